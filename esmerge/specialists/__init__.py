"""Where deltas come from, and the encoders beside them: one file per checkpoint format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import Delta
from esmerge.errors import InputError
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder, find_encoder, other_encoders
from esmerge.specialists.full import FullSpecialist
from esmerge.specialists.lora import LoraSpecialist
from esmerge.specialists.mol_llama import MOL_LLAMA, open_mol_llama
from esmerge.specialists.prot2text import PROT2TEXT, is_prot2text_adapter, open_prot2text, open_prot2text_adapter

__all__ = ["FullSpecialist", "LoraSpecialist", "Specialist", "SpecialistEncoder", "are_twins", "open_specialist"]


class Specialist(Protocol):
    """A specialist's checkpoint, whatever its format, as deltas of the base's tensors by canonical name.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: where it lies.
        config: its LLM's config.json or adapter_config.json.
        checkpoint: its tensors.
        modules: canonical name of each weight with plain low-rank factors -> the module's name in the base.
        low_rank: whether there is nothing else.
        ties_embeddings: whether what it does to the input embeddings holds for the output embeddings too.
        encoder: of its modality, if it brings one.
        left_out: how many of its tensors the result does without, by what they are.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    modules: dict[str, str]
    ties_embeddings: bool
    encoder: SpecialistEncoder | None
    left_out: dict[str, int]

    @property
    def low_rank(self) -> bool: ...
    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors that it may change."""
        ...

    @property
    def tensors(self) -> Mapping[str, str]:
        """What tells its tensors apart, whatever they are called and however they are sharded -> the tensor stored."""
        ...

    def is_scaled_as(self, other: object) -> bool:
        """Whether equal tensors mean equal deltas."""
        ...

    def stored_as(self, name: str) -> str:
        """The specialist's own tensor behind a canonical name, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as the specialist has it; () where it fits any."""
        ...

    def delta(self, name: str, shape: tuple[int, ...]) -> Delta:
        """The delta of a tensor that has `shape` in the base."""
        ...


def open_specialist(
    name: str, folder: Path, encoder_folder: Path | None = None, features: Path | None = None
) -> Specialist:
    """Open the specialist in `folder`, whatever its format.

    The formats: a PEFT adapter or a full checkpoint, each alone or with the encoder of its modality in
    `modalities/<name>`; Prot2Text-V2, merged or as an adapter; Mol-LLaMA.

    Args:
        name: the specialist's, which is its modality's.
        encoder_folder: of the encoder, where it is not in `folder`.
        features: a safetensors file of cached features, for Mol-LLaMA.

    Raises:
        InputError: if the folder holds no format that can be merged, or a part of it is missing or not known.
    """
    if (folder / "adapter_config.json").exists():
        _refuse(name, "features", features, "a PEFT adapter")
        checkpoint = Checkpoint.open(folder, "adapter_model")
        if is_prot2text_adapter(checkpoint):
            return open_prot2text_adapter(name, folder, checkpoint, encoder_folder)
        found = find_encoder(name, folder, encoder_folder)
        return LoraSpecialist(
            name, folder, checkpoint=checkpoint, encoder=found, left_out=_left_out(name, folder, found)
        )
    if not (folder / "config.json").exists():
        raise InputError(
            f"specialist {name}: {folder} has neither adapter_config.json (a PEFT LoRA adapter) nor config.json "
            "(a full checkpoint)."
        )
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type == MOL_LLAMA:
        _refuse(name, "encoder", encoder_folder, "Mol-LLaMA, which brings its own")
        return open_mol_llama(name, folder, features)
    if model_type == PROT2TEXT:
        _refuse(name, "features", features, "Prot2Text-V2")
        _refuse(name, "encoder", encoder_folder, "a full checkpoint of Prot2Text-V2, which brings its own")
        return open_prot2text(name, folder)
    _refuse(name, "features", features, "a full checkpoint")
    found = find_encoder(name, folder, encoder_folder)
    return FullSpecialist(name, folder, encoder=found, left_out=_left_out(name, folder, found))


def _left_out(name: str, folder: Path, encoder: SpecialistEncoder | None) -> dict[str, int]:
    return other_encoders(name, folder) | (encoder.left_out if encoder is not None else {})


def are_twins(one: Specialist, other: Specialist) -> bool:
    """Whether two specialists are the same, bit by bit, however they are stored; costs little if they are not."""
    tensors, others = one.tensors, other.tensors
    if tensors.keys() != others.keys() or not one.is_scaled_as(other):
        return False
    # Small ones first: the first that differs tells.
    names = sorted(tensors, key=lambda name: one.checkpoint.info(tensors[name]).nbytes)
    return all(one.checkpoint.same_tensor(tensors[name], other.checkpoint, others[name]) for name in names)


def _refuse(name: str, field: str, given: Path | None, kind: str) -> None:
    if given is not None:
        raise InputError(f"specialists.{name}.{field} is given, but {name} is {kind}: leave the field out.")
