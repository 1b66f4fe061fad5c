"""`alignpro merge`: a trained adapter and its base as one model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from alignpro.errors import AlignProError
from alignpro.runs import here, owning
from alignpro.terminal import say


@dataclass(frozen=True)
class Merge:
    """Write the whole model that a trained prompter (or any adapter that PEFT saved) and its base make.

    The result is a folder of safetensors that every program which reads transformers' models takes.
    """

    adapter: tyro.conf.Positional[str]
    """Folder of a trained prompter or policy, of the run that made it, or of an adapter that PEFT saved."""
    out: str
    """A new folder for the whole model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights that are written: as trained, or one of half the space."""

    examples = (
        ("a whole model of a trained prompter", "alignpro merge runs/ease --out models/ease"),
        ("in half the space", "alignpro merge runs/ease --dtype bfloat16 --out models/ease16"),
    )

    @owning("merge")
    def run(self) -> int:
        from alignpro.commands.opening import trained_home
        from alignpro.llm.models import adapters, catalogue, load, packages, resolve
        from alignpro.llm.models.libraries import quiet
        from alignpro.llm.policies.prompter import PROMPTER_FILE, Prompter

        home = Path(trained_home(self.adapter)).expanduser()
        if self.adapter in catalogue.RECIPES:
            home = resolve.resolve(self.adapter)
        if not (home / catalogue.ADAPTER_CONFIG).is_file():
            raise AlignProError(
                f"adapter {self.adapter!r}: holds no {catalogue.ADAPTER_CONFIG}; name the folder of a "
                "trained prompter or of an adapter that PEFT saved"
            )
        base = adapters.adapter_base(home)
        folder = Path(self.out)
        here(folder).check(names=("*",))
        packages.note(f"merging {home} into {base}, as {self.dtype}")
        if (home / PROMPTER_FILE).is_file():
            merged = Prompter.from_pretrained(home, dtype=self.dtype, device="cpu", merged=True)
            replace(merged, base=base).save(folder, whole=True)
        else:
            model, tokenizer = load.load_model(home, self.dtype, "cpu")
            with quiet():
                model.save_pretrained(str(folder), safe_serialization=True)
                tokenizer.save_pretrained(str(folder))
        say(f"wrote {folder}: a whole model; give it as --prompter or --target")
        return 0
