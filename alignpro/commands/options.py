"""Options that several verbs share: the frozen model, the reward, the prompts."""

from dataclasses import dataclass
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.models.chat import parse_options
from alignpro.llm.models.sampling import Sampling


@dataclass(frozen=True)
class PromptSettings:
    """Which user prompts."""

    dataset: str = "instructions"
    """Prompts of a package (instructions, mt-bench, dpo-demo, healthbench) or of the hub (ultrafeedback,
    ultrafeedback-binarized, helpsteer, orca-dpo-pairs, openorca)."""
    data_folder: str | None = None
    """Folder with the files of the hub's data set, where the hub is out of reach."""
    prompts_file: str | None = None
    """Your own prompts instead: .jsonl, .json, .csv, .tsv or .parquet, else a text with one per line."""
    prompt_column: str | None = None
    """Column of the prompts in that file. Default: prompt."""
    max_prompt_tokens: int | None = None
    """Leave out longer prompts, in tokens of the prompter."""

    def __post_init__(self) -> None:
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise AlignProError(
                f"max_prompt_tokens {self.max_prompt_tokens}: give at least 1, or leave it out"
            )
        if self.prompts_file is None and self.prompt_column is not None:
            raise AlignProError(f"prompt_column {self.prompt_column}: is for prompts_file; leave it out")
        if self.prompts_file is not None and self.data_folder is not None:
            raise AlignProError(f"data_folder {self.data_folder}: is for dataset; give it or prompts_file")


@dataclass(frozen=True)
class EnvironmentSettings:
    """The frozen model, how it answers, and the reward that judges."""

    target: str = "smollm2-135m-instruct"
    """Frozen model: a name like the prompter's, or the http(s) address of an OpenAI-compatible endpoint."""
    reward: str = "minilm-bt"
    """A packaged reward, a reward model's folder or hub id with its range (owner/name@squash:0,2), a Python
    function (module:function@0,1), or an endpoint's address."""
    answer_tokens: int = 64
    """Tokens of the frozen model's answers, at most."""
    answer_temperature: float = 1.0
    """Of the frozen model. The paper evaluates with 1.5, top-p 0.6 and top-k 20."""
    answer_top_p: float = 1.0
    """Of the frozen model."""
    answer_top_k: int = 0
    """Of the frozen model; 0 keeps all tokens."""
    target_model: str | None = None
    """Endpoint: the model's name there."""
    target_key_env: str | None = None
    """Endpoint: NAME of the environment variable that holds its key."""
    target_dialect: str | None = None
    """Endpoint: openai, vllm or transformers (the latter two take top-k)."""
    target_concurrency: int | None = None
    """Endpoint: requests at a time. Default: 8."""
    target_max_calls: int | None = None
    """Endpoint: budget of requests, after which the run stops and can be resumed."""
    target_max_tokens: int | None = None
    """Endpoint: budget of tokens."""
    prices: tuple[float, float] | None = None
    """Money per million prompt tokens and answer tokens, for the ledger."""
    dtype: str = "bfloat16"
    """Type of the weights of a frozen model in this process: float32 makes answers independent of how they
    are batched, bfloat16 halves its memory, 4bit quarters that (bitsandbytes)."""
    batch_size: int = 64
    """Sequences at once, of a frozen model in this process."""
    chat_template_kwargs: str | None = None
    """Further arguments of the chat templates of prompter and frozen model, as a JSON object:
    {"enable_thinking": false} turns off the thoughts of Qwen's models."""

    def __post_init__(self) -> None:
        parse_options(self.chat_template_kwargs)

    def chat_options(self) -> dict[str, Any] | None:
        """`chat_template_kwargs` as a dictionary; None where it was not given."""
        return None if self.chat_template_kwargs is None else parse_options(self.chat_template_kwargs)

    def sampling(self) -> Sampling:
        """How the frozen model decodes."""
        return Sampling(self.answer_temperature, self.answer_top_p, self.answer_top_k, self.answer_tokens)

    def endpoint(self) -> dict[str, Any]:
        """Fields of `endpoint.Endpoint` that were given."""
        names = ("model", "key_env", "dialect", "concurrency", "max_calls", "max_tokens")
        values = {name: getattr(self, f"target_{name}") for name in names}
        return {name: value for name, value in values.items() if value is not None}
