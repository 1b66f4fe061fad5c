"""What the verbs of language models do: open what was named, say what it will cost, run."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from alignpro import pages
from alignpro.errors import AlignProError
from alignpro.files import read_json, read_json_lines, writable_folder, write_json, write_text
from alignpro.llm import data, datasets, models, packages, rewards
from alignpro.llm.chat import parse_options
from alignpro.llm.checkpoints import check_reporters, refuse_other_settings
from alignpro.llm.frozen import Target
from alignpro.llm.ledger import Cached, Prices
from alignpro.llm.libraries import quiet
from alignpro.llm.prompter import (
    PROMPTER_FILE,
    Prompter,
    Template,
    check_room,
    check_template,
    target_ids,
)
from alignpro.llm.settings import (
    EnvironmentSettings,
    PromptSettings,
    RolloutSettings,
    SFTSettings,
    TrainSettings,
    refuse_moved_optimum,
)

# Of a rewrite in its chat template, for the estimate of costs.
_PROMPT_TOKENS = 64
_BLOCK = 32
"""Prompts proposed for between two writes of proposals.jsonl."""
DEFAULT_PROMPTER = "smollm2-135m-instruct"
PROMPTER_FOLDER = "prompter"


def is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def open_target(world: EnvironmentSettings) -> Target:
    """A model in this process, or an OpenAI-compatible endpoint where the target is an address.

    Raises:
        AlignProError: an endpoint without the name of its model, or a model with an endpoint's settings.
    """
    given = world.endpoint()
    if not is_address(world.target):
        _refuse_endpoint_settings(world)
        from alignpro.llm.local import LocalTarget

        return LocalTarget(
            world.target,
            dtype=world.dtype,
            batch_size=world.batch_size,
            chat_template_kwargs=world.chat_options(),
        )
    from alignpro.llm.endpoint import Endpoint

    if "model" not in given:
        raise AlignProError(f"target_model: name the model that {world.target} serves")
    return Endpoint(base_url=world.target, **given)


def _how_read(target: Target) -> dict[str, Any]:
    """How a model in this process is read (`forward.How`); nothing of an endpoint."""
    model = getattr(target, "model", None)
    if not hasattr(model, "generation_config"):
        return {}
    from alignpro.llm.forward import how_of

    return how_of(model).describe()


def _check_target_room(target: Target, prompts: Sequence[str], tokens: int) -> None:
    """Refuse prompts that leave a model in this process no room to answer, before anything is asked."""
    if _how_read(target):
        local: Any = target
        ids = [target_ids(local.tokenizer, x) for x in prompts]
        check_room(local.model, prompts, ids, tokens, f"target {target.name!r}")


def _kept(target: Target, folder: Path, prices: Prices | None = None) -> Cached:
    """Answers on file. A model in this process redoes a call that was cut short, so that an interruption
    changes no answer; nothing that was paid for is asked again."""
    return Cached(target, folder, prices=prices, note=None, whole=not target.remote)


def _refuse_endpoint_settings(world: EnvironmentSettings) -> None:
    if given := world.endpoint():
        raise AlignProError(
            f"{next(iter(given))}: is for an endpoint, and {world.target!r} is no http(s) address"
        )


def check_environment(world: EnvironmentSettings) -> tuple[Target | None, Prices | None]:
    """Refuse what cannot be opened, before anything is loaded. The target, if an endpoint, and prices."""
    opened: Target | None = None
    if is_address(world.target):
        opened = open_target(world)
    else:
        _refuse_endpoint_settings(world)
        models.check_name(world.target)
        models.check_dtype(world.dtype)
    rewards.check_name(world.reward)
    return opened, Prices(*world.prices) if world.prices is not None else None


def check_prompter(name: str, template: str | None = None) -> None:
    """Refuse what is neither a prompter's folder nor a model's name, and a template that does not fit."""
    check_template(template)
    folder = Path(name).expanduser()
    if not (folder / PROMPTER_FILE).is_file():
        models.check_name(name)
    elif template is not None:
        raise AlignProError(f"template {template}: {folder} has its own; leave it out")


def user_prompts(
    source: PromptSettings, prompter: str, split: str = "train", n: int | None = None
) -> list[str]:
    """The user's prompts: those of the file, or a split of a row of `DATASETS`; the first n."""
    if n is not None and n < 1:
        raise AlignProError(f"prompts {n}: give at least 1")
    datasets.check_dataset(source.dataset, source.data_folder, split)
    own, fits = None, None
    if source.prompts_file is not None:
        own = datasets.read_prompts(source.prompts_file, source.prompt_column)
    if source.max_prompt_tokens is not None:
        fits = datasets.shorter(tokens=source.max_prompt_tokens, tokenizer=_tokenizer(prompter))
    if own is None:
        return datasets.prompts(source.dataset, split, n, folder=source.data_folder, fits=fits)
    found = [x for x in own if fits is None or fits(x)]
    if not found:
        raise AlignProError(f"max_prompt_tokens {source.max_prompt_tokens}: no prompt is as short; raise it")
    if len(found) < len(own):
        packages.note(
            f"{len(own) - len(found)} prompts of more than {source.max_prompt_tokens} tokens left out"
        )
    if n is not None and n > len(found):
        raise AlignProError(f"prompts {n}: choose from 1 to the {len(found)} there are")
    return found[:n]


def _tokenizer(prompter: str) -> Any:
    """That with which the prompter reads, without its model."""
    from transformers import AutoTokenizer

    home = models.resolve(prompter)
    while models.is_adapter(home):  # which has no tokenizer of its own
        home = models.resolve(models.adapter_base(home))
    try:
        return AutoTokenizer.from_pretrained(home, trust_remote_code=False)
    except Exception as error:
        raise AlignProError(
            f"model {prompter!r}: cannot read its tokenizer ({error!r}); save it with save_pretrained"
        ) from error


def _money(cost: Prices | None, answers: int, tokens: int) -> str:
    """What `answers` of at most `tokens` cost at most, to end a line with."""
    if cost is None or not answers:
        return ""
    most = cost.cost(answers * _PROMPT_TOKENS, answers * tokens)
    return f"; about {most:.2f} at most for answers, at {_PROMPT_TOKENS} tokens a prompt"


def run_train(
    out: str,
    settings: TrainSettings,
    world: EnvironmentSettings,
    *,
    prompter: str,
    template: str | None = None,
    source: PromptSettings,
    train_prompts: int | None = None,
    report_to: Sequence[str],
    resume: bool,
) -> None:
    """Everything is checked before anything is loaded."""
    prompter = _home(prompter)
    refuse_moved_optimum(settings)
    check_reporters(report_to)
    folder = writable_folder(out)
    started = (folder / "settings.json").exists()
    if started and not resume:
        raise AlignProError(
            f"--out {folder}: holds a run already; continue it with --resume or choose another"
        )
    check_prompter(prompter, template)
    models.check_dtype(settings.policy_dtype)
    answers, rlhf = world.sampling(), settings.task == "rlhf"
    # The oracle is its own target.
    opened, cost = check_environment(replace(world, target=prompter) if rlhf else world)
    prompts = user_prompts(source, prompter, n=train_prompts)

    from alignpro.llm.reward_models import CachedReward, keep_scores, shown_name
    from alignpro.llm.train import Environment, train

    rounds, each = settings.iterations, settings.prompts * settings.samples
    asked = 0 if rlhf else rounds * each * settings.responses
    line = f"{len(prompts)} prompts; {rounds} rounds of {settings.prompts} x {settings.samples} "
    line += "answers" if rlhf else f"rewrites, {asked} answers of at most {answers.max_tokens} tokens"
    line += f"; {rounds * settings.steps_per_round} {settings.algorithm} steps"
    if is_address(world.reward):
        line += f"; {asked or rounds * each} scores from an endpoint"
    packages.note(line + _money(cost, asked, answers.max_tokens))

    judge = keep_scores(rewards.load_reward(world.reward), folder / "scores")
    target: Cached | None = None
    read: dict[str, Any] = {}
    if not rlhf:
        frozen = opened or open_target(world)
        read = _how_read(frozen)
        target = _kept(frozen, folder / "answers", cost)
    facts = {
        "prompter": prompter,
        "target_read": read,
        "chat_template_kwargs": world.chat_options() or {},
        "template": template,
        "target": world.target,
        "reward": shown_name(world.reward),
        "answers": asdict(answers),
    }
    base = Prompter.from_pretrained(
        prompter,
        template=template,
        dtype=settings.policy_dtype,
        chat_template_kwargs=world.chat_options(),
        merged=True,
    )
    environment = Environment(judge, target, answers, settings.responses, settings.seed)
    trained = train(
        base, environment, prompts, settings, folder, resume=resume, report_to=report_to, facts=facts
    )
    if target is not None:
        packages.note(target.ledger.line())
    if isinstance(judge, CachedReward):
        packages.note(judge.line())
    if not trained.metrics:  # of several processes the first one tells
        return
    first, last = trained.metrics[0], trained.metrics[-1]
    print(f"mean reward of a round: {first['score']:.4f} at first, {last['score']:.4f} at last")
    print(f"wrote {folder / 'prompter'}")
    pages.keep(pages.report_of_train(trained.metrics, read_json(folder / "settings.json")), folder)


def run_rewrite(
    prompter: str,
    prompts: Sequence[str],
    samples: int,
    seed: int,
    max_tokens: int | None,
    as_json: bool,
    chat_template_kwargs: str | None = None,
) -> None:
    """Prompts from the arguments, or one per line of standard input."""
    given = list(prompts) or [line.strip() for line in sys.stdin if line.strip()]
    if not given:
        raise AlignProError("prompts: none given; name some, or write one per line to standard input")
    if samples < 1:
        raise AlignProError(f"--samples {samples}: give at least 1")
    options = None if chat_template_kwargs is None else parse_options(chat_template_kwargs)
    opened = Prompter.from_pretrained(_home(prompter), chat_template_kwargs=options)
    if max_tokens is not None:
        if max_tokens < 1:
            raise AlignProError(f"--max-tokens {max_tokens}: give at least 1")
        opened.max_tokens = max_tokens
    for x, row in zip(given, opened.rewrites(given, samples, seed=seed), strict=True):
        for rewrite in row:
            print(json.dumps({"x": x, "rewrite": rewrite}, ensure_ascii=False) if as_json else rewrite)


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
    from alignpro.llm import rollout
    from alignpro.llm.reward_models import keep_scores, shown_name

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
        "reward": shown_name(world.reward),
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

        def open_policy(name: str) -> tuple[Target, rollout.Scorer]:
            from alignpro.llm.local import LocalTarget

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
            keep_scores(rewards.load_reward(world.reward), folder / "scores"),
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
                "reward_model": shown_name(world.reward),
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
        pages.keep(
            pages.report_of_rollout(found, map(json.loads, lines), record | {"seed": settings.seed}), folder
        )


def _home(name: str) -> str:
    """The folder of a trained prompter where `name` is that of the run that made it; else `name`."""
    inner = Path(name).expanduser() / PROMPTER_FOLDER
    return str(inner) if name and (inner / PROMPTER_FILE).is_file() else name


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


def run_merge(adapter: str, out: str, dtype: str) -> None:
    """Write the whole model that an adapter and its base make, into a new folder."""
    home = Path(_home(adapter)).expanduser()
    if not (home / models.ADAPTER_CONFIG).is_file():
        raise AlignProError(
            f"adapter {adapter!r}: holds no {models.ADAPTER_CONFIG}; name the folder of a trained prompter "
            "or of an adapter that PEFT saved"
        )
    if dtype == "4bit":
        raise AlignProError("--dtype 4bit: cannot be merged into; choose float32, bfloat16 or float16")
    models.check_dtype(dtype)
    base = models.adapter_base(home)
    folder = writable_folder(out)
    if any(folder.iterdir()):
        raise AlignProError(f"--out {folder}: it is not empty; name a new folder")
    packages.note(f"merging {home} into {base}, as {dtype}")
    if (home / PROMPTER_FILE).is_file():
        merged = Prompter.from_pretrained(home, dtype=dtype, device="cpu", merged=True)
        replace(merged, base=base).save(folder, whole=True)
    else:
        model, tokenizer = models.load_model(home, dtype, "cpu")
        with quiet():
            model.save_pretrained(str(folder), safe_serialization=True)
            tokenizer.save_pretrained(str(folder))
    print(f"wrote {folder}: a whole model; give it as --prompter or --target")


def run_sft(
    out: str,
    settings: SFTSettings,
    *,
    prompter: str,
    template: str | None,
    pairs: str,
    prompt_field: str,
    rewrite_field: str,
    report_to: Sequence[str],
    resume: bool,
    chat_template_kwargs: str | None = None,
) -> None:
    """Everything is checked before anything is loaded."""
    prompter = _home(prompter)
    check_prompter(prompter, template)
    check_reporters(report_to)
    folder = writable_folder(out)
    if any(folder.iterdir()) and not resume:
        raise AlignProError(f"--out {folder}: it is not empty; name a new folder, or continue with --resume")

    from alignpro.llm.sft import METRICS_FILE, PROMPTER_FOLDER, read_rewrites, sft

    read = read_rewrites(pairs, prompt=prompt_field, rewrite=rewrite_field)
    sizes = Counter(data.split_of(pair.prompt) for pair in read)
    steps = settings.epochs * -(-sizes["train"] // settings.batch_size)
    packages.note(
        f"{len(read)} pairs: {sizes['train']} to learn from, {sizes['validation']} and {sizes['test']} to "
        f"measure on; {settings.epochs} epochs, {steps} steps of {settings.batch_size} at most"
    )
    options = None if chat_template_kwargs is None else parse_options(chat_template_kwargs)
    base = Prompter.from_pretrained(prompter, template=template, chat_template_kwargs=options, merged=True)
    tuned = sft(base, read, settings, folder, resume=resume, report_to=report_to)
    found = tuned.facts["sft"]
    pages.keep(pages.report_of_sft(read_json_lines(folder / METRICS_FILE), found), folder)
    for part, nats in found["nats_per_token"].items():
        print(f"{part}: {nats['before']:.3f} nats per token before, {nats['after']:.3f} after")
    print(f"wrote {folder / PROMPTER_FOLDER}; train it with --prompter {folder / PROMPTER_FOLDER}")


def run_resample(
    out: str,
    world: EnvironmentSettings,
    *,
    prompter: str,
    template: str | None,
    source: PromptSettings,
    split: str,
    prompts: int | None,
    proposals: int,
    responses: int,
    rewrite_tokens: int | None,
    lam: Sequence[float],
    draws: int,
    seed: int,
) -> None:
    """Everything is checked before anything is loaded; proposals on file are kept."""
    from alignpro.llm import resample
    from alignpro.llm.reward_models import keep_scores, shown_name

    prompter, folder = _home(prompter), writable_folder(out)
    for name, value, least in (
        ("proposals", proposals, 1),
        ("responses", responses, 1),
        ("draws", draws, 0),
        ("seed", seed, 0),
        ("rewrite-tokens", 1 if rewrite_tokens is None else rewrite_tokens, 1),
    ):
        if value < least:
            raise AlignProError(f"--{name} {value}: give at least {least}")
    if not lam or not all(0 < value < float("inf") for value in lam):
        raise AlignProError(f"--lam {' '.join(map(str, lam))}: give positive, finite numbers")
    check_prompter(prompter, template)
    opened, cost = check_environment(world)
    xs = user_prompts(source, prompter, split, prompts)
    record = {
        "prompter": prompter,
        "template": template,
        "rewrite_tokens": rewrite_tokens,
        "proposals": proposals,
        "responses": responses,
        "seed": seed,
        "target": world.target,
        "target_model": world.target_model,
        "dtype": world.dtype,
        "reward": shown_name(world.reward),
        "sampling": asdict(world.sampling()),
        "chat_template_kwargs": world.chat_options() or {},
    }
    begun, path = folder / "settings.json", folder / "proposals.jsonl"
    if begun.exists():
        refuse_other_settings(folder, read_json(begun), record, "--out")
    found = {p.prompt: p for p in resample.load_proposals(path)} if path.exists() else {}
    todo = [x for x in xs if x not in found]
    kept = f" ({len(xs) - len(todo)} kept)" if len(todo) < len(xs) else ""
    asked = len(todo) * proposals * responses
    line = f"{len(xs)} prompts{kept}: {len(todo) * proposals} rewrites, at most {asked} answers of at most "
    line += f"{world.answer_tokens} tokens"
    packages.note(line + _money(cost, asked, world.answer_tokens))
    write_json(begun, record)
    if todo:
        from alignpro.llm.train import Environment

        target = _kept(opened or open_target(world), folder / "answers", cost)
        judge = keep_scores(rewards.load_reward(world.reward), folder / "scores")
        environment = Environment(judge, target, world.sampling(), responses, seed)
        _check_target_room(target.target, todo, world.answer_tokens)
        rho = Prompter.from_pretrained(prompter, template=template, chat_template_kwargs=world.chat_options())
        rho.max_tokens = rewrite_tokens or rho.max_tokens
        rho.prompt_ids(todo)  # all have room, before the first is drawn
        for start in tqdm(range(0, len(todo), _BLOCK), unit="block", disable=None):
            block = todo[start : start + _BLOCK]
            for p in resample.propose(rho, environment, block, proposals, seed=seed):
                found[p.prompt] = p
            resample.save_proposals(path, list(found.values()))
        packages.note(target.ledger.line())
    print(resample.table([found[x] for x in xs], lam))
    pages.keep(pages.report_of_resample([found[x] for x in xs], lam, record), folder)
    if draws:
        rows = [
            {"x": x, "lam": value, "draw": i, "rewrite": rewrite}
            for value in lam
            for x in xs
            for i, rewrite in enumerate(resample.resample(found[x], value, draws, seed=seed))
        ]
        write_text(
            folder / "rewrites.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        print(f"wrote {folder / 'rewrites.jsonl'}")
    print(f"wrote {path}")
