"""Features that were computed elsewhere: the way to use an encoder that lives in an environment of its own.

There, write one tensor [n, width] per item, under the item's own text, into a safetensors file; `export_mol_llama.py`
is a script that does so for Mol-LLaMA, whose Q-Former gives eight vectors of width 768. Here, the file is the
modality's `features_file`, of which only what is asked for is read. What the LLM needs beyond it, a projector to its
width, is trained or taken from a checkpoint; Mol-LLaMA's is its `llm_proj`.
"""

from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Features, Modality, shorten


class CachedModality(Modality):
    """Items whose features are in a file.

    Attributes:
        width: of the features.
        features_file: in the modality's folder; one tensor [n, width] per item, named by the item's text.
        projector: from the features to the LLM's width: `none` where these are equal, a `linear` layer, or an `mlp`
            (linear, GELU, linear).
        intermediate_size: of an `mlp`.
    """

    kind: ClassVar[str] = "cached"
    empty_build: ClassVar[bool] = True
    width: int = Field(gt=0)
    features_file: str = Field(default="features.safetensors", pattern=r"^[^/\\]+\.safetensors$")
    projector: Literal["none", "linear", "mlp"] = "linear"
    intermediate_size: int = Field(default=2048, gt=0)

    @property
    def files(self) -> tuple[str, ...]:
        return (self.features_file,)

    @property
    def weightless(self) -> bool:
        return self.projector == "none"

    def features(self, item: str) -> Features:
        """The item's features, [n, width], float32."""
        file = self.folder / self.features_file
        # Opened once for many items; a file that was replaced in the meantime is another one.
        if not file.is_file():
            raise InputError(
                f"{file} is missing: it holds the features of a cached modality; export them with safetensors."
            )
        stored = _open(file, file.stat().st_mtime_ns)
        if item not in stored:
            raise InputError(f"{file} has no features of {shorten(item)}: export them there under the item's own text.")
        shape = stored.info(item).shape
        if len(shape) != 2 or shape[1] != self.width or not shape[0]:
            raise InputError(
                f"{file}: the features of {shorten(item)} have shape {list(shape)}, expected [n, {self.width}]."
            )
        values = stored.read(item).float()
        if not values.isfinite().all():
            raise InputError(f"{file}: the features of {shorten(item)} have NaN or infinite values; export them again.")
        return {"values": values, "attention_mask": torch.ones(len(values), dtype=torch.int64)}

    def soft_tokens(self, features: Features) -> int:
        return len(features["values"])

    def build(self, hidden_size: int) -> "CachedEncoder":
        return CachedEncoder(self, hidden_size)


class CachedEncoder(Encoder):
    """The projector alone."""

    def __init__(self, settings: CachedModality, hidden_size: int) -> None:
        super().__init__()
        self.projector: nn.Module
        if settings.projector == "none":
            if settings.width != hidden_size:
                raise InputError(
                    f"cached: features of width {settings.width} do not fit an LLM of hidden size {hidden_size} "
                    "without a projector: set projector to linear or mlp, and train it."
                )
            self.projector = nn.Identity()
        elif settings.projector == "linear":
            self.projector = nn.Linear(settings.width, hidden_size)
        else:
            width = settings.intermediate_size
            self.projector = nn.Sequential(nn.Linear(settings.width, width), nn.GELU(), nn.Linear(width, hidden_size))

    def forward(self, **features: Tensor) -> Tensor:
        """From `values` [items, n, width] and `attention_mask` [items, n] to the soft tokens, [sum of n_i, hidden]."""
        values = features["values"][features["attention_mask"].bool()]
        for parameter in self.projector.parameters():
            values = values.to(parameter.dtype)
            break
        projected: Tensor = self.projector(values)
        return projected


@lru_cache(maxsize=4)
def _open(file: Path, modified: int) -> Checkpoint:
    return Checkpoint.open_file(file)
