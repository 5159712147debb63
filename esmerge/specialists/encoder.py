"""What a specialist brings beside its LLM: the encoder of its modality, with weights that are only copied."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmerge.checkpoint import Checkpoint, read_header
from esmerge.errors import InputError
from esmerge.modalities import Modality, modality_from_settings, open_modality
from esmerge.modalities.registry import MODALITIES_FOLDER, SETTINGS_FILE, WEIGHTS_FILE
from esmerge.sources import read_json


@dataclass(frozen=True)
class SpecialistEncoder:
    """The encoder of a specialist's modality, as it is stored.

    Attributes:
        settings: of the modality, `{kind: ..., placeholder: ..., ...}`.
        folder: where the modality's own files lie, such as cached features; None if it has none.
        checkpoint: holds the weights; empty for a modality without any.
        tensors: name of a tensor in the encoder -> its name in `checkpoint`.
        made: tensors of the encoder that are stored nowhere, as it has them without computing anything from them.
        left_out: how many tensors beside them it does without, by what they are.
    """

    settings: dict[str, Any]
    folder: Path | None
    checkpoint: Checkpoint
    tensors: dict[str, str]
    made: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    @classmethod
    def adopt(
        cls, settings: dict[str, Any], folder: Path | None, checkpoint: Checkpoint, tensors: Mapping[str, str]
    ) -> "SpecialistEncoder":
        """The encoder of tensors that older versions may have saved: names in it (then or now) -> stored names.

        Raises:
            InputError: if the settings are not valid, or the tensors contradict them.
        """
        encoder = cls(settings, folder, checkpoint, dict(tensors))
        names, told = encoder.modality.adopt(list(tensors), lambda name: checkpoint.read(tensors[name]))
        unused = len(tensors) - len(names)
        return cls(
            {**settings, **told},
            folder,
            checkpoint,
            {today: tensors[name] for today, name in names.items()},
            left_out={encoder.modality.derived: unused} if unused else {},
        )

    @property
    def placeholder(self) -> str:
        """What stands for an item in a prompt."""
        return str(self.settings["placeholder"])

    @property
    def place(self) -> Path | None:
        """Where it lies, for messages."""
        return next((file.parent for file in self.checkpoint.files), self.folder)

    @cached_property
    def modality(self) -> Modality:
        """The modality of the settings; `InputError` if they are not valid."""
        return modality_from_settings(self.settings, f"the encoder in {self.place}", self.folder)

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the encoder's tensors, by their names in it."""
        infos = {name: self.checkpoint.info(stored) for name, stored in self.tensors.items()}
        made = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.made.items()}
        return {name: (info.dtype, info.shape) for name, info in infos.items()} | made

    @property
    def projection(self) -> tuple[str, int] | None:
        """The stored tensor that makes soft tokens, and their width; None where headers do not tell."""
        found = self.modality.projection({name: self.layout[name][1] for name in self.tensors})
        return found and (self.tensors[found[0]], found[1])


def find_encoder(name: str, folder: Path, given: Path | None = None) -> SpecialistEncoder | None:
    """The encoder of a specialist in the layout of esmerge: `modalities/<name>` with config.json and model.safetensors.

    Args:
        name: the specialist's, which is its modality's.
        folder: the specialist's.
        given: the modality's folder where it is not in the specialist's.

    Raises:
        InputError: if the folder has modalities of other names only, or the modality is incomplete.
    """
    if given is not None:
        refuse_second(name, folder, "encoder", given)
        return read_encoder(given)
    found = _modalities(folder)
    if not found:
        return None
    if name not in found:
        raise InputError(
            f"specialist {name}: {folder / MODALITIES_FOLDER} has no modality {name}, only {', '.join(found)}: "
            f"name the specialist {found[0]}, or the folder {name}."
        )
    return read_encoder(folder / MODALITIES_FOLDER / name)


def refuse_second(name: str, folder: Path, field: str, given: Path) -> None:
    """Refuse what a field of the recipe gives where the specialist's folder has its modality already."""
    if (folder / MODALITIES_FOLDER / name).is_dir():
        raise InputError(
            f"specialist {name}: {folder} has the modality {MODALITIES_FOLDER}/{name}, and specialists.{name}.{field} "
            f"gives another, {given}: remove one of them."
        )


def other_encoders(name: str, folder: Path) -> dict[str, int]:
    """How many tensors the encoders of other modalities in a specialist's folder have, by what they are."""
    files = {other: folder / MODALITIES_FOLDER / other / WEIGHTS_FILE for other in _modalities(folder) if other != name}
    return {
        f"the encoder of {other}, which is another modality": len(read_header(file)[0]) if file.exists() else 0
        for other, file in files.items()
    }


def read_encoder(folder: Path) -> SpecialistEncoder:
    """An encoder in the layout of esmerge."""
    settings = read_json(folder / SETTINGS_FILE)
    for key in ("kind", "placeholder"):
        if not isinstance(settings.get(key), str):
            raise InputError(
                f"{folder / SETTINGS_FILE}: {key} is {settings.get(key)!r}, expected text; a modality's settings are "
                "{kind: ..., placeholder: ..., ...}."
            )
    try:
        checkpoint = Checkpoint.open(folder)
    except InputError:
        if not _weightless(folder):
            raise
        return SpecialistEncoder(settings, folder, Checkpoint({}), {})
    if settings["kind"] == "text" and checkpoint.tensors:
        raise InputError(
            f"{folder}: a modality of kind text has no encoder, but {WEIGHTS_FILE} holds {min(checkpoint)}: "
            "remove the file, or set the kind that it belongs to."
        )
    return SpecialistEncoder.adopt(settings, folder, checkpoint, {name: name for name in checkpoint})


def _weightless(folder: Path) -> bool:
    try:
        return open_modality(folder).weightless
    except InputError:
        return False


def _modalities(folder: Path) -> list[str]:
    parent = folder / MODALITIES_FOLDER
    return sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
