"""Prot2Text-V2: ESM2, a two-layer projector and Llama in one checkpoint, or a PEFT adapter of that model.

Layout of https://github.com/ColinFX/Prot2Text-V2: `esm_encoder.*` (EsmModel without pooler), the projector
`adapter.{fc1,fc2,ln1,ln2}` (its norms are stored but not used) and `llama_decoder.*` (LlamaForCausalLM); in config.json
one section for each. PEFT adapters train the projections of the decoder and, whole, `adapter.fc1` and `adapter.fc2`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esmerge.checkpoint import Checkpoint, open_files
from esmerge.errors import InputError
from esmerge.modalities.registry import MODALITIES_FOLDER
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder, other_encoders, read_encoder, refuse_second
from esmerge.specialists.full import FullSpecialist
from esmerge.specialists.lora import ORIGINAL_MODULES, LoraSpecialist
from esmerge.vocabulary import tokens_of

PROT2TEXT = "esm2llama_instruct"
PLACEHOLDER, PLACEHOLDER_ID = "<|reserved_special_token_1|>", 128003
# Longer proteins are cut.
MAX_RESIDUES = 1022
# Of the projector, in training.
DROPOUT = 0.3

_ENCODER, _PROJECTOR, _LLM = "esm_encoder.", "adapter.", "llama_decoder."
_PEFT = "base_model.model."
_PROJECTOR_TENSOR = re.compile(r"^adapter\.((?:fc1|fc2|ln1|ln2)\.(?:weight|bias))$")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.")
_ESM = ("embeddings.", "encoder.", "contact_head.")
# Heads of other models around an EsmModel, and the pooler, which Prot2Text-V2 does not use.
_ESM_HEADS = ("pooler.", "lm_head.", "classifier.")


def is_prot2text_adapter(tensors: Iterable[str]) -> bool:
    """Whether these are the tensors of a PEFT adapter of Prot2Text-V2."""
    return any(tensor.startswith((_PEFT + _LLM, _PEFT + _PROJECTOR)) for tensor in tensors)


def open_prot2text(name: str, folder: Path) -> FullSpecialist:
    """Merged weights: the decoder as a full checkpoint, and the encoder."""
    if (folder / MODALITIES_FOLDER / name).is_dir():
        raise InputError(
            f"specialist {name}: {folder} is a full checkpoint of Prot2Text-V2, which brings its own encoder: "
            f"remove {MODALITIES_FOLDER}/{name}."
        )
    config = _read_config(folder)
    checkpoint = Checkpoint.open(folder)
    encoder = _full_encoder(folder, config, checkpoint)
    left_out = encoder.left_out | other_encoders(name, folder)
    # The quantisation of the whole is that of its parts.
    llm = {"model_type": "llama", **config["llama_config"]}
    llm |= {field: config[field] for field in ("quantization_config",) if field in config}
    tensors = [tensor for tensor in checkpoint if tensor.startswith(_LLM)]
    return FullSpecialist(
        name, folder, config=llm, checkpoint=checkpoint, tensors=tensors, encoder=encoder, left_out=left_out
    )


def open_prot2text_adapter(name: str, folder: Path, checkpoint: Checkpoint, given: Path | None) -> LoraSpecialist:
    """A PEFT adapter, with an encoder from elsewhere whose projector is replaced by the adapter's.

    Args:
        checkpoint: the adapter's.
        given: folder of the encoder: an esmerge modality, a full checkpoint of Prot2Text-V2 or an EsmModel; by
            default `modalities/<name>` in the adapter's folder.
    """
    projector: dict[str, str] = {}
    left_out = other_encoders(name, folder)
    factors = []
    for tensor in checkpoint:
        if tensor.startswith(_PEFT + _LLM):
            factors.append(tensor)
        elif tensor.startswith(_PEFT + _PROJECTOR) and ".original_module." in tensor:
            left_out[ORIGINAL_MODULES] = left_out.get(ORIGINAL_MODULES, 0) + 1
        elif match := _PROJECTOR_TENSOR.match(_SAVED.sub(".", tensor.removeprefix(_PEFT))):
            if other := projector.get(f"projector.{match[1]}"):
                raise InputError(f"{folder} has one tensor in two places ({other} and {tensor}): save it with PEFT.")
            projector[f"projector.{match[1]}"] = tensor
        else:
            raise InputError(
                f"{checkpoint.info(tensor).file}: {tensor} is neither of llama_decoder nor of adapter, all that an "
                "adapter of Prot2Text-V2 trains: merge it into its model and give the full checkpoint."
            )
    encoder = _adapter_encoder(name, folder, given, projector)
    return LoraSpecialist(
        name, folder, checkpoint=checkpoint, tensors=factors, encoder=encoder, left_out=left_out | encoder.left_out
    )


def _adapter_encoder(name: str, folder: Path, given: Path | None, projector: Mapping[str, str]) -> SpecialistEncoder:
    own = folder / MODALITIES_FOLDER / name
    if given is None and not own.is_dir():
        raise InputError(
            f"specialist {name}: {folder} is an adapter of Prot2Text-V2, which comes without its ESM encoder: set "
            f"specialists.{name}.encoder to the folder of the full checkpoint or of the EsmModel it was trained with."
        )
    if given is not None:
        refuse_second(name, folder, "encoder", given)
    source = given or own
    config = read_json(source / "config.json")
    left_out: dict[str, int] = {}
    if "kind" in config:
        found = read_encoder(source)
        if config["kind"] != "esm":
            raise InputError(f"{source / 'config.json'}: kind is {config['kind']}; Prot2Text-V2 needs one of kind esm.")
    elif config.get("model_type") == PROT2TEXT:
        checkpoint = Checkpoint.open(source)
        found = _full_encoder(source, _read_config(source), checkpoint)
        left_out["the decoder beside the encoder"] = sum(tensor.startswith(_LLM) for tensor in checkpoint)
    elif config.get("model_type") == "esm":
        found = _plain_esm(source, config)
    else:
        raise InputError(
            f"specialists.{name}.encoder: {source} is {config.get('model_type')!r}, expected an EsmModel (model_type "
            f"esm), a full checkpoint of Prot2Text-V2 ({PROT2TEXT}) or an esmerge modality of kind esm."
        )
    replaced = len(found.tensors.keys() & projector.keys())
    if replaced:
        left_out["the projector beside the encoder, which the adapter replaces"] = replaced
    # The adapter's names all start with PEFT's prefix, so that they cannot meet those of an encoder.
    files = {**open_files(source, "model"), **open_files(folder, "adapter_model")}
    return _completed(
        replace(
            found,
            checkpoint=Checkpoint(files),
            tensors={**found.tensors, **projector},
            left_out=found.left_out | left_out,
        ),
        source,
    )


def _full_encoder(folder: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> SpecialistEncoder:
    """The encoder in a full checkpoint, all of whose tensors must be known."""
    tensors: dict[str, str] = {}
    for tensor in checkpoint:
        if tensor.startswith(_LLM):
            continue
        inner = tensor.removeprefix(_ENCODER)
        if inner != tensor and _is_esm(inner):
            tensors[f"encoder.{inner}"] = tensor
        elif match := _PROJECTOR_TENSOR.match(tensor):
            tensors[f"projector.{match[1]}"] = tensor
        else:
            raise InputError(
                f"{checkpoint.info(tensor).file}: {tensor} belongs to no part of Prot2Text-V2 (esm_encoder, adapter, "
                "llama_decoder): save the checkpoint without it."
            )
    if not any(name.startswith("encoder.") for name in tensors):
        raise InputError(f"{folder} has no tensors esm_encoder.*: download or save the checkpoint again.")
    dropout = float(config["adapter_config"].get("dropout_rate", DROPOUT))
    settings = _settings(config["esm_config"], _placeholder(folder, config), dropout)
    return _completed(SpecialistEncoder.adopt(settings, None, checkpoint, tensors), folder, _PROJECTOR)


def _plain_esm(folder: Path, config: dict[str, Any]) -> SpecialistEncoder:
    """An EsmModel, or a model with another head around one; without a projector."""
    checkpoint = Checkpoint.open(folder)
    tensors: dict[str, str] = {}
    heads = 0
    for tensor in checkpoint:
        inner = tensor.removeprefix("esm.")
        if _is_esm(inner):
            tensors[f"encoder.{inner}"] = tensor
        elif inner.startswith(_ESM_HEADS):
            heads += 1
        else:
            raise InputError(
                f"{checkpoint.info(tensor).file}: {tensor} belongs to no part of an EsmModel: save it without that."
            )
    encoder = SpecialistEncoder.adopt(_settings(config, PLACEHOLDER, DROPOUT), None, checkpoint, tensors)
    left_out = {"heads of the EsmModel, which the projector replaces": heads} if heads else {}
    return replace(encoder, left_out=encoder.left_out | left_out)


def _is_esm(inner: str) -> bool:
    # Some versions of transformers named the frequencies after no layer.
    return inner.startswith((*_ESM, "rotary_embeddings.", "layer."))


def _settings(esm_config: Mapping[str, Any], placeholder: str, dropout: float) -> dict[str, Any]:
    return {
        "kind": "esm",
        "placeholder": placeholder,
        "encoder": dict(esm_config),
        "dropout": dropout,
        "max_residues": MAX_RESIDUES,
    }


def _completed(encoder: SpecialistEncoder, folder: Path, prefix: str = "projector.") -> SpecialistEncoder:
    """The encoder with all that its projector's layers determine, if they are there and fit ESM."""
    for inner in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        if f"projector.{inner}" not in encoder.tensors:
            raise InputError(
                f"{folder} has no tensor {prefix}{inner}, without which proteins cannot reach the LLM: "
                "download or save the checkpoint again."
            )
    first, second = (encoder.checkpoint.info(encoder.tensors[f"projector.{fc}.weight"]) for fc in ("fc1", "fc2"))
    esm = encoder.settings.get("encoder")
    width = esm.get("hidden_size") if isinstance(esm, dict) else None
    if first.shape[1:] != (width,):
        raise InputError(
            f"{first.file}: {encoder.tensors['projector.fc1.weight']} has shape {list(first.shape)}, but the ESM "
            f"encoder in {folder} has hidden_size {width}: they belong to different models."
        )
    # Nothing is computed from the norms; those that an adapter leaves out are as they were initialised.
    made = {}
    for norm, info in (("ln1", first), ("ln2", second)):
        for leaf, fill in (("weight", 1.0), ("bias", 0.0)):
            if f"projector.{norm}.{leaf}" not in encoder.tensors:
                made[f"projector.{norm}.{leaf}"] = torch.full(info.shape[:1], fill, dtype=info.dtype)
    settings = {**encoder.settings, "intermediate_size": first.shape[0]}
    return replace(encoder, settings=settings, made=made)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    for section in ("esm_config", "adapter_config", "llama_config"):
        if not isinstance(config.get(section), dict):
            raise InputError(
                f"{folder / 'config.json'}: {section} is missing; a config of Prot2Text-V2 has a section for each part."
            )
    return config


def _placeholder(folder: Path, config: Mapping[str, Any]) -> str:
    token_id = config.get("placeholder_id", PLACEHOLDER_ID)
    token = tokens_of(folder).get(token_id)
    if token is None and token_id != PLACEHOLDER_ID:
        raise InputError(
            f"{folder / 'config.json'}: placeholder_id is {token_id}, which no tokenizer.json beside it names: "
            "put the specialist's tokenizer there."
        )
    return token or PLACEHOLDER
