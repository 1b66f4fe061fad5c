"""`alignpro explore`: a page on 127.0.0.1 where one moves β and λ and the theory follows.

The mathematics stays in `alignpro.theory`; the page (`explore.html`) draws what this module answers
as JSON. Names of prompts, rewrites and responses, and rollouts, were written by strangers and by language
models: they travel as JSON strings and reach the page as text nodes only. Needs no torch.
"""

import base64
import functools
import hashlib
import itertools
import json
import math
import os
import re
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jax
import numpy as np

from alignpro import rollouts
from alignpro.errors import AlignProError, check_temperature
from alignpro.report import theme
from alignpro.theory import BOUNDS, FAMILIES, LOWER_BOUNDS, STATEMENTS, Instance, load, solution
from alignpro.theory.bounds import paper_r_max, report
from alignpro.theory.families import draw
from alignpro.theory.instance import bare
from alignpro.theory.results import cost, reach

AT_STAR = tuple(n for n in (*BOUNDS, *LOWER_BOUNDS) if n not in ("trained", "trained_tight", "kl_ceiling"))
"""What is shown. At ρ* `trained` is `span`, `trained_tight` is `barycentre`, and `kl_ceiling` an equality."""
SHOWN = 12
"""Rewrites, or responses, drawn one by one."""
MOST = 2**20
"""X·K·Y of an instance asked for on the page: a slip of the hand must not cost minutes."""
_LABEL = 300  # characters of a name
_DECADES = (-3, 2)  # of the sliders, about the rewards' scale

# Compiled once for each shape; `solution` as in `check`, so that its numbers are the same to the last bit.
_ceiling = jax.jit(reach.prompting_ceiling)
_frontier = jax.jit(cost.frontier)


class Explored:
    """One instance: what does not depend on β and λ, and the numbers at any β and λ."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.arrays = bare(instance)
        s = solution(self.arrays, 1.0, 1.0)
        self.span = float(s.average(s.span))
        # Of rewards: sliders and defaults are in units of it.
        self.scale = 10.0 ** min(max(round(math.log10(self.span)), -14), 15) if self.span > 0 else 1.0

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """Sizes, labels of the prompts, defaults and ranges of β and λ, the axis of J, the frontier."""
        s = solution(self.arrays, 1.0, 1.0)
        f = _frontier(self.arrays, self.scale * np.logspace(-4, 3, 141))
        prompts = range(self.instance.shape[0])
        ends = (s.original, s.reference, s.optimum - s.ceiling, s.original + s.own_rise)
        values = [float(s.average(end)) for end in ends]
        return {
            "shape": self.instance.shape,
            "prompts": [self._label("prompts", "x", x) for x in prompts],
            "p": self.instance.p,
            "span": self.span,
            "beta": 0.1 * self.scale,
            "lam": 0.05 * self.scale,
            "low": 10.0 ** _DECADES[0] * self.scale,
            "high": 10.0 ** _DECADES[1] * self.scale,
            "axis": [min(values), max(values)],
            "frontier": {"lam": f.lam, "kl": f.mean_kl, "reward": f.mean_reward},
        }

    def solve(self, beta: float, lam: float, prompt: int = 0) -> dict[str, Any]:
        """Every number of the page: means over P, in reward units, KL in nats; policies of one prompt."""
        s, ceiling = solution(self.arrays, beta, lam), _ceiling(self.arrays, beta)
        own = self.instance.frozen[int(self.instance.own[prompt])]
        x, mean = prompt, s.average
        return {
            "beta": beta,
            "lam": lam,
            "prompt": prompt,
            "rewards": {
                "none": mean(s.original),
                "sft": mean(s.reference),
                "star": s.j_rho,
                "best": mean(s.optimum - s.ceiling),
                "rlhf": s.j_star,
            },
            "gap": mean(s.gap),
            "delta1": mean(s.delta1),
            "delta2": mean(s.delta2),
            "identity": {
                "model": mean(s.model_jeffreys),
                "shift": mean(s.shift),
                "prompter": mean(s.prompter_jeffreys),
            },
            "ceiling": {"supported": mean(s.ceiling), "anywhere": mean(ceiling.anywhere)},
            "kl": cost.kl_budget(s).mean_spent,
            "model_kl": mean(s.model_kl / s.beta),
            "span": mean(s.span),
            "r_max": paper_r_max(s),
            "bounds": [self._bound(name, s) for name in AT_STAR],
            "prompt_gap": s.gap[x],
            "rewrites": self._bars(
                "rewrites", "x′", self.instance.prior[x], s.rho_star[x], s.rewrite_reward[x], x
            ),
            "responses": self._bars("responses", "y", own, s.pi_star[x], self.instance.reward[x]),
        }

    @staticmethod
    def _bound(name: str, s: Any) -> dict[str, Any]:
        said = report(name, STATEMENTS[name](s))
        return {
            "name": name,
            "relation": said.relation,
            "rhs": said.rhs,
            "slack": said.slack,
            "verdict": said.verdict,
            "vacuous": said.vacuous,
            "terms": said.terms,
        }

    def _label(self, axis: str, letter: str, index: int) -> str:
        names = getattr(self.instance.names, axis, ())
        text = names[index] if names else f"{letter}{index}"
        return text if len(text) <= _LABEL else text[: _LABEL - 1] + "…"

    def _bars(self, axis: str, letter: str, base: Any, tilted: Any, reward: Any, x: int | None = None) -> Any:
        base, tilted, reward = (np.asarray(a) for a in (base, tilted, reward))
        kept = chosen(base, reward)
        rest = np.ones(len(base), dtype=bool)
        rest[kept] = False
        return {
            "rows": [
                {
                    "label": self._label(axis, letter, k),
                    "own": x is not None and k == self.instance.own[x],
                    "reward": reward[k],
                    "base": base[k],
                    "tilted": tilted[k],
                }
                for k in kept
            ],
            "more": {
                "count": int(np.sum(rest & (base > 0))),
                "base": base[rest].sum(),
                "tilted": tilted[rest].sum(),
            },
        }


def chosen(base: np.ndarray, reward: np.ndarray) -> list[int]:
    """The at most `SHOWN` outcomes to draw, best reward first: of most weight and of most reward, in turn.

    Not by the tilt, so that no row comes or goes as a temperature moves.
    """
    inside = np.flatnonzero(base > 0)
    by_weight, by_reward = (inside[np.argsort(-v[inside], kind="stable")] for v in (base, reward))
    in_turn = dict.fromkeys(np.stack([by_weight, by_reward], 1).ravel().tolist())
    return sorted(itertools.islice(in_turn, SHOWN), key=lambda k: -reward[k])


class Reader:
    """The texts of a rollout file that `rollouts.read` accepts, prompt by prompt."""

    def __init__(self, path: str) -> None:
        table = rollouts.read(path)
        self.about: dict[str, Any] = {
            "file": Path(path).name,
            "prompts": len(table.prompt_ids),
            "arms": table.arms,
            "frozen": table.frozen,
            "reward_model": table.reward_model,
            "sampling": table.sampling,
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
        wanted = text.casefold()
        return [
            i
            for i, rows in enumerate(self.rows.values())
            if any(
                wanted in (row[key] or "").casefold() for row in rows for key in ("x", "rewrite", "response")
            )
        ]

    def prompt(self, at: int) -> dict[str, Any]:
        """One prompt: for every arm its mean reward and, rewrite by rewrite, its answers."""
        name, rows = list(self.rows.items())[at]
        arms = []
        for arm in self.about["arms"]:
            mine = sorted(
                (row for row in rows if row["arm"] == arm), key=lambda r: (r["seed"], r["draw"], r["answer"])
            )
            draws = [list(group) for _, group in itertools.groupby(mine, lambda r: (r["seed"], r["draw"]))]
            rewards = [row["reward"] for row in mine]
            arms.append(
                {
                    "arm": arm,
                    "prompters": sorted({self.prompters[arm, row["seed"]] for row in mine}),
                    "answers": len(rewards),
                    "mean": sum(rewards) / len(rewards) if rewards else None,
                    "draws": [
                        {
                            "seed": draw[0]["seed"],
                            "draw": draw[0]["draw"],
                            "rewrite": draw[0]["rewrite"],
                            "answers": [{"text": r["response"], "reward": r["reward"]} for r in draw],
                        }
                        for draw in draws
                    ],
                }
            )
        return {"at": at, "id": name, "x": rows[0]["x"], "arms": arms}


class App:
    """What `/api/…` answers, from the query's parameters; AlignProError for a bad one."""

    def __init__(
        self,
        file: str | None = None,
        family: str | None = None,
        shape: Sequence[int] = (4, 8, 16),
        seed: int = 0,
        texts: str | None = None,
    ) -> None:
        if file is not None and family is not None:
            raise AlignProError(f"--file {file}, --family {family}: give one of them")
        self.file = None if file is None else (Path(file).name, load(file))
        x, k, y = shape
        self.start: dict[str, Any] = {"source": family or "lm_like", "x": x, "k": k, "y": y, "seed": seed}
        self._draw(*self.start.values())  # names a bad one now
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
        """The plain JSON value of one request.

        Raises:
            AlignProError: no such route; a parameter is missing, unknown or bad.
        """
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
        return _plain(value)

    def _start(self, given: dict[str, str]) -> Any:
        return {
            "families": {name: (f.__doc__ or "").split("\n")[0] for name, f in FAMILIES.items()},
            "file": self.file and self.file[0],
            "start": self.start,
            "rollouts": self.reader and self.reader.about,
        }

    def _solve(self, given: dict[str, str]) -> Any:
        explored = self._of(given)
        beta, lam = (check_temperature(name, _number(given, name)) for name in ("beta", "lam"))
        return explored.solve(beta, lam, _whole(given, "prompt", 0, explored.instance.shape[0] - 1))

    def _reader(self) -> Reader:
        if self.reader is None:
            raise AlignProError("rollouts: there are none; start with --rollouts FILE")
        return self.reader

    def _of(self, given: dict[str, str]) -> Explored:
        source = given.pop("source", "")
        if source == "file":
            return self.explored(source)
        return self.explored(
            source, *(_whole(given, n, 1) for n in ("x", "k", "y")), _whole(given, "seed", 0)
        )

    def _explored(self, source: str, *sizes: int) -> Explored:
        if source != "file":
            return Explored(self._draw(source, *sizes))
        if self.file is None:
            raise AlignProError("source file: none was given; start with --file, or choose a family")
        return Explored(self.file[1])

    @staticmethod
    def _draw(family: str, x: int, k: int, y: int, seed: int) -> Instance:
        if x * k * y > MOST:
            raise AlignProError(
                f"shape {x} {k} {y}: has {x * k * y} entries; keep X times K times Y to {MOST}"
            )
        if seed < 0:
            raise AlignProError(f"seed {seed}: is negative; give a whole number of at least 0")
        return draw(family, seed, (x, k, y))[0]


def _number(given: dict[str, str], name: str) -> float | str:
    text = given.pop(name, "")
    try:
        return float(text)
    except ValueError:
        return text if len(text) <= 40 else text[:39] + "…"


def _whole(given: dict[str, str], name: str, least: int, most: int = 2**32) -> int:
    text = given.pop(name, "")
    if not re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) or not least <= int(text) <= most:
        shown = text if len(text) <= 40 else text[:39] + "…"
        raise AlignProError(f"{name} {shown}: must be a whole number; give {least} to {most}")
    return int(text)


def _plain(value: Any) -> Any:
    """As strict JSON has it: lists for arrays, None for what overflows."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def page() -> tuple[bytes, str]:
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
            return self._send(200, "text/html; charset=utf-8", page()[0])
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
        """For what the standard library refuses itself, such as POST."""
        self.close_connection = True
        self._error(code, f"request: {message or code}; ask with GET")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", page()[1]),
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


def main(app: App, port: int | None, browser: bool) -> int:
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
    """A local page on which beta and lambda move and the theory follows: optima, gap, bounds, frontier.

    Of a random instance, or of a saved one; and a reader of rollouts. Serves on 127.0.0.1 only, until Ctrl-C.
    """

    file: str | None = None
    """An instance: an .npz file with the arrays p, prior, frozen, own, reward, such as the demo writes."""
    family: str | None = None
    """A family of random instances; the page can change it. Default: lm_like."""
    shape: tuple[int, int, int] = (4, 8, 16)
    """Prompts, rewrites and responses of the random instance; the page can change them."""
    seed: int = 0
    """Determines it."""
    rollouts: str | None = None
    """Rollouts to read, as alignpro rollout writes them."""
    port: int | None = None
    """Where to listen, 1024 to 65535. Default: a free port."""
    no_browser: bool = False
    """Only print the address."""

    def run(self) -> int:

        app = App(self.file, self.family, self.shape, self.seed, self.rollouts)
        return main(app, self.port, not self.no_browser)
