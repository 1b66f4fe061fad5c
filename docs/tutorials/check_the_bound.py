"""Check Theorem 1 on rollouts of real models, those of `train_a_prompter.py` among them if it was run."""

from pathlib import Path

from alignpro import rollouts
from alignpro.commands.main import main as alignpro
from alignpro.estimation import compare, estimate, headroom

HELD_OUT = 40  # prompts that no training has seen, from the first of the test split

trained = ["--trained", "runs/plain"] if Path("runs/plain/prompter").exists() else []
alignpro(
    [
        *("rollout", "--out", "runs/rolled", "--dataset", "instructions", "--prompts", str(HELD_OUT)),
        *("--arms", "none", "sft", *trained, "--prompter", "instructions-sft"),
        *("--target", "smollm2-135m-instruct", "--reward", "ease"),
        *("--draws", "4", "--answers", "2", "--rewrite-tokens", "16", "--answer-tokens", "40"),
    ]
)

rolled = rollouts.read("runs/rolled/rollouts.jsonl")
arms = compare(rolled, ["none", "sft", "trained"] if trained else ["none", "sft"])
print(arms)
arms.plot().savefig("compared.png")

# β and λ are those of the statement: what RLHF and the prompter would be tuned with.
report = estimate(rolled, beta=0.2, lam=0.02)
print(report)
report.plot().savefig("bounds.png")

print(headroom(rolled, lams=[0.02, 0.1]))
