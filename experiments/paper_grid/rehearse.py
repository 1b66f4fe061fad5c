"""A rehearsal: the grid's own jobs on random weights, one round each, to measure what a night will take.

Every model of the hub is replaced by one of the same configuration (layers, widths, heads, vocabulary, chat
template) whose weights are drawn when it is loaded, so that no hub is needed and nothing of their size is
stored. Their texts are nonsense of full length: rewrites and answers hardly ever end early, the worst case.
At the scale `tiny` widths, lengths and numbers are small, and the machinery alone is tried.
"""

import gc
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from alignpro.errors import AlignProError
from alignpro.files import read_json, write_json, write_text
from alignpro.llm.models import packages
from paper_grid import cost, plan, work
from paper_grid.plan import Job, Preset

FILE = "rehearsal.json"
SCALES = ("real", "tiny")
_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 2048}
_TINY_VOCABULARY = 2048


@dataclass(frozen=True)
class Model:
    """A model of the hub as its config.json has it.

    Attributes:
        kind: of transformers, the configuration's class; `head` is what it is loaded as.
        values: of the configuration.
        specials: special tokens; the roles are which of them is bos, eos and pad.
        template: a file among TRL's chat templates.
        ends: tokens at which it stops.
    """

    kind: str
    values: Mapping[str, Any]
    specials: tuple[str, ...]
    roles: Mapping[str, str]
    template: str
    ends: tuple[str, ...] = ()
    head: str = "causal"


def _qwen(hidden: int, inner: int, heads: int, groups: int, vocabulary: int, tied: bool) -> Model:
    return Model(
        "Qwen2Config",
        {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 28,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "vocab_size": vocabulary,
            "max_position_embeddings": 32_768,
            "sliding_window": 32_768,
            "use_sliding_window": False,
            "rope_theta": 1e6,
            "tie_word_embeddings": tied,
        },
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos": "<|im_end|>", "pad": "<|endoftext|>"},
        "qwen2_5.jinja",
        ("<|im_end|>", "<|endoftext|>"),
    )


CONFIGS: dict[str, Model] = {
    "microsoft/Phi-3.5-mini-instruct": Model(
        "Phi3Config",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32_064,
            "max_position_embeddings": 131_072,
            "original_max_position_embeddings": 4096,
            "sliding_window": 262_144,
            "tie_word_embeddings": False,
        },
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        {"bos": "<s>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
        "phi3_5.jinja",
        ("<|end|>", "<|assistant|>", "<|endoftext|>"),
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": _qwen(1536, 8960, 12, 2, 151_936, True),
    "Qwen/Qwen2.5-7B-Instruct": _qwen(3584, 18_944, 28, 4, 152_064, False),
    "meta-llama/Llama-3.1-8B-Instruct": Model(
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
        },
        (
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eot_id|>", "<|eom_id|>", "<|finetune_right_pad_id|>"),
        ),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        "llama3_1.jinja",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "weqweasdas/RM-Gemma-2B": Model(
        "GemmaConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 16_384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "num_labels": 1,
        },
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
        "gemma.jinja",
        head="classifier",
    ),
}
"""From the models' config.json. Positions are rotated as by default, where the originals stretch them: that
changes no size."""


def write_model(model: Model, folder: Path, scale: str) -> Path:
    """Configuration, tokenizer and chat template, and the mark by which weights are drawn at loading."""
    import transformers
    import trl
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from alignpro.llm.models.catalogue import RANDOM_FILE

    values = dict(model.values)
    if scale == "tiny":
        heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
        values |= _TINY | {"vocab_size": _TINY_VOCABULARY, "num_attention_heads": 4}
        values["num_key_value_heads"] = max(1, 4 * groups // heads)
        values |= {"head_dim": 16} if "head_dim" in values else {}
        values["original_max_position_embeddings"] = values["max_position_embeddings"]
    vocabulary, merges = _words(model.specials, values["vocab_size"])
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {f"{role}_token": token for role, token in model.roles.items()}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=values["max_position_embeddings"], **named
    )
    tokenizer.add_tokens([AddedToken(t, special=True) for t in model.specials], special_tokens=True)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / model.template).read_text()
    ids = {f"{role}_token_id": vocabulary[token] for role, token in model.roles.items()}
    config = getattr(transformers, model.kind)(**values, **ids)
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    if model.ends:
        ends = [vocabulary[token] for token in model.ends]
        transformers.GenerationConfig(eos_token_id=ends).save_pretrained(str(folder))
    write_json(folder / RANDOM_FILE, {"seed": 0})
    return folder


def _words(specials: Sequence[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary in which every word of up to four letters is a token, as far as it goes, and its merges.

    Texts are then as many tokens to every model as they were drawn with.
    """
    from tokenizers import pre_tokenizers

    tokens = [*specials, *pre_tokenizers.ByteLevel.alphabet()]
    merges, level = [], ["\u0120"]  # a space, to byte-level tokenizers
    while len(tokens) < size:
        longer = [(word, letter) for word in level for letter in "abcdefghijklmnopqrstuvwxyz"]
        merges += longer[: size - len(tokens)]
        level = [word + letter for word, letter in longer[: size - len(tokens)]]
        tokens += level
    return {token: i for i, token in enumerate(tokens)}, merges


def shrunk(preset: Preset, scale: str) -> Preset:
    """The preset with one round of each kind of job: one data set, one seed, a few held-out prompts."""
    (first, options), *_ = preset.datasets.items()
    small = replace(
        preset,
        datasets={first: options},
        seeds=preset.seeds[:1],
        baseline_seeds=preset.baseline_seeds[:1],
        align_pro={**preset.align_pro, "iterations": 1},
        rlhf={**preset.rlhf, **({"iterations": 1} if "iterations" in preset.rlhf else {})},
        held_out_prompts=min(8, preset.held_out_prompts),
        judge=None,  # a judge of the hub is no part of a night's training
    )
    if scale == "real":
        return small
    fewer = {"prompts": 8, "microbatches": 2, "max_tokens": 6}
    return replace(
        small,
        held_out_prompts=2,
        longest_prompt=160,
        environment={**small.environment, "answer_tokens": 6, "dtype": "float32"},
        align_pro={**small.align_pro, **fewer},
        rlhf={**small.rlhf, "max_tokens": 6},
        rollout={**small.rollout, "draws": 1, "answers": 1},
    )


def renamed(preset: Preset, folders: Mapping[str, str]) -> Preset:
    """The preset with each model's name replaced by its folder."""

    def local(value: Any) -> Any:
        if isinstance(value, Mapping):  # options of a frozen model
            return each(value)
        if not isinstance(value, str):
            return value
        name, at, bounds = value.partition("@")
        return folders.get(name, name) + at + bounds

    def each(options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: local(value) for key, value in options.items()}

    return replace(
        preset,
        prompters={name: each(options) for name, options in preset.prompters.items()},
        frozen=each(preset.frozen),
        unseen=each(preset.unseen),
        environment=each(preset.environment),
    )


def write_prompts(job: Job, out: Path, preset: Preset) -> None:
    """In place of a data set's prompts, as many words as they have tokens, from half to twice their mean."""
    rng = np.random.default_rng(0)
    letters = [chr(97 + i) for i in range(26)]
    mean = preset.longest_prompt // (2 * cost.CHARACTERS_PER_TOKEN)

    def texts(count: int, first: str) -> list[str]:
        lengths = rng.integers(max(1, mean // 2), 3 * mean // 2 + 1, count)
        return [" ".join([first, *("".join(rng.choice(letters, 2)) for _ in range(n))]) for n in lengths]

    rows = max(int(preset.align_pro["prompts"]) * int(preset.align_pro["samples"]), 16)
    (out / job.name).mkdir(parents=True, exist_ok=True)
    for name, prompts in (
        (plan.TRAINING, texts(rows, "training")),
        (plan.HELD_OUT, texts(preset.held_out_prompts, "held out")),
    ):
        lines = (json.dumps({"prompt": x}) + "\n" for x in dict.fromkeys(prompts))
        write_text(out / job.name / name, "".join(lines))
    write_json(out / job.name / work.FINISHED, {"seconds": 0.0})


def kind_of(job: Job) -> str:
    """A job's name without its data set and its seed: what its cost depends on."""
    first, _, *rest = job.name.split("/")
    rest[-1] = re.sub(r"^(align-pro|rlhf|rloo)-\d+$", r"\1", rest[-1])
    return "/".join([first, *rest])


@dataclass
class Watch:
    """Seconds of work without loading, and the most memory held."""

    seconds: float = 0.0
    memory: float = 0.0
    where: str = ""


@contextmanager
def watching() -> Iterator[Watch]:
    """Measure training and rolling out within; models are loaded before the clock starts."""
    import torch

    from alignpro.llm.arms import rollout
    from alignpro.llm.training import open_ended

    found = Watch(where="cuda" if torch.cuda.is_available() else "cpu")

    def timed(function: Any) -> Any:
        def run(*positional: Any, **named: Any) -> Any:
            start = time.monotonic()
            try:
                return function(*positional, **named)
            finally:
                if found.where == "cuda":
                    torch.cuda.synchronize()
                found.seconds += time.monotonic() - start

        return run

    saved = open_ended.train, rollout.roll_out
    open_ended.train, rollout.roll_out = timed(saved[0]), timed(saved[1])
    gc.collect()
    if found.where == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    try:
        yield found
    finally:
        open_ended.train, rollout.roll_out = saved
        found.memory = torch.cuda.max_memory_reserved() if found.where == "cuda" else _peak()


def _forget_peak() -> None:
    """Start the kernel's count of this process's largest memory anew, where it has one."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    """Bytes: the largest resident memory of this process; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status) or ["0"]
    return 1024.0 * float(kilobytes)


def rehearse(preset: Preset, out: Path, scale: str, only: str = "") -> dict[str, Any]:
    """Run one of each kind of job; what they took, which is also in `out`/rehearsal.json.

    A job that fails, as for want of memory, is recorded as failed, and the next one goes on.

    Raises:
        AlignProError: an unknown scale, or a model of the hub without a row in `CONFIGS`.
    """
    import torch

    from alignpro.llm.models import catalogue
    from alignpro.llm.rewards.opening import REWARDS

    if scale not in SCALES:
        raise AlignProError(f"--scale {scale}: choose from {', '.join(SCALES)}")
    folders = {}
    for name in cost.models(replace(preset, judge=None)):
        if name in catalogue.MODELS or name in REWARDS or Path(name).expanduser().exists():
            continue
        if name not in CONFIGS:
            raise AlignProError(
                f"model {name!r}: its configuration is not known; add it to CONFIGS in {__name__}"
            )
        folders[name] = str(write_model(CONFIGS[name], out / "models" / plan.slug(name), scale))
    small = shrunk(preset, scale)
    arithmetic = {job.name: cost.of_job(job, small) for job in plan.jobs(small)}
    jobs = plan.chosen(plan.jobs(renamed(small, folders)), only)
    os.environ[catalogue.REHEARSAL] = "1"
    found: dict[str, Any] = {}
    count = sum(job.verb != "prompts" for job in jobs)
    packages.note(f"rehearsal at scale {scale}: {count} jobs of one round, on random weights")
    for job in jobs:
        if job.verb == "prompts":
            write_prompts(job, out, small)
            continue
        if any(need in found and "failed" in found[need] for need in job.needs):
            continue
        packages.note(job.name)
        with watching() as watch:
            failed = _attempt(job, out)
        each = arithmetic[job.name]
        tokens = each.generated + each.read + each.trained
        found[job.name] = {
            "kind": kind_of(job),
            "seconds": round(watch.seconds, 3),
            "memory": watch.memory,
            "tokens": tokens,
            "tokens_per_second": round(tokens / watch.seconds, 1) if watch.seconds else 0.0,
            "arithmetic": {"seconds": each.seconds, "memory": each.memory},
            **({"failed": failed} if failed else {}),
        }
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    )
    record = {
        "scale": scale,
        "preset": preset.name,
        "device": device,
        "memory_of": watch.where if found else "",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "alignpro")},
        "jobs": found,
    }
    write_json(out / FILE, record)
    return record


def _attempt(job: Job, out: Path) -> str:
    """Why the job failed; nothing where it did not."""
    import torch

    try:
        (out / job.name / work.FINISHED).unlink(missing_ok=True)
        work.do(job, out)
    except torch.OutOfMemoryError:
        return "out of memory"
    except AlignProError as error:
        return str(error)
    return ""


def table(record: Mapping[str, Any]) -> str:
    """The rehearsal's measurements as lines of text."""
    lines = [f"{'job of one round':<66} {'memory':>8} {'seconds':>9} {'tokens/s':>9}"]
    for name, row in record["jobs"].items():
        if "failed" in row:
            lines.append(f"{name:<66} failed: {row['failed']}")
            continue
        gigabytes = f"{row['memory'] / 1e9:.1f}GB"
        lines.append(f"{name:<66} {gigabytes:>8} {row['seconds']:>9.2f} {row['tokens_per_second']:>9.0f}")
    return "\n".join(lines)


def load(folder: Path | None, preset: Preset) -> dict[str, dict[str, Any]]:
    """The measurements of a rehearsal in `folder` by kind of job; none where there is no use in it."""
    if folder is None or not (folder / FILE).is_file():
        return {}
    record = read_json(folder / FILE)
    if record.get("scale") != "real" or record.get("preset") != preset.name:
        return {}
    return {row["kind"]: row | {"device": record["device"]} for row in record["jobs"].values()}


def measured(job: Job, estimate: cost.Cost, rows: Mapping[str, Mapping[str, Any]]) -> cost.Cost:
    """`estimate` with seconds and memory as the rehearsal has them, its round scaled to the whole job."""
    row = rows.get(kind_of(job)) if job.verb != "prompts" else None
    if row is None or "failed" in row or not row["arithmetic"]["seconds"]:
        return estimate
    rounds = estimate.seconds / row["arithmetic"]["seconds"]
    return replace(estimate, seconds=row["seconds"] * rounds, memory=row["memory"])


def failures(jobs: Sequence[Job], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Why the rehearsal of a job's kind failed, for each job whose did."""
    found = {job.name: rows.get(kind_of(job), {}) for job in jobs if job.verb != "prompts"}
    return {name: row["failed"] for name, row in found.items() if "failed" in row}
