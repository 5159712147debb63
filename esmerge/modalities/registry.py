"""Which kinds of modalities there are, and how one is kept in a folder."""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError, some_of
from esmerge.modalities.modality import Encoder, Modality
from esmerge.sources import read_json

# A model keeps each of its modalities in a folder of this one, with these files.
MODALITIES_FOLDER = "modalities"
SETTINGS_FILE = "config.json"
WEIGHTS_STEM = "model"
WEIGHTS_FILE = f"{WEIGHTS_STEM}.safetensors"
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
        reason = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {field}: {reason[0].lower()}{reason[1:]}.") from error
    modality._folder = folder or Path()
    return modality


def modality_settings(modality: Modality) -> dict[str, Any]:
    """The settings that make the modality again; None is what is left out."""
    fields = modality.model_dump(mode="json").items()
    return {"kind": modality.kind, **{name: value for name, value in fields if value is not None}}


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
            shutil.copyfile(source, target)


def save_encoder(modality: Modality, encoder: Encoder, folder: Path) -> None:
    """Write a modality's settings and files and the encoder's weights into a folder, for `load_encoder`."""
    save_modality(encoder.settings(modality), folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load_encoder(
    modality: Modality,
    weights: Path | Mapping[str, Tensor],
    hidden_size: int,
    dtype: torch.dtype | None = None,
    source: str = "the encoder",
) -> Encoder:
    """A modality's encoder for an LLM, with its weights, in evaluation mode and on the CPU.

    Args:
        weights: the folder with model.safetensors (whole or in shards), or the tensors by name, which the encoder
            then uses as they are.
        hidden_size: of the LLM.
        dtype: of the encoder; None for the weights' own.
        source: where the tensors are from if they are given by name, for messages.

    Raises:
        InputError: if a tensor is missing, not expected or of another shape, as that of the projector of another LLM.
    """
    if isinstance(weights, Path):
        source, weights = str(weights), _read_weights(modality, weights)
    names, told = modality.adopt(list(weights), weights.__getitem__)
    weights = {name: weights[stored] for name, stored in names.items()}
    encoder = empty_encoder(modality.model_copy(update=told), hidden_size)
    check_shapes(modality, encoder, hidden_size, {name: tensor.shape for name, tensor in weights.items()}, source)
    # Assigned, not copied: the parameters may have no memory.
    encoder.load_state_dict(weights, assign=True)
    return encoder.to(dtype).eval()


def empty_encoder(modality: Modality, hidden_size: int) -> Encoder:
    """An encoder for an LLM to load weights into: its parameters have no memory where the modality can do without.

    Its buffers are made for real: no checkpoint need hold them.
    """
    if not modality.empty_build:
        return modality.build(hidden_size)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return modality.build(hidden_size)


def check_shapes(
    modality: Modality, encoder: Encoder, hidden_size: int, shapes: Mapping[str, Sequence[int]], source: str
) -> None:
    """Raise `InputError` unless tensors of these shapes are what an encoder loads.

    Args:
        encoder: of the modality, for an LLM of that hidden size.
        shapes: by name in the encoder.
        source: where the tensors are from, for messages.
    """
    expected = {name: list(tensor.shape) for name, tensor in encoder.state_dict().items()}
    for name in sorted(shapes.keys() & expected.keys()):
        found, needed = list(shapes[name]), expected[name]
        if found != needed:
            raise InputError(
                f"{source}: tensor {name} has shape {found}, expected {needed} for this {modality.kind} encoder's "
                f"settings and an LLM of hidden size {hidden_size}; use the encoder trained with that LLM."
            )
    missing, unexpected = expected.keys() - shapes.keys(), shapes.keys() - expected.keys()
    if missing or unexpected:
        faults = [("lacks", missing), ("has unexpected", unexpected)]
        told = " and ".join(f"{verb} {some_of(sorted(names))}" for verb, names in faults if names)
        raise InputError(
            f"{source} {told} for the settings of this {modality.kind} encoder: save the encoder again or correct "
            f"its {SETTINGS_FILE}."
        )


def _read_weights(modality: Modality, folder: Path) -> dict[str, Tensor]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the one that holds the encoder's {WEIGHTS_FILE}.")
    if modality.weightless and not (folder / WEIGHTS_FILE).exists():
        return {}
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint}
