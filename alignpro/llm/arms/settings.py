"""Settings of rollouts, judging and enumeration. Nothing here needs torch."""

from dataclasses import dataclass
from typing import ClassVar

from alignpro.errors import AlignProError, check_choices
from alignpro.llm.models.sampling import Dtype, Sampling, is_int
from alignpro.llm.training.settings import check_positive, check_whole


@dataclass(frozen=True)
class RolloutSettings:
    """How prompters are rolled out: which arms, and how often."""

    arms: tuple[str, ...] = ("none", "sft")
    """Arms to compare, any of: none (the prompt as it is), sft (rewrites of the reference prompter, rho_sft),
    star (those, resampled to approach the optimal prompter, rho*) and best_of_n (the best of n of those)."""
    trained: tuple[str, ...] = ()
    """Folders of trained prompters, or of runs that trained one, to compare too. They are one arm, called
    trained, with a seed for each; NAME=FOLDER makes an arm called NAME instead."""
    rlhf: tuple[str, ...] = ()
    """Folders that train --policy rlhf wrote. They make the arm rlhf: no rewrite, the tuned model answers."""
    instruction: tuple[str, ...] = ()
    """Fixed instructions to compare too, as NAME=TEXT: the arm NAME adds the text to every prompt's end."""
    rewrites: tuple[str, ...] = ()
    """Files of rewrites that another system made (or people), as NAME=FILE: the arm NAME asks them. Rows of a
    .jsonl, .json, .csv or .tsv file with a prompt and its rewrite, or a list of them."""
    draws: int = 4
    """How many rewrites of each prompt to draw, in each arm and seed; more narrow the intervals and cost
    answers."""
    answers: int = 2
    """How many answers to each rewrite. At least 2 tell the noise of answers from that of rewrites."""
    rewrite_tokens: int | None = None
    """The most tokens of one rewrite. Left out: as many as the trained prompters were trained with, or as
    the reference prompter was made for."""
    lam: float = 0.05
    """For star: weight of the KL divergence in prompt optimization (lambda), positive, in reward units, as in
    training. The smaller, the further rewrites go from what rho_sft would write."""
    proposals: int = 16
    """For star and best_of_n: how many rewrites of rho_sft each prompt's are resampled from."""
    proposal_answers: int = 1
    """For star and best_of_n: how many answers judge each distinct proposal. What is resampled is answered
    afresh, so that luck in the judging does not count."""
    best_of: int | None = None
    """For best_of_n: n, at most the proposals. Left out: all proposals."""
    seed: int = 0
    """Number that determines rewrites and answers. Trained arms count their seeds from here."""

    flags: ClassVar[dict[str, str]] = {"rewrites": "rewrites_file"}
    """Names of fields on the command line where they differ."""

    def __post_init__(self) -> None:
        check_whole(self, {"draws": 1, "answers": 1, "proposals": 1, "proposal_answers": 1, "seed": 0})
        if self.rewrite_tokens is not None and self.rewrite_tokens < 1:
            raise AlignProError(f"rewrite_tokens {self.rewrite_tokens}: give at least 1, or leave it out")
        check_positive(self, ("lam",))
        if self.best_of is not None and not 1 <= self.best_of <= self.proposals:
            raise AlignProError(f"best_of {self.best_of}: choose from 1 to the {self.proposals} proposals")


@dataclass(frozen=True)
class InstructSettings:
    """The race of instructions, and how its winner is measured."""

    instructions: str | None = None
    """File of candidate instructions, one on each line; each is tried at the end of the prompts, and no
    instruction is tried too. Left out: the 102 of the packaged bank, such as "Use simple words."."""
    budget: int | None = None
    """The most answers of the frozen model that the race may ask for; more find a better instruction, or the
    same with more certainty. Left out: 40 for each candidate."""
    answers: int = 1
    """How many answers to each prompt with each instruction. More prompts tell more than more answers; where
    prompts run out, answers grow by themselves, unless the temperature is 0."""
    prompts: int | None = None
    """How many prompts to learn from, in the race, at most. Left out: all that are for training."""
    held_out: int = 100
    """How many held-out prompts to measure on, at most, which the race does not use: of the test split of a
    data set, or of a file the 30% that are not for training. At least 5."""
    held_out_answers: int = 2
    """How many answers to each held-out prompt, with the winner and without any instruction."""
    level: float = 0.95
    """How often an interval covers the truth, and how often the best instruction is not ruled out, between
    0.5 and 1."""
    seed: int = 0
    """Number that determines the order of prompts, and the answers."""

    flags: ClassVar[dict[str, str]] = {
        "instructions": "instructions_file",
        "prompts": "train_prompts",
        "held_out": "eval_prompts",
        "held_out_answers": "eval_answers",
    }
    """Names of fields on the command line where they differ."""

    def __post_init__(self) -> None:
        # With fewer than 5 prompts there is no interval (`intervals.LEAST_PROMPTS`, which needs NumPy).
        check_whole(self, {"answers": 1, "held_out": 5, "held_out_answers": 1, "seed": 0})
        if not 0.5 < self.level < 1:
            raise AlignProError(f"level {self.level}: must lie between 0.5 and 1; give 0.95, say")
        for name in ("budget", "prompts"):
            value = getattr(self, name)
            if value is not None and (not is_int(value) or value < 1):
                raise AlignProError(f"{name} {value!r}: give a whole number of at least 1, or leave it out")


@dataclass(frozen=True)
class RouteSettings:
    """How a router is taught to pick instructions, and how it is measured."""

    instructions: str | None = None
    """File of candidate instructions, one on each line; the router picks one for each prompt, or none at
    all. Left out: 27 of the packaged bank, three of each kind."""
    prompts: int | None = 96
    """How many prompts to learn from, at most, each asked with every candidate: that is as many answers as
    prompts times candidates. At least 8."""
    answers: int = 1
    """How many answers to each prompt with each candidate. More prompts tell more than more answers."""
    held_out: int = 100
    """How many held-out prompts to measure on, at most, from which nothing is learned: of the test split of a
    data set, or of a file the 30% that are not for training. At least 5."""
    held_out_answers: int = 2
    """How many answers to each held-out prompt as the router has it, with the best single instruction, and
    without any."""
    single: str | None = None
    """Instruction that the router is compared with, such as the winner of instruct; a candidate, too. Left
    out: the one that earns most in the router's own table, which is chosen by fewer answers than a race
    has."""
    reader: str | None = None
    """Causal model whose middle layer reads the prompts: a packaged name, a local folder or a hub id. Left
    out: the frozen model, where it is one of these; else smollm2-135m-instruct."""
    level: float = 0.95
    """How often an interval covers the truth, between 0.5 and 1."""
    seed: int = 0
    """Number that determines which prompts are learned from, and the answers."""

    flags: ClassVar[dict[str, str]] = InstructSettings.flags
    """Names of fields on the command line where they differ."""

    def __post_init__(self) -> None:
        check_whole(self, {"answers": 1, "held_out": 5, "held_out_answers": 1, "seed": 0})
        if self.prompts is not None and (not is_int(self.prompts) or self.prompts < 8):
            raise AlignProError(f"prompts {self.prompts!r}: give at least 8, or leave it out")
        if not 0.5 < self.level < 1:
            raise AlignProError(f"level {self.level}: must lie between 0.5 and 1; give 0.95, say")


@dataclass(frozen=True)
class EnumerationSettings:
    """How large the finite sets of rewrites and responses are, and how they are drawn."""

    rewrites: int = 16
    """Distinct rewrites of each prompt at most, the prompt itself among them."""
    responses: int = 32
    """Distinct responses to each prompt at most."""
    rewrite_tokens: int = 32
    """Longest rewrite in tokens; candidates that do not end by then are dropped."""
    response_tokens: int = 40
    """Longest response in tokens; longer ones are cut there, as a token limit would."""
    candidate_temperature: float = 0.9
    """Temperature at which candidates for rewrites are drawn; the policies always have temperature 1."""
    seed: int = 0
    """Determines which rewrites and responses are drawn."""

    def __post_init__(self) -> None:
        least = {"rewrites": 2, "responses": 2, "rewrite_tokens": 2, "response_tokens": 1, "seed": 0}
        check_whole(self, least)
        check_positive(self, ("candidate_temperature",))


@dataclass(frozen=True)
class JudgeSettings:
    """The judge model, and which pairs of answers it compares."""

    judge: str
    """Model that judges: a packaged name, a local folder or a hub id, or the http(s) address of an
    OpenAI-compatible endpoint."""
    prices: tuple[float, float] | None = None
    """Money per million prompt tokens and per million reply tokens, to print the cost before it arises."""
    temperature: float = 0.0
    """How freely the judge draws its reply; 0 takes the likeliest token each time."""
    reply_tokens: int = 256
    """The most tokens of one reply; one that reaches them counts as failed. A judge that reasons first needs
    more."""
    refused_most: float = 0.2
    """Share of replies that the judge's service refuses to give, from 0 to 1, above which the run ends; below
    it they count as failed."""
    forced: bool = False
    """Take the verdict that the judge finds likelier, instead of having it write one: for a judge in this
    process that is too small to keep to the format."""
    prompts: int | None = None
    """How many prompts, from the first. Left out: all of them."""
    per_prompt: int = 1
    """How many pairs of answers to each prompt, at most."""
    seed: int = 0
    """Number that determines the judge's draws, where its temperature is not 0."""
    dtype: Dtype = "auto"
    """Number format of the weights of a judge in this process; auto is bfloat16 on a GPU or processor that
    computes with it, and float32 on others."""
    batch_size: int = 8
    """How many pairs a judge in this process reads at once; fewer need less memory."""
    chat_template_kwargs: str | None = None
    """Further arguments of the chat template of a judge in this process, as a JSON object. Left out: none."""

    flags: ClassVar[dict[str, str]] = {"prices": "judge_prices", "temperature": "reply_temperature"}
    """Names of fields on the command line where they differ."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_whole(self, {"reply_tokens": 1, "per_prompt": 1, "batch_size": 1})
        if self.prompts is not None and (not is_int(self.prompts) or self.prompts < 1):
            raise AlignProError(f"prompts {self.prompts!r}: give a whole number of at least 1")
        if not is_int(self.seed):
            raise AlignProError(f"seed {self.seed!r}: give a whole number")
        if not 0 <= self.refused_most <= 1:
            raise AlignProError(f"refused_most {self.refused_most}: give a share from 0 to 1")
        if self.sampling().temperature and self.forced:
            raise AlignProError(
                f"temperature {self.temperature}: a forced choice draws nothing; leave it at 0, or leave out "
                "--forced"
            )

    def sampling(self) -> Sampling:
        """How the judge decodes."""
        return Sampling(temperature=self.temperature, max_tokens=self.reply_tokens)
