"""What a job will cost: memory, tokens and hours, before anything is loaded.

Arithmetic, not measurement: 2 N operations for a token read or written by a model of N parameters, 4 N for
one that an adapter is trained on (the weights under it need no gradients), and for each step of decoding at
least the time to read all weights. `MACHINES` holds what a machine sustains; right within a factor of two
or three.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.llm.data import public
from alignpro.llm.models import packages
from paper_grid import plan
from paper_grid.plan import Job, Preset

_LOGITS = 512 * 2**20
"""Bytes of logits held at once on a GPU (`forward.chunk_rows`); they stand twice, with their exponentials."""
TEMPLATE_TOKENS = 150
"""Of the prompter's instruction and examples, shared by all prompts."""
CHARACTERS_PER_TOKEN = 4
REWARD_BYTES = 4
"""Of each weight of a reward model, which is loaded in float32."""


@dataclass(frozen=True)
class Size:
    """A language model's."""

    parameters: float
    layers: int
    hidden: int
    vocabulary: int
    kv: int
    """Numbers in the cache for each token: 2 × layers × key-value heads × their width."""


# From the models' config.json; parameters from their safetensors.
SIZES: dict[str, Size] = {
    "smollm2-135m-instruct": Size(0.135e9, 30, 576, 49_152, 11_520),
    "minimind2-small": Size(0.026e9, 8, 512, 6_400, 2_048),
    "microsoft/Phi-3.5-mini-instruct": Size(3.82e9, 32, 3072, 32_064, 196_608),
    "Qwen/Qwen2.5-1.5B-Instruct": Size(1.54e9, 28, 1536, 151_936, 14_336),
    "Qwen/Qwen2.5-7B-Instruct": Size(7.62e9, 28, 3584, 152_064, 28_672),
    "meta-llama/Llama-3.1-8B-Instruct": Size(8.03e9, 32, 4096, 128_256, 65_536),
    "weqweasdas/RM-Gemma-2B": Size(2.51e9, 18, 2048, 256_000, 9_216),
    "minilm-bt": Size(0.022e9, 6, 384, 30_522, 4_608),
}


@dataclass(frozen=True)
class Machine:
    """What one worker has, and sustains."""

    words: str
    operations: float
    """A second."""
    bandwidth: float
    """Bytes of weights read in decoding, a second."""
    step: float
    """Seconds for each step of decoding, whatever the model: launching its kernels."""
    memory: float
    """Bytes."""


MACHINES: dict[str, Machine] = {
    # Not measured: 30% of 989 TFLOP/s in bfloat16, 40% of 3.35 TB/s, 25 ms for a step of generation.
    "h100": Machine("one H100 with 80 GB", 3.0e14, 1.3e12, 0.025, 80e9),
    # Measured on the preset small: experiments/LOG.md.
    "cpu-core": Machine("one core of a CPU", 1.0e11, 1.0e10, 0.0, 12e9),
}


@dataclass(frozen=True)
class Cost:
    """Of a job."""

    generated: int = 0
    """Tokens written: rewrites and answers."""
    read: int = 0
    """Tokens read or scored without gradients."""
    trained: int = 0
    """Tokens that gradients are taken on, each pass counted."""
    seconds: float = 0.0
    memory: float = 0.0
    """Bytes, of weights, caches and activations."""

    def __add__(self, other: "Cost") -> "Cost":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Cost(**{**sums, "memory": max(self.memory, other.memory)})


NONE = Size(0, 0, 0, 0, 0)


def _reward_model(reward: str) -> str | None:
    """The model behind a reward; None where it is an address, a Python function or a few lines of one."""
    from alignpro.llm.rewards.texts import TEXTS

    name = str(reward).split("@")[0]
    return None if ":" in name or name in TEXTS else name.split("#")[0]


def models(preset: Preset) -> dict[str, str]:
    """Every model that the grid loads, and what as."""
    found: dict[str, str] = {}
    for options in preset.prompters.values():
        found.setdefault(options["prompter"], "prompter")
    for role, names in (("frozen", preset.frozen.values()), ("unseen", preset.unseen.values())):
        for name in (plan.target(model)["target"] for model in names if not plan.at_address(model)):
            found[name] = f"{found[name]}, {role}" if name in found else role
    if (reward := _reward_model(preset.environment["reward"])) is not None:
        found.setdefault(reward, "reward")
    if preset.judge is not None and not str(preset.judge["judge"]).startswith("http"):
        found.setdefault(preset.judge["judge"], "judge")
    return found


def size(model: str) -> Size:
    """Of a model in `SIZES`, or one whose configuration can be had.

    Raises:
        AlignProError: neither.
    """
    if model in SIZES:
        return SIZES[model]
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(Path(model).expanduser(), trust_remote_code=False)
        layers, hidden = config.num_hidden_layers, config.hidden_size
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        inner = getattr(config, "intermediate_size", 4 * hidden)
        block = 2 * hidden * (hidden + heads * width) + 3 * hidden * inner
        return Size(
            layers * block + hidden * config.vocab_size,
            layers,
            hidden,
            config.vocab_size,
            2 * layers * heads * width,
        )
    except Exception as error:
        raise AlignProError(
            f"model {model!r}: its size is not known ({type(error).__name__}); add it to SIZES in {__name__}"
        ) from None


def _decode(machine: Machine, m: Size, tokens: int, count: int, batch: int, nbytes: float) -> float:
    """Seconds to write `tokens` tokens of each of `count` texts."""
    at_once = max(1, min(batch, count))
    step = max(m.parameters * nbytes / machine.bandwidth, 2 * m.parameters * at_once / machine.operations)
    return -(-count // at_once) * tokens * (step + machine.step)


def _activations(m: Size, tokens: float, nbytes: int) -> float:
    """Bytes kept for the backward pass: 50 numbers for each layer and hidden unit of a model with gated
    layers and an adapter on each linear map (60 to 103 bytes in bfloat16: benchmarks/llm.py --memory); of the
    logits a chunk at a time is held."""
    return tokens * 50 * nbytes * m.layers * m.hidden + 2 * _LOGITS


def machine_of(preset: Preset) -> Machine:
    """That which the preset names. Raises AlignProError where there is no such row."""
    if preset.machine not in MACHINES:
        raise AlignProError(f"machine {preset.machine!r}: choose from {', '.join(MACHINES)}")
    return MACHINES[preset.machine]


def of_job(job: Job, preset: Preset) -> Cost:
    """Its cost on the preset's machine, at most: every rewrite and answer as long as it may be.

    Raises:
        AlignProError: a model of unknown size.
    """
    if job.verb == "prompts":
        return Cost()
    machine = machine_of(preset)
    if job.verb == "train":
        return _training(job.options, preset, machine)
    if job.verb == "rollout":
        return _rollout(job.options, preset, machine)
    return _judging(job.options, preset, machine)


def _common(o: Mapping[str, Any], preset: Preset) -> tuple[Size, Size, int, int, float]:
    """The frozen model, the reward, tokens of a prompt and of an answer, and bytes of a weight."""
    nbytes = {"float32": 4, "4bit": 0.55}.get(o.get("dtype", "bfloat16"), 2)
    prompt = preset.longest_prompt // (2 * CHARACTERS_PER_TOKEN)  # prompts are half as long as they may be
    reward = _reward_model(o["reward"])
    judge = NONE if reward is None else size(reward)
    frozen = NONE if plan.at_address(o["target"]) else size(o["target"])
    return frozen, judge, prompt, int(o["answer_tokens"]), nbytes


def _training(o: Mapping[str, Any], preset: Preset, machine: Machine) -> Cost:
    s = plan.settings_of(o, "training")
    frozen, reward, prompt, answer, nbytes = _common(o, preset)
    policy, batch = size(o["prompter"]), s.prompts * s.samples
    own = 4 if s.policy_dtype == "float32" else 2
    rlhf = s.task == "rlhf"
    shared = 0 if rlhf else TEMPLATE_TOKENS
    tokens = s.prompts * prompt + shared + batch * s.max_tokens  # of one pass of the policy
    answers = 0 if rlhf else batch * s.responses
    seen = 2 * tokens + answers * (prompt + s.max_tokens) + batch * s.responses * (prompt + answer)
    operations = 2 * policy.parameters * 2 * tokens + 4 * policy.parameters * s.epochs * tokens
    operations += 2 * frozen.parameters * answers * (prompt + s.max_tokens)
    operations += 2 * reward.parameters * batch * s.responses * (prompt + answer)
    seconds = operations / machine.operations
    seconds += _decode(machine, policy, s.max_tokens, batch, 64, own)
    if not rlhf:
        seconds += _decode(machine, frozen, answer, answers, int(o["batch_size"]), nbytes)
    memory = policy.parameters * own + reward.parameters * REWARD_BYTES
    part = tokens / (s.minibatches * s.microbatches)
    if s.gradient_checkpointing:  # each layer's input, and one layer whole
        memory += part * policy.layers * policy.hidden * own
        memory += _activations(replace(policy, layers=1), part, own)
    else:
        memory += _activations(policy, part * s.lora_layers, own)
    if not rlhf:
        memory += frozen.parameters * nbytes
        memory += frozen.kv * nbytes * int(o["batch_size"]) * (prompt + s.max_tokens + answer)
    written = batch * s.max_tokens + answers * answer
    n = s.iterations
    return Cost(n * written, n * seen, n * s.epochs * tokens, n * seconds, memory)


def _rollout(o: Mapping[str, Any], preset: Preset, machine: Machine) -> Cost:
    frozen, reward, prompt, answer, nbytes = _common(o, preset)
    draws, each = int(o.get("draws") or 4), int(o.get("answers") or 2)
    prompter = size(next(iter(preset.prompters.values()))["prompter"])
    resampled = [arm for arm in o["arms"] if arm in ("star", "best_of_n")]
    policies = len(o.get("rlhf", ())) + len(o["trained"])
    n = preset.held_out_prompts
    rewrites = n * draws * (("sft" in o["arms"]) + len(o["trained"])) + bool(resampled) * n * o.get(
        "proposals", 0
    )
    answers = n * draws * each * (len(o["arms"]) + policies) + bool(resampled) * n * o.get("proposals", 0)
    length = int(o["rewrite_tokens"])
    scored = 3 * answers * (prompt + length + answer)
    seconds = 2 * frozen.parameters * scored / machine.operations
    seconds += 2 * reward.parameters * answers * (prompt + answer) / machine.operations
    seconds += _decode(machine, frozen, answer, answers, int(o["batch_size"]), nbytes)
    seconds += _decode(machine, prompter, length, rewrites, int(o["batch_size"]), 4)
    memory = 2 * frozen.parameters * nbytes + reward.parameters * REWARD_BYTES + 8 * prompter.parameters
    memory += frozen.kv * nbytes * int(o["batch_size"]) * (prompt + length + answer)
    return Cost(answers * answer + rewrites * length, scored, 0, seconds, memory)


def _judging(o: Mapping[str, Any], preset: Preset, machine: Machine) -> Cost:
    questions = 2 * preset.held_out_prompts
    tokens = (
        300
        + preset.longest_prompt // (2 * CHARACTERS_PER_TOKEN)
        + 2 * int(preset.environment["answer_tokens"])
    )
    reply = 0 if o.get("forced") else int(o.get("reply_tokens", 256))
    if str(o["judge"]).startswith("http"):
        return Cost(questions * reply, questions * tokens)
    judge, batch = size(o["judge"]), int(o.get("batch_size", 8))
    seconds = 2 * judge.parameters * questions * tokens / machine.operations
    if reply:
        seconds += _decode(machine, judge, reply, questions, batch, 2)
    return Cost(
        questions * reply,
        questions * tokens,
        0,
        seconds,
        judge.parameters * 2 + judge.kv * 2 * batch * tokens,
    )


def reachable(preset: Preset) -> list[str]:
    """One sentence for each model or data set of the hub that cannot be had from here; none is downloaded."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    from alignpro.llm.models.catalogue import MODELS
    from alignpro.llm.rewards.opening import REWARDS

    wanted = [
        (m, "model") for m in models(preset) if m not in MODELS and m not in REWARDS and not Path(m).exists()
    ]
    for options in preset.datasets.values():
        source = public.DATASETS.get(options.get("dataset", ""))
        if isinstance(source, public.Source) and not options.get("data_folder"):
            wanted.append((source.repository, "dataset"))
    found = []
    for name, kind in wanted:
        page = f"huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
        try:
            HfApi().auth_check(name, repo_type=kind)
        except GatedRepoError:
            found.append(f"{name}: its licence must be accepted first; do so at {page}, then hf auth login")
        except RepositoryNotFoundError:
            found.append(
                f"{name}: the hub has no such {kind}, or it is private; check the name, or hf auth login"
            )
        except Exception as error:  # of httpx and huggingface_hub, without a common class
            why = packages.scrub(" ".join(str(error).split())[:120]) or type(error).__name__
            found.append(f"{name}: the hub cannot be reached ({why})")
    return found
