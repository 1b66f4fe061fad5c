"""Addresses and keys of servers: what of them may be shown, and what never is.

A key is read from the environment when it is needed, goes into one request header, to the address given and
nowhere else, and is removed from whatever a server sends back.
"""

import json
import os
import re
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from alignpro.errors import AlignProError


def check_address(name: str, address: Any, example: str, query: bool = False) -> str:
    """`address` without its query, to be shown.

    Args:
        name: the field's, for errors.
        query: whether it may have one.

    Raises:
        AlignProError: no http(s) address, or one with a user name, or with a query where none may be.
    """
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
        good = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
        good = good and (query or not (parts.query or parts.fragment))
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good or re.search(r"[\s\x00-\x20\x7f]", str(address)):
        # Not repeated: it may hold a secret.
        raise AlignProError(
            f"{name}: give an http(s) address such as {example}, without a user name"
            f"{'' if query else ', query'} or password; a key goes into the environment variable that "
            "key_env names"
        )
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{parts.scheme}://{host}{port}{parts.path}"


class Secret:
    """A key, and whatever in an address may be one, that no traceback, log or repr shows.

    Args:
        value: the key; empty for none.
        address: the one that is asked; its query is hidden too.
    """

    def __init__(self, value: str, address: str = "") -> None:
        self.value = value
        query = urlsplit(address).query
        hidden = {query, *(v for _, v in parse_qsl(query) if len(v) > 3)}
        # Placeholders such as EMPTY are no secrets, and are words besides.
        hidden |= {value} if len(value) >= 8 else set()
        forms = {form for s in hidden for form in (s, quote(s, safe=""), json.dumps(s)[1:-1])} - {""}
        self._forms = sorted(forms, key=len, reverse=True)

    def __repr__(self) -> str:
        return "<key>"

    def scrub(self, text: str) -> str:
        """`text` with `<key>` in place of each."""
        for form in self._forms:
            text = text.replace(form, "<key>")
        return text

    def said(self, text: str, most: int = 200) -> str:
        """Foreign text made safe to print: one line, no key (removed before cutting), no control codes."""
        line = " ".join(self.scrub(text).split())
        line = "".join(c if c.isprintable() else "?" for c in line)
        return line if len(line) <= most else line[: most - 3] + "..."


def read_key(name: str | None, address: str = "") -> Secret:
    """The key in the environment variable `name`, and what `address` hides.

    Raises:
        AlignProError: it is not set, or is no key.
    """
    if name is None:
        return Secret("", address)
    value = os.environ.get(name, "").strip()
    if not value:
        named = name if name.isupper() else "given"  # in small letters it may be a key, pasted by mistake
        raise AlignProError(f"key_env {named}: that environment variable is not set; export it")
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise AlignProError(
            f"key_env {name}: its value is no key (white space or non-ASCII in it); copy it again"
        )
    return Secret(value, address)
