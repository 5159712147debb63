"""A merged model from its folder in one call, whatever it consists of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from esmerge.errors import InputError
from esmerge.mllm.configuration_mllm import MllmConfig
from esmerge.mllm.modeling_mllm import MllmForConditionalGeneration
from esmerge.mllm.processing_mllm import MllmProcessor, open_modalities
from esmerge.modalities import Modality
from esmerge.modalities.modality import with_encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, load_encoder, modality_settings
from esmerge.sources import read_json, resolve


def load_model(
    model: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """A merged model, a specialist, or any causal LLM, and its processor.

    Args:
        model: folder or Hub id (`user/repo@revision`) of a multimodal checkpoint, of an adapter with or without
            `modalities/`, or of a plain LLM.
        base: of an adapter; by default the one that the adapter names.
        dtype, device_map: as `from_pretrained` of transformers takes them.

    Raises:
        InputError: if the folder holds no such model.
    """
    folder = resolve(str(model), Path(), "the model").folder
    if (folder / "adapter_config.json").exists():
        return _load_adapter(folder, base, dtype, device_map)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} has neither adapter_config.json nor config.json: it holds no model.")
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": False}
    if read_json(folder / "config.json").get("model_type") == MllmConfig.model_type:
        loaded = MllmForConditionalGeneration.from_pretrained(folder, **options)
        return loaded.eval(), MllmProcessor.from_pretrained(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder, **options)
    processor = MllmProcessor(AutoTokenizer.from_pretrained(folder), open_modalities(folder))
    return assemble(llm, processor, load_encoders(folder, processor.modalities, llm)).eval(), processor


def _load_adapter(
    folder: Path, base: str | Path | None, dtype: torch.dtype | str, device_map: Any
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    from peft import PeftModel

    named = base or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise InputError(f"{folder / 'adapter_config.json'} does not name its base_model_name_or_path: give the base.")
    source = resolve(str(named), Path(), "the base").folder
    llm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, trust_remote_code=False)
    # In the base's dtype: PEFT's default of float32 casts every activation to and fro.
    adapted: Any = PeftModel.from_pretrained(llm, folder, autocast_adapter_dtype=False)
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else source)
    processor = MllmProcessor(tokenizer, open_modalities(folder))
    return assemble(adapted, processor, load_encoders(folder, processor.modalities, llm)).eval(), processor


def load_encoders(folder: Path, modalities: Mapping[str, Modality], llm: PreTrainedModel) -> dict[str, nn.Module]:
    """The encoders in a folder's `modalities`, with dtype and device of the LLM's embeddings."""
    embeddings: Tensor = llm.get_input_embeddings().weight
    return {
        name: load_encoder(modality, folder / MODALITIES_FOLDER / name, llm.config.get_text_config().hidden_size).to(
            embeddings.device, embeddings.dtype
        )
        for name, modality in with_encoder(modalities).items()
    }


def mllm_config(text_config: Any, processor: MllmProcessor) -> MllmConfig:
    """The configuration of an LLM with the modalities of a processor."""
    ids = processor.placeholder_ids
    settings = {
        name: {**modality_settings(modality), **({"token_id": ids[name]} if name in ids else {})}
        for name, modality in processor.modalities.items()
    }
    return MllmConfig(text_config=text_config, modalities=settings, dtype=getattr(text_config, "dtype", None))


def assemble(llm: Any, processor: MllmProcessor, encoders: Mapping[str, nn.Module]) -> MllmForConditionalGeneration:
    """A multimodal model of an LLM, PEFT's or transformers', and encoders that exist already."""
    config = mllm_config(llm.config, processor)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config)
    model.language_model = llm
    for name, encoder in encoders.items():
        model.encoders[name] = encoder
    model.generation_config = llm.generation_config
    return model
