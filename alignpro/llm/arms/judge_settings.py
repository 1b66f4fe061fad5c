"""Settings of `alignpro judge`, apart from what they set so that they import fast."""

from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models.sampling import Sampling, is_int


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
