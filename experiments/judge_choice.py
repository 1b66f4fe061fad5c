"""Whether a small model made to choose can judge: forced choice on preference pairs of general chat.

    python experiments/judge_choice.py --threads 1

Each pair (a preferred answer and a rejected one, `dpo-demo`, cut to their first words) is asked in both
orders; the model's choice is taken as it is and calibrated. A pair counts as decided where its orders agree.
Intervals are Wilson's, 95%; pairs have distinct prompts.
"""

import argparse
import re

import numpy as np
import torch

from alignpro.estimation import winrate
from alignpro.llm.arms.forced import ForcedChoice
from alignpro.llm.arms.question import question
from alignpro.llm.data import packaged
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.targets.quoting import control_tokens


def cut(text: str, words: int) -> str:
    found = re.match(rf"\s*(?:\S+\s+){{0,{words - 1}}}\S+", text)
    return found[0] if found else text


def rate(hits: np.ndarray) -> str:
    if not len(hits):
        return "none"
    low, high = winrate.wilson(float(hits.mean()), len(hits))
    return f"{hits.mean():.3f} [{low:.3f}, {high:.3f}] of {len(hits)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--words", type=int, default=60, help="of prompt and answers, from the first")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = {}
    for pair in packaged.preference_pairs(["dpo-demo"]):
        x, *answers = (cut(text, args.words) for text in (pair.prompt, pair.chosen, pair.rejected))
        if answers[0] != answers[1]:
            texts.setdefault(x, answers)
    chosen = [(x, *answers) for x, answers in texts.items()][: args.pairs]
    judge = ForcedChoice(LocalTarget(args.model, batch_size=8))
    control = control_tokens(judge)
    asked = [question(x, *a, control) for x, good, bad in chosen for a in ((good, bad), (bad, good))]
    odds = judge.log_odds(asked).reshape(-1, 2)  # the preferred answer first, then second
    print(f"{judge.name}: {len(chosen)} pairs of dpo-demo, first {args.words} words")
    print(
        f"log-odds of A over B: mean {odds.mean():+.3f}, sd {odds.std():.3f}; content-free {judge.prior:+.3f}"
    )
    for name, prior in (("as it is", 0.0), ("calibrated", judge.prior)):
        said = np.sign((odds - prior) * [1, -1])  # of the preferred answer: 1 where it is taken
        agree = said[:, 0] == said[:, 1]
        print(name)
        print(f"  orders agree             {rate(agree)}")
        print(f"  right where they agree   {rate(said[agree, 0] > 0)}")
        first = np.where(said == 0, 0.5, said == [1, -1])
        print(f"  first shown preferred    {first.mean():.3f}")
    # Were a pair's preference for a place the same in both orders, this would be all that is left of it.
    total = odds[:, 0] - odds[:, 1]
    print(f"right by the sum of both orders' log-odds: {rate(total[total != 0] > 0)}")


if __name__ == "__main__":
    main()
