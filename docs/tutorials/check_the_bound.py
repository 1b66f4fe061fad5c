"""Check Theorem 1 on rollouts of real models, that of `train_a_prompter.py` among them if it is there."""

from pathlib import Path

from alignpro.commands.main import main as alignpro

PROMPTS = [
    "How do I fold a shirt?",
    "Name three uses of vinegar.",
    "Why is the sky blue?",
    "Write a birthday wish for a colleague.",
    "How long should I boil an egg?",
    "Give me a tip for packing light.",
]
Path("held_out.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")  # not those of training

trained = ["--trained", "runs/mine"] if Path("runs/mine/prompter").exists() else []
status = alignpro(
    [
        *("rollout", "--out", "runs/rolled", "--prompts-file", "held_out.txt"),
        *("--arms", "none", "sft", *trained),
        *("--draws", "2", "--answers", "2", "--rewrite-tokens", "12", "--answer-tokens", "10"),
    ]
)
if status == 0:
    # β and λ are those of the statement: what RLHF and the prompter would be tuned with.
    alignpro(["estimate", "runs/rolled/rollouts.jsonl", "--beta", "0.2", "--lam", "0.2"])
    alignpro(["headroom", "runs/rolled/rollouts.jsonl", "--lam", "0.05", "0.2"])
