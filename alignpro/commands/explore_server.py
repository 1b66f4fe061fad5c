"""The server of `alignpro explore`: on 127.0.0.1, for those who know its token, nothing from elsewhere."""

import base64
import functools
import hashlib
import hmac
import html as markup
import json
import os
import re
import secrets
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit

from alignpro.errors import AlignProError
from alignpro.report import theme

MOST_BYTES = 2**26
"""Bytes of an uploaded file, at most."""
_REMEDY = "open the address that the command printed"


class Answers(Protocol):
    """An app that answers the page's questions."""

    def answer(self, route: str, given: dict[str, str], body: bytes | None = None) -> Any:
        """Answer with a plain JSON value, or with the bytes of a file; AlignProError for a bad question."""


@functools.cache
def html() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: its own script and style, by hash, and no others."""
    text = theme.template("explore.html")
    sources = []
    for tag in ("script", "style"):
        (inline,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    return text.encode(), "; ".join(
        [
            "default-src 'none'",
            *sources,
            "connect-src 'self'",
            "img-src data:",  # the empty icon, which spares a request, and figures on their way to a PNG
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # innerHTML and its like throw
            "trusted-types 'none'",
        ]
    )


class Server(ThreadingHTTPServer):
    """Serves `app` on 127.0.0.1, to requests with this server's token."""

    def __init__(self, app: Answers, port: int | None = None) -> None:
        self.app = app
        self.token = secrets.token_urlsafe(24)
        if port is not None and not 1024 <= port <= 65535:
            raise AlignProError(f"--port {port}: must be from 1024 to 65535; leave it out for a free one")
        try:
            super().__init__(("127.0.0.1", port or 0), _Handler)
        except OSError as error:
            raise AlignProError(
                f"--port {port}: cannot listen there ({error.strerror}); give another, or leave it out for a "
                "free one"
            ) from error

    @property
    def origin(self) -> str:
        """The address without the token."""
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def address(self) -> str:
        """The address to open, token included."""
        return f"{self.origin}?{urlencode({'token': self.token})}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exception(), ConnectionError | TimeoutError
        ):  # a tab was closed while it waited
            super().handle_error(request, client_address)


@contextmanager
def opening(address: str) -> Iterator[None]:
    """Open `address` in the user's browser; until the block ends, the file lies there that it opens first.

    A browser's command line is there for every user of the machine to read, and the address holds the token:
    so it is given a file that only this user can read, and which leads on.
    """
    # Without a display a text browser would take over the terminal.
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="alignpro-explore-") as folder:  # for this user alone
        first = Path(folder, "open.html")
        to = markup.escape(address)
        first.write_text(f'<meta http-equiv="refresh" content="0; url={to}"><a href="{to}">explore</a>')
        webbrowser.open(first.as_uri())
        yield


class _Refused(Exception):
    """A request that is not served: the status, and a sentence that says why and what helps."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers wait 40 ms for the body's acknowledgement
    timeout = 300
    server_version, sys_version = "alignpro", ""

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def _reply(self) -> None:
        """Send what the request asks for, or one sentence: whatever is asked, something is answered."""
        try:
            status, kind, body = 200, *self._found()
        except _Refused as refused:
            status, kind, body = refused.args[0], *_sentence(refused.args[1])
        except AlignProError as error:
            status, kind, body = 400, *_sentence(str(error))
        except MemoryError:
            status, kind, body = (
                500,
                *_sentence("memory: this machine has too little; ask for a smaller shape"),
            )
        except (ConnectionError, TimeoutError):  # while the body was read
            raise
        except Exception as error:
            name = type(error).__name__
            said = f"{name}: a fault of alignpro's own; the terminal says where, please report it"
            self.close_connection = True
            self._send(500, *_sentence(said))
            raise
        self._send(status, kind, body)

    def _found(self) -> tuple[str, bytes]:
        if self.command == "POST":
            self.close_connection = True  # unless its body is read, below
        # A page elsewhere can point its own name at 127.0.0.1 (DNS rebinding): the name betrays it.
        host, port = self.headers.get("Host", ""), self.server.server_port
        if host not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            raise _Refused(403, f"Host {host}: is not this server; {_REMEDY}")
        try:
            url = urlsplit(self.path)
        except ValueError:  # http://[ for instance
            raise _Refused(400, f"address: is none; {_REMEDY}") from None
        try:
            given = dict(parse_qsl(url.query, keep_blank_values=True, max_num_fields=20))
        except ValueError:
            raise _Refused(400, "query: has more than 20 parameters; give those of the page") from None
        if self.command == "GET" and url.path == "/":
            return "text/html; charset=utf-8", html()[0]
        if self.command == "POST" and url.path != "/api/upload":
            raise _Refused(501, "request: Unsupported method ('POST'); ask with GET")
        if not url.path.startswith("/api/"):
            raise _Refused(404, f"{url.path[:80]}: there is none; {_REMEDY}")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            raise _Refused(403, "Sec-Fetch-Site: another site asks; open the page itself")
        # Other users of this machine reach its ports, too.
        asked = given.pop("token", "")
        said = self.headers.get("Authorization", "").removeprefix("token ") or asked
        if not hmac.compare_digest(said.encode(), self.server.token.encode()):
            raise _Refused(403, f"token: is missing or another run's; {_REMEDY}")
        body = self._body() if self.command == "POST" else None
        value = self.server.app.answer(url.path.removeprefix("/api/"), given, body)
        if isinstance(value, bytes):
            return "application/octet-stream", value
        return "application/json", json.dumps(value, allow_nan=False).encode()

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length, re.ASCII):
            raise _Refused(411, "Content-Length: is missing; send the file as one body")
        if int(length) > MOST_BYTES:
            raise _Refused(413, f"file: has {int(length):,} bytes; keep it to {MOST_BYTES:,}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refused(400, "file: was cut short on its way; send it again")
        self.close_connection = self.headers.get("Connection", "").lower() == "close"
        return body

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that the standard library cannot serve, such as PUT."""
        self.close_connection = True
        self._send(code, *_sentence(f"request: {message or code}; ask with GET"))

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", html()[1]),
            ("X-Content-Type-Options", "nosniff"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
            *((("Connection", "close"),) if self.close_connection else ()),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _sentence(said: str) -> tuple[str, bytes]:
    return "application/json", json.dumps({"error": said}).encode()
