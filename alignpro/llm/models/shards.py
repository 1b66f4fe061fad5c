"""A policy's frozen weights divided among the processes that train it, by torch's FSDP2.

Every process keeps a part of each layer's frozen weights and reads the others while the layer is at work. An
adapter, which is what is trained, stays whole in each process, so that its gradients, its optimizer and its
checkpoints are those of training without shards.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from alignpro.llm.models.adapters import blocks_of
from alignpro.llm.models.forward import unwrap


def shard(model: Any) -> None:
    """Divide the frozen weights of a model's layers among all processes, in place.

    Embeddings, the last norm and the head, which are read between the model's passes too, stay whole.

    Args:
        model: a causal language model with an adapter, alike in all processes and not yet wrapped by DDP.
    """
    causal = unwrap(model)
    device = next(causal.parameters()).device.type
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks_of(model)[1]:
        fully_shard(block, mesh=mesh, ignored_params={p for p in block.parameters() if p.requires_grad})
    whole = {p for p in causal.parameters() if not isinstance(p, DTensor)}
    fully_shard(causal, mesh=mesh, ignored_params=whole)  # the root, which orders what is read ahead
    with torch.no_grad():  # FSDP2 wants its root to have seen a pass before what is in it does
        causal(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    divided = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    # DDP joins the gradients of what is trained, and is to leave alone what is divided.
    model._ddp_params_and_buffers_to_ignore = divided


def is_sharded(model: Any) -> bool:
    """Whether `shard` divided the model's weights."""
    return isinstance(unwrap(model), FSDPModule)


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Have the weights whole in each process for the block, in which the processes need not keep pace.

    To be entered and left by all processes together. A model that is not sharded is left alone.
    """
    if not is_sharded(model):
        yield
        return
    layers = [module for module in unwrap(model).modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
            layer.reshard()


def most(model: Any, count: int) -> int:
    """The greatest `count` of all processes: with shards they make their passes in step, and all as many."""
    found = torch.tensor(count, device=next(unwrap(model).parameters()).device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
