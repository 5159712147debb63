"""Code that a checkpoint brings along: it runs only if the user says so on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esmerge.errors import InputError
from esmerge.sources import read_json

FLAG = "--trust-remote-code"


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether a model can be built by its own code only, as its config.json says."""
    if not config.get("auto_map"):
        return False
    from transformers import CONFIG_MAPPING

    return config.get("model_type") not in CONFIG_MAPPING


def check_remote_code(config: Mapping[str, Any], trusted: bool, what: str) -> None:
    """Raise `InputError` if a model needs code of its own and the user does not trust it.

    Args:
        what: the model, for messages.
    """
    if not trusted and needs_remote_code(config):
        raise InputError(
            f"{what} is a {config.get('model_type')!r}, which only code of its own can build (auto_map in its "
            f"config.json): read its *.py files, and if you trust them, add {FLAG}."
        )


def names_code(folder: Path) -> bool:
    """Whether a checkpoint's model or its tokenizer names code of its own."""
    configs = [folder / name for name in ("config.json", "tokenizer_config.json")]
    return any(read_json(file).get("auto_map") for file in configs if file.exists())


def code_files(folder: Path) -> list[Path]:
    """The files with a checkpoint's code, if its model or its tokenizer names some."""
    return sorted(folder.glob("*.py")) if names_code(folder) else []
