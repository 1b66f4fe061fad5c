"""A vLLM server asked by token ids, and what a server says that it serves. Needs no torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import Sampling, is_int
from alignpro.llm.targets import http
from alignpro.llm.targets.keys import read_key
from alignpro.llm.targets.responses import get
from alignpro.llm.targets.services import Complaint
from alignpro.llm.targets.settings import EndpointSettings, check_address, is_number
from alignpro.llm.targets.target import Answer, Known
from alignpro.llm.targets.vllm import SCORED, VLLM, Asked, Drawn, Ids, Keep, Tops, read_tops, sampled

_ASKING_S = 10.0  # for a list of models
_TOKENS = 2**31  # of no vocabulary are as many
_REASON = 400  # characters of a refusal that are kept
_OWN = ("model", "prompt", "n", "stream", "echo", "prompt_logprobs", "return_token_ids")


@dataclass(frozen=True)
class Serving:
    """A server's /models."""

    vllm: bool
    """Whether it says to be vLLM."""
    most: dict[str, int | None]
    """Most tokens of a sequence by model, where it says so."""


def serving(base_url: str, settings: EndpointSettings) -> Serving | None:
    """Ask the server at `base_url` for what it serves; None where it cannot be reached or has no key yet.

    A server without such a list serves nothing that it names.
    """
    try:
        secret = read_key(settings.key_env, base_url)
    except AlignProError:
        return None
    told = get(f"{base_url.rstrip('/')}/models", secret, min(_ASKING_S, settings.timeout_s))
    if told is None:
        return None
    try:
        rows = [row for row in told["data"] if isinstance(row["id"], str)]
    except (KeyError, TypeError):
        rows = []
    most = {row["id"]: row.get("max_model_len") for row in rows}
    return Serving(
        vllm=any(row.get("owned_by") == "vllm" for row in rows),
        most={name: int(n) if is_int(n) else None for name, n in most.items()},
    )


class Served(http.Counted, VLLM):
    """A model behind a vLLM server, asked by token ids at `/completions`.

    Requests are posted as `http.Transport` says; budgets are those of `Endpoint`, and requests for
    log-probabilities count as those for answers do. A bad field raises AlignProError before any request.

    Args:
        base_url: the address, up to and with `/v1`; no key in it.
        settings: of its requests. The model is needed; the dialect is vLLM's, whatever they say.
        tokenizer, ends: what `load.load_tokenizer` returns for the model that is served.
        weights: whatever identifies the weights served; the address where empty. Part of `revision`.
    """

    remote: ClassVar[bool] = True

    def __init__(
        self,
        base_url: str,
        settings: EndpointSettings,
        tokenizer: Any,
        ends: Sequence[int],
        weights: str = "",
    ) -> None:
        check_address("base_url", base_url, "http://127.0.0.1:8000/v1")
        if settings.model is None:
            raise AlignProError(f"model: name the model that {base_url} serves")
        if settings.dialect not in (None, "vllm"):
            raise AlignProError(f"dialect {settings.dialect}: only vLLM is asked by token ids; leave it out")
        sent = (*sampled(Sampling(), ends), "seed")
        settings.check_fields(sent, (*sent, *_OWN))
        super().__init__(tokenizer, ends, settings.model)
        self.base_url, self.settings, self.weights = base_url.rstrip("/"), settings, weights
        self._serving: Serving | None = None
        self._http = http.Transport(
            url=f"{self.base_url}/completions",
            shown=self.base_url,
            name=f"vLLM at {self.base_url}, model {self.name!r}",
            words={
                "address": "base_url",
                "found": "base_url (it ends in /v1), the model's name, and that it is a vLLM server",
                "json": "that base_url is a vLLM server's",
                "request": "model, omit, extra_body or sampling",
                "omit": "--target-omit",
            },
            settings=settings,
        )

    @property
    def revision(self) -> str:
        """See `Target.revision`: what is served, its tokens and chat format, and what else is sent."""
        mark = self.settings.mark()
        return f"{self.weights or self.base_url} vllm tokens {self.format} {mark}".rstrip()

    def most(self) -> int | None:
        if self._serving is None:  # where it cannot be reached its requests will tell
            self._serving = serving(self.base_url, self.settings) or Serving(False, {})
        named = self._serving.most
        if self._serving.vllm and self.name not in named:
            raise AlignProError(
                f"model {self.name!r}: {self.base_url} serves {', '.join(sorted(named))}; name one of these"
            )
        return named.get(self.name)

    def _draw(
        self, asked: Sequence[Asked], sampling: Sampling, keep: Keep, known: Known, meter: http.Meter | None
    ) -> http.GiveUp | None:
        secret = read_key(self.settings.key_env, self.base_url)

        def call(group: Asked) -> http.Call[list[Answer]]:
            missing = []
            for k, places in enumerate(group.places):
                if (found := known(*places[0])) is None:
                    missing.append(k)
                else:
                    keep(places, found)
            # Seeds follow each other: what is known in between comes once more.
            start, end = (missing[0], missing[-1] + 1) if missing else (0, 0)

            def kept(answers: list[Answer]) -> None:
                for k, answer in enumerate(answers, start):
                    if k in missing:
                        keep(group.places[k], answer)

            def settle(found: Complaint) -> tuple[list[Answer], int] | None:
                if not found.refused:
                    return None
                reason = secret.said(found.text, _REASON)
                return [Answer(reason, "refused", 0, 0)] * (end - start), 0

            body = {
                **sampled(sampling, self.ends),
                "seed": group.seed + start,
                **self._common(group.ids),
                "n": end - start,
                "return_token_ids": True,
            }
            return http.Call(
                json.dumps(self.settings.fields(body)).encode(),
                lambda value: self._read_answers(value, group.ids, end - start, sampling),
                kept,
                (end - start) * (len(group.ids) + sampling.max_tokens),
                lambda: None if missing else [],
                settle,
            )

        return self._http.post(asked, call, secret, meter)

    def _score(self, rows: Sequence[tuple[Ids, Ids]], top: int, meter: http.Meter | None) -> list[list[Tops]]:
        secret = read_key(self.settings.key_env, self.base_url)
        out: list[list[Tops]] = [[] for _ in rows]

        def call(i: int) -> http.Call[list[Tops]]:
            ids, said = rows[i]

            def settle(found: Complaint) -> http.Instead | None:
                text = secret.said(found.text)
                if "logprobs" in text:
                    raise AlignProError(
                        f"{self._http.name}: gives no log-probabilities of {top} tokens ({text}); serve with "
                        "a larger --max-logprobs, or choose a smaller top_k"
                    )
                return None

            body = {**SCORED, **self._common((*ids, *said)), "prompt_logprobs": top}
            return http.Call(
                json.dumps(body | self.settings.extra).encode(),
                lambda value: self._read_tops(value, ids, said, top),
                lambda tops: out.__setitem__(i, tops),
                len(ids) + len(said) + 1,
                settle=settle,
            )

        failure = self._http.post(range(len(rows)), call, secret, meter)
        if failure is not None:
            raise AlignProError(f"{failure.text} (while scoring answers)")
        return out

    def _common(self, ids: Ids) -> dict[str, Any]:
        return {"model": self.name, "prompt": list(ids)}

    def _read_answers(
        self, value: Any, ids: Ids, count: int, sampling: Sampling
    ) -> tuple[list[Answer], int] | http.Problem:
        choices = _choices(value, count)
        if isinstance(choices, http.Problem):
            return choices
        found = []
        for choice in choices:
            new, told = choice.get("token_ids"), choice.get("logprobs")
            if not isinstance(new, list) or not all(is_int(i) and 0 <= i < _TOKENS for i in new):
                return _wrong(
                    "token_ids", "a list of tokens; serve by a newer vLLM, which knows return_token_ids"
                )
            told = told.get("token_logprobs") if isinstance(told, dict) else None
            if not isinstance(told, list) or len(told) != len(new) or not all(map(is_number, told)):
                return _wrong("logprobs.token_logprobs", "a number for each token; ask a vLLM server")
            drawn = Drawn(new, choice.get("finish_reason"), float(sum(told)))
            if drawn.finish not in ("stop", "length"):
                return http.Problem("error", True, error={"finish_reason": drawn.finish})
            try:
                found.append(self.answer(len(ids), drawn, sampling))
            except AlignProError as error:
                return http.Problem(str(error), False)
        return found, sum(answer.prompt_tokens + answer.tokens for answer in found)

    def _read_tops(self, value: Any, ids: Ids, said: Ids, top: int) -> tuple[list[Tops], int] | http.Problem:
        choices = _choices(value, 1)
        if isinstance(choices, http.Problem):
            return choices
        try:
            tops = read_tops(choices[0].get("prompt_logprobs"), (*ids, *said), len(ids), top)
        except AlignProError as error:
            return http.Problem(str(error), False)
        return tops, len(ids) + len(said) + 1


def _choices(value: Any, count: int) -> list[dict[str, Any]] | http.Problem:
    """The choices of a completion in their order, or what is wrong with it."""
    choices = value.get("choices") if isinstance(value, dict) else None
    if not choices and isinstance(value, dict) and value.get("error"):
        return http.Problem("error", True, error=value["error"])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return _wrong("choices", "a list of objects; check the server")
    if len(choices) != count:
        return _wrong("choices", f"{count} objects, as many as were asked for; check the server")
    return sorted(choices, key=lambda choice: choice["index"] if is_int(choice.get("index")) else 0)


def _wrong(name: str, want: str) -> http.Problem:
    return http.Problem(f"response field {name} is not {want}", False)
