"""Fully sharded data parallelism (FSDP2): every rank holds a part of the LLM's weights and gets the rest as needed."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


def shard_llm(llm: nn.Module, mesh: DeviceMesh) -> None:
    """Shard an LLM, layer by layer, in place; encoders beside it stay whole on every rank.

    A layer's weights are put together before it runs and let go after it, so the memory for weights is that of one
    layer and of a rank's share of all others. Results are the same to the last bit.
    """
    for layer in decoder_layers(llm):
        fully_shard(layer, mesh=mesh)
    fully_shard(llm, mesh=mesh)


def decoder_layers(llm: Any) -> list[nn.Module]:
    """The modules that transformers names as those to keep on one device: the decoder's layers."""
    names = set(getattr(llm, "_no_split_modules", None) or getattr(llm.get_base_model(), "_no_split_modules", ()))
    return [module for module in llm.modules() if type(module).__name__ in names]
