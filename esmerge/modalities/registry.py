"""Which kinds of modalities there are, and how one is kept in a folder."""

import json
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from esmerge.errors import InputError
from esmerge.modalities.modality import Modality
from esmerge.sources import read_json

SETTINGS_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Other packages add kinds by an entry point of this group, whose name is the kind and whose value the class.
ENTRY_POINTS = "esmerge.modalities"

_KINDS = {
    "text": "esmerge.modalities.modality:TextModality",
    "esm": "esmerge.modalities.esm:EsmModality",
    "fingerprint": "esmerge.modalities.fingerprint:FingerprintModality",
    "cached": "esmerge.modalities.cached:CachedModality",
    "mol_llama": "esmerge.modalities.mol_llama:MolLlamaModality",
}


def modality_class(kind: str, source: str) -> type[Modality]:
    """The class of a kind of modality: one of ours, or one that an installed package registers.

    Raises:
        InputError: if no package knows the kind; `source` says where it was named.
    """
    if kind in _KINDS:
        module, _, name = _KINDS[kind].partition(":")
        found: Any = getattr(import_module(module), name)
    else:
        registered = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
        if kind not in registered:
            known = ", ".join([*_KINDS, *sorted(registered)])
            raise InputError(f"{source}: {kind!r} is no known kind of modality (known: {known}); install its package.")
        found = registered[kind].load()
    if not (isinstance(found, type) and issubclass(found, Modality)):
        raise InputError(
            f"{source}: the package that registers the kind {kind!r} gives no subclass of Modality for it."
        )
    return found


def modality_from_settings(settings: Mapping[str, Any], source: str, folder: Path | None = None) -> Modality:
    """A modality from its settings, `{kind: ..., placeholder: ..., ...}`.

    Args:
        source: where the settings are from, for messages.
        folder: where its own files lie.

    Raises:
        InputError: if the kind is not known or a setting is not valid.
    """
    fields = dict(settings)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        raise InputError(f"{source}: kind is missing; it says which encoder the modality has.")
    try:
        modality = modality_class(kind, source).model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{source}: {field}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
    modality._folder = folder or Path()
    return modality


def modality_settings(modality: Modality) -> dict[str, Any]:
    """The settings that make the modality again."""
    return {"kind": modality.kind, **modality.model_dump(mode="json")}


def open_modality(folder: Path) -> Modality:
    """The modality that `save_modality` left in a folder."""
    file = folder / SETTINGS_FILE
    return modality_from_settings(read_json(file), str(file), folder)


def save_modality(modality: Modality, folder: Path) -> None:
    """Write a modality's settings and copy its own files into a folder; the weights are the caller's to write."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(modality_settings(modality), indent=2)
    (folder / SETTINGS_FILE).write_text(settings + "\n", encoding="utf-8")
    for name in modality.files:
        source, target = modality.folder / name, folder / name
        if source.resolve() != target.resolve():
            target.write_bytes(source.read_bytes())
