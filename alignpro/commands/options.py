"""Options that several verbs share, each written once."""

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from alignpro.commands.flags import Prefixed
from alignpro.errors import AlignProError, check_choices
from alignpro.llm.models.chat import parse_options
from alignpro.llm.models.sampling import Dtype, Sampling
from alignpro.llm.rewards.rubric import JudgeRewardSettings
from alignpro.llm.targets.settings import EndpointSettings
from alignpro.llm.training.settings import Reporter

DEFAULT_PROMPTER = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """A run with a folder of its own."""

    out: str
    """Folder of the run, made if need be."""
    config: str | None = None
    """YAML file with any of these options, such as lam: 0.05.

    Each is on a line of its own; what is also on the command line is taken from there. A reward that is a
    Python function must be in a file beside it, and the variable of a key stays on the command line."""


@dataclass(frozen=True, kw_only=True)
class ResumedRun(RunOptions):
    """A run that goes on after an interruption when told to."""

    resume: bool = False
    """Continue the run in that folder where it was interrupted, or start one.

    The settings must be the same; it goes on from its last checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ReportedRun(ResumedRun):
    """A run whose metrics can be followed."""

    report_to: tuple[Reporter, ...] = ()
    """Services that also receive the metrics while it trains, which must be installed. Left out:
    metrics.jsonl and the page alone."""


@dataclass(frozen=True, kw_only=True)
class TemplateOption:
    """How a model is asked for rewrites."""

    template: Literal["rewrite", "append"] | None = None
    """How a model is asked to rewrite a prompt: to write it anew, or to write only what follows it (append).
    Left out: rewrite; a trained prompter keeps what it was trained with."""


@dataclass(frozen=True, kw_only=True)
class PrompterOptions(TemplateOption):
    """The prompter that a verb starts from."""

    prompter: str = DEFAULT_PROMPTER
    """The reference prompter, rho_sft in the paper: a packaged model's name, a local folder or an id on the
    Hugging Face hub; instructions-sft is one that appends a plain instruction.

    A folder may be that of a fine-tuned prompter, or of the run that made it. instructions-sft is a packaged
    model that is fine-tuned once on this machine."""


@dataclass(frozen=True, kw_only=True)
class ChatOption:
    """How conversations are written down for models."""

    chat_template_kwargs: str | None = None
    """Further arguments of the models' chat templates, as a JSON object: {"enable_thinking": false} turns off
    the thoughts of Qwen's models. Left out: none; a trained prompter keeps those it was trained with."""

    def __post_init__(self) -> None:
        parse_options(self.chat_template_kwargs)

    def chat_options(self) -> dict[str, Any] | None:
        """`chat_template_kwargs` as a dictionary; None where it was not given."""
        return None if self.chat_template_kwargs is None else parse_options(self.chat_template_kwargs)


@dataclass(frozen=True, kw_only=True)
class SeedOption:
    """A seed, which makes two runs equal."""

    seed: int = 0
    """Number that determines what is drawn: the same seed and options give the same rewrites and answers."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """The user prompts."""

    dataset: str = "instructions"
    """Data set of the user prompts: a name, a file or folder of your own, or any id on the Hugging Face hub.

    An id is owner/name or owner/name:configuration. Packaged: instructions, mt-bench, dpo-demo, healthbench
    or verifiable (for the reward of that name). On the hub: ultrafeedback, ultrafeedback-binarized,
    helpsteer, orca-dpo-pairs, openorca or bpo-test. In files that you download: dolly-eval,
    self-instruct-eval or vicuna-eval."""
    data_folder: str | None = None
    """Folder with the files of the hub's data set, for a machine that cannot reach the hub. Left out: they
    are downloaded."""
    prompts_file: str | None = None
    """File of your own prompts, used whole instead of a data set. Left out: the data set's prompts.

    Ending in .jsonl, .json, .csv, .tsv or .parquet; any other is read as text with one prompt per line."""
    prompt_column: str | None = None
    """Column of the prompts, texts or conversations (lists of messages); several texts are joined as
    instruction+input. Left out: prompt, or another common name where it is the only one."""
    system_prompt: str | None = None
    """System message for every prompt that has none. Left out: prompts stay as they are."""
    max_prompt_tokens: int | None = None
    """Leave out prompts of more tokens than this, counted as the prompter reads them; long ones take memory
    and time. Left out: every prompt is used."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise AlignProError(
                f"max_prompt_tokens {self.max_prompt_tokens}: give at least 1, or leave it out"
            )
        if self.system_prompt is not None and not self.system_prompt.strip():
            raise AlignProError("system_prompt: is empty; write one, or leave it out")
        if self.prompts_file is not None and self.data_folder is not None:
            raise AlignProError(f"data_folder {self.data_folder}: is for dataset; give it or prompts_file")


@dataclass(frozen=True, kw_only=True)
class MeasuredPrompts(PromptSettings):
    """The user prompts that are measured on."""

    split: Literal["train", "validation", "test"] = "test"
    """Part of the data set. Training learns from train, so measure on test."""
    prompts: int | None = None
    """How many prompts, from the first. Left out: all of them."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings:
    """How a reward model (a sequence classifier) works in this process."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights of a reward model in this process."""
    batch_size: int = 16
    """How many samples a reward model in this process scores at once; lower it where memory runs out."""
    sample_tokens: int | None = None
    """The most tokens of a sample, prompt and answer, that a reward model in this process reads; longer
    prompts lose their beginning. (--reward-max-tokens is the budget of a reward behind an endpoint.) Left
    out: what it was trained with, or what it can take."""

    def __post_init__(self) -> None:
        check_choices(self)

    def given(self) -> list[str]:
        """Names of the fields that are not at their defaults."""
        return [f.name for f in fields(self) if getattr(self, f.name) != f.default]

    def record(self) -> dict[str, Any]:
        """Settings that determine scores, as a run's record keeps them: None at their defaults."""
        given = self.given()
        names = ("dtype", "sample_tokens")
        return {f"reward_{name}": getattr(self, name) if name in given else None for name in names}


@dataclass(frozen=True, kw_only=True)
class EnvironmentSettings(ChatOption):
    """The frozen model, how it answers, and the reward that judges its answers."""

    target: str = "smollm2-135m-instruct"
    """The frozen model, which answers the rewritten prompts: a packaged model's name, a local folder, a hub
    id, or the http(s) address of an OpenAI-compatible endpoint.

    After vllm: (as in vllm:owner/name) a folder or hub id runs on vLLM in this process."""
    target_tokenizer: str | None = None
    """For a frozen model behind a vLLM server: name or folder of that model, whose tokenizer alone is read
    here. The server is then asked by token ids, for several answers at once, and tells log-probabilities too.
    Left out: it is asked by messages, and tells none."""
    target_engine: str | None = None
    """For vllm:NAME: arguments of vLLM's engine, as a JSON object such as '{"tensor_parallel_size": 2,
    "gpu_memory_utilization": 0.8, "max_model_len": 4096}'. Left out: vLLM's own."""
    reward: tuple[str, ...] = ("minilm-bt",)
    """The reward, which scores the answers: minilm-bt (preferences), ease, sentiment, brevity, json, list,
    clean, verifiable, a Python function (./mine.py:score@0,1) or another (see --help-all).

    list:5 is for lists of five items. A judge on a rubric: judge (see --reward-judge). Your own has its range
    after an @: a reward model's folder or hub id (owner/name@squash:0,2; owner/name#LABEL@0,1 for the
    probability of one of several labels), a Python function (./mine.py:score@0,1, or module:score@0,1) or the
    address of an endpoint; a folder that reward-model wrote knows its range. Several are added up
    (0.7*minilm-bt 0.3*ease) or, after the word mean, averaged, and each is reported apart."""
    answer_tokens: int = 64
    """The most tokens of one answer; a longer one is cut."""
    answer_temperature: float = 1.0
    """Temperature of the frozen model: 1 draws from its own distribution, which the theory is about, more is
    more varied, and 0 takes the likeliest token. The paper evaluates with 1.5, top-p 0.6 and top-k 20."""
    answer_top_p: float = 1.0
    """Draw answers from the likeliest tokens that together have this probability, above 0 and at most 1; 1
    keeps all tokens."""
    answer_top_k: int = 0
    """Draw answers from this many of the likeliest tokens; 0 keeps all tokens."""
    prices: tuple[float, float] | None = None
    """Money for a million prompt tokens, and for a million answer tokens, of the frozen model: what a run can
    cost is said before it asks, and what it did cost at its end. Left out: tokens alone are counted."""
    answers_folder: str | None = None
    """Folder of answers, and of scores by an endpoint or a judge, that several runs share, also at the same
    time: what one of them paid for, the others do not ask again, and their budgets are one. Left out: every
    run keeps its own, in its folder's answers/ and scores/."""
    refused_reward: float | None = None
    """Reward of an answer that the frozen model's service refuses to give, by its content filter for one.
    Left out: the lower end of the reward's range."""
    refused_most: float = 0.2
    """Share of refused answers, from 0 to 1, above which the run ends."""
    dtype: Dtype = "auto"
    """Number format of the weights of models in this process: float32 makes answers independent of how they
    are batched, bfloat16 halves the memory, and 4bit quarters that (it needs bitsandbytes). auto is bfloat16
    on a GPU or processor that computes with it, and float32 on others."""
    batch_size: int = 64
    """How many sequences a model in this process works on at once; lower it where memory runs out."""
    target_endpoint: Annotated[EndpointSettings, Prefixed("target")] = field(default_factory=EndpointSettings)
    reward_endpoint: Annotated[EndpointSettings, Prefixed("reward")] = field(default_factory=EndpointSettings)
    reward_judge: Annotated[JudgeRewardSettings, Prefixed("reward")] = field(
        default_factory=JudgeRewardSettings
    )
    reward_model: Annotated[RewardModelSettings, Prefixed("reward")] = field(
        default_factory=RewardModelSettings
    )

    flags: ClassVar[dict[str, str]] = {"prices": "target_prices"}
    """Names of fields on the command line where they differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)

    def record(self, reward: str) -> dict[str, Any]:
        """The frozen model, how it decodes, and the reward's name, as a run's record keeps them."""
        from alignpro.llm.models.devices import dtype_of

        return {
            "target": self.target,
            **self.target_endpoint.record("target"),
            "target_tokenizer": self.target_tokenizer,
            "target_engine": self.target_engine,
            **self.reward_endpoint.record("reward"),
            "dtype": dtype_of(self.dtype),
            "reward": reward,
            **self.reward_model.record(),
            "sampling": asdict(self.sampling()),
            "chat_template_kwargs": self.chat_options() or {},
            "refused_reward": self.refused_reward,
            **self.reward_judge.record(),
        }

    def sampling(self) -> Sampling:
        """How the frozen model decodes."""
        return Sampling(self.answer_temperature, self.answer_top_p, self.answer_top_k, self.answer_tokens)
