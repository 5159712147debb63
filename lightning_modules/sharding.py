"""Fully sharded data parallelism (FSDP2): every rank holds a part of the LLM's weights and gets the rest as needed."""

from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel


def shard_llm(llm: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the layers of an LLM in place; its embeddings and the encoders before it stay whole on every rank.

    A layer's weights are put together before it runs and let go after it, so the memory for weights is that of one
    layer and of a rank's share of all others. Results are the same to the last bit.
    """
    plain: Any = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    for layer in decoder_layers(plain):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # Embeddings are looked up outside of the LLM's forward too, where soft tokens are put in place.
    embeddings = (plain.get_input_embeddings(), plain.get_output_embeddings())
    whole = {parameter for module in embeddings if module is not None for parameter in module.parameters()}
    fully_shard(plain, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def decoder_layers(llm: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers names as those to keep on one device: the decoder's layers."""
    return [module for module in llm.modules() if type(module).__name__ in llm._no_split_modules]
