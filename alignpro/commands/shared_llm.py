"""What the verbs of language models do: open what was named, say what it will cost, run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignpro.commands.options import EnvironmentSettings, PromptSettings
from alignpro.errors import AlignProError
from alignpro.llm.data import own as datasets_own
from alignpro.llm.data import public
from alignpro.llm.models import adapters, catalogue, configure, packages, resolve
from alignpro.llm.models import catalogue as adapters_catalogue
from alignpro.llm.policies.prompter import PROMPTER_FILE, check_room, check_template, target_ids
from alignpro.llm.rewards import opening
from alignpro.llm.targets.ledger import Cached, Prices
from alignpro.llm.targets.target import Target

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
        from alignpro.llm.targets.local import LocalTarget

        return LocalTarget(
            world.target,
            dtype=world.dtype,
            batch_size=world.batch_size,
            chat_template_kwargs=world.chat_options(),
        )
    from alignpro.llm.targets.endpoint import Endpoint
    from alignpro.llm.targets.settings import EndpointSettings

    if "model" not in given:
        raise AlignProError(f"target_model: name the model that {world.target} serves")
    return Endpoint(world.target, EndpointSettings(**given))


def _how_read(target: Target) -> dict[str, Any]:
    """How a model in this process is read (`forward.How`); nothing of an endpoint."""
    model = getattr(target, "model", None)
    if not hasattr(model, "generation_config"):
        return {}
    from alignpro.llm.models.forward import how_of

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
        catalogue.check_name(world.target)
        configure.check_dtype(world.dtype)
    opening.read_spec(world.reward)
    return opened, Prices(*world.prices) if world.prices is not None else None


def check_prompter(name: str, template: str | None = None) -> None:
    """Refuse what is neither a prompter's folder nor a model's name, and a template that does not fit."""
    check_template(template)
    folder = Path(name).expanduser()
    if not (folder / PROMPTER_FILE).is_file():
        catalogue.check_name(name)
    elif template is not None:
        raise AlignProError(f"template {template}: {folder} has its own; leave it out")


def user_prompts(
    source: PromptSettings, prompter: str, split: str = "train", n: int | None = None
) -> list[str]:
    """The user's prompts: those of the file, or a split of a row of `DATASETS`; the first n."""
    if n is not None and n < 1:
        raise AlignProError(f"prompts {n}: give at least 1")
    public.check_dataset(source.dataset, source.data_folder, split)
    own, fits = None, None
    if source.prompts_file is not None:
        own = datasets_own.read_prompts(source.prompts_file, source.prompt_column)
    if source.max_prompt_tokens is not None:
        fits = public.shorter(tokens=source.max_prompt_tokens, tokenizer=_tokenizer(prompter))
    if own is None:
        return public.prompts(source.dataset, split, n, folder=source.data_folder, fits=fits)
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

    home = resolve.resolve(prompter)
    while adapters_catalogue.is_adapter(home):  # which has no tokenizer of its own
        home = resolve.resolve(adapters.adapter_base(home))
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


def _home(name: str) -> str:
    """The folder of a trained prompter where `name` is that of the run that made it; else `name`."""
    inner = Path(name).expanduser() / PROMPTER_FOLDER
    return str(inner) if name and (inner / PROMPTER_FILE).is_file() else name
