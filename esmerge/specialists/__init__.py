"""Where deltas come from: one file per checkpoint format."""

from pathlib import Path

from esmerge.errors import InputError
from esmerge.specialists.lora import LoraSpecialist

__all__ = ["LoraSpecialist", "open_specialist"]


def open_specialist(name: str, folder: Path) -> LoraSpecialist:
    """Open the specialist in `folder`, whatever its format.

    Raises:
        InputError: if the folder holds no format that can be merged.
    """
    if (folder / "adapter_config.json").exists():
        return LoraSpecialist(name, folder)
    raise InputError(
        f"specialist {name}: {folder} has no adapter_config.json; a specialist must be a PEFT LoRA adapter."
    )
