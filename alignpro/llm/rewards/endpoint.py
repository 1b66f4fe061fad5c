"""A reward served over HTTP."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import digest
from alignpro.llm.rewards.bounds import Bounded, Bounds, parse_bounds
from alignpro.llm.rewards.reward import (
    PLAIN,
    Array,
    at_least,
    batches,
    check_template,
    check_texts,
    fill,
)
from alignpro.llm.targets import http
from alignpro.llm.targets.settings import Secret, check_address, read_key
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.targets.target import Stopped


def _ask_rewards(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"prompts": prompts, "responses": responses}


def _ask_score(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"text_1": prompts, "text_2": responses}


def _ask_classify(prompts: list[str], responses: list[str], template: str) -> dict[str, Any]:
    return {"input": [fill(template, x, y) for x, y in zip(prompts, responses, strict=True)]}


def _only(values: list[Any]) -> Any:
    (value,) = values
    return value


def _in_order(body: Any) -> list[dict[str, Any]]:
    return sorted(body["data"], key=lambda row: row["index"])


STYLES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any], Any]]] = {
    "rewards": (_ask_rewards, lambda body: body["rewards"]),
    "score": (_ask_score, lambda body: [row["score"] for row in _in_order(body)]),
    "classify": (_ask_classify, lambda body: [_only(row["probs"]) for row in _in_order(body)]),
}
"""Ways to ask an endpoint and to read its answer. `rewards`: {"prompts", "responses"} for {"rewards"}.
`score` and `classify`: vLLM's /score, of (prompt, response) as two texts, and /classify, of a filled text,
for a model with one output; that server applies a sigmoid unless told otherwise."""

_WORDS = {
    "address": "url",
    "found": "url and model",
    "request": "dialect, model or template",
}


@dataclass
class EndpointReward:
    """A reward that a server gives: JSON is posted, and JSON comes back (see `STYLES`).

    The key is read from the environment for each `score`; it is in no field, and in no error even if the
    server repeats it. Redirects are not followed, since they would take it along.

    Args:
        url: http or https, without user name; a query is sent and never shown.
        bounds: see `parse_bounds`.
        settings: how it is asked; the dialect is a row of `STYLES`.
        template: for `classify`, a text with {prompt} and {response}.
        batch_size: samples per request.

    Raises:
        AlignProError: values that do not fit, the variable is not set, or httpx2 is not installed.
    """

    url: str = field(repr=False)
    bounds: Bounds | str
    settings: EndpointSettings = field(default_factory=EndpointSettings)
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
        self.style, self.model = self.settings.dialect or "rewards", self.settings.model
        if self.style not in STYLES:
            raise AlignProError(f"dialect {self.style!r}: choose from {', '.join(STYLES)}")
        check_template(self.template)
        if self.template in ("chat", "pair"):
            raise AlignProError(
                f"template {self.template}: an endpoint needs a text with {{prompt}} and {{response}}"
            )
        at_least(1, batch_size=self.batch_size)
        read_key(self.settings.key_env)
        http.client_library()
        self._http = http.Transport(
            url=self.url,
            shown=self.shown,
            name=f"endpoint {self.shown}",
            words=_WORDS,
            settings=self.settings,
        )

    @property
    def calls(self) -> int:
        """Count the requests so far, retries included."""
        return self._http.calls

    @property
    def retried(self) -> int:
        """Count the requests that repeated a failed one."""
        return self._http.retried

    @property
    def revision(self) -> str:
        """Name what determines the raw scores, by a digest, since the address may hold a key."""
        return digest(self.url, self.style, self.model, self.template).hex()

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Ask for all scores and bound them: [n] float64 in [low, high].

        The first failure stops it; what was asked meanwhile is waited for.

        Raises:
            AlignProError: the server answers something else than one finite number per sample.
            Stopped: it cannot be reached or refuses, or the budget is spent; says why in `reason`.
        """
        return self.bounded.apply(self.raw(prompts, responses))

    def raw(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        on_score: Callable[[int, float], None] = lambda i, score: None,
        meter: http.Meter | None = None,
    ) -> Array:
        """Ask for all raw scores, not yet clipped or squashed: [n] float64.

        Args:
            on_score: called with (sample, raw score) as each arrives.
            meter: counts the requests instead of this object.

        Raises:
            AlignProError: see `score`.
        """
        check_texts(prompts, responses)
        scores = np.full(len(prompts), np.nan)
        secret = read_key(self.settings.key_env, self.url)

        def call(part: range) -> http.Call[Array]:
            some = [prompts[i] for i in part], [responses[i] for i in part]

            def keep(found: Array) -> None:
                scores[part[0] : part[-1] + 1] = found
                for i in part:
                    on_score(i, float(scores[i]))

            content = STYLES[self.style][0](*some, self.template)
            content |= {"model": self.model} if self.model else {}
            body = json.dumps(content).encode()
            return http.Call(body, lambda body: self._read(body, *some, part[0], secret), keep)

        failure = self._http.post(batches(len(prompts), self.batch_size), call, secret, meter)
        if failure is None:
            return scores
        done = np.isfinite(scores).sum()
        raise Stopped(f"{failure.text} ({done} of {len(prompts)} scored)", failure.reason, {})

    def describe(self) -> dict[str, Any]:
        """Say where and how the server is asked, and the bounds with what they did; not the key."""
        facts = {"kind": "endpoint", "url": self.shown, "style": self.style, "model": self.model}
        return {"name": self.model or self.shown, **facts, "bounds": self.bounded.describe()}

    def _read(
        self, body: bytes, prompts: Sequence[str], responses: Sequence[str], start: int, secret: Secret
    ) -> tuple[Array, int] | http.Problem:
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            text = secret.said(body.decode(errors="replace"))
            return http.Problem(f"response {text!r} is not JSON; check the url and the server", True)
        try:
            scores = STYLES[self.style][1](content)
            if not isinstance(scores, list):
                raise TypeError
        except Exception:
            return http.Problem(
                f"answered {secret.said(json.dumps(content))}, which is not of dialect {self.style}; choose "
                f"from {', '.join(STYLES)}, or mend the server",
                False,
            )
        return self.bounded.check(prompts, responses, scores, start=start), 0


def check_url(url: str) -> str:
    """Check an endpoint's address, and return it without its query, to be shown.

    Raises:
        AlignProError: it is not http or https, has no host, or has a user name or password in it.
    """
    return check_address("url", url, "https://HOST/PATH", query=True)
