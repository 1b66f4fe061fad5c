"""`alignpro explore`: a page on 127.0.0.1 where one moves β and λ and the theory follows.

The mathematics stays in `alignpro.theory`; the page (`report/templates/explore.html`) draws what
`commands.exploring` answers as JSON.
"""

import base64
import functools
import hashlib
import json
import os
import re
import sys
import webbrowser
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from alignpro.commands.exploring import App
from alignpro.errors import AlignProError
from alignpro.report import theme


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
            "img-src data:",  # the empty icon, which spares a request
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",  # innerHTML and its like throw
            "trusted-types 'none'",
        ]
    )


class Server(ThreadingHTTPServer):
    """Serves `app` on 127.0.0.1.

    Raises:
        AlignProError: the port is no number from 1024 to 65535, or taken.
    """

    def __init__(self, app: App, port: int | None = None) -> None:
        self.app = app
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
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a tab was closed while it waited
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else headers wait 40 ms for the body's acknowledgement
    timeout = 300
    server_version, sys_version = "alignpro", ""

    def do_GET(self) -> None:
        # A page elsewhere can point its own name at 127.0.0.1 (DNS rebinding): the name betrays it.
        host, port = self.headers.get("Host", ""), self.server.server_port
        if host not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            return self._error(403, f"Host {host}: is not this server; open {self.server.address}")
        url = urlsplit(self.path)
        if url.path == "/":
            return self._send(200, "text/html; charset=utf-8", html()[0])
        if not url.path.startswith("/api/"):
            return self._error(404, f"{url.path}: there is none; open {self.server.address}")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            return self._error(403, "Sec-Fetch-Site: another site asks; open the page itself")
        try:
            value = self.server.app.answer(url.path.removeprefix("/api/"), url.query)
        except AlignProError as error:
            return self._error(400, str(error))
        self._send(200, "application/json", json.dumps(value, allow_nan=False).encode())

    def _error(self, status: int, sentence: str) -> None:
        self._send(status, "application/json", json.dumps({"error": sentence}).encode())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that the standard library cannot serve, such as POST."""
        self.close_connection = True
        self._error(code, f"request: {message or code}; ask with GET")

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


def serve(app: App, port: int | None, browser: bool) -> int:
    """Serve until Ctrl-C, which is the normal end: 0.

    Raises:
        AlignProError: as `Server` does.
    """
    with Server(app, port) as server:
        try:
            print(f"{server.address}  (Ctrl-C ends it)", flush=True)
            # Without a display a text browser would take over the terminal.
            if browser and (sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)):
                webbrowser.open(server.address)
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


@dataclass(frozen=True)
class Explore:
    """Open a local page on which beta and lambda move and the theory follows: optima, gap, bounds, frontier.

    It shows a random instance, or a saved one, and reads rollouts. Serves on 127.0.0.1 only, until Ctrl-C.
    """

    file: str | None = None
    """Instance to show: an .npz file with the arrays p, prior, frozen, own, reward, such as the demo writes.
    Left out: a random one."""
    family: str | None = None
    """Kind of random instance (lm_like, independent, signed, ...; an unknown name lists them). The page can
    change it. Left out: lm_like, which looks as language models do."""
    shape: tuple[int, int, int] = (4, 8, 16)
    """How many prompts, rewrites and responses the random instance has. The page can change them."""
    seed: int = 0
    """Number that determines the random instance. The page can change it."""
    rollouts: str | None = None
    """File of rollouts to read on the page, as alignpro rollout writes it. Left out: the page has no reader
    of them."""
    port: int | None = None
    """Port to listen on, 1024 to 65535. Left out: a free one."""
    no_browser: bool = False
    """Print the address only, and open no browser."""

    def run(self) -> int:
        app = App(self.file, self.family, self.shape, self.seed, self.rollouts)
        return serve(app, self.port, not self.no_browser)
