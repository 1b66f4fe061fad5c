"""Settings of training on pairs of texts: fine-tuning a prompter, and learning a reward."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from alignpro.errors import AlignProError
from alignpro.llm.training.settings import FitSettings


@dataclass(frozen=True)
class PairSettings(FitSettings):
    """Settings that training on pairs of texts has."""

    batch_size: int = 16
    """How many pairs in each optimizer step."""
    save_every: int = 100
    """Optimizer steps between checkpoints, which an interrupted run continues from."""
    microbatches: int = 1
    """Parts in which an optimizer step's pairs go through the model, one after the other: the same gradient
    with less memory."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: about a third more time
    for a fraction of the memory."""

    least = FitSettings.least | {"batch_size": 1, "save_every": 1, "microbatches": 1}
    flags: ClassVar[dict[str, str]] = {"batch_size": "pairs_per_step"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.microbatches:
            raise AlignProError(
                f"microbatches {self.microbatches}: does not divide batch_size {self.batch_size}"
            )


@dataclass(frozen=True)
class SFTSettings(PairSettings):
    """How the prompter is fine-tuned on pairs of a prompt and its rewrite."""

    learning_rate: float = 2e-4
    """Step of the optimizer (AdamW) for the adapter at first; it falls along a cosine."""
    epochs: int = 3
    """Passes over the training pairs."""
    max_tokens: int = 128
    """The most tokens of one rewrite, its end token included, here and when sampled later. Longer pairs are
    left out: cut, they would teach never to end."""
    lora_layers: float = 1.0
    """Share of the layers, from the top, that carry the adapter."""
    policy_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights under the adapter, which is trained in float32: bfloat16 takes half the memory."""
    together: bool = False
    """Learn the pairs of one prompt in one batch, which then reads the prompt once: faster where prompts have
    many pairs."""

    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "lora_layers")
    least = PairSettings.least | {"epochs": 1, "max_tokens": 2}
    flags = PairSettings.flags | {"max_tokens": "rewrite_tokens"}


@dataclass(frozen=True)
class RewardSettings(PairSettings):
    """How a reward model is trained on preference pairs."""

    learning_rate: float = 1e-4
    """Step of the optimizer (AdamW) at first; it falls along a cosine. About 1e-5 suits training of all
    weights."""
    epochs: float = 1.0
    """Passes over the training pairs. Reward models overfit after few."""
    max_tokens: int = 1024
    """The most tokens of a sample, prompt and answer, with what the template adds; longer ones lose the
    beginning of the prompt."""
    lora_rank: int = 16
    """Rank of the adapter (LoRA), which is merged before saving; 0 trains all weights."""
    centre: float = 0.01
    """Weight of the mean of (r(x,y_u) + r(x,y_v))² in the loss (arXiv 2312.09244): eq. (1) leaves a term in x
    free."""

    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "epochs")
    least = PairSettings.least | {"lora_rank": 0, "max_tokens": 1}
    flags = PairSettings.flags | {"max_tokens": "sample_tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.centre) and self.centre >= 0):
            raise AlignProError(f"centre {self.centre}: give a finite number, at least 0")
