"""Devices that models run on, and number formats of their weights."""

import os
import sys
from importlib.util import find_spec

import torch

from alignpro.errors import AlignProError

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DTYPES["4bit"] = torch.bfloat16
"""Types of weights by name, and what is computed in. 4bit: NF4 by bitsandbytes (arXiv 2305.14314)."""


def check_dtype(dtype: str) -> None:
    """Refuse a type of weights that is neither `auto` nor in `DTYPES`, and 4bit without bitsandbytes."""
    if dtype not in ("auto", *DTYPES):
        raise AlignProError(f"dtype {dtype!r}: choose from auto, {', '.join(DTYPES)}")
    if dtype == "4bit" and find_spec("bitsandbytes") is None:
        raise AlignProError(
            "dtype '4bit': the package bitsandbytes is missing; run pip install bitsandbytes, or choose "
            "bfloat16"
        )


def device_of(device: str) -> torch.device:
    """The torch device that `device` names; by `auto`, each process on a machine has its own."""
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank >= torch.cuda.device_count():
            raise AlignProError(
                f"LOCAL_RANK {rank}: this machine has {torch.cuda.device_count()} CUDA devices; start no "
                "more processes than that"
            )
        torch.cuda.set_device(rank)  # what asks for CUDA without a number means this one
        return torch.device("cuda", rank)
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise AlignProError(f"device {device!r}: use auto, cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise AlignProError(f"device {device!r}: this machine or this torch has no CUDA; use cpu or auto")
    return chosen


def computes_bfloat16(where: torch.device) -> bool:
    """Whether a device has instructions for bfloat16: a CPU without them took seven times as long in it."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if where.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    # On ARM only torch's Linux builds have the library that uses them.
    names = ("amx_bf16", "avx512_bf16", *(("bf16",) if sys.platform == "linux" else ()))
    return any(known.get(name) for name in names)


def dtype_of(dtype: str, device: str = "auto") -> str:
    """The row of `DTYPES` that `dtype` names: for `auto`, bfloat16 on a device that computes with it, and
    float32 on others."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if computes_bfloat16(device_of(device)) else "float32"
