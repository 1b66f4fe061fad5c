"""Train a prompter on prompts of your own: two minutes on one CPU core, too short a run to teach it much."""

from pathlib import Path

from alignpro.commands.main import main as alignpro

PROMPTS = [
    "How do I keep my bread from going stale?",
    "Explain compound interest.",
    "My bicycle chain squeaks.",
    "What should I see in Lisbon in one day?",
]
Path("mine.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")

status = alignpro(
    [
        *("train", "--out", "runs/mine", "--resume"),  # the same command goes on where it was interrupted
        *("--prompts-file", "mine.txt"),
        *("--prompter", "smollm2-135m-instruct"),  # ρ_sft; what is trained is an adapter on it
        *("--target", "smollm2-135m-instruct"),  # π_F: any folder or hub id, or the address of an endpoint
        *("--reward", "minilm-bt"),  # r*, in [0, 1]
        *("--algorithm", "ppo", "--lam", "0.05"),
        *(
            "--iterations",
            "2",
            "--prompts-per-round",
            "4",
            "--draws",
            "2",
            "--epochs",
            "2",
        ),  # by default 32, 8, 8, 4
        *(
            "--rewrite-tokens",
            "16",
            "--answer-tokens",
            "16",
            "--lora-layers",
            "0.34",
            "--learning-rate",
            "1e-3",
        ),
    ]
)
if status == 0:
    alignpro(["rewrite", "runs/mine/prompter", "Tips for learning the piano", "--seed", "1", "--json"])
