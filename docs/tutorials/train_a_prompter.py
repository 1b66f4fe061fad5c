"""Train a prompter that a person can see working: about ten minutes on two CPU cores."""

from alignpro import train
from alignpro.llm import Sampling
from alignpro.llm.data.public import prompts

ROUNDS = 20  # of 16 prompts, each rewritten twice: 640 answers in all

trained = train(
    prompts("instructions", split="train"),  # 416 requests; a list of your own, or the Path of a file
    out="runs/mine",
    resume=True,  # the same call goes on where it was interrupted
    prompter="instructions-sft",  # ρ_sft, which adds a few words; made at its first use, in minutes
    target="smollm2-135m-instruct",  # π_F: any folder or hub id, or an Endpoint
    reward="ease",  # r: how easily the answer reads, from 0 to 1
    answers=Sampling(max_tokens=40),
    lam=0.02,
    iterations=ROUNDS,
    prompts_per_round=16,
    draws=2,
    epochs=2,
    schedule="constant",
    rewrite_tokens=24,
    lora_layers=0.34,
)
print(trained)

trained.plot().savefig("curves.png")  # reward and KL, round by round

for request in ("Explain compound interest.", "How do I keep bread from going stale?"):
    print({"x": request, "rewrite": trained.prompter.rewrite(request, seed=1)})
