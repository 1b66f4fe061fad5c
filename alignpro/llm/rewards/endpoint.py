"""A reward served over HTTP, and its scores kept on file, so that none is paid for twice."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.prompt import transcript
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.rewards.bounds import Bounded, Bounds, parse_bounds
from alignpro.llm.rewards.reward import (
    PLAIN,
    Array,
    Reward,
    at_least,
    batches,
    check_template,
    check_texts,
    fill,
)
from alignpro.llm.targets import http
from alignpro.llm.targets.keys import Secret, read_key
from alignpro.llm.targets.ledger import Cached, Ledger
from alignpro.llm.targets.refusals import Refusals
from alignpro.llm.targets.responses import as_json
from alignpro.llm.targets.services import Complaint
from alignpro.llm.targets.settings import EndpointSettings, check_address
from alignpro.llm.targets.target import Answer, Known, OnAnswer, Stopped


def _ask_classify(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"input": [fill(template, x, y) for x, y in zip(prompts, responses, strict=True)]}


def _only(values: list[Any]) -> Any:
    (value,) = values
    return value


def _in_order(body: Any) -> list[dict[str, Any]]:
    return sorted(body["data"], key=lambda row: row["index"])


STYLES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any], Any]]] = {
    "rewards": (lambda x, y, _: {"prompts": x, "responses": y}, lambda body: body["rewards"]),
    "score": (
        lambda x, y, _: {"text_1": x, "text_2": y},
        lambda body: [row["score"] for row in _in_order(body)],
    ),
    "classify": (_ask_classify, lambda body: [_only(row["probs"]) for row in _in_order(body)]),
}
"""Ways to ask an endpoint and to read its answer. `rewards`: {"prompts", "responses"} for {"rewards"}.
`score` and `classify`: vLLM's /score, of (prompt, response) as two texts, and /classify, of a filled text,
for a model with one output; that server applies a sigmoid unless told otherwise."""

_WORDS = {
    "address": "url",
    "found": "url and model",
    "json": "the url and the server",
    "request": "dialect, model, omit, extra_body or template",
    "omit": "--reward-omit",
}


@dataclass
class EndpointReward(http.Counted):
    """A reward that a server gives: JSON is posted, and JSON comes back (see `STYLES`).

    The key is read from the environment for each `score`; it is in no field, and in no error even if the
    server repeats it. Redirects are not followed, since they would take it along.

    Args:
        url: http or https, without user name; a query is sent and never shown.
        bounds: see `parse_bounds`.
        settings: how it is asked; the dialect is a row of `STYLES`.
        refusals: the reward of a sample that the server refuses to score, and how many are too many.
        template: for `classify`, a text with {prompt} and {response}.
        batch_size: samples per request.

    A key that is not set, or httpx2 that is not installed, raises AlignProError here.
    """

    url: str = field(repr=False)
    bounds: Bounds | str
    settings: EndpointSettings = field(default_factory=EndpointSettings)
    refusals: Refusals = field(default_factory=Refusals)
    template: str = PLAIN
    batch_size: int = 32
    shown: str = field(init=False)
    bounded: Bounded = field(init=False, repr=False)
    low: float = field(init=False)
    high: float = field(init=False)

    def __post_init__(self) -> None:
        self.shown = check_url(self.url)
        self.bounds = parse_bounds(self.bounds)
        self.bounded = Bounded(self.bounds)
        self.low, self.high = self.bounds.low, self.bounds.high
        self.style, self.model = self.settings.chosen(STYLES), self.settings.model
        own = {"model": "", **STYLES[self.style][0](["x"], ["y"], PLAIN)}
        self.settings.check_fields(["model"], own)
        check_template(self.template)
        if self.template in ("chat", "pair"):
            raise AlignProError(
                f"template {self.template}: an endpoint needs a text with {{prompt}} and {{response}}"
            )
        at_least(1, batch_size=self.batch_size)
        read_key(self.settings.key_env, self.url)
        http.client_library()
        self._http = http.Transport(
            url=self.url,
            shown=self.shown,
            name=f"endpoint {self.shown}",
            words=_WORDS,
            settings=self.settings,
        )

    @property
    def revision(self) -> str:
        """Name what determines the raw scores, by a digest, since the address may hold a key."""
        return digest(self.url, self.style, self.model, self.template, *self.settings.mark().split()).hex()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Ask for all scores and bound them: [n] float64 in [low, high].

        The first failure stops it; what was asked meanwhile is waited for.

        Raises:
            Stopped: it cannot be reached or refuses, or the budget is spent; says why in `reason`.
        """
        return self.settled(prompts, responses, self.raw(prompts, responses))

    def settled(self, prompts: Sequence[str], responses: Sequence[str], raw: Sequence[Answer]) -> Array:
        """Bound what `raw` gave; a refused sample has the reward declared for it: [n] float64."""
        self.refusals.count(raw)
        given = [i for i, found in enumerate(raw) if found.finish != "refused"]
        out = np.full(len(raw), self.refusals.worth(self) if len(given) < len(raw) else 0.0)
        scores = [_number(raw[i].text) for i in given]
        out[given] = self.bounded([prompts[i] for i in given], [responses[i] for i in given], scores)
        return out

    def raw(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        on_score: Callable[[int, Answer], None] = lambda i, score: None,
        meter: http.Meter | None = None,
    ) -> list[Answer]:
        """Ask for all raw scores, not yet clipped or squashed, each as an answer whose text is the number.

        A sample that the server refuses to score is asked alone, so that no other is refused with it.

        Args:
            on_score: called with (sample, raw score) as each arrives.
            meter: counts the requests instead of this object.
        """
        check_texts(prompts, responses)
        prompts = [transcript(x) for x in prompts]
        scores: dict[int, Answer] = {}
        secret = read_key(self.settings.key_env, self.url)

        def call(part: range) -> http.Call[list[Answer]]:
            some = [prompts[i] for i in part], [responses[i] for i in part]

            def keep(found: list[Answer]) -> None:
                for i, score in zip(part, found, strict=True):
                    scores[i] = score
                    on_score(i, score)

            def settle(found: Complaint) -> tuple[list[Answer], int] | http.Instead | None:
                if not found.refused:
                    return None
                if len(part) == 1:
                    return [Answer(secret.said(found.text), "refused", 0, 0)], 0
                half = len(part) // 2
                return http.Instead([call(part[:half]), call(part[half:])])

            content = STYLES[self.style][0](*some, self.template)
            content |= {"model": self.model} if self.model else {}
            body = json.dumps(self.settings.fields(content)).encode()
            read = partial(self._read, prompts=some[0], responses=some[1], start=part[0], secret=secret)
            return http.Call(body, read, keep, settle=settle)

        failure = self._http.post(batches(len(prompts), self.batch_size), call, secret, meter)
        if failure is None:
            return [scores[i] for i in range(len(prompts))]
        raise Stopped(f"{failure.text} ({len(scores)} of {len(prompts)} scored)", failure.reason, {})

    def describe(self) -> dict[str, Any]:
        """Say where and how the server is asked, and the bounds with what they did; not the key."""
        facts = {"kind": "endpoint", "url": self.shown, "style": self.style, "model": self.model}
        return {"name": self.model or self.shown, **facts, "bounds": self.bounded.describe()}

    def _read(
        self, content: Any, prompts: Sequence[str], responses: Sequence[str], start: int, secret: Secret
    ) -> tuple[list[Answer], int] | http.Problem:
        try:
            scores = STYLES[self.style][1](content)
            if not isinstance(scores, list):
                raise TypeError
        except Exception:
            if isinstance(content, dict) and content.get("error"):
                return http.Problem("error", True, error=content["error"])
            return http.Problem(
                f"answered {secret.said(as_json(content))}, which is not of dialect {self.style}; choose "
                f"from {', '.join(STYLES)}, or mend the server",
                False,
            )
        found = self.bounded.check(prompts, responses, scores, start=start).tolist()
        return [Answer(repr(score), "stop", 0, 0) for score in found], 0  # repr: to the bit


def check_url(url: str) -> str:
    """Check an endpoint's address, and return it without its query, to be shown."""
    return check_address("url", url, "https://HOST/PATH", query=True)


_ONCE = Sampling(temperature=0.0, max_tokens=1)


class CachedReward:
    """An endpoint's reward that asks only for the scores its folder does not hold.

    A raw score is on file as soon as it arrives, in the file of `ledger.Cached`: what killed a run, or
    changed the bounds, asks for no sample again.

    Args:
        reward: the endpoint; its bounds apply, and its `revision` and the texts are the key.
        folder: holds the file, in which an answer is a score in decimal; created if need be.
    """

    def __init__(self, reward: EndpointReward, folder: str | Path) -> None:
        self.reward = reward
        self.low, self.high = reward.low, reward.high
        self._cached = Cached(_AsTarget(reward), folder, note=None)

    @property
    def ledger(self) -> Ledger:
        """Count what this object has asked for; its `answers` are scores."""
        return self._cached.ledger

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Score each response, from the file where it is there: [n] float64 in [low, high].

        See `EndpointReward.score`; a full disk raises `Stopped` too. What arrived before is on file.
        """
        check_texts(prompts, responses)
        texts = [transcript(x) for x in prompts]
        asked = [json.dumps(sample) for sample in zip(texts, responses, strict=True)]
        rows = self._cached.respond(asked, _ONCE)
        return self.reward.settled(prompts, responses, [row[0] for row in rows])

    def describe(self) -> dict[str, Any]:
        """Say what `EndpointReward.describe` says."""
        return self.reward.describe()

    def line(self) -> str:
        """Say in one line what was asked for."""
        spent = self.ledger
        return (
            f"{spent.answers} scores in {spent.calls} requests ({spent.retries} retries), {spent.hits} more "
            f"from the file{f', {spent.refused} refused' if spent.refused else ''}"
        )


def keep_scores(reward: Reward, folder: str | Path) -> Reward:
    """Put a reward whose scores are paid for behind a `CachedReward` in `folder`.

    One with a method `kept` gives what keeps its scores there itself; others stay as they are.
    """
    if kept := getattr(reward, "kept", None):
        return kept(folder)
    return CachedReward(reward, folder) if isinstance(reward, EndpointReward) else reward


class _AsTarget(http.Counted):
    """An endpoint's reward as a `Target`: a question is a sample, as JSON, and its answer the raw score."""

    remote = True

    def __init__(self, reward: EndpointReward) -> None:
        self.reward = reward
        self.name = str(reward.describe()["name"])
        self.revision = reward.revision
        self._http = reward._http

    def respond(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        first: Sequence[int] | int = 0,
        samples: int = 1,
        seed: int = 0,
        on_answer: OnAnswer | None = None,
        known: Known = lambda *_: None,
        meter: http.Meter | None = None,
    ) -> list[list[Answer]]:
        found: list[list[Answer]] = [[] for _ in prompts]

        def keep(i: int, score: Answer) -> None:
            found[i] = [score]
            if on_answer:
                on_answer(i, 0, score)

        pairs = [json.loads(prompt) for prompt in prompts]
        self.reward.raw([x for x, _ in pairs], [y for _, y in pairs], keep, meter)
        return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # of an edited file; told with its sample
