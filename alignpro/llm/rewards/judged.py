"""A judge as a reward: a model, in this process or behind an address, scores answers on a rubric."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.files import make_private, writable_folder
from alignpro.llm.models.sampling import digest
from alignpro.llm.rewards import rubric
from alignpro.llm.rewards.reward import Array, batches, check_texts
from alignpro.llm.rewards.rubric import SCALES, TRIES, JudgeRewardSettings
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.quoting import control_tokens
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.target import Answer, Target

if TYPE_CHECKING:
    from alignpro.llm.targets.local import LocalTarget

NOISE_FILE = "scored_twice.jsonl"
"""A line for each answer that was put to the judge twice: its key and both scores, null where one failed."""
_COUNTED = 64  # answers after which it is seen whether too many have no score
_A_SCORE = Answer("", "stop", 0, 0)
_NO_SCORE = Answer("no score: the judge's service refused it, or its replies were none", "refused", 0, 0)


@dataclass
class Noise:
    """Scores of the same answers, asked twice, in a file where there is a folder."""

    most: int
    """How many answers are scored twice."""
    path: Path | None = None
    pairs: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def read(self) -> int:
        """Take in what is on file, by other processes too; how many answers are still to be asked."""
        for line in (
            self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else ()
        ):
            try:
                row = json.loads(line)
                self.pairs[row["key"]] = (row["scores"][0], row["scores"][1])
            except (ValueError, KeyError, TypeError, IndexError):
                continue  # a line that was cut short; its answer is asked again, from the cache
        return max(0, self.most - len(self.pairs))

    def add(self, key: str, first: float, second: float) -> None:
        """Keep two scores of one answer; NaN where there is none."""
        pair = [None if math.isnan(score) else score for score in (first, second)]
        self.pairs[key] = (pair[0], pair[1])
        if self.path:
            make_private(self.path)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "scores": pair}) + "\n")

    def describe(self) -> dict[str, Any]:
        """Standard deviation of one score, √(mean d²/2) over the differences d of two, and their number."""
        both = [(a, b) for a, b in self.pairs.values() if a is not None and b is not None]
        sd = math.sqrt(sum((a - b) ** 2 for a, b in both) / (2 * len(both))) if both else None
        return {"noise_sd": sd, "noise_pairs": len(both)}


@dataclass
class JudgeReward:
    """Scores in [0, 1] that a judge gives to answers, on a rubric.

    Question and answer are fenced (`alignpro.llm.targets.quoting`). A reply that is no score is asked for
    again, up to twice; an answer that has no score then, or that the judge's service refuses, has the reward
    that is declared for refused ones.

    Args:
        judge: the model; any `Target` on 1-10, a `LocalTarget` or an `Endpoint` on yes-no.
        settings: rubric, scale and decoding; which judge they name does not matter here.
        refusals: the reward of an answer without a score, and how many are too many.
    """

    judge: Target
    settings: JudgeRewardSettings = field(default_factory=JudgeRewardSettings)
    refusals: Refusals = field(default_factory=Refusals)
    low: float = field(init=False, default=0.0)
    high: float = field(init=False, default=1.0)
    noise: Noise = field(init=False)
    scored: int = field(init=False, default=0)
    """Answers that this object was asked to score."""
    failures: Counter[str] = field(init=False, default_factory=Counter)
    """Replies without a score, by a key of `rubric.FAILURES`."""

    def __post_init__(self) -> None:
        self.rubric = self.settings.text()
        self.noise = Noise(self.settings.repeats)
        self._control = control_tokens(self.judge)
        self._asked = self.judge if SCALES[self.settings.scale].drawn else _first_words(self.judge)

    def kept(self, folder: str | Path) -> "JudgeReward":
        """The reward with every reply on file in `folder`, which holds what it says of the judge's noise too.

        A judge in this process redoes a call that was cut short, so that an interruption changes no score.
        """
        out = replace(self)
        out.rubric = self.rubric  # as it was read
        whole, prices = not self._asked.remote, self.settings.priced()
        out._asked = Cached(self._asked, folder, prices=prices, note=None, whole=whole)
        out.noise = Noise(self.settings.repeats, writable_folder(folder, "folder") / NOISE_FILE)
        out.noise.read()
        return out

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response to its prompt: [n] float64 in [0, 1].

        Raises:
            Stopped: an endpoint cannot be reached, or its budget is spent; what was scored is kept.
            AlignProError: too many answers got no score.
        """
        check_texts(prompts, responses)
        pairs = list(zip(prompts, responses, strict=True))
        questions = [self.question(x, y) for x, y in pairs]
        tries = TRIES if SCALES[self.settings.scale].drawn else 1
        found = np.full(len(pairs), np.nan)
        for block in batches(len(pairs), _COUNTED):
            found[block] = self._ask([questions[i] for i in block], tries)
            self.scored += len(block)
            self.refusals.count([_NO_SCORE if none else _A_SCORE for none in np.isnan(found[block])])
        missing = np.isnan(found)
        left = self.noise.read() if len(self.noise.pairs) < self.noise.most else 0
        keys = {digest(text).hex()[:16]: i for i, text in reversed(list(enumerate(questions)))}
        again = [(key, i) for key, i in keys.items() if key not in self.noise.pairs]
        again = sorted(again, key=lambda item: item[1])[:left]
        if again:
            seconds = self._ask([self.question(*pairs[i], again=1) for _, i in again], 1)
            for (key, i), second in zip(again, seconds, strict=True):
                self.noise.add(key, float(found[i]), float(second))
        return np.where(missing, self.refusals.worth(self), found)

    def question(self, x: str, y: str, again: int = 0) -> str:
        """The text that the judge is asked; see `rubric.question`."""
        return rubric.question(self.rubric, self.settings.scale, x, y, self._control, again)

    def _ask(self, questions: Sequence[str], tries: int) -> Array:
        """Scores that the judge gives, NaN for none after so many tries."""
        found = np.full(len(questions), np.nan)
        todo = list(range(len(questions)))
        for attempt in range(tries):
            if not todo:
                break
            how = self.settings.sampling(attempt)
            rows = self._asked.respond([questions[i] for i in todo], how, first=attempt)
            failed = []
            for i, (reply,) in zip(todo, rows, strict=True):
                value, failure = SCALES[self.settings.scale].read(reply)
                if failure is None:
                    found[i] = value
                    continue
                self.failures[failure] += 1
                failed += [] if failure == "refused" else [i]
            todo = failed
        return found

    def describe(self) -> dict[str, Any]:
        """Say who judges by what, what failed, and the judge's own noise, in reward units."""
        facts = {name: getattr(self.settings, name) for name in ("scale", "temperature", "reply_tokens")}
        counts: dict[str, Any] = {"scored": self.scored, "not_scored": self.refusals.refused}
        counts["failed_replies"] = dict(self.failures)
        return {
            "name": f"judge {self.judge.name}",
            "kind": "judge",
            "model": self.judge.name,
            **facts,
            "rubric": self.rubric,
            **(counts if self.scored else {}),
            **self.noise.describe(),
            "limits": [
                "A model's taste, with its biases: for length, for confident tone, for answers like its own.",
                "Training looks for answers that the judge overrates. The noise is that of asking twice, not "
                "the distance from what people would say.",
            ],
        }

    def line(self) -> str:
        """Say in one line what was asked for, what failed, and the judge's own noise."""
        spent = self._asked.ledger.line() if isinstance(self._asked, Cached) else f"{self.scored} scores"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.failures.items())
        failed = f"; failed replies: {kinds}; {self.refusals.refused} answers not scored" if kinds else ""
        noise = self.noise.describe()
        said = "its noise was not measured"
        if noise["noise_pairs"]:
            said = f"noise of one score {noise['noise_sd']:.3f} (sd), by {noise['noise_pairs']} asked twice"
        return f"{self.judge.name} as a judge: {spent}{failed}; {said}"


def _first_words(judge: Target) -> Target:
    """The judge as it is asked for the probabilities of yes and no."""
    from alignpro.llm.targets.endpoint import Endpoint
    from alignpro.llm.targets.first_token import FirstToken
    from alignpro.llm.targets.given import GivenReplies

    if isinstance(judge, Endpoint):
        return FirstToken(judge.base_url, judge.settings, judge.weights, judge.role)
    if not hasattr(judge, "log_probs"):
        raise AlignProError(
            "reward_scale yes-no: needs a LocalTarget or an Endpoint, not behind a cache; or choose 1-10"
        )
    local: LocalTarget = judge  # type: ignore[assignment]
    return GivenReplies(local, (rubric.YES, rubric.NO))
