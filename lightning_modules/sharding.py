"""Fully sharded data parallelism (FSDP2): every rank holds a part of the LLM's weights and gets the rest as needed."""

from typing import Any

from peft import PeftModel
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
    fully_shard(llm, mesh=mesh, reshard_after_forward=True)


def decoder_layers(llm: Any) -> list[nn.Module]:
    """The modules that transformers names as those to keep on one device: the decoder's layers."""
    plain = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    return [module for module in plain.modules() if type(module).__name__ in plain._no_split_modules]
