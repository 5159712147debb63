"""Where deltas come from: one file per checkpoint format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import Delta
from esmerge.errors import InputError
from esmerge.specialists.full import FullSpecialist
from esmerge.specialists.lora import LoraSpecialist

__all__ = ["FullSpecialist", "LoraSpecialist", "Specialist", "open_specialist"]


class Specialist(Protocol):
    """A specialist's checkpoint, whatever its format, as deltas of the base's tensors by canonical name.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: where it lies.
        config: its config.json or adapter_config.json.
        checkpoint: its tensors.
        modules: canonical name of each weight with plain low-rank factors -> the module's name in the base.
        low_rank: whether there is nothing else.
        ties_embeddings: whether what it does to the input embeddings holds for the output embeddings too.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    modules: dict[str, str]
    ties_embeddings: bool

    @property
    def low_rank(self) -> bool: ...
    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors that it may change."""
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


def open_specialist(name: str, folder: Path) -> Specialist:
    """Open the specialist in `folder`, whatever its format.

    Raises:
        InputError: if the folder holds no format that can be merged.
    """
    if (folder / "adapter_config.json").exists():
        return LoraSpecialist(name, folder)
    if (folder / "config.json").exists():
        return FullSpecialist(name, folder)
    raise InputError(
        f"specialist {name}: {folder} has neither adapter_config.json (a PEFT LoRA adapter) nor config.json "
        "(a full checkpoint)."
    )
