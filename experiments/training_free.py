"""PPO beside the training-free prompter and best-of-n at equal target calls, on held-out prompts.

    python experiments/training_free.py --run runs/open_ppo      # after experiments/open_ppo.py

PPO asked the frozen model rounds × prompts × samples times to train one prompter. The training-free prompter
asks as often for the held-out prompts together: n rewrites of each from ρ_sft, one answer to each. What is
chosen, by ρ* at PPO's λ or as the best of n, is valued on fresh answers, four for each prompt, as PPO's
rewrites were.
Intervals are 95% bootstraps over prompts.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from open_ppo import MODEL, REWARD, VARIANTS, by_prompt, interval

from alignpro.files import read_json_lines, write_json
from alignpro.llm.arms.evaluate import evaluate
from alignpro.llm.arms.resample import best_of_n, load_proposals, propose, save_proposals, star
from alignpro.llm.data import packaged, split
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training.open_ended import Environment
from alignpro.runs import environment


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="what open_ppo.py wrote")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings, answers = VARIANTS["rewrite"]
    held_out = [x for x in packaged.instructions() if split.split_of(x) == "test"]
    n = round(settings.iterations * settings.prompts * settings.samples / len(held_out))
    world = Environment(
        load_reward(REWARD),
        Cached(LocalTarget(MODEL, batch_size=64), args.run / "training_free", note=None),
        answers,
        seed=20_000 + args.seed,
    )
    path = args.run / "training_free" / "proposals.jsonl"
    if not path.exists():
        prompter = Prompter.from_pretrained(MODEL)
        prompter.max_tokens = settings.max_tokens
        print(f"{len(held_out)} prompts, {n} rewrites of each, one answer to each", flush=True)
        save_proposals(path, propose(prompter, world, held_out, n, seed=args.seed))
    proposals = load_proposals(path)
    stars = [star(p, settings.lam) for p in proposals]
    chosen = {
        "star": [s.weights for s in stars],
        "best_of_n": [best_of_n(p).weights for p in proposals],
    }
    means = {
        arm: evaluate(proposals, weights, world, draws=4, seed=args.seed).values
        for arm, weights in chosen.items()
    }
    for arm in ("none", "sft", "trained"):
        files = sorted(args.run.glob(f"seed-*/rollouts-{arm}.jsonl"))
        rows = [row for file in files for row in read_json_lines(file)]
        means[arm] = by_prompt(rows, held_out)
    pairs = [("star", "none"), ("best_of_n", "none"), ("trained", "star"), ("trained", "best_of_n")]
    result = {
        "rewrites": n,
        "calls": sum(p.calls for p in proposals),
        "calls_of_training": settings.iterations * settings.prompts * settings.samples,
        "lam": settings.lam,
        "effective_rewrites": interval(np.array([s.ess for s in stars])),
        "optimism": interval(np.array([s.value for s in stars]) - means["star"]),
        "mean_reward": {arm: interval(values) for arm, values in means.items()},
        "differences": {f"{a} - {b}": interval(means[a] - means[b]) for a, b in pairs},
        "environment": environment(),
    }
    out = Path(__file__).parent / "results" / "training_free.json"
    write_json(out, result)
    for name, d in result["differences"].items():
        print(f"{name}: {d['value']:+.4f} [{d['lo']:+.4f}, {d['hi']:+.4f}]")


if __name__ == "__main__":
    main()
