"""Mol-LLaMA: graph encoders, a Q-Former and a linear projector around a Llama with LoRA, in one checkpoint.

Layout of https://github.com/DongkiKim95/Mol-LLaMA: `encoder.{graph_encoder,ln_graph,blending_module,Qformer}.*` and
`encoder.query_tokens`, `llm_proj.{weight,bias}`, and under `llm.` the PeftModel, with or without the frozen weights of
its base. The graph encoders are public models of their own, which its package downloads: checkpoints without them can
be used with cached features only.
"""

import re
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.modalities.registry import MODALITIES_FOLDER, SETTINGS_FILE
from esmerge.names import canonical_name, is_rotary
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder, find_encoder, other_encoders, refuse_second
from esmerge.specialists.full import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, ROTARY_FREQUENCIES
from esmerge.specialists.lora import LoraSpecialist

MOL_LLAMA = "mol_llama"
PLACEHOLDER = "<mol>"
FEATURES_FILE = "features.safetensors"

_LLM = "llm.base_model.model."
_ENCODER = re.compile(r"^encoder\.(graph_encoder|ln_graph|blending_module|Qformer|query_tokens)(\.|$)")
_NEEDED = ("ln_graph", "blending_module", "Qformer", "query_tokens")
_PROJECTOR = ("llm_proj.weight", "llm_proj.bias")
_SECTIONS = ("graph_encoder_config", "blending_module_config", "qformer_config")
_LORA = re.compile(r"\.lora_|\.modules_to_save\.")


def open_mol_llama(name: str, folder: Path, features: Path | None = None) -> LoraSpecialist:
    """The adapter on the LLM, and the encoder.

    Its own encoder runs in its own environment only. Where features that it gave are at hand, in `features` or in
    `modalities/<name>/features.safetensors`, they and `llm_proj` are the modality, and the encoder's weights are left
    out. Where `modalities/<name>` has settings too, it is the modality as it is.

    Args:
        features: a safetensors file of cached features.
    """
    checkpoint = Checkpoint.open(folder)
    config_file = folder / "config.json"
    config = read_json(config_file)
    encoder: list[str] = []
    adapter: list[str] = []
    frozen: dict[str, str] = {}
    left_out: dict[str, int] = other_encoders(name, folder)
    derived = 0
    for tensor in checkpoint:
        if _ENCODER.match(tensor) or tensor in _PROJECTOR:
            encoder.append(tensor)
        elif not tensor.startswith(_LLM):
            raise InputError(
                f"{checkpoint.info(tensor).file}: {tensor} belongs to no part of Mol-LLaMA (encoder, llm_proj, "
                "llm.base_model.model): save the checkpoint without it."
            )
        elif is_rotary(tensor):
            derived += 1
        elif _LORA.search(tensor) or canonical_name(tensor) in (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS):
            # Embeddings are as large as the vocabulary with the specialist's own tokens.
            adapter.append(tensor)
        else:
            frozen[canonical_name(re.sub(r"\.(base_layer|original_module)\.", ".", tensor))] = tensor
    if not any(_LORA.search(tensor) for tensor in adapter):
        raise InputError(f"specialist {name}: {folder} has no LoRA factors under {_LLM}, which Mol-LLaMA keeps there.")
    if frozen:
        left_out["frozen weights of the base"] = len(frozen)
    if derived:
        left_out[ROTARY_FREQUENCIES] = derived
    found, unused = _encoder(name, folder, config, checkpoint, encoder, features)
    left_out |= found.left_out
    if unused:
        left_out["Mol-LLaMA's own encoder, which cached features or other settings replace"] = unused
    return LoraSpecialist(
        name,
        folder,
        config=_lora_config(config, config_file),
        config_file=config_file,
        checkpoint=checkpoint,
        tensors=adapter,
        encoder=found,
        left_out=left_out,
        frozen=frozen,
    )


def _encoder(
    name: str, folder: Path, config: dict[str, Any], checkpoint: Checkpoint, tensors: list[str], features: Path | None
) -> tuple[SpecialistEncoder, int]:
    """The modality, and how many of the encoder's tensors it does without."""
    own = folder / MODALITIES_FOLDER / name
    if features is not None:
        refuse_second(name, folder, "features", features)
    if (own / SETTINGS_FILE).exists() or (not (own / FEATURES_FILE).exists() and features is None):
        found = find_encoder(name, folder)
        if found is not None:
            return found, len(tensors)
        return _own_encoder(name, folder, config, checkpoint, tensors), 0
    _check_projector(folder, tensors)
    cached = features or own / FEATURES_FILE
    if cached.suffix != ".safetensors":
        raise InputError(f"specialists.{name}.features: {cached} is no .safetensors file.")
    width = checkpoint.info("llm_proj.weight").shape[1]
    settings = {
        "kind": "cached",
        "placeholder": PLACEHOLDER,
        "width": width,
        "features_file": cached.name,
        "projector": "linear",
    }
    projector = {tensor.replace("llm_proj", "projector"): tensor for tensor in _PROJECTOR}
    return SpecialistEncoder(settings, cached.parent, checkpoint, projector), len(tensors) - len(projector)


def _own_encoder(
    name: str, folder: Path, config: dict[str, Any], checkpoint: Checkpoint, tensors: list[str]
) -> SpecialistEncoder:
    _check_projector(folder, tensors)
    for part in _NEEDED:
        if not any(tensor.split(".")[1] == part for tensor in tensors):
            raise InputError(f"{folder} has no tensors encoder.{part}: download or save the checkpoint again.")
    if not any(tensor.startswith("encoder.graph_encoder.") for tensor in tensors):
        raise InputError(
            f"{folder} has no tensors encoder.graph_encoder, which Mol-LLaMA's package downloads: save the checkpoint "
            f"with them, or run esmerge/modalities/export_mol_llama.py in the package's environment and set "
            f"specialists.{name}.features to the file that it writes."
        )
    sections = {section: config[section] for section in _SECTIONS if section in config}
    settings = {"kind": "mol_llama", "placeholder": PLACEHOLDER, **sections}
    return SpecialistEncoder.adopt(settings, None, checkpoint, {tensor: tensor for tensor in tensors})


def _check_projector(folder: Path, tensors: list[str]) -> None:
    for tensor in _PROJECTOR:
        if tensor not in tensors:
            raise InputError(
                f"{folder} has no tensor {tensor}, without which molecules cannot reach the LLM: "
                "download or save the checkpoint again."
            )


def _lora_config(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """Mol-LLaMA's config of its LoRA as PEFT has it."""
    llm = config.get("llm_config")
    lora = llm.get("lora_config") if isinstance(llm, dict) else None
    if not isinstance(lora, dict) or not {"r", "lora_alpha"} <= lora.keys():
        raise InputError(
            f"{file}: llm_config.lora_config with r and lora_alpha is missing, without which the scaling of the "
            "adapter is not known: take the config.json that was published with the weights."
        )
    assert isinstance(llm, dict)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": llm.get("llm_model"),
        **{field: lora[field] for field in ("r", "lora_alpha", "lora_dropout") if field in lora},
    }
