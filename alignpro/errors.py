"""The one exception users see."""


class AlignProError(ValueError):
    """A mistake the user can mend: names the field, the value and the remedy in one line.

    The command line prints it after `alignpro: error:` and exits with status 2; no traceback.
    """
