"""Open-ended PPO of SmolLM2-135M-Instruct as prompter and frozen model, judged on held-out prompts.

    python experiments/open_ppo.py --out runs/open_ppo             # seeds 0 1 2, then the comparison
    python experiments/open_ppo.py --out runs/open_ppo --seeds 1   # one of them; several can run at once
    python experiments/open_ppo.py --out runs/append --variant append

`rewrite`: the prompter says the whole rewrite, and the frozen model samples at temperature 1. `append`: it
only adds to the prompt, and the frozen model samples as the paper evaluates (temperature 1.5, top-p 0.6,
top-k 20).

Trains on the training split of the packaged instructions, with the faithful settings, and rolls out on the
test split: no prompter, ρ_sft, and ρ_θ of each seed, each rewrite answered once. Differences of mean reward
come with 95% bootstrap intervals over prompts, within which all samples and seeds of a prompt stay together.
Everything resumes: run the same command again.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from alignpro.files import read_json_lines, write_json, write_text
from alignpro.llm.data import packaged, split
from alignpro.llm.models.sampling import EVALUATION, Sampling
from alignpro.llm.policies.prompter import Prompter
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets.ledger import Cached
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training.open_ended import PROMPTER_FOLDER, Environment, TrainSettings, train
from alignpro.runs import environment

MODEL, REWARD = "smollm2-135m-instruct", "minilm-bt"
SETTINGS = TrainSettings(
    lam=0.02,
    iterations=30,
    prompts=8,
    samples=6,
    epochs=2,
    minibatches=2,
    max_tokens=24,
    learning_rate=5e-4,
    lora_layers=0.34,
)
# Settings, and how the frozen model answers, by template of the prompter.
VARIANTS = {
    "rewrite": (SETTINGS, Sampling(max_tokens=32)),
    "append": (
        replace(SETTINGS, iterations=40, samples=8, max_tokens=16),
        replace(EVALUATION, max_tokens=32),
    ),
}


def rows_of(arm, seed, prompts, rewrites, env, samples):
    """One row per prompt and sample: what was asked of the frozen model, what it said, how it was judged."""
    asked = [x for row in rewrites for x in row]
    owners = [x for x in prompts for _ in range(samples)]
    places = [i for _ in prompts for i in range(samples)]
    answers = env.target.respond([a or " " for a in asked], env.sampling, first=places, seed=10_000 + seed)
    texts = [row[0].text for row in answers]
    rewards = env.reward.score(owners, texts)
    return [
        {"arm": arm, "seed": seed, "x": x, "sample": i, "rewrite": a, "response": y, "reward": float(r)}
        for x, i, a, y, r in zip(owners, places, asked, texts, rewards, strict=True)
    ]


def roll_out(path, arm, seed, prompts, rewrites, env, samples):
    if path.exists():
        return read_json_lines(path)
    rows = rows_of(arm, seed, prompts, rewrites(), env, samples)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{arm} (seed {seed}): mean reward {np.mean([row['reward'] for row in rows]):.4f}", flush=True)
    return rows


def by_prompt(rows, prompts):
    """[prompts] mean reward."""
    return np.array([np.mean([row["reward"] for row in rows if row["x"] == x]) for x in prompts])


def interval(values, repeats=10_000):
    """Mean and 95% percentile bootstrap interval over prompts."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(repeats, len(values)))].mean(1)
    return {
        "value": float(values.mean()),
        "lo": float(np.quantile(means, 0.025)),
        "hi": float(np.quantile(means, 0.975)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--variant", choices=VARIANTS, default="rewrite")
    parser.add_argument("--iterations", type=int, help="rounds, if not the variant's own")
    parser.add_argument("--samples", type=int, default=4, help="rollouts per held-out prompt and arm")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compare-only", action="store_true", help="compare the seeds that are finished")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    every = packaged.instructions()
    training = [x for x in every if split.split_of(x) == "train"]
    held_out = [x for x in every if split.split_of(x) == "test"]
    settings, answers = VARIANTS[args.variant]
    settings = replace(settings, iterations=args.iterations or settings.iterations)
    reward = load_reward(REWARD)
    frozen = LocalTarget(MODEL, batch_size=64)
    print(f"{len(training)} prompts to train on, {len(held_out)} held out", flush=True)

    def env(folder):
        return Environment(reward, Cached(frozen, folder, note=None), answers, seed=0)

    rolled = {"none": [], "sft": [], "trained": []}
    for seed in args.seeds:
        folder = args.out / f"seed-{seed}"
        world = env(folder / "answers")
        world.seed = seed
        final = folder / PROMPTER_FOLDER
        if not (folder / "finished.json").exists():
            if args.compare_only:
                continue
            base = Prompter.from_pretrained(MODEL, template=args.variant)
            facts = {"model": MODEL, "target": MODEL, "reward": REWARD}
            train(base, world, training, replace(settings, seed=seed), folder, resume=True, facts=facts)
            write_json(folder / "finished.json", {"seed": seed})
        judge = env(args.out / "answers")

        def of(prompter, seed=seed):
            return lambda: prompter().rewrites(held_out, args.samples, seed=seed)

        def untrained():
            base = Prompter.from_pretrained(MODEL, template=args.variant)
            return replace(base, max_tokens=settings.max_tokens)

        arms = {
            "none": lambda: [[x] * args.samples for x in held_out],
            "sft": of(untrained),
            "trained": of(lambda final=final: Prompter.from_pretrained(final)),
        }
        for arm, rewrites in arms.items():
            path = folder / f"rollouts-{arm}.jsonl"
            rolled[arm] += roll_out(path, arm, seed, held_out, rewrites, judge, args.samples)

    means = {arm: by_prompt(rows, held_out) for arm, rows in rolled.items()}
    seeds = sorted({row["seed"] for row in rolled["trained"]})
    result = {
        "variant": args.variant,
        "settings": asdict(settings),
        "answers": asdict(answers),
        "held_out": len(held_out),
        "samples": args.samples,
        "seeds": seeds,
        "mean_reward": {arm: interval(values) for arm, values in means.items()},
        "trained_minus_none": interval(means["trained"] - means["none"]),
        "trained_minus_sft": interval(means["trained"] - means["sft"]),
        "sft_minus_none": interval(means["sft"] - means["none"]),
        "by_seed": {
            str(seed): {
                arm: float(np.mean([row["reward"] for row in rows if row["seed"] == seed]))
                for arm, rows in rolled.items()
            }
            for seed in seeds
        },
        "curves": {str(s): _curve(args.out / f"seed-{s}" / "metrics.jsonl") for s in seeds},
        "environment": environment(),
    }
    write_json(args.out / "results.json", result)
    for name in ("trained_minus_none", "trained_minus_sft", "sft_minus_none"):
        print(f"{name}: {result[name]['value']:+.4f} [{result[name]['lo']:+.4f}, {result[name]['hi']:+.4f}]")


def _curve(path):
    names = (
        "step",
        "score",
        "ppo/kl_k1",
        "ppo/objective",
        "ppo/explained_variance",
        "completions/mean_length",
    )
    return [{name: line.get(name) for name in names} for line in read_json_lines(path)]


if __name__ == "__main__":
    main()
