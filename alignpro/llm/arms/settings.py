"""Settings of `alignpro rollout` and `alignpro judge`, apart from what they set so that they import fast."""

import math
from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import Sampling, is_int
from alignpro.llm.training.settings import _check_whole


@dataclass(frozen=True)
class RolloutSettings:
    """The arms that are rolled out, and how often."""

    arms: tuple[str, ...] = ("none", "sft")
    """Any of none (the prompt itself), sft (drawn from rho_sft), star (rho* by resampling) and best_of_n."""
    trained: tuple[str, ...] = ()
    """Folders of trained prompters: one arm, trained, with a seed for each; NAME=FOLDER makes an arm NAME."""
    rlhf: tuple[str, ...] = ()
    """Folders that train --task rlhf wrote: the arm rlhf, where the policy answers the prompt itself."""
    draws: int = 4
    """Rewrites of each prompt in each arm and seed."""
    answers: int = 2
    """Answers to each of them."""
    rewrite_tokens: int | None = None
    """Tokens of a rewrite, at most. Left out: as the trained prompters were trained, or rho_sft's own."""
    lam: float = 0.05
    """star: lambda, positive, in units of the reward."""
    proposals: int = 16
    """star, best_of_n: rewrites drawn from rho_sft, from which each resamples."""
    proposal_answers: int = 1
    """star, best_of_n: answers that judge each distinct proposal; those to what is resampled are fresh."""
    best_of: int | None = None
    """best_of_n: n, at most the proposals. Left out: all of them."""
    seed: int = 0
    """Determines rewrites and answers. Trained arms count their seeds from here."""

    def __post_init__(self) -> None:
        _check_whole(self, {"draws": 1, "answers": 1, "proposals": 1, "proposal_answers": 1, "seed": 0})
        if self.rewrite_tokens is not None and self.rewrite_tokens < 1:
            raise AlignProError(f"rewrite_tokens {self.rewrite_tokens}: give at least 1, or leave it out")
        if not (math.isfinite(self.lam) and self.lam > 0):
            raise AlignProError(f"lam {self.lam}: give a positive, finite number")
        if self.best_of is not None and not 1 <= self.best_of <= self.proposals:
            raise AlignProError(f"best_of {self.best_of}: choose from 1 to the {self.proposals} proposals")


@dataclass(frozen=True)
class JudgeSettings:
    """The judge model, and which pairs of answers it compares."""

    judge: str
    """Model that judges: a packaged name, a local folder or a hub id, or the http(s) address of an
    OpenAI-compatible endpoint."""
    judge_model: str | None = None
    """Endpoint: the name that it knows the judge by; needed."""
    judge_key_env: str | None = None
    """Endpoint: NAME of the environment variable that holds its key. Left out: no key is sent."""
    judge_dialect: str | None = None
    """Endpoint: how requests are written: openai, vllm or transformers. Left out: openai."""
    judge_concurrency: int | None = None
    """Endpoint: requests at a time. Left out: 8."""
    judge_max_calls: int | None = None
    """Endpoint: budget of requests; then the run stops, and the same command goes on. Left out: no limit."""
    judge_max_tokens: int | None = None
    """Endpoint: budget of tokens, in questions and replies. Left out: no limit."""
    prices: tuple[float, float] | None = None
    """Money per million prompt tokens and per million reply tokens, to print the cost before it arises."""
    temperature: float = 0.0
    """How freely the judge draws its reply; 0 takes the likeliest token each time."""
    reply_tokens: int = 256
    """Tokens of a reply, at most; one that reaches them counts as failed. A judge that reasons first needs
    more."""
    forced: bool = False
    """Take the verdict that the judge finds likelier, instead of having it write one: for a judge in this
    process that is too small to keep to the format."""
    prompts: int | None = None
    """How many prompts, from the first. Left out: all of them."""
    per_prompt: int = 1
    """Pairs of answers to each prompt, at most."""
    seed: int = 0
    """Seed of the judge's draws, where its temperature is not 0."""
    dtype: str = "bfloat16"
    """Type of the weights of a judge in this process: bfloat16, float32 or 4bit."""
    batch_size: int = 8
    """Pairs that a judge in this process reads at once; fewer need less memory."""
    chat_template_kwargs: str | None = None
    """Further arguments of the chat template of a judge in this process, as a JSON object. Left out: none."""

    def __post_init__(self) -> None:
        for name, low in (("reply_tokens", 1), ("per_prompt", 1), ("batch_size", 1)):
            if not is_int(getattr(self, name)) or getattr(self, name) < low:
                raise AlignProError(f"{name} {getattr(self, name)!r}: give a whole number of at least {low}")
        if self.prompts is not None and (not is_int(self.prompts) or self.prompts < 1):
            raise AlignProError(f"prompts {self.prompts!r}: give a whole number of at least 1")
        if not is_int(self.seed):
            raise AlignProError(f"seed {self.seed!r}: give a whole number")
        if self.sampling().temperature and self.forced:
            raise AlignProError(
                f"temperature {self.temperature}: a forced choice draws nothing; leave it at 0, or leave out "
                "--forced"
            )

    def sampling(self) -> Sampling:
        """How the judge decodes."""
        return Sampling(temperature=self.temperature, max_tokens=self.reply_tokens)

    def endpoint(self) -> dict[str, Any]:
        """Fields of `endpoint.Endpoint` that were given."""
        names = ("model", "key_env", "dialect", "concurrency", "max_calls", "max_tokens")
        values = {name: getattr(self, f"judge_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}
