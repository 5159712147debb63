"""Random adapters, and a random checkpoint of any size, written tensor by tensor."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from esmerge.checkpoint import MAX_SHARD_BYTES, Checkpoint, CheckpointWriter
from esmerge.results import adapter_config, write_json


def write_adapter(folder: Path, base: Path, seed: int, rank: int = 8, strength: float = 0.05) -> None:
    """A LoRA adapter of all linear layers in the decoder, as PEFT saves it, with alpha twice the rank.

    Args:
        folder: a new folder.
        base: the base model's folder.
        strength: how large the delta's elements are, relative to those of a freshly initialised weight.
    """
    checkpoint = Checkpoint.open(base)
    modules = {name.removesuffix(".weight"): checkpoint.info(name).shape for name in checkpoint if "_proj." in name}
    generator = torch.Generator().manual_seed(seed)
    # A delta `2 B A` whose elements have the standard deviation strength / sqrt(in).
    spread = strength / (2 * math.sqrt(rank))
    tensors: dict[str, Tensor] = {}
    for module, (out, width) in modules.items():
        a = torch.randn(rank, width, generator=generator) / math.sqrt(width)
        b = torch.randn(out, rank, generator=generator) * spread
        tensors |= {f"base_model.model.{module}.lora_{letter}.weight": t for letter, t in (("A", a), ("B", b))}
    folder.mkdir()
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    _write(folder, "adapter_model", layout, tensors.__getitem__)
    ranks = dict.fromkeys(modules, (rank, 2.0 * rank))
    config = adapter_config(ranks, list(checkpoint), str(base), None, "CAUSAL_LM")
    write_json(folder / "adapter_config.json", config)


def write_llama(folder: Path, seed: int, max_shard_bytes: int = MAX_SHARD_BYTES, **config: object) -> None:
    """A Llama checkpoint with random bfloat16 weights, a tensor in memory at a time.

    Args:
        folder: a new folder.
        max_shard_bytes: a new shard begins before one would become larger than this.
        config: of transformers' LlamaConfig.
    """
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(**config, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with init_empty_weights():
        model = LlamaForCausalLM(settings)
    generator = torch.Generator().manual_seed(seed)

    def make(name: str) -> Tensor:
        _, shape = layout[name]
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=settings.initializer_range, generator=generator)

    layout = {name: (torch.bfloat16, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    folder.mkdir()
    _write(folder, "model", layout, make, max_shard_bytes)
    settings.save_pretrained(folder)


def write_specialist(
    folder: Path, base: Path, seed: int, max_shard_bytes: int = MAX_SHARD_BYTES, strength: float = 0.1
) -> None:
    """A full checkpoint that differs from the base in every matrix.

    Args:
        folder: a new folder.
        base: the base model's folder.
        max_shard_bytes: a new shard begins before one would become larger than this.
        strength: how large the delta's elements are, relative to those of the base.
    """
    checkpoint = Checkpoint.open(base)
    generator = torch.Generator().manual_seed(seed)

    def make(name: str) -> Tensor:
        values = checkpoint.read(name)
        if values.dim() == 1:
            return values
        noise = torch.empty_like(values).normal_(std=strength * float(values[0].float().std()), generator=generator)
        return values.add_(noise)

    layout = {name: (checkpoint.info(name).dtype, checkpoint.info(name).shape) for name in checkpoint}
    folder.mkdir()
    _write(folder, "model", layout, make, max_shard_bytes)
    shutil.copyfile(base / "config.json", folder / "config.json")


def _write(
    folder: Path,
    stem: str,
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    make: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    writer = CheckpointWriter(folder, layout, stem=stem, max_shard_bytes=max_shard_bytes)
    for name in layout:
        writer.write(name, make(name))
    writer.finish()
