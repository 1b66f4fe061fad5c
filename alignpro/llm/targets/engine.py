"""vLLM's engine in this process as a frozen model: `vllm:NAME`. vLLM is imported when one opens."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from alignpro.errors import AlignProError
from alignpro.files import real
from alignpro.llm.models import packages
from alignpro.llm.models.catalogue import is_adapter
from alignpro.llm.models.devices import dtype_of
from alignpro.llm.models.libraries import one_line
from alignpro.llm.models.load import load_tokenizer
from alignpro.llm.models.resolve import resolve
from alignpro.llm.models.sampling import Sampling, digest
from alignpro.llm.targets import http
from alignpro.llm.targets.target import Known
from alignpro.llm.targets.vllm import SCORED, VLLM, Asked, Drawn, Ids, Keep, Tops, read_tops, sampled

PREFIX = "vllm:"
"""Beginning of the name of a target that runs on vLLM's engine."""
MOST_TOP = 256
"""Most likeliest tokens that the engine is asked for, and so the largest top_k with log-probabilities."""
_BATCH = 1024  # answers, or sequences to score, between two that are kept
_FIXED = ("model", "tokenizer", "dtype", "generation_config", "logprobs_mode", "trust_remote_code")


def parse_engine(text: str | None) -> dict[str, Any]:
    """The arguments of vLLM's engine from a JSON object; refuses those that are set here."""
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AlignProError(
            f"target_engine {str(text)[:80]!r}: is no JSON object; write one such as "
            '\'{"tensor_parallel_size": 2, "max_model_len": 4096}\''
        )
    for name in _FIXED:
        if name in found:
            raise AlignProError(f"target_engine {name!r}: is not to be chosen here; leave it out")
    return found


def check_engine(name: str, dtype: str) -> None:
    """Refuse `vllm:NAME` where vLLM is not installed or has no such dtype, before anything is loaded."""
    if dtype == "4bit":
        raise AlignProError(
            f'dtype 4bit: {name} runs on vLLM; choose bfloat16 and --target-engine \'{{"quantization": '
            '"bitsandbytes"}\''
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AlignProError(
            f"target {name}: each training process would load it, all on one GPU; serve it (vllm serve), and "
            "give its address"
        )
    if find_spec("vllm") is None:
        raise AlignProError(
            f"target {name}: the package vllm is missing; pip install vllm (on a machine with a GPU it can "
            f"use), serve the model elsewhere, or leave out {PREFIX!r}"
        )


class InProcess(VLLM):
    """A model on vLLM's engine, in this process.

    Args:
        model: a name or folder (`resolve.resolve`) of a whole model in safetensors, or a hub id.
        dtype: of the weights and of the arithmetic: float32, bfloat16, float16 or `auto` (bfloat16 where the
            device computes with it, otherwise float32).
        engine: further arguments of `vllm.LLM`: tensor_parallel_size, gpu_memory_utilization, max_model_len …
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        AlignProError: vLLM is not installed, or will not load the model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        engine: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        name = f"{PREFIX}{model}"
        check_engine(name, dtype)
        dtype = dtype_of(dtype)
        tokenizer, ends = load_tokenizer(model, chat_template_kwargs=chat_template_kwargs)
        super().__init__(tokenizer, ends, name)
        folder = resolve(model)
        if is_adapter(folder):
            raise AlignProError(
                f"target {name}: is an adapter; run alignpro merge first, and name what it wrote"
            )
        import vllm

        self._params = vllm.SamplingParams
        more = {"seed": 0, "max_logprobs": MOST_TOP, **(engine or {})}
        try:
            self.engine = vllm.LLM(
                model=str(folder),
                tokenizer=str(folder),
                dtype=dtype,
                generation_config="vllm",  # nothing that the model ships leaks in
                logprobs_mode="raw_logprobs",
                **more,
            )
        except Exception as error:  # of whatever kind the engine's workers have
            raise AlignProError(
                f"target {name}: vLLM does not load it ({one_line(error)}); see its log above, and "
                "--target-engine"
            ) from error
        loaded = digest(weights_of(folder), more).hex()[:16]
        self.revision = f"vllm {vllm.__version__} {dtype} {loaded} {self.format}"
        self.calls = 0
        self.retried = 0

    def most(self) -> int | None:
        return int(self.engine.llm_engine.model_config.max_model_len)

    def _draw(
        self, asked: Sequence[Asked], sampling: Sampling, keep: Keep, known: Known, meter: http.Meter | None
    ) -> http.GiveUp | None:
        fields = {**sampled(sampling, self.ends), "detokenize": False}
        step = max(1, _BATCH // max([len(group.places) for group in asked], default=1))
        for some in (asked[i : i + step] for i in range(0, len(asked), step)):
            params = [self._params(**fields, n=len(group.places), seed=group.seed) for group in some]
            try:
                found = self._generate([group.ids for group in some], params)
                for group, request in zip(some, found, strict=True):
                    for places, output in zip(
                        group.places, sorted(request.outputs, key=lambda o: o.index), strict=True
                    ):
                        ids = [int(i) for i in output.token_ids]
                        told = sum(tops[i].logprob for tops, i in zip(output.logprobs, ids, strict=True))
                        drawn = Drawn(ids, output.finish_reason, float(told))
                        self.calls += 1
                        keep(places, self.answer(len(group.ids), drawn, sampling))
            except AlignProError as error:
                return http.GiveUp(str(error))
        return None

    def _score(self, rows: Sequence[tuple[Ids, Ids]], top: int, meter: http.Meter | None) -> list[list[Tops]]:
        params = self._params(**SCORED, prompt_logprobs=top, detokenize=False)
        out = []
        for some in (rows[i : i + _BATCH] for i in range(0, len(rows), _BATCH)):
            found = self._generate([(*ids, *said) for ids, said in some], [params] * len(some))
            for (ids, said), request in zip(some, found, strict=True):
                out.append(read_tops(request.prompt_logprobs, (*ids, *said), len(ids), top))
        return out

    def _generate(self, prompts: Sequence[Ids], params: Sequence[Any]) -> list[Any]:
        try:
            asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
            return list(self.engine.generate(asked, list(params), use_tqdm=False))
        except Exception as error:
            raise AlignProError(
                f"target {self.name}: vLLM fails ({one_line(error)}); see its log above"
            ) from error


def weights_of(folder: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file of weights and of the configuration."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return [(file.name, _sha256(file)) for file in files]


def _sha256(file: Path) -> str:
    named = real(file).name  # the hub's cache calls a large file by its checksum
    return named if re.fullmatch(r"[0-9a-f]{64}", named) else packages.sha256(file)
