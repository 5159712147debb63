"""A merged model from its folder in one call, whatever it consists of."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError, first_line, some_of
from esmerge.memory import is_out_of_memory
from esmerge.mllm.configuration_mllm import MllmConfig
from esmerge.mllm.modeling_mllm import MllmForConditionalGeneration
from esmerge.mllm.processing_mllm import MllmProcessor, open_modalities
from esmerge.modalities import Encoder
from esmerge.modalities.modality import with_encoder
from esmerge.modalities.registry import MODALITIES_FOLDER, load_encoder, modality_settings
from esmerge.remote_code import check_remote_code
from esmerge.sources import is_on_hub, read_json, resolve
from esmerge.tokenizer import load_tokenizer

# In the names of tensors that PEFT stores beside those that it loads.
_TWICE = re.compile(r"\.(modules_to_save|original_module|token_adapter)\.")


def load_model(
    model: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    """A merged model, a specialist, or any causal LLM, and its processor.

    Args:
        model: folder or Hub id (`user/repo@revision`) of a multimodal checkpoint, of an adapter with or without
            `modalities/`, or of a plain LLM.
        base: of an adapter; by default the one that the adapter names.
        dtype, device_map: as `from_pretrained` of transformers takes them.
        trust_remote_code: let code that comes with the LLM run, if it needs some.

    Raises:
        InputError: if the folder holds no such model.
    """
    folder = resolve(str(model), Path(), "the model", trust_remote_code).folder
    options = {"dtype": dtype, "device_map": device_map, "trust_remote_code": trust_remote_code}
    if named := base_of(folder, base):
        return _load_adapter(folder, named, options)
    config = read_json(folder / "config.json")
    check_remote_code(config, trust_remote_code, f"the model {model}")
    if config.get("model_type") == MllmConfig.model_type:
        loaded = _whole(MllmForConditionalGeneration, folder, options)
        return loaded.eval(), MllmProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    llm = _whole(AutoModelForCausalLM, folder, options)
    processor = load_processor(folder, trust_remote_code=trust_remote_code)
    return assemble(llm, processor, _load_encoders(folder, processor, llm)).eval(), processor


def base_of(folder: Path, base: str | Path | None = None) -> str | None:
    """The base of the adapter in a folder, `base` if it is given; None if the folder holds a whole model.

    One on the Hub has the revision that the adapter names.

    Raises:
        InputError: if it holds neither, or an adapter whose base is not known.
    """
    if not (folder / "adapter_config.json").exists():
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} has neither adapter_config.json nor config.json: it holds no model.")
        return None
    config = read_json(folder / "adapter_config.json")
    named = base or config.get("base_model_name_or_path")
    if not base and named and config.get("revision") and is_on_hub(str(named), Path()):
        return f"{named}@{config['revision']}"
    if not named:
        raise InputError(f"{folder / 'adapter_config.json'} does not name its base_model_name_or_path: give the base.")
    return str(named)


def load_processor(model: str | Path, base: str | Path | None = None, trust_remote_code: bool = False) -> MllmProcessor:
    """The processor alone of what `load_model` loads, with the same errors.

    The settings of its modalities are those in their files, which an encoder of an old checkpoint may yet complete.
    """
    folder = resolve(str(model), Path(), "the model", trust_remote_code).folder
    named = base_of(folder, base)
    if named and not (folder / "tokenizer_config.json").exists():
        source = resolve(named, Path(), "the base", trust_remote_code).folder
        tokenizer = load_tokenizer(source, trust_remote_code, named)
    else:
        tokenizer = load_tokenizer(folder, trust_remote_code, str(model))
    return MllmProcessor(tokenizer, open_modalities(folder))


def _whole(kind: Any, folder: Path, options: Mapping[str, Any]) -> Any:
    """A model of transformers with every tensor from its files, where `from_pretrained` makes up what is missing."""
    try:
        model, loaded = kind.from_pretrained(folder, output_loading_info=True, **options)
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder} cannot be loaded as a causal language model: {first_line(error)}.") from error
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"{folder} has no {some_of(missing)}, so the model would run on random numbers: save the whole model there."
        )
    return model


def _load_adapter(
    folder: Path, base: str, options: Mapping[str, Any]
) -> tuple[MllmForConditionalGeneration, MllmProcessor]:
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise InputError(
            f"the adapter {folder} puts virtual tokens before prompts ({config.peft_type.value}): "
            "take one that changes weights, as LoRA does."
        )
    trusted = options["trust_remote_code"]
    source = resolve(base, Path(), "the base", trusted).folder
    check_remote_code(read_json(source / "config.json"), trusted, f"the base {base}")
    llm = _whole(AutoModelForCausalLM, source, options)
    _grow_vocabulary(llm, folder)
    # In the base's dtype: PEFT's default of float32 casts every activation to and fro.
    try:
        adapted: Any = PeftModel.from_pretrained(llm, folder, autocast_adapter_dtype=False)
        # Once more for what `from_pretrained` does not give back: which tensors had no place.
        mapping = getattr(llm, "_checkpoint_conversion_mapping", {})
        fit = adapted.load_adapter(folder, adapted.active_adapter, autocast_adapter_dtype=False, key_mapping=mapping)
    except KeyError as error:
        raise InputError(
            f"the adapter {folder} has no {error.args[0]}, which its adapter_config.json promises: save it whole."
        ) from error
    except (RuntimeError, ValueError) as error:
        # PEFT's ways to say that shapes, or names of modules, are others.
        if not any(said in str(error) for said in ("size mismatch", "not found in the base model")):
            raise
        raise InputError(
            f"the adapter {folder} does not fit the base {base}, whose tensors have other names or shapes: give the "
            "base that it was trained on."
        ) from error
    missing = sorted(name.replace(f".{adapted.active_adapter}.", ".") for name in fit.missing_keys if "lora_" in name)
    # PEFT may store a module that it saves whole twice, and the one before it; of tied embeddings, tokens at both ends.
    if unknown := sorted(name for name in fit.unexpected_keys if not _TWICE.search(name)):
        example = f", as in {missing[0]}" if missing else ""
        raise InputError(
            f"the adapter {folder} has {some_of(unknown)}, for which the base {base} has no place: give its tensors "
            f"the names that PEFT has for this base{example}."
        )
    if missing:
        raise InputError(
            f"the adapter {folder} has no {some_of(missing)}, which its adapter_config.json promises: save it whole."
        )
    processor = load_processor(folder, base, trusted)
    return assemble(adapted, processor, _load_encoders(folder, processor, llm)).eval(), processor


def _grow_vocabulary(llm: PreTrainedModel, folder: Path) -> None:
    """Give a base the rows of embeddings that an adapter which stores all of them has more than it."""
    if not (folder / "adapter_model.safetensors").exists():
        return
    embeddings, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    ends = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    rows = []
    with Checkpoint.open(folder, "adapter_model") as own:
        for end in ends:
            module = next(name for name, module in llm.named_modules() if module is end)
            parts = ("", "base_layer.", "modules_to_save.", "token_adapter.base_layer.")
            stored = (f"base_model.model.{module}.{part}weight" for part in parts)
            rows.append(max((own.info(name).shape[0] for name in stored if name in own), default=0))
    # Rows that it does not store would be random numbers.
    if min(rows) > embeddings.weight.shape[0]:
        llm.resize_token_embeddings(min(rows), mean_resizing=False)


def _load_encoders(folder: Path, processor: MllmProcessor, llm: PreTrainedModel) -> dict[str, Encoder]:
    """The encoders in a folder's `modalities`, with dtype and device of the LLM's embeddings."""
    embeddings: Tensor = llm.get_input_embeddings().weight
    encoders = {}
    for name, modality in with_encoder(processor.modalities).items():
        encoder = load_encoder(modality, folder / MODALITIES_FOLDER / name, embeddings.shape[1])
        processor.modalities[name] = encoder.settings(modality)
        encoders[name] = encoder.to(embeddings.device, embeddings.dtype)
    return encoders


def mllm_config(text_config: Any, processor: MllmProcessor) -> MllmConfig:
    """The configuration of an LLM with the modalities of a processor."""
    ids = processor.placeholder_ids
    settings = {
        name: {**modality_settings(modality), **({"token_id": ids[name]} if name in ids else {})}
        for name, modality in processor.modalities.items()
    }
    return MllmConfig(text_config=text_config, modalities=settings, dtype=getattr(text_config, "dtype", None))


def assemble(llm: Any, processor: MllmProcessor, encoders: Mapping[str, Encoder]) -> MllmForConditionalGeneration:
    """A multimodal model of an LLM, PEFT's or transformers', and encoders that exist already."""
    from peft import PeftModel

    plain = llm.get_base_model() if isinstance(llm, PeftModel) else llm
    attention = plain.config._attn_implementation
    config = mllm_config(llm.config, processor)
    with torch.device("meta"):
        model = MllmForConditionalGeneration(config, type(plain))
    # A model that is built chooses an attention for the configuration that it shares with the LLM.
    plain.config._attn_implementation = attention
    model.language_model = llm
    for name, encoder in encoders.items():
        model.encoders[name] = encoder
    model.generation_config = llm.generation_config
    return model
