"""`alignpro rollout`: texts, rewards and log-probabilities of prompters and policies."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from alignpro.commands import opening
from alignpro.commands.estimate import add_parts
from alignpro.commands.options import (
    DEFAULT_PROMPTER,
    EnvironmentSettings,
    MeasuredPrompts,
    RunOptions,
    TemplateOption,
)
from alignpro.commands.shared import ranges, with_reward, with_sums
from alignpro.errors import AlignProError
from alignpro.files import real
from alignpro.llm.arms.settings import RolloutSettings
from alignpro.report import keep
from alignpro.report.numbers import interval, number
from alignpro.report.page import MOST_PROMPTS, Dots, Json, Page, Table, dots
from alignpro.runs import here, owning
from alignpro.terminal import say

if TYPE_CHECKING:
    from alignpro.llm.arms.draws import Arm, Scorer
    from alignpro.llm.arms.rollout import ArmSummary, RolloutSummary
    from alignpro.llm.policies.prompter import Prompter, Saved, Template
    from alignpro.llm.targets.target import Target

_RESAMPLING = ("lam", "proposals", "proposal_answers", "best_of")
"""Settings on which the arms star and best_of_n depend."""


@dataclass(frozen=True, kw_only=True)
class Rollout(TemplateOption, RunOptions):
    """Roll out prompters and policies on real models: texts, rewards and log-probabilities of every party.

    Writes rollouts.jsonl, from which estimate, headroom and compare work without a GPU. Interrupt at any
    time; the same command continues, and further arms can be added to a finished folder.
    """

    out: str
    """Folder for rollouts.jsonl, report.html and the answers paid for."""
    settings: tyro.conf.OmitArgPrefixes[RolloutSettings] = field(default_factory=RolloutSettings)
    environment: tyro.conf.OmitArgPrefixes[EnvironmentSettings] = field(
        # Log-probabilities are what it is for: bfloat16 leaves tenths of a nat of noise in each.
        default_factory=lambda: EnvironmentSettings(dtype="float32")
    )
    prompter: str | None = None
    """The reference prompter, rho_sft in the paper: a packaged model's name, a local folder or an id on the
    Hugging Face hub. Left out: what the trained prompters were trained from, or smollm2-135m-instruct.

    instructions-sft is one that appends a plain instruction: a packaged model that is fine-tuned once on this
    machine."""
    source: tyro.conf.OmitArgPrefixes[MeasuredPrompts] = field(default_factory=MeasuredPrompts)

    common = (
        "out arms trained instruction prompter reward target dataset prompts-file prompts split draws "
        "answers rewrite-tokens answer-tokens seed config"
    )
    examples = (
        (
            "no prompter and the reference, on 50 prompts",
            "alignpro rollout --out runs/rollouts --reward ease --prompts 50",
        ),
        (
            "and a trained one, and an instruction",
            "alignpro rollout --out runs/rollouts --reward ease --prompts 50 --trained runs/ease "
            "--instruction plain='Use plain words.'",
        ),
    )

    @owning("rollout")
    def run(self) -> int:
        from alignpro.llm.models.load import sharing

        with sharing():  # prompters, and the frozen model with a tuned policy, often have one base
            return self._run()

    def _run(self) -> int:
        from alignpro.estimation.intervals import LEAST_PROMPTS
        from alignpro.llm.arms import rollout
        from alignpro.llm.arms.draws import RESAMPLED, draws_of
        from alignpro.llm.arms.given import read_given
        from alignpro.llm.models import packages
        from alignpro.llm.models.libraries import quiet
        from alignpro.llm.models.prompt import said_in
        from alignpro.llm.policies.prompter import Prompter, read_saved

        settings, environment = self.settings, self.environment
        folder, sampling = Path(self.out), environment.sampling()
        arms = rollout.arms_of(settings)
        # A trained prompter is named by its folder, or by that of the run that made it.
        homes = {arm.folder: _prompter_folder(arm.folder) for arm in arms if arm.folder}
        saved = {name: read_saved(home, name) for name, home in homes.items()}
        for arm in arms:
            if arm.folder:
                _check_trained(arm, saved[arm.folder], environment)
        trained = {arm.folder: saved[arm.folder] for arm in arms if arm.folder and arm.name != "rlhf"}
        reference = _reference(self.prompter and opening.trained_home(self.prompter), trained, homes)
        chosen = _template(self.template, reference, trained)
        if settings.rewrite_tokens is None and trained:
            lengths = {said.max_tokens for said in trained.values()}
            if len(lengths) > 1:
                raise AlignProError(
                    f"rewrite_tokens: the trained prompters have {sorted(lengths)}; give one for all arms"
                )
            settings = replace(settings, rewrite_tokens=lengths.pop())
        world = opening.World(environment)
        xs = opening.user_prompts(self.source, reference, self.source.split, self.source.prompts, world)
        world.check_prompts(xs)
        if len(xs) < LEAST_PROMPTS:
            packages.note(f"{len(xs)} prompts are too few for intervals: estimate needs {LEAST_PROMPTS}")
        given = {arm.name: read_given(arm.file, xs) for arm in arms if arm.file}
        for name, found in given.items():
            most = max(map(len, found.of.values()))
            if most > settings.draws:
                packages.note(f"{name}: the first {settings.draws} of up to {most} rewrites (--draws)")

        digests = {name: packages.sha256(_weights(home))[:12] for name, home in homes.items()}
        files = {arm.file: Path(arm.file).expanduser() for arm in arms if arm.file}
        digests |= {name: packages.sha256(file)[:12] for name, file in files.items()}
        resampling = {name: getattr(settings, name) for name in _RESAMPLING}

        def how(arm: "Arm") -> dict[str, Any]:
            if arm.folder:
                return {"folder": arm.folder, "weights": digests[arm.folder]}
            if arm.file:
                return {"file": arm.file, "sha256": digests[arm.file], **given[arm.name].cost}
            return {"instruction": arm.text} if arm.text else resampling if arm.name in RESAMPLED else {}

        reward = world.reward_name
        record = {
            "prompts": opening.prompts_digest(xs),
            **{name: getattr(settings, name) for name in ("draws", "answers", "rewrite_tokens")},
            "prompter": reference,
            "template": asdict(chosen) if chosen else None,
            **environment.record(reward),
            "arms": {str(arm): how(arm) for arm in arms},
        }
        here(folder).contents |= world.contents(prompter=reference)
        planned = rollout.plan(folder, xs, settings, record)
        if settings.rlhf and not sampling.natural:
            packages.note(
                "rlhf: policies are trained at temperature 1 with nothing truncated; under this decoding of "
                "answers some of theirs may be impossible to the frozen model, and their KL then is infinite"
            )
        _, asked, _ = planned.asks()
        packages.note(planned.line(sampling) + world.money(asked, sampling.max_tokens))

        path, options = folder / rollout.FILE, environment.chat_options()
        if options is None and trained:  # as they were trained, and ρ_sft as they were
            options = next(iter(trained.values())).chat_template_kwargs
        if planned.todo or not path.exists() or (folder / rollout.PARTIAL).exists():
            target = world.target()
            opening.check_target_room(target, xs, sampling.max_tokens)
            getattr(target, "check_scored", lambda _: None)(sampling)
            frozen = world.kept(target, folder)

            def open_policy(name: str) -> "tuple[Target, Scorer]":
                from alignpro.llm.targets.local import LocalTarget

                dtype, size = environment.dtype, environment.batch_size
                policy = Prompter.from_pretrained(homes[name], dtype=dtype, chat_template_kwargs=options)
                local = LocalTarget((policy.model, policy.tokenizer), batch_size=size, name=name)
                return opening.kept(local, folder / "answers"), local.log_probs

            def open_prompter(name: str) -> "Prompter":
                home = homes[name] if name else reference
                opened = Prompter.from_pretrained(home, chat_template_kwargs=options)
                if not name:
                    opened = replace(opened, template=chosen) if chosen else opened
                    opened.prompt_ids(xs)  # all have room, before the first is drawn
                return opened

            judge = world.reward(folder)
            scorer, size = frozen.scorer(), environment.batch_size
            work = rollout.Work(
                settings,
                judge,
                frozen,
                scorer,
                sampling,
                open_prompter,
                open_policy,
                size,
                world.refusals,
                {name: found.of for name, found in given.items()},
            )
            for arm in arms:
                if arm.text or arm.file:
                    drawn = zip(xs, draws_of(work, arm, xs), strict=True)
                    asked_of = [said_in(x, draw.rewrite or "") for x, row in drawn for draw in row]
                    opening.check_target_room(target, asked_of, sampling.max_tokens)
            who = {arm.name: f"x, then {arm.text!r}" for arm in arms if arm.text} | {
                "none": "none",
                "sft": reference,
                "star": f"rho* of {reference} at lam {settings.lam:g} by {settings.proposals} proposals",
                "best_of_n": f"best of {settings.best_of or settings.proposals} of {reference}",
            }

            def parties(arm: "Arm") -> dict[str, str]:
                named, cost = arm.folder or arm.file, given[arm.name].costs() if arm.file else ""
                return {
                    "frozen": f"{target.name} {target.revision}",
                    "prompter": who.get(arm.name) or f"{named} {digests[named]}{cost}",
                    "reward_model": reward,
                    "sampling": json.dumps(asdict(sampling)),
                }

            with quiet():
                rollout.roll_out(planned, work, parties)
            packages.note(frozen.ledger.line())
            if (off := getattr(target, "line", lambda: None)()) is not None:
                packages.note(off)
            world.told(judge, folder)
        else:
            world.tell_again(folder)
        result = rollout.summarise(path, MOST_PROMPTS)
        say(text(result))
        keep.keep(with_reward(page(result, record | {"seed": settings.seed}), folder), folder)
        return 0


def _prompter_folder(name: str) -> Path:
    from alignpro.llm.models.catalogue import RECIPES
    from alignpro.llm.models.resolve import resolve
    from alignpro.llm.policies.prompter import PROMPTER_FILE

    if name in RECIPES:
        return resolve(name)
    home = Path(opening.trained_home(name)).expanduser()
    if (home / PROMPTER_FILE).is_file():
        return home
    raise AlignProError(f"trained {name!r}: holds no {PROMPTER_FILE}; name a folder that training wrote")


def _weights(home: Path) -> Path:
    from alignpro.llm.models.catalogue import ADAPTER_WEIGHTS

    for file in (ADAPTER_WEIGHTS, "model.safetensors"):
        if (home / file).is_file():
            return home / file
    raise AlignProError(f"trained {str(home)!r}: holds no weights in safetensors; save it again")


def _same_model(one: str, other: str) -> bool:
    return one == other or real(Path(one).expanduser()) == real(Path(other).expanduser())


def _check_trained(arm: "Arm", said: "Saved", environment: EnvironmentSettings) -> None:
    """Refuse a policy as a prompter, a prompter as a policy, and the policy of another model."""
    settings, base = said.facts.get("settings"), said.base
    task = settings.get("task", "prompter") if isinstance(settings, dict) else "prompter"
    if (task == "rlhf") != (arm.name == "rlhf"):
        option = "rlhf" if task == "rlhf" else "trained"
        raise AlignProError(f"{arm.folder!r}: it was trained with --policy {task}; give it as --{option}")
    served = opening.is_address(environment.target)
    target = environment.target.removeprefix("vllm:")
    if arm.name == "rlhf" and not served and not _same_model(base, target):
        raise AlignProError(
            f"rlhf {arm.folder!r}: its policy was trained from {base}, which is not the target "
            f"{target}; name that as --target"
        )


def _reference(prompter: str | None, trained: Mapping[str, "Saved"], homes: Mapping[str, Path]) -> str:
    """The name of ρ_sft: what the trained prompters' adapters rest on."""
    from alignpro.llm.models.catalogue import ADAPTER_WEIGHTS

    bases = {said.base: name for name, said in trained.items() if (homes[name] / ADAPTER_WEIGHTS).is_file()}
    given = prompter or next(iter(bases), DEFAULT_PROMPTER)
    for base, name in bases.items():
        if not _same_model(base, given):
            raise AlignProError(
                f"trained {name!r}: it was trained from {base}, and rho_sft is {given}; roll each out in a "
                "folder of its own, without --prompter"
            )
    return given


def _template(name: str | None, reference: str, trained: Mapping[str, "Saved"]) -> "Template | None":
    """The template for ρ_sft: the trained prompters', as they are compared with it; None where it has one."""
    from alignpro.llm.policies.prompter import check_prompter, check_template, has_template

    saved = [said.template for said in trained.values()]
    for said in saved:
        if said != saved[0]:
            raise AlignProError("trained: their templates differ; roll each out in a folder of its own")
    if name is not None and saved:
        raise AlignProError(f"template {name}: the trained prompters have their own; leave it out")
    check_prompter(reference, name)
    if has_template(reference):
        return None
    return saved[0] if saved else check_template(name)


def text(result: "RolloutSummary") -> str:
    lines = []
    for arm in result.arms:
        parts = "".join(f", {mean.value:.4f} of {part}" for part, mean in arm.parts.items())
        told = f"{arm.name}: mean reward {arm.mean.value:.4f} of {arm.rollouts} rollouts"
        told += f" ({parts[2:]})" if parts else ""
        lines.append(f"{told}; refused: {_refused(arm)}" if arm.refused else told)
    return "\n".join([*lines, f"wrote {result.path}"])


def _refused(arm: "ArmSummary") -> str:
    return f"{arm.refused:,} ({arm.refused / arm.rollouts:.1%})" if arm.refused else "0"


def page(result: "RolloutSummary", record: Json) -> Page:
    """Mean rewards by arm, and some of the texts; `record` is how they were made."""
    from alignpro.llm.models.prompt import Prompt, transcript

    made = Page(
        "rollout",
        "Rollouts of prompters and policies",
        f"{result.rollouts:,} rollouts of {result.prompts} prompts by {len(result.arms)} arms. What they say "
        "of Theorem 1, and of differences between the arms, tell alignpro estimate, headroom and compare.",
        record,
    )
    for arm in result.arms[:4]:
        made.estimate(f"Mean reward, {arm.name}", arm.mean)
    means, axis = {arm.name: arm.mean for arm in result.arms}, "reward units, 95% intervals"
    spread = ["spread of members"] if any(arm.spread is not None for arm in result.arms) else []
    worth = (
        " A refused answer counts with its declared reward." if any(a.refused for a in result.arms) else ""
    )
    made.add(
        "Mean reward by arm",
        f"On a scale from {number(result.low)} to {number(result.high)}, with 95% intervals over prompts "
        f"where there are enough of them.{worth}",
        Table(
            ["arm", "mean reward", "rollouts", "seeds", "refused", *spread, "rewritten by"],
            [
                (
                    *(arm.name, interval(arm.mean), number(arm.rollouts), number(arm.seeds), _refused(arm)),
                    *([number(arm.spread)] if spread else []),
                    arm.prompter,
                )
                for arm in result.arms
            ],
            "wnnnn" + "n" * len(spread) + "w",
        ),
        Dots("Mean reward of each arm", axis, dots(means)),
    )
    if result.part_ranges:
        rows = with_sums({arm.name: arm.parts for arm in result.arms}, means)
        add_parts(made, rows, ranges(result.part_ranges, result.low, result.high), axis)
    texts = []
    for row in result.texts:
        rewrite = row.rewrite if row.rewrite and row.arm != "none" else "–"
        answer = "(refused)" if row.response is None else row.response
        texts.append(
            (transcript(Prompt(row.x, row.context or ())), row.arm, rewrite, answer, number(row.reward))
        )
    told = len({row.prompt_id for row in result.texts})
    made.add(
        "Texts",
        f"The first draw of {told} of {result.prompts} prompts, as the models wrote it, with invisible "
        "characters spelled out.",
        Table("prompt | arm | rewrite | answer | reward", texts, "twttn"),
    )
    return made
