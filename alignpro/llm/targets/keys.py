"""Keys of servers: each goes into one request header, to the host that it is for, and is shown nowhere.

A key is read from the environment when it is needed, its variable is said before the first request, and it is
removed from whatever a server sends back. Needs no torch, no NumPy.
"""

import base64
import bisect
import functools
import html
import os
import re
from collections.abc import Callable, Iterator
from urllib.parse import parse_qsl, urlsplit

from alignpro.errors import AlignProError
from alignpro.llm.targets.settings import LIKE_A_KEY, check_address
from alignpro.terminal import note

HOST = "_HOST"
"""End of the name of a second variable, which binds the key in the first to hosts: `OPENAI_API_KEY_HOST`."""
_SHORT = 8
"""Characters in a row by which a part of a key is known; shorter placeholders such as EMPTY are words."""
_LONG = 16
"""Characters from which parts of what is hidden are hidden too, in what is shown of a server's errors."""
_READ = 2**16
"""Characters of an error that are looked at."""
_ESCAPED = re.compile(
    r"\\+(?:u00([0-9a-f]{2})|x([0-9a-f]{2})|(/))|&(?:amp;)*#(?:x0*([0-9a-f]{2})|0*([0-9]{2,3}));"
    r"|(&(?:amp;)*[a-z]{2,8};)|%(?:25)*([0-9a-f]{2})",
    re.IGNORECASE,
)
"""A character as JSON, HTML and addresses may write it, again within one another."""


class Secret:
    """A key, and whatever in an address may be one, that no traceback, log or repr shows.

    Args:
        value: the key; empty for none.
        address: the one that is asked; its query, and what looks like a key in its path, are hidden too.
    """

    def __init__(self, value: str, address: str = "") -> None:
        self.value = value
        parts = urlsplit(address)
        hidden = {parts.query, *(v for _, v in parse_qsl(parts.query) if len(v) > 3)}
        hidden |= {found[0] for found in LIKE_A_KEY.finditer(parts.path)}
        hidden |= {value} if len(value) >= _SHORT else set()
        whole = {form.lower() for each in hidden - {""} for form in _forms(each)}
        self._whole = sorted(whole, key=len, reverse=True)
        long = [form for form in whole if len(form) >= _LONG]
        self._parts = {form[i : i + _SHORT] for form in long for i in range(len(form) - _SHORT + 1)}

    def __repr__(self) -> str:
        return "<key>"

    def scrub(self, text: str, *, parts: bool = False) -> str:
        """`text` with `<key>` in place of each, however its characters are written, in base64 and as hex too.

        Args:
            parts: whether also in place of pieces of a key, as of one that was cut.
        """
        if not self._whole:
            return text
        plain, places = _unescaped(text)
        found = plain.lower()
        if len(found) != len(plain):  # a letter that is two in small: the key has none
            found = "".join(c.lower() if c.isascii() else c for c in plain)
        marked = bytearray(len(plain))
        for form in (*self._whole, *(self._parts if parts else ())):
            start = found.find(form)
            while start >= 0:
                marked[start : start + len(form)] = b"\1" * len(form)
                start = found.find(form, start + 1)
        out, last = [], 0
        for run in re.finditer(b"\1+", bytes(marked)):
            begin, end = places(run.start()), places(run.end())
            out += [text[last:begin], "<key>"]
            last = end
        return "".join([*out, text[last:]])

    def said(self, text: str, most: int = 200) -> str:
        """Foreign text made safe to print: one line, no key (removed before cutting), no control codes."""
        line = " ".join(self.scrub(text[:_READ], parts=True).split())
        line = "".join(c if c.isprintable() else "?" for c in line)
        return line if len(line) <= most else line[: most - 3] + "..."


def _forms(secret: str) -> Iterator[str]:
    """A secret as it is, and as it is within the base64 and the hexadecimal form of a text that holds it."""
    yield secret
    data = secret.encode()
    yield data.hex()
    if len(data) >= _SHORT:
        for before in range(3):
            coded = base64.b64encode(bytes(before) + data).decode()
            # The first and the last letters depend on what stands beside the secret.
            inner = coded[(0, 2, 3)[before] : len(coded) - (0, 3, 2)[(before + len(data)) % 3]]
            yield inner
            yield inner.replace("+", "-").replace("/", "_")


def _unescaped(text: str) -> tuple[str, Callable[[int], int]]:
    """`text` with its escapes undone, and a function from places in that to places in `text`."""
    pieces, here, there, last, length = [], [0], [0], 0, 0
    for match in _ESCAPED.finditer(text):
        character = _character(match)
        if len(character) == 1:
            length += match.start() - last
            last = match.end()
            pieces += [text[there[-1] : match.start()], character]
            here += [length, length + 1]
            there += [match.start(), last]
            length += 1
    pieces.append(text[last:])

    def place(at: int) -> int:
        known = bisect.bisect_right(here, at) - 1
        return there[known] + at - here[known]

    return "".join(pieces), place


def _character(match: re.Match[str]) -> str:
    for group in (1, 2, 4, 7):
        if match[group]:
            return chr(int(match[group], 16))
    if match[3]:
        return "/"
    if match[5]:
        return chr(int(match[5]))
    return html.unescape("&" + re.sub(r"^&(?:amp;)*", "", match[6]))


def read_key(name: str | None, address: str) -> Secret:
    """The key in the environment variable `name`, to be sent to `address`; and what that hides.

    Where it goes is said the first time. A variable `name` + `HOST` names the hosts, separated by spaces,
    that the key may go to.

    Raises:
        AlignProError: the variable is not set, holds no key, or is bound to other hosts.
    """
    if name is None:
        return Secret("", address)
    host = urlsplit(address).hostname or ""
    if (hosts := bound(name)) and host not in hosts:
        raise AlignProError(
            f"key_env {name}: is for {' and '.join(hosts)} alone, as {name}{HOST} says, and the address is "
            f"at {host}; name another variable, or add that host there"
        )
    value = os.environ.get(name, "").strip()
    if not value:
        named = name if name.isupper() else "given"  # in small letters it may be a key, pasted by mistake
        raise AlignProError(f"key_env {named}: that environment variable is not set; export it")
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise AlignProError(
            f"key_env {name}: its value is no key (white space or non-ASCII in it); copy it again"
        )
    _tell(name, check_address("address", address, "https://HOST/v1", query=True))
    return Secret(value, address)


def bound(name: str) -> list[str]:
    """The hosts that the key in this variable is for; none where it is bound to none."""
    return os.environ.get(f"{name}{HOST}", "").lower().split()


@functools.cache
def _tell(name: str, shown: str) -> None:
    note(f"the key in {name} goes to {shown}")
