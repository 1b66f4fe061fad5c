"""How much of a training step is the same for every prompt? What an adapter's gradients see of the prompt.

    python experiments/gradients.py          # requests to make something, and all others: minutes of one core
    python experiments/gradients.py --who    # the same requests, said to come from a child or a colleague

g(x) is the gradient of log ρ(s|x) with respect to a fresh adapter, s an instruction. A small step along g(x)
changes log ρ(s|x′) in proportion to g(x)·g(x′). So for two kinds of prompts, whose mean gradients are g₀ and
g₁, |g₀ + g₁|² is the rate at which a step in favour of s on both is learned, and |g₀ − g₁|² that of a step in
favour of s on one and against it on the other: of reading the kind. Their ratio says how much longer that
takes.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_grid import launch
from peft import get_peft_model
from task_grid.kinds import FROM_A_CHILD, MAKING, WHO, Kind
from torch import Tensor
from tqdm import tqdm

from alignpro.errors import AlignProError
from alignpro.files import write_json
from alignpro.llm.data import public
from alignpro.llm.models import policy
from alignpro.llm.models.adapters import adapter_config, blocks_of
from alignpro.llm.models.prompt import with_instruction
from alignpro.llm.policies.prompter import Prompter
from alignpro.runs import environment

INSTRUCTIONS = ("Explain it to a five-year-old child.", "Answer in one word.")
"""What the kinds of `tasks.py` want."""
LAYERS = {
    "all layers": (0.0, 1.0),
    "top half": (0.5, 1.0),
    "top third": (0.66, 1.0),
    "lower half": (0.0, 0.5),
}
"""By name: which layers carry the adapter, as shares of the depth."""
RANK = 16


def chosen(count: int, who: bool) -> tuple[list[str], np.ndarray, Kind]:
    """`count` prompts of each kind from the split `train`, their kinds, and what the kinds 1 are."""
    every = public.prompts("instructions", "train")
    if who:  # each request is of both kinds, so that nothing else differs
        prompts, kind = [first + x for x in every[:count] for first in WHO], FROM_A_CHILD
    else:
        kind = MAKING
        of = kind.of(every)
        prompts = [every[i] for value in (0, 1) for i in np.flatnonzero(of == value)[:count]]
    kinds = kind.of(prompts)
    if (least := min(int((kinds == value).sum()) for value in (0, 1))) < count:
        raise AlignProError(f"--prompts {count}: there are {least} of a kind; give at most that")
    return prompts, kinds, kind


def gradients(prompter: Prompter, prompts: Sequence[str], instruction: str) -> list[dict[str, Tensor]]:
    """Of each prompt: the gradient of log ρ(instruction|x), by parameter of a fresh adapter on every layer.

    A fresh adapter is B A with B = 0, so that only B has a gradient.
    """
    torch.manual_seed(0)
    model = get_peft_model(prompter.model, adapter_config(prompter.model, RANK, 1.0))
    weights = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    found = []
    for x in tqdm(prompts, unit="prompt", disable=None):
        rewrite = with_instruction(x, instruction)
        said = prompter.template.rewrite_ids(prompter.tokenizer, x, rewrite)
        scores = policy.log_probs(model, prompter.prompt_ids([x]), [said])
        got = torch.autograd.grad(scores.log_probs.sum(), list(weights.values()))
        found.append({name: g.detach() for name, g in zip(weights, got, strict=True)})
    model.unload()
    return found


def energies(kernel: np.ndarray, kinds: np.ndarray, paired: bool) -> dict[str, float]:
    """|g₀ + g₁|² and |g₀ − g₁|² by the products of gradients, `kernel` [X, X].

    Both are of the kinds' means over all prompts there might be: what the draw of these prompts adds is taken
    out, where the kinds are not `paired`, that is, of the same requests.
    """
    sign, count = np.where(kinds == 1, 1.0, -1.0), np.bincount(kinds)
    means = 1.0 / count[kinds]
    drawn = 0.0
    for value in () if paired else (0, 1):
        rows = kernel[np.ix_(kinds == value, kinds == value)]
        drawn += (np.trace(rows) - rows.sum() / len(rows)) / (len(rows) - 1) / len(rows)
    shared, apart = means @ kernel @ means, (means * sign) @ kernel @ (means * sign)
    return {"shared": shared - drawn, "kind": apart - drawn}


def summarise(
    found: Mapping[str, list[dict[str, Tensor]]], depth: int, kinds: np.ndarray, paired: bool
) -> dict[str, Any]:
    """By layers: the share of the gradients' energy that all prompts have in common, and what tells kinds."""
    rows = {}
    for name, (low, high) in LAYERS.items():
        kept, common = [], []
        for each in found.values():
            inside = [key for key in each[0] if round(low * depth) <= layer(key) < round(high * depth)]
            flat = torch.stack([torch.cat([row[key].flatten() for key in inside]) for row in each])
            kernel = (flat @ flat.T).double().numpy()
            kept.append(energies(kernel, kinds, paired))
            values = np.linalg.eigvalsh(kernel)
            common.append(float(values[-1] / values.sum()))
        shared, kind = (sum(one[key] for one in kept) for key in ("shared", "kind"))
        rows[name] = {"in common": float(np.mean(common)), "kind over shared": kind / shared}
    return rows


def layer(name: str) -> int:
    """The layer of a parameter: the number in its name."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompter", default="instructions-sft", help="ρ_sft: a trained prompter, or a recipe"
    )
    parser.add_argument("--prompts", type=int, default=24, help="how many of each kind")
    parser.add_argument("--who", action="store_true", help="kinds by who asks, in place of what is asked for")
    parser.add_argument("--out", type=Path, help="file of the results (JSON)")
    args = parser.parse_args()
    return launch.ended("gradients.py", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Take the gradients, and print what they have in common."""
    if args.prompts < 2:
        raise AlignProError(f"--prompts {args.prompts}: give at least 2")
    prompts, kinds, kind = chosen(args.prompts, args.who)
    prompter = Prompter.from_pretrained(args.prompter, merged=True)
    depth = len(blocks_of(prompter.model)[1])
    found = {text: gradients(prompter, prompts, text) for text in INSTRUCTIONS}
    results = {
        "prompter": args.prompter,
        "prompts": len(prompts),
        "kind": kind.name,
        "instructions": INSTRUCTIONS,
        "environment": environment(),
        "layers": summarise(found, depth, kinds, args.who),
    }
    print("| adapter on | in common to all prompts | telling a kind, over what all share | times slower |")
    print("|---|---|---|---|")
    for name, row in results["layers"].items():
        ratio = row["kind over shared"]
        slower = f"{1 / ratio:.0f}" if ratio > 0 else "not told from 0"
        print(f"| {name} | {row['in common']:.1%} | {ratio:.5f} | {slower} |")
    if args.out is not None:
        write_json(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
