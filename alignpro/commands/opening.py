"""Opens what the options of a verb name: checked before anything is loaded, with what it will cost."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from alignpro.commands.options import DEFAULT_PROMPTER, EnvironmentSettings, PromptSettings
from alignpro.commands.shared import REWARD_FILE
from alignpro.errors import AlignProError

if TYPE_CHECKING:
    from alignpro.llm.rewards.reward import Reward
    from alignpro.llm.targets.ledger import Cached
    from alignpro.llm.targets.target import Target

PROMPT_TOKENS = 64
"""Tokens of a rewrite in its chat template, in the estimate of costs."""
PROMPTER_FOLDER = "prompter"
"""The trained prompter in the folder of the run that made it."""


def is_address(name: str) -> bool:
    """Whether `name` is that of an endpoint and not of a model in this process."""
    return name.startswith(("http://", "https://"))


def on_vllm(name: str) -> bool:
    """Whether `name` is that of a model to run on vLLM in this process."""
    return name.startswith("vllm:")


def trained_home(name: str) -> str:
    """The folder of a trained prompter where `name` is that of the run that made it; else `name`."""
    from alignpro.llm.models.catalogue import packaged
    from alignpro.llm.policies.prompter import PROMPTER_FILE

    inner = Path(name).expanduser() / PROMPTER_FOLDER
    return str(inner) if name and not packaged(name) and (inner / PROMPTER_FILE).is_file() else name


class World:
    """The frozen model and the reward that were named: checked now, opened when asked for."""

    def __init__(self, settings: EnvironmentSettings) -> None:
        from alignpro.llm.models import catalogue, devices
        from alignpro.llm.rewards.opening import JUDGE, judge_opener, keyed, read_plan
        from alignpro.llm.targets.engine import PREFIX, check_engine, parse_engine
        from alignpro.llm.targets.ledger import Prices
        from alignpro.llm.targets.refusals import Refusals

        self.settings = settings
        self._endpoint: Target | None = None
        if (given := settings.target_endpoint.given()) and not is_address(settings.target):
            raise AlignProError(
                f"target_{given[0]}: is for an endpoint, and {settings.target!r} is no http(s) address"
            )
        if settings.target_tokenizer is not None and not is_address(settings.target):
            raise AlignProError(
                f"target_tokenizer: is for a vLLM server, and {settings.target!r} is no http(s) address"
            )
        self._engine = parse_engine(settings.target_engine)
        if settings.target_engine is not None and not on_vllm(settings.target):
            raise AlignProError(f"target_engine: is for vllm:NAME, and the target is {settings.target!r}")
        if is_address(settings.target):
            from alignpro.llm.targets.endpoint import Endpoint

            if settings.target_endpoint.model is None:
                raise AlignProError(f"target_model: name the model that {settings.target} serves")
            self._endpoint = Endpoint(settings.target, settings.target_endpoint)
            if settings.target_tokenizer is not None:
                self._endpoint = self._served(settings.target_tokenizer)
        elif on_vllm(settings.target):
            check_engine(settings.target, settings.dtype)
            catalogue.check_name(settings.target.removeprefix(PREFIX))
            devices.check_dtype(settings.dtype)
        else:
            catalogue.check_name(settings.target)
            devices.check_dtype(settings.dtype)
        self._plan, judge = read_plan(settings.reward), settings.reward_judge
        specs = self._plan.specs
        kinds = [spec.kind for spec in specs]
        self.endpoints = kinds.count("endpoint")
        """How many of the rewards are at an address, judges apart."""
        self._judge: dict[str, Any] = {}
        if JUDGE in kinds:
            self._judge = {"settings": judge, "endpoint": settings.reward_endpoint, "dtype": settings.dtype}
            self._judge["chat_template_kwargs"] = settings.chat_options() or {}
            judge_opener(**self._judge)  # refused here, before it is opened
            name = judge.shown(settings.reward_endpoint.model)
            specs = tuple(replace(spec, shown=name) if spec.kind == JUDGE else spec for spec in specs)
        elif given := judge.given():
            raise AlignProError(f"reward_{given[0]}: is for --reward {JUDGE}; leave it out")
        self.reward_name = replace(self._plan, specs=specs).shown
        if self.endpoints and judge.address:
            raise AlignProError(
                "reward_judge: is at an address, as another reward is, and one --reward-key-env would go to "
                "both; take a judge in this process, or the other reward in another way"
            )
        hosts = {urlsplit(spec.target).netloc for spec in self._plan.specs if spec.kind == "endpoint"}
        if len(hosts) > 1 and keyed(settings.reward_endpoint).key_env:
            raise AlignProError(
                f"reward_key_env: would go to {' and '.join(sorted(hosts))}, and may be for one of them; "
                "take one of the rewards in another way"
            )
        if not (self.endpoints or judge.address) and (given := settings.reward_endpoint.given()):
            raise AlignProError(
                f"reward_{given[0]}: is for an endpoint, and {self.reward_name!r} is no http(s) address"
            )
        if "classifier" not in kinds and (given := settings.reward_model.given()):
            raise AlignProError(
                f"reward_{given[0]}: is for a reward model in this process, and {self.reward_name!r} is none"
            )
        self.refusals = Refusals(settings.refused_reward, settings.refused_most)
        """Reward of refused answers, and their count in this run."""
        self.prices = Prices(*settings.prices) if settings.prices is not None else None

    def money(self, answers: int, tokens: int, scores: int | None = None) -> str:
        """Say what `answers` of at most `tokens` cost at most, and their scores, to end a line with.

        Args:
            scores: how many answers are scored. None: as many as are asked for.
        """
        said, scores = "", answers if scores is None else scores
        if self.prices is not None and answers:
            most = self.prices.cost(answers * PROMPT_TOKENS, answers * tokens)
            said = f"; about {most:.2f} at most for answers, at {PROMPT_TOKENS} tokens a prompt"
        if not scores:
            return said
        if self.endpoints:
            said += f"; {self.endpoints * scores} scores from an endpoint"
        return said + (self.settings.reward_judge.bill(scores, PROMPT_TOKENS + tokens) if self._judge else "")

    def _served(self, tokenizer: str) -> "Target":
        from alignpro.llm.models.load import load_tokenizer
        from alignpro.llm.targets.served import Served

        settings = self.settings
        read = load_tokenizer(tokenizer, chat_template_kwargs=settings.chat_options())
        return Served(settings.target, settings.target_endpoint, *read)

    def target(self) -> "Target":
        from alignpro.llm.targets.engine import PREFIX, InProcess
        from alignpro.llm.targets.local import LocalTarget

        settings = self.settings
        if on_vllm(settings.target):
            return InProcess(
                settings.target.removeprefix(PREFIX),
                dtype=settings.dtype,
                engine=self._engine,
                chat_template_kwargs=settings.chat_options(),
            )
        return self._endpoint or LocalTarget(
            settings.target,
            dtype=settings.dtype,
            batch_size=settings.batch_size,
            chat_template_kwargs=settings.chat_options(),
        )

    def contents(self, **models: str) -> "dict[str, Callable[[], str | None]]":
        """Digests of what the names of a run stand for, for `runs.Run.contents`: the frozen model's, the
        reward's, its judge's, and those of further models."""
        from functools import partial

        from alignpro.llm.models import contents

        if not is_address(self.settings.target):
            models = {"target": self.settings.target.removeprefix("vllm:"), **models}
        judge = self.settings.reward_judge
        if self._judge and judge.judge is not None and not judge.address:
            models["reward_judge"] = judge.judge
        found: dict[str, Callable[[], str | None]] = {"reward": self._plan.content}
        return found | {name: partial(contents.of_model, model) for name, model in models.items()}

    def kept(self, target: "Target", folder: Path) -> "Cached":
        """Answers of the frozen model on file, those of the run in `folder` or those that runs share."""
        shared = self.settings.answers_folder
        return kept(target, folder / "answers" if shared is None else Path(shared).expanduser(), self.prices)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the prompts' data that the reward needs."""
        return self._plan.reads.needed

    @property
    def optional_columns(self) -> tuple[str, ...]:
        """Columns that it reads where they are there; `*` stands for all."""
        return self._plan.reads.optional

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the reward cannot judge, such as those without a column that it needs."""
        self._plan.check_prompts(prompts)

    def reward(self, folder: Path) -> "Reward":
        """The reward; scores of endpoints are kept in `folder`, or beside the answers that runs share."""
        from alignpro.llm.rewards.endpoint import keep_scores
        from alignpro.llm.targets.refusals import Refusals

        def declared() -> Refusals:  # of its own samples
            return Refusals(most=self.settings.refused_most)

        model = self.settings.reward_model
        options: dict[str, Callable[[], dict[str, Any]]] = {
            "endpoint": lambda: {"settings": self.settings.reward_endpoint, "refusals": declared()},
            "judge": lambda: self._judge | {"refusals": declared()},
            "classifier": lambda: {
                "dtype": model.dtype,
                "batch_size": model.batch_size,
                "max_tokens": model.sample_tokens,
            },
        }
        opened = [spec.open(**options.get(spec.kind, dict)()) for spec in self._plan.specs]
        scores, shared = folder / "scores", self.settings.answers_folder
        if shared is not None and not scores.exists():
            scores = Path(shared).expanduser() / "scores"
        found = self._plan.put_together([keep_scores(reward, scores) for reward in opened])
        share = (self.refusals.worth(found) - found.low) / (found.high - found.low)
        # What one does not score lies in its contribution's range where it lies in the whole one.
        for weight, part in zip(self._plan.weights, opened, strict=True):
            if (own := getattr(part, "refusals", None)) is not None:
                at = share if weight > 0 else 1 - share
                own.reward = min(part.high, part.low + at * (part.high - part.low))
        return found

    def told(self, reward: "Reward", folder: Path) -> None:
        """Say what scoring asked of services, and keep in `folder` what the reward says of itself."""
        from alignpro.files import write_json
        from alignpro.llm.models import packages
        from alignpro.llm.rewards.combined import line_of
        from alignpro.report.numbers import plain

        for line in line_of(reward).splitlines():
            packages.note(line)
        declared = {"low": reward.low, "high": reward.high}
        write_json(folder / REWARD_FILE, plain(reward.describe() | declared))

    def tell_again(self, folder: Path) -> None:
        """Keep in `folder` what `told` does, where a finished run has lost it: without its counts."""
        from alignpro.files import read_json
        from alignpro.llm.models import packages

        try:
            said = read_json(folder / REWARD_FILE, dict)
        except AlignProError:
            said = {}
        if not all(type(said.get(name)) in (int, float) for name in ("low", "high")):
            packages.note(f"{folder / REWARD_FILE}: is missing or damaged; made again, without its counts")
            self.told(self.reward(folder), folder)


def kept(target: "Target", folder: Path, prices: Any = None) -> "Cached":
    """Answers on file in `folder`. A model in this process redoes a call that was cut short, so that an
    interruption changes no answer; nothing that was paid for is asked again."""
    from alignpro.llm.targets.ledger import Cached

    return Cached(target, folder, prices=prices, note=None, whole=not target.remote)


def how_read(target: "Target") -> dict[str, Any]:
    """How a model in this process is read (`forward.How`); nothing of an endpoint."""
    model = getattr(target, "model", None)
    if not hasattr(model, "generation_config"):
        return {}
    from alignpro.llm.models.forward import how_of

    return how_of(model).describe()


def check_target_room(target: "Target", prompts: Sequence[str], tokens: int) -> None:
    """Refuse prompts that leave a model whose tokens are known here no room to answer, before it is asked."""
    local: Any = target
    if not how_read(target) and hasattr(target, "too_long"):
        for x in prompts:
            if (reason := local.too_long(local.count_tokens(x), tokens)) is not None:
                raise AlignProError(f"prompt {x[:60]!r}: {reason}; leave it out, or lower answer_tokens")
    elif how_read(target):
        from alignpro.llm.policies.prompter import check_room, target_ids

        ids = [target_ids(local.tokenizer, x) for x in prompts]
        check_room(local.model, prompts, ids, tokens, f"target {target.name!r}")


def prompts_digest(prompts: Sequence[str]) -> str:
    """Name the prompts, in their order and with all that they come with, in a run's record."""
    from alignpro.llm.models.prompt import as_json

    return hashlib.sha256(json.dumps([as_json(x) for x in prompts]).encode()).hexdigest()[:16]


def user_prompts(
    source: PromptSettings,
    prompter: str,
    split: str = "train",
    n: int | None = None,
    world: Any = None,
    *,
    fewer: bool = False,
) -> list[str]:
    """The user's prompts: those of the file, or a split of the data set; the first n.

    Args:
        world: says which columns the reward asks for, which are kept with them.
        fewer: whether fewer than n of a data set will do.
    """
    from alignpro.llm.data import own as own_files
    from alignpro.llm.data import public, subset
    from alignpro.llm.data.rows import Reading
    from alignpro.llm.models import packages

    if n is not None and n < 1:
        raise AlignProError(f"prompts {n}: give at least 1")
    public.check_split(split)  # a mistake also where a file is used whole
    own, fits, longest = None, None, source.max_prompt_tokens
    keep, optional = (tuple(getattr(world, name, ())) for name in ("columns", "optional_columns"))
    reading = Reading(source.prompt_column, keep, optional, source.system_prompt)
    if source.prompts_file is None:
        public.check_dataset(source.dataset, source.data_folder, split)
    else:
        path, used = Path(source.prompts_file).expanduser(), dict[str, None]()
        own = list(dict.fromkeys(own_files.file_prompts(path, reading, used)))
    if longest is not None:
        fits = subset.shorter(tokens=longest, tokenizer=_tokenizer(prompter))
    if own is None:
        more: dict[str, Any] = {
            "folder": source.data_folder,
            "fits": fits,
            "reading": reading,
            "fewer": fewer,
        }
        return public.prompts(source.dataset, split, n, **more)
    found = [x for x in own if fits is None or fits(x)]
    if not found:
        raise AlignProError(f"max_prompt_tokens {longest}: no prompt is as short; raise it")
    if len(found) < len(own):
        packages.note(f"{len(own) - len(found)} prompts of more than {longest} tokens left out")
    if n is not None and n > len(found):
        raise AlignProError(f"prompts {n}: choose from 1 to the {len(found)} there are")
    own_files.note(len(found[:n]), used, path.name)
    return found[:n]


def divided_prompts(
    source: PromptSettings, prompter: str, n: int | None, held_out: int, world: Any = None
) -> tuple[list[str], list[str]]:
    """The user's prompts to learn from, the first n, and at most `held_out` to evaluate on meanwhile.

    They are the train and the validation split of the data set. A file of prompts is divided in the same way
    (`split_of`), and its test prompts are left alone.
    """
    from alignpro.llm.data.rows import first_turn
    from alignpro.llm.data.split import split_of

    if source.prompts_file is None:
        learned = user_prompts(source, prompter, n=n, world=world)
        return learned, user_prompts(source, prompter, "validation", held_out, world, fewer=True)
    own = user_prompts(source, prompter, world=world)
    parts = {part: [x for x in own if split_of(first_turn(x)) == part] for part in ("train", "validation")}
    learned = parts["train"]
    if not learned or (n is not None and not 1 <= n <= len(learned)):
        raise AlignProError(
            f"train_prompts {n}: {len(learned)} of the file's {len(own)} prompts are to learn from, the "
            "others held out (eval_every); give more prompts, or lower it"
        )
    return learned[:n], parts["validation"][:held_out]


def prompts_of_candidates(
    source: PromptSettings, target: str, settings: Any, world: World
) -> tuple[list[str], list[str]]:
    """The prompts on which candidate instructions are tried, and those held out from that.

    They are the train and the test split of the data set; a file is divided by the hash of its texts
    (`instruct.divided`, which reads `settings`).
    """
    from alignpro.llm.arms.instruct import divided

    # Prompts are counted as the frozen model reads them, where it is here to be asked.
    reader = DEFAULT_PROMPTER if is_address(target) else target
    training = user_prompts(source, reader.removeprefix("vllm:"), "train", None, world)
    whole = source.prompts_file is not None
    others = training if whole else user_prompts(source, reader.removeprefix("vllm:"), "test", None, world)
    found = divided(training, others, settings)
    world.check_prompts([x for part in found for x in part])
    return found


def for_candidates(
    world: World, candidates: Sequence[str], prompts: Sequence[str], folder: Path, opened: list[Any]
) -> Callable[[], "Cached"]:
    """Opens the frozen model, behind its cache, once it is known that the longest candidate leaves it room;
    it is then the one item of `opened`."""
    from alignpro.llm.models.prompt import said_in, with_instruction

    def open_target() -> "Cached":
        target, longest = world.target(), max(candidates, key=len)
        asked = [said_in(x, with_instruction(x, longest)) for x in prompts]
        check_target_room(target, asked, world.settings.answer_tokens)
        opened.append(world.kept(target, folder))
        return opened[-1]

    return open_target


def _tokenizer(prompter: str) -> Any:
    """The tokenizer with which the prompter reads, without its model."""
    from alignpro.llm.models import adapters, catalogue, resolve
    from alignpro.llm.models.load import read_tokenizer

    home = resolve.resolve(prompter)
    while catalogue.is_adapter(home):  # which has no tokenizer of its own
        home = resolve.resolve(adapters.adapter_base(home))
    try:
        return read_tokenizer(home)
    except Exception as error:
        raise AlignProError(
            f"model {prompter!r}: cannot read its tokenizer ({error!r}); save it with save_pretrained"
        ) from error
