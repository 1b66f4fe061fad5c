"""Frozen models that vLLM runs, asked by token ids: answers, and log π_F(y|x) of any answer to any prompt.

A server (`served.Served`) and an engine in this process (`engine.InProcess`) share all but how they are
asked. What both send and read is vLLM's own (SamplingParams, prompt_logprobs, logprobs), as of version 0.32.

Prompts are cut into tokens here, with the model's tokenizer and chat format, and what comes back are tokens,
the end token included: what is scored is what was sampled. vLLM's `prompt_logprobs` are always those of the
model itself, temperature 1 and nothing truncated; the distribution of a `Sampling` is made from them here
(`under`), so that a log-probability means what it means to `LocalTarget.log_probs`. Needs no torch.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from alignpro.errors import AlignProError
from alignpro.llm.models.chat import chat_of
from alignpro.llm.models.sampling import Sampling, digest, stream_key
from alignpro.llm.targets import http
from alignpro.llm.targets.target import Answer, Answers, Known, OnAnswer, Stopped, arrange, jobs
from alignpro.llm.targets.tokens import Ids, answer_of, ids_of, prompt_ids, to_score

AT_ONCE = 32
"""Answers to one prompt that one request asks for, at most."""
TOKENS = 2**16
"""Tokens of one response, at most: some 100 bytes each."""
TOP = 20
"""How many of the likeliest tokens a server gives whose --max-logprobs is as it comes."""
WARMEST, COOLEST = 2.0, 0.01
"""Temperatures that vLLM takes; it takes a lower one, but for 0, as 0.01."""
_UNDERFLOW = -9000.0  # vLLM's server sends -9999 for −inf

Place = tuple[int, int]
Tops = tuple[float, np.ndarray, bool]
"""A token's log-probability by the model itself, those of the likeliest tokens, falling, and whether it is
one of these."""


@dataclass(frozen=True)
class Asked:
    """Consecutive samples of one prompt: one request."""

    ids: Ids
    """The prompt's tokens."""
    seed: int
    """Seed of the first; each further one's is one more, as vLLM has it."""
    places: tuple[tuple[Place, ...], ...]
    """Places of each sample, (position, sample index): more than one where a prompt is asked twice."""


class Drawn(NamedTuple):
    """One sample, as vLLM tells it."""

    ids: Sequence[int]
    finish: str | None
    log_prob: float
    """Sum of its tokens' log-probabilities, by the model itself or the sampler as the server has it."""


Keep = Callable[[tuple[Place, ...], Answer], None]


class VLLM:
    """A frozen model that vLLM runs; a subclass says how it is asked.

    Sample i of a prompt has seed s + i, where s depends on the call's seed, the sampling and the prompt:
    asked again it is the same, as far as vLLM's kernels are independent of the batch.

    Args:
        tokenizer, ends: what `load.load_tokenizer` returns for the model.
        name: of the model, in caches and tables.
    """

    tokenizer: Any
    ends: list[int]
    name: str
    remote: ClassVar[bool] = False

    def __init__(self, tokenizer: Any, ends: Sequence[int], name: str) -> None:
        self.tokenizer, self.ends, self.name = tokenizer, list(ends), name
        self._off: list[float] = []

    def most(self) -> int | None:
        """Most tokens of a sequence; None where it is not known."""
        raise NotImplementedError

    def _draw(
        self, asked: Sequence[Asked], sampling: Sampling, keep: Keep, known: Known, meter: http.Meter | None
    ) -> http.GiveUp | None:
        """Ask for samples and keep each as it comes; None, or why not all came."""
        raise NotImplementedError

    def _score(self, rows: Sequence[tuple[Ids, Ids]], top: int, meter: http.Meter | None) -> list[list[Tops]]:
        """Score each token of each (prompt, continuation), with `top` likeliest tokens."""
        raise NotImplementedError

    @cached_property
    def format(self) -> str:
        """A digest of the tokens and the chat format, for revisions."""
        chat = chat_of(self.tokenizer)
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return digest(vocabulary, str(chat.template), dict(chat.options), chat.sample(), self.ends).hex()[:12]

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
        """See `Target.respond`; `known` and `meter` are those of `Endpoint.respond`. The answer to a prompt
        that leaves no room for `max_tokens`, and one token more, is a refusal."""
        wanted = jobs(prompts, first, samples, seed)
        check_sampling(sampling)
        ids = ids_of(self.tokenizer, prompts)
        answers: Answers = {}

        def keep(places: tuple[Place, ...], answer: Answer) -> None:
            for place in places:
                answers[place] = answer
                if on_answer:
                    on_answer(*place, answer)

        fitting: list[Place] = []
        for place in wanted:
            size = len(ids[place[0]])
            if (reason := self.too_long(size, sampling.max_tokens)) is None:
                fitting.append(place)
            else:
                keep((place,), Answer(reason, "refused", size, 0))
        seeds = {p: stream_key(seed, sampling, prompts[p], 0) % 2**31 for p in {p for p, _ in fitting}}
        most = max(1, min(AT_ONCE, TOKENS // sampling.max_tokens))
        failure = self._draw(asked_at_once(fitting, ids, seeds, most), sampling, keep, known, meter)
        if failure is None:
            return arrange(wanted, answers, len(prompts))
        text = f"{failure.text} ({len(answers)} of {len(wanted)} answered)"
        raise Stopped(text, failure.reason, answers)

    def log_probs(
        self,
        prompts: Sequence[str],
        responses: Sequence[str | Answer],
        sampling: Sampling | None = None,
        *,
        drawn: bool = False,
        meter: http.Meter | None = None,
    ) -> np.ndarray:
        """See `LocalTarget.log_probs`.

        Raises:
            AlignProError: also where vLLM does not tell enough for this sampling (`needed`), and where it
                fails or a budget is spent.
        """
        top = needed(sampling)
        found = to_score(self.tokenizer, self.ends, prompts, responses, self.too_long)
        scored = self._score([(ids, said) for _, ids, said in found.rows], top, meter)
        for row, tops in zip(found.rows, scored, strict=True):
            value = math.fsum(under(each, sampling, drawn) for each in tops)
            found.add(row, value)
            told = getattr(responses[row[0]], "log_prob", None)
            if drawn and told is not None:
                self._off.append(abs(told - value))
        return found.values

    def check_scored(self, sampling: Sampling) -> None:
        """Refuse a sampling under which no log-probabilities can be had, before anything is asked."""
        needed(sampling)

    def line(self) -> str | None:
        """One line on how far vLLM's sampler and its scorer disagree; None where nothing was compared."""
        if not self._off:
            return None
        return (
            f"{self.name}: log-probabilities of {len(self._off)} answers, when drawn and when scored, differ "
            f"by {np.mean(self._off):.2g} nats on average, {max(self._off):.2g} at most"
        )

    def count_tokens(self, prompt: str) -> int:
        """Tokens of `prompt` as the user's turn, the chat template's included."""
        return len(prompt_ids(self.tokenizer, prompt))

    def too_long(self, tokens: int, more: int) -> str | None:
        """Say why a prompt of so many tokens leaves no room for so many more, and for the one that vLLM must
        draw to score a sequence; None where it does."""
        most = self.most()
        if most is None or tokens + more < most:
            return None
        return (
            f"{tokens} tokens, with {more} more to come and one to score by, are beyond the {most} that "
            f"model {self.name!r} reads here (max_model_len)"
        )

    def answer(self, asked: int, drawn: Drawn, sampling: Sampling) -> Answer:
        """The answer that a sample is.

        Raises:
            AlignProError: it ends where these tokens do not end, or sooner than was asked for.
        """
        new, finish = drawn.ids, drawn.finish
        ended: Literal["stop", "length"] = "stop" if new and new[-1] in self.ends else "length"
        if ended == "length" and (finish != "length" or len(new) < sampling.max_tokens):
            raise AlignProError(
                f"an answer of {len(new)} of {sampling.max_tokens} tokens ends (finish_reason {finish}) "
                f"without one of the tokens {self.ends}: name the tokenizer of the model that is served, and "
                "let no limit of the server's (max_new_tokens, --max-model-len) be shorter"
            )
        told = drawn.log_prob if sampling.natural else None
        return answer_of(self.tokenizer, asked, new, ended, told)


def asked_at_once(
    places: Iterable[Place], ids: Sequence[Ids], seeds: dict[int, int], most: int
) -> list[Asked]:
    """The requests for these samples: consecutive samples of one prompt together, at most `most`.

    Args:
        places: (position, sample index).
        ids: the tokens of the prompt at each position.
        seeds: that of sample 0 of the prompt at each position. Equal prompts have equal ones.
    """
    groups: dict[tuple[Ids, int], dict[int, list[Place]]] = {}
    for place in places:
        same = groups.setdefault((ids[place[0]], seeds[place[0]]), {})
        same.setdefault(place[1], []).append(place)
    out = []
    for (tokens, seed), by_index in groups.items():
        indices = sorted(by_index)
        start = 0
        for end in range(1, len(indices) + 1):
            if end < len(indices) and indices[end] == indices[end - 1] + 1 and end - start < most:
                continue
            some = tuple(tuple(by_index[i]) for i in indices[start:end])
            out.append(Asked(tokens, seed + indices[start], some))
            start = end
    return out


def sampled(sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams, and of a request to its server, that draw from `sampling`.

    All that a model's generation_config may set is set, so that none of it leaks in. Its ends do not count
    either: an answer ends at `ends` and nowhere else.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_tokens": sampling.max_tokens,
        **NEUTRAL,
        "ignore_eos": True,
        "stop_token_ids": list(ends),
        "logprobs": 0,  # of the token that was drawn, and no other
    }


NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Settings that vLLM takes from the model's generation_config unless told, at values that change nothing."""
SCORED = {"max_tokens": 1, "temperature": 0.0}
"""Fields that have a given sequence scored: vLLM draws a token at least, which nobody reads."""


def check_sampling(sampling: Sampling) -> None:
    """Refuse what vLLM would take for something else."""
    if sampling.temperature > WARMEST or 0 < sampling.temperature < COOLEST:
        raise AlignProError(
            f"temperature {sampling.temperature:g}: vLLM draws at 0 and from {COOLEST:g} to {WARMEST:g} "
            "only; choose one of these"
        )


def needed(sampling: Sampling | None) -> int:
    """How many of the likeliest tokens `under` needs.

    Raises:
        AlignProError: all of them.
    """
    if sampling is None or sampling.natural:
        return 0
    check_sampling(sampling)
    if sampling.temperature == 0:
        return 1
    if sampling.top_k:
        return sampling.top_k
    if sampling.temperature == 1:
        return TOP
    raise AlignProError(
        f"temperature {sampling.temperature:g}: with top_k 0 its log-probabilities depend on all tokens' "
        "scores, which vLLM does not send; choose temperature 1, or a top_k such as 20"
    )


def under(tops: Tops, sampling: Sampling | None, drawn: bool) -> float:
    """Log-probability of a token under `sampling`, in nats, as `policy.Warper` has it: by temperature, then
    top-k, then top-p of what is left.

    Args:
        tops: with at least `needed(sampling)` likeliest tokens, or all there are.
        drawn: the token was drawn from it, so that it is possible whatever rounding says.

    Raises:
        AlignProError: top_p keeps more tokens than are told.
    """
    own, likeliest, among = tops
    if sampling is None or sampling.natural:
        return own
    if sampling.temperature == 0:
        return 0.0 if drawn or own >= likeliest[0] else -math.inf
    kept = likeliest
    if sampling.top_k:
        kept = kept[: sampling.top_k]
        if not among and own >= kept[-1]:  # as likely as the last that is kept
            kept = np.append(kept, own)
    own, kept = own / sampling.temperature, kept / sampling.temperature
    if sampling.top_p < 1:
        mass = np.exp(kept)  # of the whole, where all are kept
        mass = mass / mass.sum() if sampling.top_k else mass
        before = np.cumsum(mass) - mass
        if not sampling.top_k and before[-1] + mass[-1] < sampling.top_p and mass.sum() < 1 - 1e-6:
            raise AlignProError(
                f"top_p {sampling.top_p:g}: keeps more than the {len(kept)} likeliest tokens that vLLM tells "
                "and so cannot be computed; choose top_p 1, or a top_k such as 20 too"
            )
        kept = kept[before < sampling.top_p]
    total = float(np.logaddexp.reduce(kept))
    if own >= kept[-1]:
        return float(own - total)
    return float(own - np.logaddexp(total, own)) if drawn else -math.inf


def read_tops(told: Any, tokens: Sequence[int], start: int, top: int) -> list[Tops]:
    """Read vLLM's prompt_logprobs: one entry for each token of the prompt, None for the first.

    Args:
        told: a sequence of {token id: {"logprob": …}}, as the server has it, or of {token id: Logprob}.
        tokens: the prompt.
        start: the first of the tokens that are asked about.
        top: how many of the likeliest were asked for.

    Raises:
        AlignProError: they are no log-probabilities of these tokens.
    """
    if not isinstance(told, Sequence) or len(told) != len(tokens):
        size = f"{len(told)} entries" if isinstance(told, Sequence) else str(told)
        raise AlignProError(
            f"prompt_logprobs: {size} for a prompt of {len(tokens)} tokens; it is no vLLM that scores"
        )
    out = []
    for token, entry in zip(tokens[start:], told[start:], strict=True):
        try:
            values = {int(i): _told(v) for i, v in entry.items()}
            _ = values[token]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise AlignProError(
                f"prompt_logprobs: say nothing of token {token}; it is no vLLM that scores"
            ) from None
        if not all(v < 1e-3 for v in values.values()):
            raise AlignProError(
                f"prompt_logprobs: {max(values.values()):g} is no log-probability; serve with "
                "--logprobs-mode raw_logprobs"
            )
        values = {i: v if v > _UNDERFLOW else -math.inf for i, v in values.items()}
        # Beside the likeliest stands the token itself, wherever it ranks.
        likeliest = sorted(values, key=lambda i: (-values[i], i == token))[:top]
        row = np.array([values[i] for i in likeliest])
        out.append((values[token], row, token in likeliest))
    return out


def _told(value: Any) -> float:
    return float(value["logprob"] if isinstance(value, dict) else value.logprob)
