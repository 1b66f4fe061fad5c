"""`alignpro explore`: a page on 127.0.0.1 where one moves β and λ and the theory follows.

The page (`report/templates/explore.html`) draws what `App` answers as JSON from `alignpro.theory`. Names and
rollouts were written by strangers and by language models: they travel as JSON strings and reach the page as
text nodes only.
"""

import base64
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import webbrowser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import tyro

from alignpro.commands.shared import ROLLOUTS_FILE, found_file
from alignpro.errors import AlignProError, check_temperature
from alignpro.llm.models.prompt import Prompt, transcript
from alignpro.report import theme
from alignpro.report.numbers import plain

if TYPE_CHECKING:
    from alignpro.theory.search.exploring import Explored


class Reader:
    """The texts of a rollout file that `rollouts.read` accepts, prompt by prompt."""

    def __init__(self, path: str) -> None:
        from alignpro import rollouts

        table = rollouts.read(path)
        self.about: dict[str, Any] = {
            "file": Path(path).name,
            "prompts": len(table.prompt_ids),
            **{name: getattr(table, name) for name in ("arms", "frozen", "reward_model", "sampling")},
            "range": [table.low, table.high],
        }
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.prompters = table.prompters
        with open(path, "rb") as file:
            lines = (line for line in file if not line.isspace())
            for line in itertools.islice(lines, len(table)):  # a run may still be adding to it
                row = json.loads(line)
                self.rows.setdefault(row["prompt_id"], []).append(row)

    def find(self, text: str) -> list[int]:
        """Positions of the prompts that have `text`, in any case, in them, a rewrite or an answer."""
        wanted, keys = text.casefold(), ("x", "rewrite", "response")
        return [
            i
            for i, rows in enumerate(self.rows.values())
            if any(wanted in (row[key] or "").casefold() for row in rows for key in keys)
        ]

    def prompt(self, at: int) -> dict[str, Any]:
        """One prompt, by its position: for every arm its mean reward and, rewrite by rewrite, its answers."""
        name, rows = list(self.rows.items())[at]
        arms = []
        for arm in self.about["arms"]:
            mine = [row for row in rows if row["arm"] == arm]
            mine.sort(key=itemgetter("seed", "draw", "answer"))
            draws = [list(group) for _, group in itertools.groupby(mine, itemgetter("seed", "draw"))]
            arms.append(
                {
                    "arm": arm,
                    "prompters": sorted({self.prompters[arm, row["seed"]] for row in mine}),
                    "answers": len(mine),
                    "mean": sum(row["reward"] for row in mine) / len(mine) if mine else None,
                    "draws": [
                        {key: draw[0][key] for key in ("seed", "draw", "rewrite")}
                        | {"answers": [{"text": row["response"], "reward": row["reward"]} for row in draw]}
                        for draw in draws
                    ],
                }
            )
        x = transcript(Prompt(rows[0]["x"], rows[0].get("context") or ()))
        return {"at": at, "id": name, "x": x, "arms": arms}


class App:
    """The answers to `/api/…`, from the query's parameters; AlignProError for a bad one."""

    def __init__(
        self,
        file: str | None = None,
        family: str | None = None,
        shape: Sequence[int] = (4, 8, 16),
        seed: int = 0,
        texts: str | None = None,
    ) -> None:
        if file is not None and family is not None:
            raise AlignProError(
                f"--family {family}: is for a random instance, and {Path(file).name} is given; leave one out"
            )
        from alignpro.theory.instance import load
        from alignpro.theory.search.exploring import drawn

        self.file = None if file is None else (Path(file).name, load(file))
        x, k, y = shape
        self.start: dict[str, Any] = {"source": family or "lm_like", "x": x, "k": k, "y": y, "seed": seed}
        drawn(*self.start.values())  # names a bad one now
        if file is not None:
            self.start["source"] = "file"
        self.reader = None if texts is None else Reader(texts)
        self.lock = threading.Lock()  # one computation, and one compilation, at a time
        self.explored = functools.lru_cache(maxsize=8)(self._explored)
        self.routes: dict[str, Callable[[dict[str, str]], Any]] = {
            "start": self._start,
            "instance": lambda given: self._of(given).about,
            "solve": self._solve,
            "find": lambda given: {"found": self._reader().find(given.pop("text", ""))},
            "rollout": lambda given: self._reader().prompt(
                _whole(given, "at", 0, self._reader().about["prompts"] - 1)
            ),
        }

    def answer(self, route: str, query: str) -> Any:
        """Answer one request with a plain JSON value."""
        if route not in self.routes:
            raise AlignProError(f"/api/{route}: there is none; ask for one of {', '.join(self.routes)}")
        try:
            given = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=20))
        except ValueError:
            raise AlignProError("query: has more than 20 parameters; give those of the page") from None
        with self.lock:
            value = self.routes[route](given)
        if given:
            raise AlignProError(f"{next(iter(given))}: is no parameter of {route}; leave it out")
        return plain(value)

    def _start(self, given: dict[str, str]) -> Any:
        from alignpro.theory.families import FAMILIES

        return {
            "families": {name: (f.__doc__ or "").split("\n")[0] for name, f in FAMILIES.items()},
            "file": self.file and self.file[0],
            "start": self.start,
            "rollouts": self.reader and self.reader.about,
        }

    def _solve(self, given: dict[str, str]) -> Any:
        explored = self._of(given)
        beta, lam = (check_temperature(name, _temperature(given, name)) for name in ("beta", "lam"))
        return explored.solve(beta, lam, _whole(given, "prompt", 0, explored.instance.shape[0] - 1))

    def _reader(self) -> Reader:
        if self.reader is None:
            raise AlignProError("rollouts: there are none; start with --rollouts FILE")
        return self.reader

    def _of(self, given: dict[str, str]) -> "Explored":
        source = given.pop("source", "")
        sizes: tuple[int, ...] = ()
        if source != "file":
            sizes = (*(_whole(given, n, 1) for n in ("x", "k", "y")), _whole(given, "seed", 0))
        return self.explored(source, *sizes)

    def _explored(self, source: str, *sizes: int) -> "Explored":
        from alignpro.theory.search.exploring import Explored, drawn

        if source != "file":
            return Explored(drawn(source, *sizes))
        if self.file is None:
            raise AlignProError("source file: none was given; start with one, or choose a family")
        return Explored(self.file[1])


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _temperature(given: dict[str, str], name: str) -> float | str:
    text = given.pop(name, "")
    try:
        return float(text)
    except ValueError:
        return _short(text)


def _whole(given: dict[str, str], name: str, least: int, most: int = 2**32) -> int:
    text = given.pop(name, "")
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        raise AlignProError(f"{name} {_short(text)}: must be a whole number; give {least} to {most}")
    return int(text)


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
    """Serves `app` on 127.0.0.1."""

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


@dataclass(frozen=True)
class Explore:
    """Open a local page on which beta and lambda move and the theory follows: optima, gap, bounds, frontier.

    It shows a random instance, or a saved one, and reads rollouts. Serves on 127.0.0.1 only, until Ctrl-C.
    """

    file: tyro.conf.Positional[str | None] = None
    """Instance to show: an .npz file with the arrays p, prior, frozen, own, reward, or the folder of a run
    that wrote one, such as the demo. Left out: a random one."""
    family: str | None = None
    """Kind of random instance (lm_like, independent, signed, ...; an unknown name lists them). The page can
    change it. Left out: lm_like, which looks as language models do."""
    shape: tuple[int, int, int] = (4, 8, 16)
    """How many prompts, rewrites and responses the random instance has. The page can change them."""
    seed: int = 0
    """Number that determines the random instance. The page can change it."""
    rollouts: str | None = None
    """Rollouts to read on the page: the folder that alignpro rollout wrote, or the file in it. Left out: the
    page has no reader of them."""
    port: int | None = None
    """Port to listen on, 1024 to 65535. Left out: a free one."""
    no_browser: bool = False
    """Print the address only, and open no browser."""

    renamed: ClassVar = {"file": ""}
    examples = (
        ("a random instance that looks as language models do", "alignpro explore"),
        ("the instance of a demo", "alignpro explore runs/quick"),
    )

    def run(self) -> int:
        file = None if self.file is None else found_file(self.file, "*.npz")
        texts = None if self.rollouts is None else found_file(self.rollouts, ROLLOUTS_FILE)
        app = App(file, self.family, self.shape, self.seed, texts)
        with Server(app, self.port) as server:
            try:
                print(f"{server.address}  (Ctrl-C ends it)", flush=True)
                # Without a display a text browser would take over the terminal.
                display = sys.platform != "linux" or {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
                if display and not self.no_browser:
                    webbrowser.open(server.address)
                server.serve_forever()
            except KeyboardInterrupt:  # the normal end
                print()
        return 0
