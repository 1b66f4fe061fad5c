"""An endpoint that is asked for the likeliest first tokens of its answer, instead of the answer."""

import json
import math
from dataclasses import replace
from typing import Any

from alignpro.llm.models.sampling import Sampling
from alignpro.llm.targets import http
from alignpro.llm.targets.endpoint import Endpoint
from alignpro.llm.targets.keys import Secret
from alignpro.llm.targets.settings import is_number
from alignpro.llm.targets.target import Answer

TOP = 20
"""How many tokens are asked for: as many as OpenAI's interface, and a vLLM server left as it is, give."""


class FirstToken(Endpoint):
    """An endpoint whose answer is its likeliest first tokens, as JSON: [[token, log π(token)], …], in nats.

    The fields are those of OpenAI's chat completions, `logprobs` and `top_logprobs`.
    """

    @property
    def revision(self) -> str:
        """See `Target.revision`."""
        return f"{super().revision}, first {TOP} tokens"

    def _body(self, prompt: str, index: int, sampling: Sampling, seed: int) -> bytes:
        asked = json.loads(super()._body(prompt, index, sampling, seed))
        return json.dumps({**asked, "logprobs": True, "top_logprobs": TOP}).encode()

    def _parse(self, value: Any, secret: Secret, sampling: Sampling) -> tuple[Answer, int] | http.Problem:
        found = super()._parse(value, secret, sampling)
        if isinstance(found, http.Problem) or found[0].finish == "refused":
            return found
        try:
            first = value["choices"][0]["logprobs"]["content"][0]
            # The same token twice is one: some servers repeat the one that was drawn.
            tops = {(top["token"], top["logprob"]): None for top in first.get("top_logprobs") or [first]}
        except (TypeError, KeyError, IndexError, AttributeError):
            tops = {}
        if not tops or not all(isinstance(t, str) and is_number(v) and not math.isnan(v) for t, v in tops):
            return http.Problem(
                "it gives no log-probabilities of the first token (choices[0].logprobs.content[0]); "
                "choose scale 1-10, or another server",
                False,
            )
        text = json.dumps([[secret.scrub(token), value] for token, value in tops])
        return replace(found[0], text=text, finish="stop"), found[1]
