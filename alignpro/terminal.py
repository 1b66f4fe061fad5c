"""Says things on the terminal: what others wrote cannot steer it, and a reader who left ends no work."""

import contextlib
import errno
import io
import os
import re
import sys

_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls but the newline and the tab, characters that turn the direction of writing, lone surrogates."""
_GONE = (errno.EPIPE, errno.EBADF)
_lost: list[OSError] = []


def harmless(text: str) -> str:
    r"""Spell out, as \u001b, each character of `text` that could steer a terminal or hide what it shows.

    The JSON of a value remains the JSON of the same value. Marks that scripts need, such as the joiners of
    Persian, stay.
    """
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: object = "", *, error: bool = False) -> None:
    """Print a line, made `harmless`, to standard output, or to standard error; whatever becomes of it.

    Where nobody reads any more, or a disk is full, the work goes on, since its files and its exit status are
    still wanted: `lost` tells.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        print(harmless(str(text)), file=stream, flush=True)
    except OSError as failure:
        _lose(stream, failure, error)
    except ValueError:  # it was closed
        pass


def note(text: str) -> None:
    """Tell the user about long work, on standard error so that results can be piped."""
    say(f"alignpro: {text}", error=True)


def lost() -> OSError | None:
    """Why what was said is not on standard output, such as a full disk; None also where its reader left."""
    return next((failure for failure in _lost if failure.errno not in _GONE), None)


def begin() -> None:
    """Make the three standard streams ones that can be used, closed ones too, and forget what was lost.

    A file opened while one of their numbers is free would get it, and with it what libraries print there.
    """
    _lost.clear()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - until the end
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter is no reason to lose a result
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Send off what others printed to standard output, as `say` does."""
    try:
        sys.stdout.flush()
    except OSError as failure:
        _lose(sys.stdout, failure, False)
    except ValueError:
        pass


def _lose(stream: object, failure: OSError, error: bool) -> None:
    if not error:
        _lost.append(failure)
    # What is still in its buffer would fail again, as the interpreter ends for one.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
