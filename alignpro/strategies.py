"""Says what a rewrite does to its prompt, so that rewrites of several prompts can be told to do the same."""

from typing import NamedTuple


class Strategy(NamedTuple):
    """Treatment of a prompt by its rewrite; equal for rewrites of several prompts that do the same."""

    added: bool
    """Whether the rewrite is the prompt with text added."""
    does: tuple[str, ...]
    """The text before and the text after the prompt where text is added; else the first three words of the
    rewrite, in lower case."""

    @property
    def text(self) -> str:
        """The strategy as a reader sees it."""
        if self.added:
            return " … ".join(part.strip() for part in self.does if part.strip())
        return f"{' '.join(self.does)} …"


def strategy_of(x: str, rewrite: str) -> Strategy:
    """Find what a rewrite does to its prompt x."""
    own = str(x).strip()
    before, found, after = rewrite.partition(own) if own else ("", "", "")
    return Strategy(bool(found), (before, after) if found else tuple(rewrite.lower().split(maxsplit=3)[:3]))
