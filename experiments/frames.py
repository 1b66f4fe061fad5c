"""Which fixed words around a prompt help at all? Hand-written frames, rewarded against the bare prompt.

    python experiments/frames.py                 # 60 training prompts, 2 answers each, SmolLM2, minilm-bt
    python experiments/frames.py --prompts 20

The mean difference in reward to the prompt alone, with 1.96 standard errors over prompts. What no fixed frame
gains, a prompter has to find prompt by prompt.
"""

import argparse

import numpy as np
import torch

from alignpro.llm.data import packaged, split
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.rewards.opening import load_reward
from alignpro.llm.targets.local import LocalTarget

FRAMES = (
    "{x} Explain in detail.",
    "{x} Answer step by step.",
    "{x} Answer briefly.",
    "{x} Give a list.",
    "{x} Give an example.",
    "You are an expert. {x}",
    "Please help me: {x}",
    "{x} Give a complete and accurate answer.",
    "{x} Answer directly, without repeating the question.",
    "{x} Be specific and practical.",
    "{x} Begin with the most important point.",
    "{x} Use simple words.",
    "{x} Restate the question in your answer.",
    "{x} Write a clear and concise paragraph.",
    "{x} Write a short essay about it.",
    "{x} Write a comprehensive guide.",
    "{x} Explain thoroughly, with reasons and examples.",
    "{x}\n\nExplain your answer in detail.",
    "{x}\n\n{x}",
    "{x}\n\nAnswer:",
    "{x} Start with an introduction.",
    "{x} Write in plain, fluent English sentences.",
    "{x} Be informative and helpful.",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    prompts = [x for x in packaged.instructions() if split.split_of(x) == "train"][: args.prompts]
    target, reward = LocalTarget("smollm2-135m-instruct", batch_size=64), load_reward("minilm-bt")

    def mean_rewards(frame):
        """[prompts]"""
        asked = [frame.replace("{x}", x) for x in prompts]
        rows = target.respond(asked, Sampling(max_tokens=32), samples=args.answers, seed=1)
        owners = [x for x in prompts for _ in range(args.answers)]
        return reward.score(owners, [a.text for row in rows for a in row]).reshape(len(prompts), -1).mean(1)

    bare = mean_rewards("{x}")
    print(f"the prompt alone: {bare.mean():.4f}", flush=True)
    for frame in FRAMES:
        difference = mean_rewards(frame) - bare
        error = 1.96 * difference.std(ddof=1) / np.sqrt(len(prompts))
        print(f"{difference.mean():+.4f} ± {error:.4f}  {frame!r}", flush=True)


if __name__ == "__main__":
    main()
