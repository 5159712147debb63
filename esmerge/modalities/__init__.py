"""Modalities: how items other than plain text get into an LLM. One file per kind of encoder."""

from esmerge.modalities.modality import Encoder, Features, Modality, TextModality
from esmerge.modalities.registry import modality_from_settings, open_modality, save_modality

__all__ = [
    "Encoder",
    "Features",
    "Modality",
    "TextModality",
    "modality_from_settings",
    "open_modality",
    "save_modality",
]
