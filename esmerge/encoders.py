"""The specialists' encoders in a result: copied as they are, streamed, with their settings beside them."""

import json
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from esmerge.checkpoint import CheckpointWriter
from esmerge.modalities import save_modality
from esmerge.modalities.registry import MODALITIES_FOLDER, WEIGHTS_STEM, modality_settings
from esmerge.plan import Plan
from esmerge.results import write_json
from esmerge.scores import row_blocks
from esmerge.sources import content_hash
from esmerge.specialists import SpecialistEncoder
from esmerge.tokenizer import load_tokenizer

# Where a multimodal checkpoint has its parts.
LLM_PREFIX = "language_model."
ENCODERS_PREFIX = "encoders."

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def encoders_of(plan: Plan) -> dict[str, SpecialistEncoder]:
    """The encoders that the specialists of a plan bring, by modality; text modalities with settings among them."""
    return {s.name: s.encoder for s in plan.specialists if s.encoder is not None}


def weights_of(encoder: SpecialistEncoder) -> dict[str, Tensor]:
    """All tensors of an encoder, by their names in it."""
    return {key: encoder.checkpoint.read(stored) for key, stored in encoder.tensors.items()} | encoder.made


def weights_hash(encoder: SpecialistEncoder) -> str:
    """Tells the weights of an encoder from others; of the checkpoint, nothing else is read."""
    layout = [[key, str(dtype), shape] for key, (dtype, shape) in sorted(encoder.layout.items())]
    digest = xxhash.xxh3_128(json.dumps(layout).encode())
    for _, stored in sorted(encoder.tensors.items()):
        digest.update(encoder.checkpoint.tensor_hash(stored))
    return digest.hexdigest()


def encoder_hash(encoder: SpecialistEncoder) -> str:
    """`xxh3:<hex>` of all that an encoder consists of: settings, weights, and the modality's own files."""
    modality = encoder.modality
    files = [content_hash(modality.folder / file) for file in modality.files]
    content = json.dumps([modality_settings(modality), weights_hash(encoder), files], sort_keys=True)
    return f"xxh3:{xxhash.xxh3_128_hexdigest(content.encode())}"


def write_modalities(plan: Plan, folder: Path) -> int:
    """Write all modalities, with files and weights, into `modalities` of an adapter; return the number of tensors."""
    for name, encoder in encoders_of(plan).items():
        place = folder / MODALITIES_FOLDER / name
        save_modality(encoder.modality, place)
        if encoder.tensors or encoder.made:
            # No shards: an encoder is read whole, by one call.
            writer = CheckpointWriter(place, encoder.layout, stem=WEIGHTS_STEM, max_shard_bytes=1 << 62)
            _copy(encoder, writer, "")
            writer.finish()
    return len(encoders_layout(plan))


def encoders_layout(plan: Plan) -> Layout:
    """The tensors of all encoders as a multimodal checkpoint has them."""
    return {
        f"{ENCODERS_PREFIX}{name}.{key}": entry
        for name, encoder in encoders_of(plan).items()
        for key, entry in encoder.layout.items()
    }


def copy_encoders(plan: Plan, writer: CheckpointWriter) -> int:
    """Copy all encoders into a multimodal checkpoint; return the number of tensors."""
    for name, encoder in encoders_of(plan).items():
        _copy(encoder, writer, f"{ENCODERS_PREFIX}{name}.")
    return len(encoders_layout(plan))


def write_mllm_files(plan: Plan, folder: Path) -> None:
    """Turn the files of an LLM that are in `folder` already, its config and tokenizer, into a multimodal model's."""
    from transformers import AutoConfig

    from esmerge.mllm import MllmForConditionalGeneration, MllmProcessor
    from esmerge.mllm.loading import mllm_config

    modalities = {name: encoder.modality for name, encoder in encoders_of(plan).items()}
    tokenizer = load_tokenizer(folder, plan.trust_remote_code, plan.base.reference)
    processor = MllmProcessor(tokenizer, modalities)
    processor.save_pretrained(folder)
    config = mllm_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), processor).to_dict()
    for part in (config, config["text_config"]):
        part.pop("_name_or_path", None)  # the folder that is being written, which has another name when it is done
    write_json(folder / "config.json", {**config, "architectures": [MllmForConditionalGeneration.__name__]})


def _copy(encoder: SpecialistEncoder, writer: CheckpointWriter, prefix: str) -> None:
    for key, stored in encoder.tensors.items():
        name = prefix + key
        if name not in writer.pending:
            continue
        shape = encoder.checkpoint.info(stored).shape
        for start, stop in row_blocks(shape):
            writer.write_rows(name, start, encoder.checkpoint.read_range(stored, start, stop))
        writer.complete(name)
    for key, tensor in encoder.made.items():
        if prefix + key in writer.pending:
            writer.write(prefix + key, tensor)
