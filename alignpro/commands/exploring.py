"""The questions of `alignpro explore`'s page, answered as JSON values: an instance's numbers, and rollouts.

Names of prompts, rewrites and responses, and rollouts, were written by strangers and by language models: they
travel as JSON strings and reach the page as text nodes only. Needs no torch.
"""

import functools
import itertools
import json
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from alignpro.errors import AlignProError
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
        """One prompt, by its position: for every arm its mean reward and, rewrite by rewrite, its answers."""
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
            raise AlignProError(f"--file {file}, --family {family}: give one of them")
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
        """Answer one request with a plain JSON value.

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
        from alignpro.theory.gibbs import check_temperature

        explored = self._of(given)
        beta, lam = (check_temperature(name, _temperature(given, name)) for name in ("beta", "lam"))
        return explored.solve(beta, lam, _whole(given, "prompt", 0, explored.instance.shape[0] - 1))

    def _reader(self) -> Reader:
        if self.reader is None:
            raise AlignProError("rollouts: there are none; start with --rollouts FILE")
        return self.reader

    def _of(self, given: dict[str, str]) -> "Explored":
        source = given.pop("source", "")
        if source == "file":
            return self.explored(source)
        return self.explored(
            source, *(_whole(given, n, 1) for n in ("x", "k", "y")), _whole(given, "seed", 0)
        )

    def _explored(self, source: str, *sizes: int) -> "Explored":
        from alignpro.theory.search.exploring import Explored, drawn

        if source != "file":
            return Explored(drawn(source, *sizes))
        if self.file is None:
            raise AlignProError("source file: none was given; start with --file, or choose a family")
        return Explored(self.file[1])


def _temperature(given: dict[str, str], name: str) -> float | str:
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
