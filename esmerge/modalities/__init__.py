"""Modalities: how items other than plain text get into an LLM. One file per kind of encoder."""

from esmerge.modalities.encode import encode_items
from esmerge.modalities.modality import Encoder, Features, Modality, TextModality
from esmerge.modalities.registry import (
    load_encoder,
    modality_from_settings,
    open_modality,
    save_encoder,
    save_modality,
)

__all__ = [
    "Encoder",
    "Features",
    "Modality",
    "TextModality",
    "encode_items",
    "load_encoder",
    "modality_from_settings",
    "open_modality",
    "save_encoder",
    "save_modality",
]
