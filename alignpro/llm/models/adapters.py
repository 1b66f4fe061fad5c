"""LoRA adapters: where in a model they go, in any layout, and which base an adapter's folder rests on."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from alignpro.errors import AlignProError
from alignpro.files import read_json, real
from alignpro.llm.models import limits
from alignpro.llm.models.catalogue import ADAPTER_CONFIG, HUB_ID, packaged
from alignpro.llm.models.forward import text_config, unwrap

_OTHER_TOWERS = ("vision", "visual", "audio", "image")


def blocks_of(model: Any) -> tuple[str, Any]:
    """The name and the list of the language model's layers, from the first to the last."""
    causal, depth = unwrap(model), int(text_config(model).num_hidden_layers)
    found = [
        (name, module)
        for name, module in causal.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not any(tower in part for part in name.split(".") for tower in _OTHER_TOWERS)
    ]
    if not found:
        raise AlignProError(
            f"model {type(causal).__name__}: no list of its {depth} layers was found, so that an adapter has "
            "no place; choose another model"
        )
    # A model may list other things that are as many, such as each layer's norms.
    return max(found, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def adapter_config(model: Any, rank: int, layers: float) -> LoraConfig:
    """A LoRA adapter (arXiv 2106.09685) on every linear map of the top layers; fresh, it changes nothing.

    Args:
        layers: share of the layers, from the top, that carry it.
    """
    name, blocks = blocks_of(model)
    first = len(blocks) - max(1, round(layers * len(blocks)))
    linear = {
        f"{name}.{i}.{part}": type(module)
        for i in range(first, len(blocks))
        for part, module in blocks[i].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if not linear:
        raise AlignProError(
            f"model {type(unwrap(model)).__name__}: its layers hold no linear map that an adapter could "
            "change; choose another model"
        )
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=sorted(linear),
        fan_in_fan_out=all(issubclass(kind, Conv1D) for kind in linear.values()),  # GPT-2's transposed maps
        task_type="CAUSAL_LM",
    )


def check_patterns(model: Any, folder: Path) -> None:
    """Refuse an adapter's folder whose patterns of modules' names take too long to match.

    A list of names, as is written here, needs none; other tools write regular expressions.
    """
    said = read_json(folder / ADAPTER_CONFIG, dict)
    patterns = [said.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern")]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns += list(said.get(name) or ()) if isinstance(said.get(name), dict) else []
    texts = [pattern for pattern in patterns if isinstance(pattern, str) and re.search(r"[*+?{(]", pattern)]
    names = [name for name, _ in model.named_modules()]

    def match() -> str:
        for pattern in texts:
            with contextlib.suppress(re.error):  # PEFT tells
                for form in (re.compile(pattern), re.compile(rf"(.*\.)?({pattern})$")):
                    for name in names:
                        form.match(name)
                        form.fullmatch(name)
        return ""

    if texts and (why := limits.beyond(match)) is not None:
        raise AlignProError(
            f"adapter {folder}: a pattern in its {ADAPTER_CONFIG} {why}; list names in target_modules instead"
        )


@contextlib.contextmanager
def left_as_it_was(model: Any) -> Iterator[None]:
    """Take an adapter off `model` again where what is done with it raises, so that it can be used anew."""
    learned = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training, forward = model.training, vars(model).get("forward")
    try:
        yield
    except BaseException:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, BaseTunerLayer):
                    setattr(module, name, child.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        if forward is None:
            vars(model).pop("forward", None)  # a trainer's, which would call the adapter's
        for parameter, learns in learned:
            parameter.requires_grad_(learns)
        model.train(training)
        raise


def check_adapter(folder: Path, what: str) -> None:
    """Refuse the configuration of an adapter that lacks a number which PEFT would fill in with its own, so
    that it would be another adapter."""
    said = read_json(folder / ADAPTER_CONFIG, dict)
    kinds = {"peft_type": str, "r": int, "lora_alpha": int | float, "target_modules": list | str}
    for name, kind in kinds.items() if said.get("peft_type") == "LORA" else [("peft_type", str)]:
        if not isinstance(said.get(name), kind) or isinstance(said[name], bool):
            raise AlignProError(f"{what}: its {ADAPTER_CONFIG} has no {name} that is one; save it again")


def adapter_base(folder: Path) -> str:
    """The name of the model that an adapter's folder rests on, found from any working folder."""
    said: Any = {}
    for file, key in (("prompter.json", "base"), (ADAPTER_CONFIG, "base_model_name_or_path")):
        if (folder / file).is_file():
            said = read_json(folder / file, dict)
            if isinstance(said.get(key), str) and said[key]:
                return find_base(said[key], folder)
    raise AlignProError(f"adapter {folder}: does not name the model that it belongs to; save it again")


def find_base(base: str, folder: Path) -> str:
    """`base` as a name that can be opened now: a relative path is looked for from the working folder, then
    from `folder` and each folder above it."""
    path = Path(base).expanduser()
    if packaged(base) or path.exists():
        return base
    if not path.is_absolute():
        home = real(folder.expanduser())
        for parent in (home, *home.parents):
            if (parent / path).exists():
                return str(parent / path)
        if HUB_ID.fullmatch(base):
            return base
    raise AlignProError(
        f"{folder}: its base model {base!r} is not there; put it back, or write where it is into base in its "
        "prompter.json (base_model_name_or_path in adapter_config.json)"
    )
