"""What the prompter of `train_a_prompter.py` earns on held-out prompts, and Theorem 1 on it: five minutes."""

from alignpro import rollouts
from alignpro.commands.main import main as alignpro
from alignpro.estimation import compare, estimate, headroom

HELD_OUT = 40  # prompts that it was not trained on

status = alignpro(
    [
        *("rollout", "--out", "runs/rolled"),
        *("--dataset", "instructions", "--prompts", str(HELD_OUT)),  # of its split `test`
        *("--arms", "none", "sft", "--trained", "runs/mine", "--draws", "2", "--answers", "2"),
        *("--target", "smollm2-135m-instruct", "--answer-tokens", "40", "--reward", "ease"),  # as in training
    ]
)
assert status == 0, "rollout has said why"

rolled = rollouts.read("runs/rolled/rollouts.jsonl")
compared = compare(rolled, ["none", "sft", "trained"])
print(compared)
compared.plot().savefig("compared.png")

# β and λ are those of the statement: what RLHF and the prompter would be tuned with.
report = estimate(rolled, beta=0.2, lam=0.2)
print(report)
report.plot().savefig("bounds.png")  # each bound beside the gap

print(headroom(rolled, lams=(0.02, 0.2)))
