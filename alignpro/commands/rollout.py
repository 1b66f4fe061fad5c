"""`alignpro rollout`."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands.options import EnvironmentSettings, PromptSettings
from alignpro.errors import AlignProError
from alignpro.files import read_json
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.report import keep

if TYPE_CHECKING:
    from alignpro.rollouts import Rollouts

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from alignpro.commands.shared_llm import (
    DEFAULT_PROMPTER,
    _check_target_room,
    _home,
    _kept,
    _money,
    check_environment,
    check_prompter,
    is_address,
    open_target,
    user_prompts,
)
from alignpro.files import writable_folder
from alignpro.llm.models import packages
from alignpro.llm.models.libraries import quiet
from alignpro.llm.policies.prompter import (
    PROMPTER_FILE,
    Prompter,
    Template,
    check_template,
)
from alignpro.llm.rewards import opening
from alignpro.llm.targets.target import Target
from alignpro.report.numbers import interval, limits, number
from alignpro.report.page import MOST_PROMPTS, Dots, Json, Page, Table, dot


def run_rollout(
    out: str,
    settings: RolloutSettings,
    world: EnvironmentSettings,
    *,
    prompter: str | None,
    template: str | None,
    source: PromptSettings,
    split: str,
    prompts: int | None,
) -> None:
    """Everything is checked before anything is loaded."""
    from alignpro import rollouts
    from alignpro.llm.arms import draws, rollout
    from alignpro.llm.rewards.cached import keep_scores

    folder, sampling = writable_folder(out), world.sampling()
    arms = rollout.arms_of(settings)
    # A trained prompter is named by its folder, or by that of the run that made it.
    homes = {arm.folder: _prompter_folder(arm.folder) for arm in arms if arm.folder}
    saved = {name: read_json(home / PROMPTER_FILE) for name, home in homes.items()}
    for arm in arms:
        if arm.folder:
            _check_trained(arm, saved[arm.folder], world)
    trained = {arm.folder: saved[arm.folder] for arm in arms if arm.folder and arm.name != "rlhf"}
    reference = _reference(prompter and _home(prompter), trained, homes)
    chosen = _template(template, reference, trained)
    if settings.rewrite_tokens is None and trained:
        limits = {int(said["max_tokens"]) for said in trained.values()}
        if len(limits) > 1:
            raise AlignProError(
                f"rewrite_tokens: the trained prompters have {sorted(limits)}; give one for all arms"
            )
        settings = replace(settings, rewrite_tokens=limits.pop())
    opened, cost = check_environment(world)
    xs = user_prompts(source, reference, split, prompts)

    weights = {name: rollout.sha256(_weights(home)) for name, home in homes.items()}
    resampling = ("lam", "proposals", "proposal_answers", "best_of")
    record = {
        "prompts": hashlib.sha256(json.dumps(xs).encode()).hexdigest()[:16],
        "draws": settings.draws,
        "answers": settings.answers,
        "rewrite_tokens": settings.rewrite_tokens,
        "prompter": reference,
        "template": asdict(chosen) if chosen else None,
        "target": world.target,
        "target_model": world.target_model,
        "dtype": world.dtype,
        "reward": opening.read_spec(world.reward).shown,
        "sampling": asdict(sampling),
        "chat_template_kwargs": world.chat_options() or {},
        "arms": {
            str(arm): {"folder": arm.folder, "weights": weights[arm.folder]}
            if arm.folder
            else {name: getattr(settings, name) for name in resampling if arm.name in ("star", "best_of_n")}
            for arm in arms
        },
    }
    planned = rollout.plan(folder, xs, settings, record)
    if settings.rlhf and not sampling.natural:
        packages.note(
            "rlhf: policies are trained at temperature 1 with nothing truncated; under this decoding of "
            "answers some of theirs may be impossible to the frozen model, and their KL then is infinite"
        )
    _, asked, _ = planned.asks()
    packages.note(planned.line(sampling) + _money(cost, asked, sampling.max_tokens))

    path, options = folder / rollout.FILE, world.chat_options()
    if options is None and trained:  # as they were trained, and ρ_sft as they were
        options = dict(next(iter(trained.values())).get("chat_template_kwargs") or {})
    if planned.todo or not path.exists() or (folder / rollout.PARTIAL).exists():
        target = opened or open_target(world)
        _check_target_room(target, xs, sampling.max_tokens)
        frozen = _kept(target, folder / "answers", cost)

        def open_policy(name: str) -> tuple[Target, draws.Scorer]:
            from alignpro.llm.targets.local import LocalTarget

            policy = Prompter.from_pretrained(homes[name], dtype=world.dtype, chat_template_kwargs=options)
            local = LocalTarget((policy.model, policy.tokenizer), batch_size=world.batch_size, name=name)
            return _kept(local, folder / "answers"), local.log_probs

        def open_prompter(name: str) -> Prompter:
            if name:
                return Prompter.from_pretrained(homes[name], chat_template_kwargs=options)
            opened = Prompter.from_pretrained(reference, chat_template_kwargs=options)
            opened = replace(opened, template=chosen) if chosen else opened
            opened.prompt_ids(xs)  # all have room, before the first is drawn
            return opened

        work = rollout.Work(
            settings,
            keep_scores(opening.load_reward(world.reward), folder / "scores"),
            frozen,
            getattr(target, "log_probs", None),
            sampling,
            open_prompter,
            open_policy,
            world.batch_size,
        )

        def parties(arm: rollout.Arm) -> dict[str, str]:
            who = {
                "none": "none",
                "sft": reference,
                "star": f"rho* of {reference} at lam {settings.lam:g} by {settings.proposals} proposals",
                "best_of_n": f"best of {settings.best_of or settings.proposals} of {reference}",
            }
            named = f"{arm.folder} {weights[arm.folder]}" if arm.folder else who[arm.name]
            decoding = json.dumps(asdict(sampling))
            return {
                "frozen": f"{target.name} {target.revision}",
                "prompter": named,
                "reward_model": opening.read_spec(world.reward).shown,
                "sampling": decoding,
            }

        with quiet():
            rollout.roll_out(planned, work, parties)
        packages.note(frozen.ledger.line())
    found = rollouts.read(path)
    for name in found.arms:
        rewards_ = found.reward[found.rows(name)]
        print(f"{name}: mean reward {rewards_.mean():.4f} of {len(rewards_)} rollouts")
    print(f"wrote {path}")
    with path.open(encoding="utf-8") as lines:
        keep.keep(report_of_rollout(found, map(json.loads, lines), record | {"seed": settings.seed}), folder)


def _prompter_folder(name: str) -> Path:
    home = Path(_home(name)).expanduser()
    if (home / PROMPTER_FILE).is_file():
        return home
    raise AlignProError(f"trained {name!r}: holds no {PROMPTER_FILE}; name a folder that training wrote")


def _weights(home: Path) -> Path:
    for file in ("adapter_model.safetensors", "model.safetensors"):
        if (home / file).is_file():
            return home / file
    raise AlignProError(f"trained {str(home)!r}: holds no weights in safetensors; save it again")


def _same_model(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _check_trained(arm: Any, said: Any, world: EnvironmentSettings) -> None:
    """Refuse a policy as a prompter, a prompter as a policy, and the policy of another model."""
    try:
        task, base = said["facts"].get("settings", {}).get("task", "prompter"), str(said["base"])
        _ = int(said["max_tokens"]), dict(said["template"])["examples"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise AlignProError(
            f"trained {arm.folder!r}: its {PROMPTER_FILE} is damaged; save it again"
        ) from None
    if (task == "rlhf") != (arm.name == "rlhf"):
        option = "rlhf" if task == "rlhf" else "trained"
        raise AlignProError(f"{arm.folder!r}: it was trained with --task {task}; give it as --{option}")
    if arm.name == "rlhf" and not is_address(world.target) and not _same_model(base, world.target):
        raise AlignProError(
            f"rlhf {arm.folder!r}: its policy was trained from {base}, which is not the target {world.target}"
            "; name that as --target"
        )


def _reference(prompter: str | None, trained: Mapping[str, Any], homes: Mapping[str, Path]) -> str:
    """The name of ρ_sft: what the trained prompters' adapters rest on."""
    bases = {
        str(said["base"]): name
        for name, said in trained.items()
        if (homes[name] / "adapter_model.safetensors").is_file()
    }
    given = prompter or next(iter(bases), DEFAULT_PROMPTER)
    for base, name in bases.items():
        if not _same_model(base, given):
            raise AlignProError(
                f"trained {name!r}: it was trained from {base}, and rho_sft is {given}; roll each out in a "
                "folder of its own, without --prompter"
            )
    return given


def _template(name: str | None, reference: str, trained: Mapping[str, Any]) -> Template | None:
    """That of ρ_sft: the trained prompters' own, since they are compared with it; None: it has one."""
    saved = [said["template"] for said in trained.values()]
    for said in saved:
        if said != saved[0]:
            raise AlignProError("trained: their templates differ; roll each out in a folder of its own")
    if name is not None and saved:
        raise AlignProError(f"template {name}: the trained prompters have their own; leave it out")
    check_prompter(reference, name)
    if (Path(reference).expanduser() / PROMPTER_FILE).is_file():
        return None
    if not saved:
        return check_template(name)
    return Template(**saved[0] | {"examples": tuple(map(tuple, saved[0]["examples"]))})


def report_of_rollout(found: "Rollouts", rows: Iterable[Json], record: Json) -> Page:
    """Of rollouts.jsonl, as columns and as rows, and of settings.json beside it."""
    from alignpro.estimation.arm import Arm
    from alignpro.estimation.paired import Term, estimates

    means: dict[str, Json] = {}
    for name in found.arms:
        try:
            arm = Arm(found, name)
            term = Term(arm.mean(arm.reward), found.low, found.high, frozenset({name}), "none", "")
            means[name] = asdict(estimates({name: term}, found, 0.95)[name])
        except AlignProError:  # too few prompts, or one that the arm lacks: no interval
            means[name] = {"value": float(found.reward[found.rows(name)].mean()), "lo": None, "hi": None}
    prompts = len(found.prompt_ids)
    page = Page(
        "rollout",
        "Rollouts of prompters and policies",
        f"{len(found):,} rollouts of {prompts} prompts by {len(found.arms)} arms. What they say of "
        "Theorem 1, and of differences between the arms, tell alignpro estimate, headroom and compare.",
        record,
    )
    for name, e in list(means.items())[:4]:
        page.key(f"Mean reward, {name}", number(e["value"]), limits(e))
    page.add(
        "Mean reward by arm",
        f"On a scale from {number(found.low)} to {number(found.high)}, with 95% intervals over prompts where "
        "there are enough of them.",
        Table(
            "arm | mean reward | rollouts | seeds",
            [
                (name, interval(e), number(int(mine.sum())), number(len(set(found.seed[mine].tolist()))))
                for name, e in means.items()
                for mine in (found.rows(name),)
            ],
            "wnnn",
        ),
        Dots(
            "Mean reward of each arm", "reward units, 95% intervals", [dot(*item) for item in means.items()]
        ),
    )
    texts: dict[str, dict[str, Json]] = {}
    for row in rows:
        first = row["draw"] == 0 and row["answer"] == 0
        if first and (row["prompt_id"] in texts or len(texts) < MOST_PROMPTS):
            texts.setdefault(row["prompt_id"], {}).setdefault(row["arm"], row)
    page.add(
        "Texts",
        f"The first draw of {len(texts)} of {prompts} prompts, as the models wrote it, with invisible "
        "characters spelled out.",
        Table(
            "prompt | arm | rewrite | answer | reward",
            [
                (
                    row["x"],
                    arm,
                    row["rewrite"] if row["rewrite"] and arm != "none" else "–",
                    row["response"],
                    number(row["reward"]),
                )
                for of in texts.values()
                for arm, row in of.items()
            ],
            "twttn",
        ),
    )
    return page


@dataclass(frozen=True)
class Rollout:
    """Roll out prompters and policies on real models: texts, rewards and log-probabilities of every party.

    Writes rollouts.jsonl, from which estimate, headroom and compare work without a GPU. Interrupt at any
    time; the same command continues, and further arms can be added to a finished folder.
    """

    out: str
    """Folder for rollouts.jsonl, report.html and the answers paid for."""
    config: str | None = None
    """YAML file with any of these options; those on the command line win."""
    settings: tyro.conf.OmitArgPrefixes[RolloutSettings] = field(default_factory=RolloutSettings)
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(
        # Log-probabilities are what it is for: bfloat16 leaves tenths of a nat of noise in each.
        default_factory=lambda: EnvironmentSettings(dtype="float32")
    )
    prompter: str | None = None
    """rho_sft: a packaged name, a local folder or a hub id. Default: what the trained ones were trained from,
    or smollm2-135m-instruct."""
    template: str | None = None
    """How a model is asked to rewrite: rewrite, or append (only what follows the prompt). A trained prompter
    has its own. Default: rewrite."""
    source: tyro.conf.OmitArgPrefixes[PromptSettings] = field(default_factory=PromptSettings)
    split: str = "test"
    """Of the data set: train, validation or test."""
    prompts: int | None = None
    """How many of them, from the first. Default: all."""

    def run(self) -> int:
        run_rollout(
            self.out,
            self.settings,
            self.environment,
            prompter=self.prompter,
            template=self.template,
            source=self.source,
            split=self.split,
            prompts=self.prompts,
        )
        return 0
