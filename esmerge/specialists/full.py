"""Full checkpoints: every tensor of the base, with the specialist's values."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from esmerge.checkpoint import Checkpoint
from esmerge.configs import quantisation, ties_embeddings
from esmerge.deltas import Delta, ValueDelta
from esmerge.errors import InputError
from esmerge.names import canonical_names, is_mask, is_rotary
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder

INPUT_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "embeddings.weight",
)
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "output_projection.weight")


# What `left_out` calls tensors that follow from others or from the config.
ROTARY_FREQUENCIES = "rotary frequencies, which the config determines"
_MASKS = "causal masks, which the model makes itself"
_DOUBLED_EMBEDDINGS = "output embeddings that are tied to the input embeddings and stored once more"


def own_tensors(
    config: Mapping[str, Any], checkpoint: Checkpoint, names: Sequence[str], source: str
) -> tuple[dict[str, str], dict[str, int]]:
    """The tensors of a decoder-only model, without what follows from others or from its config.

    Args:
        names: of its tensors in the checkpoint.
        source: where they come from, for messages.

    Returns:
        Canonical name -> the checkpoint's tensor; and how many were left out, by what they are.
    """
    rotary = {name for name in names if is_rotary(name)}
    masks = {name for name in names if is_mask(name) and checkpoint.info(name).dtype.is_floating_point}
    own = [name for name in names if name not in rotary | masks]
    left_out = {what: len(found) for what, found in ((ROTARY_FREQUENCIES, rotary), (_MASKS, masks)) if found}
    stored = canonical_names(own, source)
    if doubled := _doubled_embeddings(config, checkpoint, stored):
        del stored[doubled]
        left_out[_DOUBLED_EMBEDDINGS] = 1
    return stored, left_out


def embeddings_of(stored: Collection[str]) -> tuple[str | None, str | None]:
    """Which of some canonical names are the output embeddings' and the input embeddings'."""
    head = next((name for name in OUTPUT_EMBEDDINGS if name in stored), None)
    return head, next((name for name in INPUT_EMBEDDINGS if name in stored), None)


def _doubled_embeddings(config: Mapping[str, Any], checkpoint: Checkpoint, stored: Mapping[str, str]) -> str | None:
    """The canonical name of output embeddings that are a copy of the input embeddings they are tied to.

    transformers ties the two of a checkpoint that has both only if they are equal.

    Args:
        stored: canonical name -> the checkpoint's tensor.
    """
    head, embeddings = embeddings_of(stored)
    if head is None or embeddings is None:
        return None
    pair = stored[head], stored[embeddings]
    infos = [checkpoint.info(name) for name in pair]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return None
    # A row tells nearly all of those that are not tied.
    rows = [checkpoint.read_range(name, 0, min(1, infos[0].shape[0])) for name in pair]
    if not torch.equal(*rows) or not ties_embeddings(config):
        return None
    return head if checkpoint.same_tensor(pair[0], checkpoint, pair[1]) else None


class FullSpecialist:
    """A full checkpoint, whose delta is what it has minus what the base has, tensor by tensor.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: of the checkpoint.
        config: its config.json.
        modules: empty; no tensor has low-rank factors.
        ties_embeddings: whether its output embeddings are its input embeddings.
        encoder: of its modality, if it brings one.
        left_out: how many of its tensors the result does without, by what they are.

    Args:
        config: of the LLM, where config.json is that of a model which holds the LLM.
        checkpoint: where it is open already.
        tensors: those of the LLM, where the checkpoint holds more.
    """

    low_rank = False

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
        tensors: Sequence[str] | None = None,
        encoder: SpecialistEncoder | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.encoder = encoder
        self.config: Mapping[str, Any] = read_json(folder / "config.json") if config is None else config
        self._refuse_quantised(())
        self.checkpoint = checkpoint or Checkpoint.open(folder)
        self.modules: dict[str, str] = {}
        own = list(self.checkpoint) if tensors is None else tensors
        self._refuse_quantised(own)
        self._stored, derived = own_tensors(self.config, self.checkpoint, own, str(folder))
        self.left_out = {**(left_out or {}), **derived}
        self.ties_embeddings = not any(head in self._stored for head in OUTPUT_EMBEDDINGS)

    def _refuse_quantised(self, tensors: Sequence[str]) -> None:
        if (method := quantisation(self.config, tensors)) is not None:
            raise InputError(
                f"specialist {self.name}: {self.folder} is quantised ({method}); save it dequantised, in bfloat16 or "
                "float32, and give that."
            )

    @cached_property
    def names(self) -> list[str]:
        """Canonical names of its tensors of floating-point values."""
        return [name for name, tensor in self._stored.items() if self.checkpoint.info(tensor).dtype.is_floating_point]

    @property
    def tensors(self) -> Mapping[str, str]:
        """Canonical name -> the checkpoint's tensor."""
        return self._stored

    def is_scaled_as(self, other: object) -> bool:
        """Whether equal tensors mean equal deltas."""
        return isinstance(other, FullSpecialist)

    @property
    def integers(self) -> list[str]:
        """Canonical names of its other tensors, which are buffers such as masks."""
        return sorted(self._stored.keys() - set(self.names))

    def stored_as(self, name: str) -> str:
        """The checkpoint's tensor behind a canonical name."""
        return self._stored[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.checkpoint.info(self._stored[name]).shape

    def delta(self, name: str, shape: tuple[int, ...]) -> Delta:
        """The delta of one tensor."""
        return ValueDelta(self.checkpoint, self._stored[name])
