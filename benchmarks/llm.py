"""How fast one training step is, by phase, beside plain transformers and TRL's own RLOO in the same run.

    python benchmarks/llm.py                         # SmolLM2-135M-Instruct, 8 prompts x 8 rewrites
    python benchmarks/llm.py --tiny                  # a tiny random model: the overhead of the machinery
    python benchmarks/llm.py --memory                # what scoring keeps, at a vocabulary of 262,144
    python benchmarks/llm.py --json result.json

One step: rewrites are generated, the frozen model answers each, the reward judges (a cheap one here), the
reference scores the rewrites, and the adapter is updated once. The rivals do the same work:

- `plain`: transformers.generate with num_return_sequences, padded batches, no sharing of prefixes;
- `trl rloo`: trl.RLOOTrainer as it comes, with the same adapter and a reward function that asks the same
  frozen model.

Each does `--rounds` steps after one that is not counted; the least is shown. All sample from the same policy,
so lengths are alike but not equal: rates are per token generated. `in models` is the share of a step spent
inside forward and backward passes; the rest is overhead.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from theory import machine

from alignpro.llm.data import packaged
from alignpro.llm.models import policy
from alignpro.llm.models.adapters import adapter_config
from alignpro.llm.models.configure import tiny_model
from alignpro.llm.models.libraries import quiet
from alignpro.llm.models.sampling import Sampling
from alignpro.llm.policies.prompter import Prompter, target_ids
from alignpro.llm.targets.local import LocalTarget
from alignpro.llm.training import open_ended
from alignpro.llm.training.open_ended import Environment, train
from alignpro.llm.training.ppo import PPOTrainer
from alignpro.llm.training.settings import TrainSettings


class Clock:
    """Seconds by phase, and within forward and backward passes.

    On a GPU a phase waits for what it set going, and passes are timed by events among the kernels, so that
    nothing is held up amid a phase.
    """

    def __init__(self):
        self.on_gpu = torch.cuda.is_available()
        self.steps = []
        self.begin()

    def now(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self):
        self.phases = defaultdict(float)
        self.tokens = defaultdict(int)
        self.passes = []
        self.depth = 0
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.since = self.now()

    def end(self):
        total = self.now() - self.since
        inside = sum(
            start.elapsed_time(stop) / 1000 if self.on_gpu else stop - start for start, stop in self.passes
        )
        memory = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        self.steps.append(Step(total, dict(self.phases), dict(self.tokens), inside, memory))
        self.begin()

    @contextmanager
    def phase(self, name):
        start = self.now()
        yield
        self.phases[name] += self.now() - start

    @contextmanager
    def within(self):
        self.depth += 1
        start = self._mark() if self.depth == 1 else None
        try:
            yield
        finally:
            self.depth -= 1
            if start is not None:
                self.passes.append((start, self._mark()))

    def _mark(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def watch(self, model):
        """Counts the forward passes of the model, and of its trunk called by itself, as inside."""
        for part in (model, model.base_model):
            part.forward = self._timed(part.forward)
        return model

    def _timed(self, forward):
        def run(*positional, **named):
            with self.within():
                return forward(*positional, **named)

        return run

    def best(self):
        return min(self.steps[1:], key=lambda step: step.seconds)


class Step(NamedTuple):
    """What one step took; `memory` in bytes, of a GPU, at most."""

    seconds: float
    phases: dict
    tokens: dict
    inside: float
    memory: int


class Parts(NamedTuple):
    """What a step is made of."""

    prompter: Prompter
    frozen: LocalTarget
    reward: Any
    prompts: list


class Cheap:
    """A reward that costs nothing: the share of distinct words."""

    low, high = 0.0, 1.0

    def score(self, prompts, responses):
        return np.array([len(set(y.split())) / max(1, len(y.split())) for y in responses])

    def describe(self):
        return {"name": "distinct words"}


def parts(tiny):
    if tiny:
        model, tokenizer = tiny_model(seed=0)
        frozen, _ = tiny_model(seed=1)
        prompts = ["abc", "bcd", "cde", "def", "efg", "fgh", "gha", "hab"]
        target = LocalTarget((frozen, tokenizer), batch_size=64)
        return Parts(Prompter(model, tokenizer, base="tiny"), target, Cheap(), prompts)
    prompter = Prompter.from_pretrained("smollm2-135m-instruct")
    target = LocalTarget("smollm2-135m-instruct", dtype="float32", batch_size=64)
    return Parts(prompter, target, Cheap(), packaged.instructions(8))


def settings(args):
    return TrainSettings(
        algorithm="ppo",
        iterations=args.rounds + 1,
        prompts=args.prompts,
        samples=args.samples,
        epochs=1,
        microbatches=args.microbatches,
        max_tokens=args.rewrite_tokens,
        lora_layers=args.lora_layers,
        learning_rate=1e-4,
    )


def watched(made):
    """A clock on every model of a step."""
    clock = Clock()
    for part in made[:3]:
        if hasattr(part, "model"):
            clock.watch(part.model)
    return clock


def answering(clock, frozen):
    """Times what the frozen model does, and counts its tokens."""
    respond = frozen.respond

    def responding(*positional, **named):
        with clock.phase("frozen generation"):
            found = respond(*positional, **named)
        clock.tokens["answers"] += sum(answer.tokens for row in found for answer in row)
        return found

    frozen.respond = responding


def judging(clock, reward):
    """Times what the reward does."""
    score = reward.score

    def scoring(*positional, **named):
        with clock.phase("reward"):
            return score(*positional, **named)

    reward.score = scoring


def ours(args, made):
    """`alignpro.llm.training.open_ended`, PPO."""
    prompter, frozen, reward, prompts = made
    clock = watched(made)
    environment = Environment(reward, frozen, Sampling(max_tokens=args.answer_tokens))
    head = policy.edge_log_probs

    def applied(*positional, **named):  # the model's head, which is applied outside its forward pass
        with clock.within():
            return head(*positional, **named)

    policy.edge_log_probs = applied
    timed = {"sample_and_score": "prompter generation", "log_probs": "scoring and update, forward"}
    saved = {name: getattr(open_ended, name) for name in timed}

    def wrap(name, phase):
        def run(*positional, **named):
            with clock.phase(phase):
                found = saved[name](*positional, **named)
            if name == "sample_and_score":
                clock.tokens["rewrites"] += sum(len(ids) for row in found for ids, _ in row)
            return found

        return run

    for name, phase in timed.items():
        setattr(open_ended, name, wrap(name, phase))
    answering(clock, frozen)
    judging(clock, reward)
    with _backward(clock, PPOTrainer, args.microbatches), tempfile.TemporaryDirectory() as folder:
        train(prompter, environment, prompts, settings(args), folder, progress=False)
    policy.edge_log_probs = head
    for name, function in saved.items():
        setattr(open_ended, name, function)
    return clock.best()


@contextmanager
def _backward(clock, trainer, passes=1):
    """Times each step, of so many passes with their gradients, and the backward passes in it."""
    from accelerate import Accelerator

    step, backward = trainer.training_step, Accelerator.backward

    done = 0

    def stepping(self, *positional, **named):
        nonlocal done
        if done % passes == 0:
            clock.begin()
        found = step(self, *positional, **named)
        done += 1
        if done % passes == 0:
            clock.end()
        return found

    def going_back(self, *positional, **named):
        with clock.phase("update, backward"), clock.within():
            return backward(self, *positional, **named)

    trainer.training_step, Accelerator.backward = stepping, going_back
    try:
        yield
    finally:
        trainer.training_step, Accelerator.backward = step, backward


def trl_rloo(args, made):
    """trl.RLOOTrainer as it comes."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    prompter, frozen, judge, prompts = made
    tokenizer, template = prompter.tokenizer, prompter.template
    clock = watched(made)
    environment = Environment(judge, frozen, Sampling(max_tokens=args.answer_tokens))
    answering(clock, frozen)
    judging(clock, judge)

    def reward(prompts, completion_ids, x, **_):
        clock.tokens["rewrites"] += sum(map(len, completion_ids))
        texts = [
            template.rewrite(tokenizer, *pair) for pair in zip(x, map(tuple, completion_ids), strict=True)
        ]
        return environment.score(x, texts, list(range(len(x)))).tolist()

    asked = [tokenizer.decode(list(template.prompt_ids(tokenizer, x))) for x in prompts]
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=args.prompts * args.samples,
            num_generations=args.samples,
            max_steps=args.rounds + 1,
            max_completion_length=args.rewrite_tokens,
            temperature=1.0,
            beta=0.05,
            learning_rate=1e-4,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = RLOOTrainer(
            model=prompter.model,
            peft_config=adapter_config(prompter.model, 16, args.lora_layers),
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": asked, "x": prompts}),
            processing_class=tokenizer,
        )
        with _backward(clock, RLOOTrainer):
            trainer.train()
    return clock.best()


def plain(args, made):
    """The same step with transformers alone: padded batches, logits of the rewrites only."""
    from peft import get_peft_model

    prompter, frozen, reward, prompts = made
    tokenizer, template = prompter.tokenizer, prompter.template
    clock = watched(made)
    judging(clock, reward)
    model = get_peft_model(prompter.model, adapter_config(prompter.model, 16, args.lora_layers))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def padded(rows, pad, device):
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows])
        real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return ids.to(device), real.to(device)

    def generate(net, words, rows, count, most):
        ids, mask = padded(rows, words.pad_token_id, net.device)
        with torch.no_grad():
            out = net.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=most,
                num_return_sequences=count,
                pad_token_id=words.pad_token_id,
            )
        ends = net.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends)
        said = []
        for row in out[:, ids.shape[1] :].tolist():
            stops = [i for i, token in enumerate(row) if token in ends]
            said.append(row[: stops[0] + 1] if stops else row)
        return said

    def log_probs(rows, said):
        both = [[*r, *s] for r, s in zip(rows, said, strict=True)]
        ids, mask = padded(both, tokenizer.pad_token_id, model.device)
        most = max(map(len, said))
        out = model(input_ids=ids, attention_mask=mask, logits_to_keep=most + 1, use_cache=False)
        values = torch.log_softmax(out.logits[:, :-1].float(), -1).gather(2, ids[:, -most:, None])[..., 0]
        lengths = torch.tensor([[len(s)] for s in said], device=ids.device)
        return (values * (torch.arange(most, 0, -1, device=ids.device) <= lengths)).sum(1)

    def pieces(values):  # each with all rewrites of its prompts
        size = args.samples * -(-args.prompts // args.microbatches)
        return [values[i : i + size] for i in range(0, len(values), size)]

    for _ in range(args.rounds + 1):
        clock.begin()
        rows = [template.prompt_ids(tokenizer, x) for x in prompts]
        with clock.phase("prompter generation"):
            said = generate(model, tokenizer, rows, args.samples, args.rewrite_tokens)
        rows = [row for row in rows for _ in range(args.samples)]
        owners = [x for x in prompts for _ in range(args.samples)]
        texts = [template.rewrite(tokenizer, x, tuple(ids)) for x, ids in zip(owners, said, strict=True)]
        words = frozen.tokenizer
        with clock.phase("frozen generation"):
            asked = [target_ids(words, x or " ") for x in texts]
            answers = generate(frozen.model, words, asked, 1, args.answer_tokens)
        clock.tokens["rewrites"] += sum(map(len, said))
        clock.tokens["answers"] += sum(map(len, answers))
        scores = reward.score(owners, [words.decode(a, skip_special_tokens=True) for a in answers])
        scores = torch.tensor(scores, dtype=torch.float32, device=model.device)
        for *part, earned in zip(pieces(rows), pieces(said), pieces(scores), strict=True):
            with clock.phase("scoring and update, forward"):
                with torch.no_grad(), model.disable_adapter():
                    reference = log_probs(*part)
                policy = log_probs(*part)
            advantage = (earned - 0.05 * (policy.detach() - reference)).view(-1, args.samples)
            advantage = (advantage - advantage.mean(1, keepdim=True)).flatten()
            with clock.phase("update, backward"), clock.within():
                (-(policy * advantage).sum() / len(said)).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.end()
    return clock.best()


# --- memory ----------------------------------------------------------------------------------------------

VOCABULARY, STATES = 262_144, 1024


class Peak:
    """Bytes held at most within the block, beyond what was held before it."""

    def __enter__(self):
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_):
        now = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self._resident("VmHWM")
        self.bytes = now - self.before

    @staticmethod
    def _resident(field):
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field)]
        return 1024 * int(line.split()[1])


def scoring_memory():
    """Log-probabilities, entropies and the gradient of 1,024 tokens at a vocabulary of 262,144."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from alignpro.llm.models.forward import How, remember
    from alignpro.llm.models.policy import log_probs

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(device)
    remember(model, How())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    rng = np.random.default_rng(0)
    said = rng.integers(5, VOCABULARY, (8, STATES // 8)).tolist()
    prompts = rng.integers(5, VOCABULARY, (8, 4)).tolist()

    def ours():
        scores = log_probs(model, prompts, said)
        scores.log_probs.sum().backward()

    def plain():
        ids = torch.tensor([[*p, *s] for p, s in zip(prompts, said, strict=True)], device=device)
        logits = model(input_ids=ids, logits_to_keep=STATES // 8 + 1).logits[:, :-1].float()
        logp = torch.log_softmax(logits, -1)
        with torch.no_grad():
            (-(logp.exp() * logp)).sum(-1)
        logp.gather(2, ids[:, -STATES // 8 :, None]).sum().backward()

    out = {}
    for name, way in (("alignpro", ours), ("plain transformers", plain)):
        trained.grad = None
        with Peak() as peak:
            start = time.perf_counter()
            way()
            seconds = time.perf_counter() - start
        out[name] = {"bytes": peak.bytes, "seconds": seconds, "gradient": float(trained.grad.norm())}
    return out


def saved_activations():
    """Bytes that autograd keeps for each token, layer and hidden unit, in bfloat16, by configuration."""
    import transformers as t
    from peft import get_peft_model

    common = {"num_hidden_layers": 4, "vocab_size": 1000, "pad_token_id": 0}

    def sizes(hidden, inner, heads, groups, **more):
        named = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads}
        return common | named | {"num_key_value_heads": groups} | more

    kinds = {  # the ratios of the models' own widths
        "Llama-3.1-8B": (t.LlamaForCausalLM, t.LlamaConfig(**sizes(512, 1792, 4, 1))),
        "Phi-3.5-mini": (t.Phi3ForCausalLM, t.Phi3Config(**sizes(384, 1024, 4, 4))),
        "Qwen2.5-1.5B": (t.Qwen2ForCausalLM, t.Qwen2Config(**sizes(384, 2240, 3, 1))),
        "Qwen2.5-7B": (t.Qwen2ForCausalLM, t.Qwen2Config(**sizes(448, 2368, 7, 1))),
        "Gemma 2": (t.Gemma2ForCausalLM, t.Gemma2Config(**sizes(512, 2048, 4, 2, head_dim=128))),
    }
    out = {}
    for name, (kind, config) in kinds.items():
        model = kind(config).to(torch.bfloat16)
        model = get_peft_model(model, adapter_config(model, 16, 1.0))
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = {}

        def keep(tensor, weights=weights, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(5, 900, (1, 256))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden = model.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        out[name] = sum(kept.values()) / (ids.numel() * config.hidden_size * config.num_hidden_layers)
        del hidden
    return out


def memory(path):
    logits = 4 * STATES * VOCABULARY
    found = {"machine": machine(), "one_logits_tensor": logits, "scoring": scoring_memory()}
    print(f"{STATES} tokens at a vocabulary of {VOCABULARY}: the logits are {logits / 1e9:.2f} GB in float32")
    for name, row in found["scoring"].items():
        print(
            f"{name:22s}{row['bytes'] / 1e9:8.2f} GB more at the peak, {row['bytes'] / logits:.2f} logits "
            f"tensors, {row['seconds']:.2f} s, gradient {row['gradient']:.6f}"
        )
    found["saved_activations"] = saved_activations()
    print("bytes that autograd keeps for each token, layer and hidden unit, bfloat16:")
    print(", ".join(f"{name} {value:.0f}" for name, value in found["saved_activations"].items()))
    if path:
        path.write_text(json.dumps(found, indent=1))


PLAIN = "plain transformers"
RIVALS = {"alignpro ppo": ours, PLAIN: plain, "trl rloo": trl_rloo}


def add_arguments(parser):
    """Of a step's sizes."""
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rewrite-tokens", type=int, default=24)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--lora-layers", type=float, default=0.34)


def measured(name, args, made):
    """One rival's best step."""
    step = RIVALS[name](args, made)
    tokens = sum(step.tokens.values())
    return {**step._asdict(), "tokens_per_second": tokens / step.seconds}


_CELLS = ("step s", "rewrites", "answers", "tok/s", "in models", "x plain")
HEAD = f"{'':22s}" + "".join(f"{cell:>11s}" for cell in _CELLS) + "   seconds by phase"


def line(name, row):
    """A row below `HEAD`."""
    cells = (
        f"{row['seconds']:.2f}",
        str(row["tokens"]["rewrites"]),
        str(row["tokens"]["answers"]),
        f"{row['tokens_per_second']:.1f}",
        f"{100 * row['inside'] / row['seconds']:.0f}%",
        f"{row['times_plain']:.2f}",
    )
    by_phase = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["phases"].items())
    return f"{name:22s}" + "".join(f"{cell:>11s}" for cell in cells) + f"   {by_phase}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        memory(args.json)
        return
    found = {"machine": machine(), "threads": args.threads, "rivals": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    print(HEAD)
    for name in (PLAIN, "trl rloo", "alignpro ppo"):
        row = found["rivals"][name] = measured(name, args, parts(args.tiny))
        row["times_plain"] = row["tokens_per_second"] / found["rivals"][PLAIN]["tokens_per_second"]
        print(line(name, row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
