"""`alignpro explore`: a page on 127.0.0.1 where one moves β and λ and the theory follows.

The page (`report/templates/explore.html`) draws what `App` answers as JSON from `alignpro.theory`. Names and
rollouts were written by strangers and by language models: they travel as JSON strings and reach the page as
text nodes only.
"""

import functools
import hashlib
import io
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from alignpro.commands.explore_server import MOST_BYTES, Server, opening
from alignpro.commands.shared import ROLLOUTS_FILE, found_file
from alignpro.errors import AlignProError, check_temperature
from alignpro.llm.models.prompt import Prompt, transcript
from alignpro.report.numbers import plain
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.theory.instance import Instance
    from alignpro.theory.search.exploring import Explored

HELD, UPLOADS, SHAPES = 8, 4, 12
"""How many instances, uploaded files among them, and shapes' compiled code are kept at a time."""


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


class _Held:
    """An instance that the page asks about, made when first asked for; one question about it at a time."""

    def __init__(self, make: Callable[[], "Explored"]) -> None:
        self._make = make
        self.lock = threading.Lock()

    @functools.cached_property
    def explored(self) -> "Explored":
        return self._make()


class App:
    """The answers to `/api/…`, from the query's parameters; AlignProError for a bad one."""

    def __init__(
        self,
        file: str | None = None,
        family: str | None = None,
        shape: Sequence[int] = (4, 8, 16),
        seed: int = 0,
        texts: str | None = None,
        beta: float | None = None,
        lam: float | None = None,
    ) -> None:
        if file is not None and family is not None:
            raise AlignProError(
                f"--family {family}: is for a random instance, and {Path(file).name} is given; leave one out"
            )
        from alignpro.theory.instance import load
        from alignpro.theory.search.exploring import drawn

        self.file = file
        self.files: dict[str, tuple[str, Instance]] = {}
        if file is not None:
            self.files["file"] = (Path(file).name, load(file))
        x, k, y = shape
        self.start: dict[str, Any] = {"source": family or "lm_like", "x": x, "k": k, "y": y, "seed": seed}
        drawn(*self.start.values())  # names a bad one now
        if file is not None:
            self.start["source"] = "file"
        for name, value in (("beta", beta), ("lam", lam)):
            self.start[name] = None if value is None else check_temperature(f"--{name}", value)
        self.reader = None if texts is None else Reader(texts)
        self.closing = False
        self.lock = threading.Lock()  # of what follows, held for a moment at a time
        self.held: dict[tuple[Any, ...], _Held] = {}
        self.shapes: set[tuple[int, ...]] = set()
        self.routes: dict[str, Callable[[dict[str, str]], Any]] = {
            "start": self._start,
            "instance": self._about,
            "solve": self._solve,
            "sweep": self._sweep,
            "npz": self._npz,
            "find": lambda given: {"found": self._reader().find(given.pop("text", ""))},
            "rollout": lambda given: self._reader().prompt(
                _whole(given, "at", 0, self._reader().about["prompts"] - 1)
            ),
        }

    def answer(self, route: str, given: dict[str, str], body: bytes | None = None) -> Any:
        """Answer one question with a plain JSON value, or with the bytes of a file.

        `body` is an uploaded file. Parameters are taken out of `given` as they are read; one left is a fault.
        """
        if body is not None:
            value: Any = self._upload(given, body)
        elif route not in self.routes:
            raise AlignProError(
                f"/api/{_short(route)}: there is none; ask for one of {', '.join(self.routes)}"
            )
        else:
            value = self.routes[route](given)
        if given:
            raise AlignProError(f"{_short(next(iter(given)))}: is no parameter of {route}; leave it out")
        return value if isinstance(value, bytes) else plain(value)

    def close(self) -> None:
        """Wait for computations under way, and begin no others: Python cannot end in the midst of one."""
        with self.lock:
            self.closing = True
        for held in self.held.values():
            held.lock.acquire()

    def _start(self, given: dict[str, str]) -> Any:
        from alignpro.theory.families import FAMILIES

        return {
            "families": {name: (f.__doc__ or "").split("\n")[0] for name, f in FAMILIES.items()},
            "files": {key: name for key, (name, _) in self.files.items()},
            "path": self.file,
            "start": self.start,
            "rollouts": self.reader and self.reader.about,
        }

    def _about(self, given: dict[str, str]) -> Any:
        with self._of(given) as explored:
            return explored.about

    def _solve(self, given: dict[str, str]) -> Any:
        beta, lam = (check_temperature(name, _temperature(given, name)) for name in ("beta", "lam"))
        with self._of(given) as explored:
            return explored.solve(beta, lam, _whole(given, "prompt", 0, explored.instance.shape[0] - 1))

    def _sweep(self, given: dict[str, str]) -> Any:
        from alignpro.theory.search.exploring import PARTS

        beta = check_temperature("beta", _temperature(given, "beta"))
        part = _whole(given, "part", 0, PARTS - 1)
        with self._of(given) as explored:
            return {"beta": beta, "part": part, "rows": explored.sweep(beta, part)}

    def _npz(self, given: dict[str, str]) -> bytes:
        with self._of(given) as explored:
            explored.instance.write(file := io.BytesIO())
        return file.getvalue()

    def _upload(self, given: dict[str, str], body: bytes) -> Any:
        """Take in a stranger's instance: what `solve` accepts, and no larger than the page can draw."""
        from alignpro.theory.instance import load
        from alignpro.theory.search.exploring import check_shape

        name = _short(given.pop("name", "")) or "file"
        instance = load(name, body, most=MOST_BYTES)
        try:
            check_shape(*instance.shape)
        except AlignProError as error:
            raise AlignProError(f"{name}: {error}") from None
        key = "upload-" + hashlib.sha256(body).hexdigest()[:12]
        with self.lock:
            uploaded = [other for other in self.files if other != "file" and other != key]
            for old in uploaded[: max(len(uploaded) + 1 - UPLOADS, 0)]:
                del self.files[old]
            self.files[key] = (name, instance)
        return {"source": key, "name": name}

    def _reader(self) -> Reader:
        if self.reader is None:
            raise AlignProError("rollouts: there are none; start with --rollouts FILE")
        return self.reader

    @contextmanager
    def _of(self, given: dict[str, str]) -> Iterator["Explored"]:
        """The instance that is asked about, for this question alone; others are answered meanwhile."""
        from alignpro.theory.search.exploring import forget

        source = given.pop("source", "")
        named = source == "file" or source.startswith("upload-")
        sizes = () if named else (*(_whole(given, n, 1) for n in ("x", "k", "y")), _whole(given, "seed", 0))
        with self.lock:
            key = (source, *sizes)
            held = self.held.pop(key, None) or _Held(lambda: self._explored(source, *sizes))
            self.held[key] = held  # the last asked for comes last
            while len(self.held) > HELD:
                del self.held[next(iter(self.held))]
        with held.lock:
            if self.closing:
                raise AlignProError("alignpro explore: has ended; start it again")
            explored = held.explored
            with self.lock:
                self.shapes.add(explored.instance.shape)
                full = len(self.shapes) > SHAPES
                if full:
                    self.shapes = {explored.instance.shape}
            if full:
                forget()
            yield explored

    def _explored(self, source: str, *sizes: int) -> "Explored":
        from alignpro.theory.search.exploring import Explored, drawn

        if sizes:
            return Explored(drawn(source, *sizes))
        if source not in self.files:
            remedy = "start with one" if source == "file" else "upload it again"
            raise AlignProError(f"source {_short(source)}: is not here; {remedy}, or choose a family")
        return Explored(self.files[source][1])


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
    beta: float | None = None
    """Weight of the KL divergence in RLHF (beta), positive, in reward units, at first. Left out: a tenth of
    the rewards' scale."""
    lam: float | None = None
    """Weight of the KL divergence in prompt optimization (lambda), positive, in reward units, at first. Left
    out: a twentieth of the rewards' scale."""
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
        app = App(file, self.family, self.shape, self.seed, texts, self.beta, self.lam)
        with Server(app, self.port) as server:
            try:
                say(f"{server.address}  (Ctrl-C ends it)")
                with nullcontext() if self.no_browser else opening(server.address):
                    server.serve_forever()
            except KeyboardInterrupt:  # the normal end
                say()
                app.close()
        return 0
