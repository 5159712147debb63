"""Items -> soft tokens in batches, each item once, kept on disk from one run to the next."""

import json
import logging
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.modalities.modality import Encoder, Features, Modality, shorten
from esmerge.modalities.registry import modality_settings
from esmerge.rawio import bytes_of

logger = logging.getLogger(__name__)

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
        cache: a folder for results; None for none. One that cannot be used costs time, and nothing else.
        weights_hash: tells the encoder's weights from others in the cache, as `Checkpoint.content_hash` does.
        device: where the encoder runs.
        dtype: in which it runs, and of the results.
        progress: whether to show a progress bar.

    Returns:
        For each item, in order, [n_i, hidden], on the CPU; equal items share one tensor.

    Raises:
        InputError: if an item is not valid; before anything is encoded.
    """
    features = {item: modality.features(item) for item in dict.fromkeys(items)}
    counts = {item: modality.soft_tokens(own) for item, own in features.items()}
    files, done = {}, {}
    if cache is not None:
        common = _common_key(modality, weights_hash, dtype, torch.device(device))
        files = {item: _cache_file(cache, common, own) for item, own in features.items()}
        for item, file in files.items():
            found = _read(file, dtype)
            if found is not None and len(found) == counts[item]:
                done[item] = found
    # The longest first: if memory does not suffice, that shows at once.
    queue = sorted(features.keys() - done.keys(), key=lambda item: (-counts[item], item))
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
                if not tokens.isfinite().all():
                    raise InputError(
                        f"the {modality.kind} encoder makes NaN or infinite values of {shorten(item)}: save it "
                        "again, or run it in float32 (probe.dtype)."
                    )
                done[item] = tokens.to("cpu", dtype, copy=True)
                if files and not _written(files[item], done[item]):
                    files = {}
            bar.update(len(batch))
    return [done[item] for item in items]


def _common_key(modality: Modality, weights_hash: str, dtype: torch.dtype, device: torch.device) -> str:
    """All that soft tokens depend on beside an item's features, to the last bit."""
    packages = [version("torch"), version("transformers")]
    threads = torch.get_num_threads() if device.type == "cpu" else None  # they decide what is summed up first
    return json.dumps(
        [modality.version, modality_settings(modality), weights_hash, str(dtype), device.type, threads, packages],
        sort_keys=True,
    )


def _cache_file(cache: Path, common: str, features: Features) -> Path:
    digest = xxhash.xxh3_128(common.encode())
    for name, tensor in sorted(features.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(bytes_of(tensor.contiguous()))
    name = digest.hexdigest()
    return cache / name[:2] / f"{name}.safetensors"


def _content_hash(tensor: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(bytes_of(tensor)) if tensor.numel() else ""


def _read(file: Path, dtype: torch.dtype) -> Tensor | None:
    """What `_written` left in a file; None if that is missing or damaged in any way."""
    try:
        if not file.exists():
            return None
        with Checkpoint.open_file(file) as checkpoint:
            tensor = checkpoint.read(_TENSOR)
            stated = checkpoint.metadata.get("xxh3")
    # A damaged header can say anything.
    except (InputError, OSError, ValueError, TypeError, AttributeError, RuntimeError):
        return None
    return tensor if tensor.dtype == dtype and tensor.dim() == 2 and stated == _content_hash(tensor) else None


def _written(file: Path, tensor: Tensor) -> bool:
    """Keep soft tokens in a file; whether that worked."""
    # Another process may encode the same item: each writes its own file and moves it there whole.
    part = file.with_suffix(f".{uuid.uuid4().hex}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({_TENSOR: tensor}, part, metadata={"xxh3": _content_hash(tensor)})
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        logger.warning("soft tokens cannot be kept in %s (%s): they will be made again", file.parents[1], reason)
        return False
    return True
