"""Train a prompter that gets plain answers out of a frozen model: 15 to 30 minutes on two CPU cores."""

from alignpro import train
from alignpro.llm import Sampling, prompts

ROUNDS = 40  # of 16 prompts with 2 rewrites each, all of which the frozen model answers once

trained = train(
    prompts("instructions", "train"),  # 416 packaged prompts; or a list of your own
    reward="ease",  # reading ease of the answer, in [0, 1]
    target="smollm2-135m-instruct",  # π_F, which stays as it is
    prompter="instructions-sft",  # ρ_sft: ends each prompt in one of a hundred instructions
    answers=Sampling(max_tokens=40),
    out="runs/plain",
    resume=True,  # the same script goes on where it was interrupted
    lam=0.02,
    iterations=ROUNDS,
    prompts_per_round=16,
    draws=2,
    epochs=2,
    learning_rate=1e-3,
    schedule="constant",
    rewrite_tokens=16,
    lora_layers=0.34,
)
print(trained)
trained.plot().savefig("curves.png")

for x in ("How do I keep my bread from going stale?", "My bicycle chain squeaks."):
    print(trained.prompter.rewrite(x))
