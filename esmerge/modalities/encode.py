"""Items -> soft tokens in batches, each item once, kept on disk from one run to the next."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Modality
from esmerge.modalities.registry import modality_settings
from esmerge.rawio import bytes_of

# Changes with anything that makes cached soft tokens out of date though settings and weights are the same.
CACHE_VERSION = 1
_READ_BYTES = 1 << 22
_TENSOR = "soft_tokens"


def encode_items(
    modality: Modality,
    encoder: Encoder,
    items: Sequence[str],
    batch_size: int,
    cache: Path | None,
    weights_hash: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> list[Tensor]:
    """The soft tokens of items.

    Args:
        encoder: of the modality; it is moved to `device` and `dtype` and put in evaluation mode.
        batch_size: items at a time; they are sorted by length, so that little is padded.
        cache: a folder for results; None for none.
        weights_hash: tells the encoder's weights from others in the cache, as `Checkpoint.content_hash` does.
        device: where the encoder runs.
        dtype: in which it runs, and of the results.
        progress: whether to show a progress bar.

    Returns:
        For each item, in order, [n_i, hidden], on the CPU; equal items share one tensor.

    Raises:
        InputError: if an item is not valid; before anything is encoded.
    """
    wanted = list(dict.fromkeys(items))
    files = {}
    done = {}
    if cache is not None:
        common = _common_key(modality, weights_hash, dtype)
        for item in wanted:
            files[item] = _cache_file(cache, common, item)
            found = _read(files[item], dtype)
            if found is not None:
                done[item] = found
    features = {item: modality.features(item) for item in wanted if item not in done}
    counts = {item: modality.soft_tokens(features[item]) for item in features}
    # The longest first: if memory does not suffice, that shows at once.
    queue = sorted(features, key=lambda item: -counts[item])
    if queue:
        encoder.to(device, dtype).eval()
    with (
        torch.no_grad(),
        tqdm(total=len(queue), desc=f"{modality.kind} encoder", unit="item", disable=not progress or not queue) as bar,
    ):
        for start in range(0, len(queue), batch_size):
            batch = queue[start : start + batch_size]
            inputs = modality.collate([features.pop(item) for item in batch])
            packed = encoder(**{name: tensor.to(device) for name, tensor in inputs.items()})
            sizes = [counts[item] for item in batch]
            if len(packed) != sum(sizes):
                raise ValueError(
                    f"the {modality.kind} encoder made {len(packed)} soft tokens where soft_tokens says {sum(sizes)}"
                )
            for item, tokens in zip(batch, packed.split(sizes), strict=True):
                done[item] = tokens.to("cpu", dtype, copy=True)
                if cache is not None:
                    _write(files[item], done[item])
            bar.update(len(batch))
    return [done[item] for item in items]


def _common_key(modality: Modality, weights_hash: str, dtype: torch.dtype) -> str:
    settings = json.dumps(modality_settings(modality), sort_keys=True)
    own = [_file_hash(modality.folder / name) for name in modality.files]
    return json.dumps([CACHE_VERSION, settings, weights_hash, str(dtype), own])


def _file_hash(file: Path) -> str:
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb") as stream:
            while data := stream.read(_READ_BYTES):
                digest.update(data)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); the modality needs it.") from error
    return digest.hexdigest()


def _cache_file(cache: Path, common: str, item: str) -> Path:
    name = xxhash.xxh3_128_hexdigest(json.dumps([common, item]).encode())
    return cache / name[:2] / f"{name}.safetensors"


def _content_hash(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor)) if tensor.numel() else ""


def _read(file: Path, dtype: torch.dtype) -> Tensor | None:
    """What `_write` left in a file; None if that is missing or damaged in any way."""
    if not file.exists():
        return None
    try:
        with Checkpoint.open_file(file) as checkpoint:
            tensor = checkpoint.read(_TENSOR)
            stated = checkpoint.metadata.get("xxh3")
    except (InputError, OSError):
        return None
    return tensor if tensor.dtype == dtype and tensor.dim() == 2 and stated == _content_hash(tensor) else None


def _write(file: Path, tensor: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Another process may encode the same item: each writes its own file and moves it there whole.
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({_TENSOR: tensor}, part, metadata={"xxh3": _content_hash(tensor)})
    part.replace(file)
