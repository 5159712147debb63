"""What a specialist brings beside its LLM: the encoder of its modality, with weights that are only copied."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from esmerge.checkpoint import Checkpoint, read_header
from esmerge.errors import InputError
from esmerge.modalities.registry import MODALITIES_FOLDER, SETTINGS_FILE, WEIGHTS_FILE
from esmerge.names import natural_order
from esmerge.sources import read_json

# Modules whose last matrix gives soft tokens, by the kind of modality.
_PROJECTORS = {"esm": "projector.", "cached": "projector.", "fingerprint": "projector.", "mol_llama": "llm_proj."}


@dataclass(frozen=True)
class SpecialistEncoder:
    """The encoder of a specialist's modality, as it is stored.

    Attributes:
        settings: of the modality, `{kind: ..., placeholder: ..., ...}`.
        folder: where the modality's own files lie, such as cached features; None if it has none.
        checkpoint: holds the weights; empty for a modality without any.
        tensors: name of a tensor in the encoder -> its name in `checkpoint`.
        made: tensors of the encoder that are stored nowhere, as it has them without computing anything from them.
    """

    settings: dict[str, Any]
    folder: Path | None
    checkpoint: Checkpoint
    tensors: dict[str, str]
    made: dict[str, Tensor] = field(default_factory=dict)

    @property
    def placeholder(self) -> str:
        """What stands for an item in a prompt."""
        return str(self.settings["placeholder"])

    @property
    def projection(self) -> tuple[str, int] | None:
        """The stored tensor that makes soft tokens, and their width; None where headers do not tell."""
        module = _PROJECTORS.get(str(self.settings["kind"]))
        shapes = {name: self.checkpoint.info(stored).shape for name, stored in self.tensors.items()}
        matrices = [name for name in shapes if module and name.startswith(module) and len(shapes[name]) == 2]
        if not matrices:
            return None
        last = max(matrices, key=natural_order)
        # A fingerprint's soft tokens come out of one row of units.
        count = self.settings.get("tokens", 1) if self.settings["kind"] == "fingerprint" else 1
        return self.tensors[last], shapes[last][0] // count


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
    # Text is read as it is, and features may be cached as soft tokens.
    weightless = settings["kind"] == "text" or settings.get("projector") == "none"
    if weightless and not (folder / WEIGHTS_FILE).exists():
        return SpecialistEncoder(settings, folder, Checkpoint({}), {})
    checkpoint = Checkpoint.open(folder)
    if settings["kind"] == "text" and checkpoint.tensors:
        raise InputError(
            f"{folder}: a modality of kind text has no encoder, but {WEIGHTS_FILE} holds {min(checkpoint)}: "
            "remove the file, or set the kind that it belongs to."
        )
    return SpecialistEncoder(settings, folder, checkpoint, {name: name for name in checkpoint})


def _modalities(folder: Path) -> list[str]:
    parent = folder / MODALITIES_FOLDER
    return sorted(entry.name for entry in parent.iterdir() if entry.is_dir()) if parent.is_dir() else []
