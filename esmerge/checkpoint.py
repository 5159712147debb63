"""Safetensors checkpoints, read lazily and written as a stream.

The reader fills freshly allocated tensors with `preadv` instead of mapping the file: what is held in
memory is then exactly what was asked for, and it is gone when the tensor is. The writer knows every
name, dtype and shape beforehand, writes the headers first and takes the tensors in any order.
"""

import json
import logging
import math
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash

from esmerge.errors import InputError
from esmerge.rawio import bytes_of, read_into, write_from

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_SHARD_BYTES = 5_000_000_000
# What was written is flushed to disk in the background in pieces of this size, so that little is left at the end.
FLUSH_BYTES = 1 << 27
# What journals of unfinished files are called.
JOURNALS = ".*.journal"
# Files that hold their headers only so far, and what gets count bytes from an offset into them before they are read.
PARTIAL_FILES: dict[Path, Callable[[int, int], None]] = {}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype, shape and the byte offset of its data in that file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one safetensors file, from its header alone.

    Raises:
        InputError: if the file is missing, truncated, corrupt or holds an unknown dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise InputError(f"{file} is truncated or no safetensors file: download or save it again.")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{file} has a corrupt safetensors header: download or save it again.") from error
    metadata = header.pop("__metadata__", {})
    infos = {}
    try:
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise InputError(
                    f"{file}: tensor {name} has dtype {entry['dtype']}, which cannot be merged; "
                    "save the model in bfloat16, float16 or float32."
                )
            start, end = entry["data_offsets"]
            info = TensorInfo(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
            if end - start != info.nbytes:
                raise InputError(f"{file}: tensor {name} has {end - start} bytes, its shape needs {info.nbytes}.")
            if start < 0 or info.offset + info.nbytes > size:
                raise InputError(f"{file} is truncated inside tensor {name}: download or save it again.")
            infos[name] = info
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} has a corrupt safetensors header: download or save it again.") from error
    return infos, metadata


def weights_stem(folder: Path) -> str:
    """What the names of the files with weights begin with in the folder of a model: an adapter's or a whole one's."""
    return "adapter_model" if (folder / "adapter_config.json").exists() else "model"


def open_files(folder: Path, stem: str) -> dict[Path, list[str] | None]:
    """The safetensors files of the checkpoint `stem` in `folder`, with the tensors that its index puts there.

    Returns:
        One file with None, or each shard of the index with its tensors.

    Raises:
        InputError: if there is none, only a pickle (which is never opened), or the index is faulty.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return {single: None}
    if index.exists():
        return _read_index(index)
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code when opened; "
            f"convert it to {stem}.safetensors (save_pretrained writes that) and try again."
        )
    raise InputError(f"{folder} has no {stem}.safetensors and no {index.name}.")


def _read_index(index: Path) -> dict[Path, list[str] | None]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{index} lists {twice} twice: download or save the checkpoint again.")
        return dict(pairs)

    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)["weight_map"]
        shards: dict[Path, list[str] | None] = {}
        for name, shard in weight_map.items():
            listed = shards.setdefault(index.parent / shard, [])
            assert listed is not None
            listed.append(name)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no safetensors index: it needs a JSON object weight_map.") from error
    for file in shards:
        if not file.exists():
            raise InputError(f"{index} names the shard {file.name}, which is missing: download it again.")
    return shards


class _RunningHash:
    """XXH3 of a tensor's bytes, taken while they go by from first to last and still lie in a core's cache."""

    def __init__(self) -> None:
        self.done = 0
        self.hash = xxhash.xxh3_128()
        self._lock = threading.Lock()

    def update(self, start: int, tensor: torch.Tensor) -> None:
        """Take in the bytes from `start` on; what comes again, or out of order, does not count."""
        end = start + tensor.nbytes
        if start <= self.done < end and self._lock.acquire(blocking=False):
            try:
                if start <= self.done < end:
                    self.hash.update(bytes_of(tensor)[self.done - start :])
                    self.done = end
            finally:
                self._lock.release()


# First row, last row + 1, and these rows of a tensor.
_Parts = list[tuple[int, int, torch.Tensor]]


def _rows_of(parts: _Parts, start: int, stop: int) -> torch.Tensor | None:
    """A copy of rows start to stop, which whoever asked may change; None if the parts do not have them all."""
    found, row = [], start
    while row < stop:
        part = next((part for part in parts if part[0] <= row < part[1]), None)
        if part is None:
            return None
        first, last, rows = part
        found.append(rows[row - first : stop - first] if rows.dim() else rows)
        row = last
    if not found:
        return None
    return torch.cat(found) if len(found) > 1 else found[0].clone()


class Checkpoint:
    """A checkpoint whose tensors are read one by one, when they are asked for, from any thread.

    Args:
        files: the safetensors files it consists of, each with the tensors that it must hold, or None.
    """

    def __init__(self, files: Mapping[Path, list[str] | None]) -> None:
        self.files = list(files)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._streams: dict[Path, BinaryIO] = {}
        self._hashes: dict[str, _RunningHash] = {}
        self._known_hashes: dict[str, bytes] = {}
        self._remembered = threading.local()
        for file, listed in files.items():
            infos, metadata = read_header(file)
            for name in infos.keys() & self.tensors.keys():
                raise InputError(f"tensor {name} is both in {self.tensors[name].file} and in {file}.")
            if listed is not None and infos.keys() != set(listed):
                name = min(infos.keys() ^ set(listed))
                there, missing = ("the shard", "the index") if name in infos else ("the index", "the shard")
                raise InputError(
                    f"{file}: tensor {name} is in {there} but not in {missing}: download or save the checkpoint again."
                )
            self.tensors |= infos
            self.metadata |= metadata
            self._streams[file] = file.open("rb", buffering=0)

    @classmethod
    def open(cls, folder: Path, stem: str = "model") -> "Checkpoint":
        """Open `stem`.safetensors, or the shards that `stem`.safetensors.index.json names, in `folder`."""
        return cls(open_files(folder, stem))

    @classmethod
    def open_file(cls, file: Path) -> "Checkpoint":
        """Open one safetensors file."""
        return cls({file: None})

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Where the tensor `name` lies; `InputError` if it does not."""
        if name not in self.tensors:
            raise InputError(f"{self.files[0].parent} has no tensor {name}.")
        return self.tensors[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name` on the CPU, converted to `dtype` if that is given."""
        info = self.info(name)
        tensor = torch.empty(info.shape, dtype=info.dtype)
        self._fill(tensor, info, info.offset)
        self._hash(name).update(0, tensor)
        return tensor if dtype is None else tensor.to(dtype)

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start to stop of the tensor `name`; start 0 and stop 1 for a scalar."""
        parts = self._parts(name)
        if parts and (remembered := _rows_of(parts, start, stop)) is not None:
            return remembered
        info = self.info(name)
        if info.shape:
            tensor = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
            begin = start * (info.nbytes // max(1, info.shape[0]))
            self._fill(tensor, info, info.offset + begin)
            self._hash(name).update(begin, tensor)
        else:
            tensor = self.read(name)
        if parts is not None:
            parts.append((start, stop, tensor.clone()))
        return tensor

    @contextmanager
    def remembering(self, name: str) -> Iterator[None]:
        """Keep what `read_range` reads of a tensor in this thread, so that the same rows are read once."""
        if self._parts(name) is not None:
            yield
            return
        vars(self._remembered).setdefault("parts", {})[name] = []
        try:
            yield
        finally:
            del self._remembered.parts[name]

    def _parts(self, name: str) -> _Parts | None:
        remembered: dict[str, _Parts] = getattr(self._remembered, "parts", {})
        return remembered.get(name)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The given rows (int64 [n]) of the matrix `name`, without reading the others."""
        info = self.info(name)
        tensor = torch.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
        row_bytes = info.nbytes // info.shape[0]
        for target, row in zip(tensor, rows.tolist(), strict=True):
            self._fill(target, info, info.offset + row * row_bytes)
        return tensor

    def _fill(self, tensor: torch.Tensor, info: TensorInfo, offset: int) -> None:
        if fetch := PARTIAL_FILES.get(info.file):
            fetch(offset, tensor.nbytes)
        try:
            read_into(self._streams[info.file].fileno(), tensor, offset)
        except EOFError as error:
            raise InputError(f"{info.file} became shorter while it was read.") from error

    def content_hash(self) -> str:
        """XXH3 over the files' names, headers and tensors; what was not read in order so far is read now."""
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(self.tensor_hash, self.tensors))
        digest = xxhash.xxh3_128()
        for file in sorted(self.files):
            digest.update(file.name.encode())
            inside = sorted((info.offset, name) for name, info in self.tensors.items() if info.file == file)
            end = inside[0][0] if inside else file.stat().st_size
            digest.update(os.pread(self._streams[file].fileno(), end, 0))
            for _, name in inside:
                digest.update(self.tensor_hash(name))
        return digest.hexdigest()

    def tensor_hash(self, name: str) -> bytes:
        """XXH3 of one tensor's bytes; what was not read in order so far is read now."""
        if name in self._known_hashes:
            return self._known_hashes[name]
        info, hashed = self.info(name), self._hash(name)
        while hashed.done < info.nbytes:
            piece = torch.empty(min(1 << 20, info.nbytes - hashed.done), dtype=torch.uint8)
            self._fill(piece, info, info.offset + hashed.done)
            hashed.update(hashed.done, piece)
        return hashed.hash.digest()

    def finished_hash(self, name: str) -> bytes | None:
        """The XXH3 of a tensor that was read whole and in order so far; None of others."""
        hashed = self._hash(name)
        return hashed.hash.digest() if hashed.done == self.info(name).nbytes else None

    def adopt_hash(self, name: str, digest: bytes | None) -> None:
        """Take over what `finished_hash` found in another process."""
        if digest is not None:
            self._known_hashes[name] = digest

    def same_tensor(self, name: str, other: "Checkpoint", other_name: str) -> bool:
        """Whether a tensor and one of a checkpoint are the same, bit by bit."""
        first, second = self.info(name), other.info(other_name)
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return self.tensor_hash(name) == other.tensor_hash(other_name)

    def _hash(self, name: str) -> _RunningHash:
        # Made when a tensor is first read: some files have very many. Of two threads, `setdefault` lets one win.
        return self._hashes.get(name) or self._hashes.setdefault(name, _RunningHash())

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            stream.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _to_disk(descriptor: int) -> None:
    """Have what was written to a file go to the disk."""
    # macOS has only what also waits for times and the like.
    getattr(os, "fdatasync", os.fsync)(descriptor)


def _from_disk(descriptor: int) -> None:
    """Have what is read of a file come from the disk: memory also has what could not be written there."""
    _to_disk(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class CheckpointWriter:
    """Writes a checkpoint whose names, dtypes and shapes are known beforehand, in any order, from any thread.

    Headers are written first; then rows go straight to their place. A journal beside the files names the tensors that
    are complete, so that a writer of the same layout can go on where a killed one stopped. Its lines may reach the disk
    before what they tell of, and a power cut come between: they hold a hash of every tensor's bytes, and the new writer
    believes those alone that it finds on the disk.

    Args:
        folder: an existing folder; what an earlier writer of the same layout left there is kept.
        tensors: dtype and shape of every tensor, in the order in which they are laid out.
        stem: `model` or `adapter_model`; shards are named as transformers names them.
        max_shard_bytes: a new shard begins before one would become larger than this.

    Attributes:
        pending: names of the tensors that are not complete.
        flushes: whether what is written is soon sent to the disk; a forked process leaves that to its parent.
        notes: by name of a complete tensor, what `complete` was told about it.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        stem: str = "model",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.places: dict[str, TensorInfo] = {}
        self.pending = set(tensors)
        self.flushes = True
        self.notes: dict[str, Any] = {}
        self._folder, self._stem = folder, stem
        self._streams: dict[Path, BinaryIO] = {}
        # None where rows came out of order, or again.
        self._hashes: dict[str, _RunningHash | None] = {}
        shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
        room = max_shard_bytes
        for name, (dtype, shape) in tensors.items():
            nbytes = math.prod(shape) * dtype.itemsize
            if shards[-1] and nbytes > room:
                shards.append({})
                room = max_shard_bytes
            shards[-1][name] = (dtype, shape)
            room -= nbytes
        kept = True
        for number, shard in enumerate(shards, start=1):
            single = f"{stem}.safetensors"
            file = folder / (single if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors")
            kept &= self._begin(file, shard, {"format": "pt", **(metadata or {})})
        journal = folder / f".{stem}.journal"
        self._journal = journal.open("ab+", buffering=0)
        if kept:
            self._journal.seek(0)
            # A line that was cut off must go, or the next one would be written onto it.
            whole, _, _ = self._journal.read().rpartition(b"\n")
            self._journal.truncate(len(whole) + 1 if whole else 0)
            self.notes = self._recalled(whole)
            self.pending -= self.notes.keys()
        else:
            self._journal.truncate(0)
        self._flusher = ThreadPoolExecutor(max_workers=1)
        self._flushed: list[Future[None]] = []
        self._unflushed = 0

    def _recalled(self, journal: bytes) -> dict[str, Any]:
        """The notes on those tensors of a journal that the disk has as they were written."""
        found: dict[str, tuple[Any, str]] = {}
        for line in journal.splitlines():
            # After a power cut there may be anything in its place.
            with suppress(ValueError, TypeError):
                name, note, digest = json.loads(line)
                if name in self.places:
                    found[name] = note, digest
        for stream in self._streams.values():
            _from_disk(stream.fileno())
        with Checkpoint(dict.fromkeys(self._streams)) as stored, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            stored_hashes = dict(zip(found, pool.map(stored.tensor_hash, found), strict=True))
        intact = {name: note for name, (note, digest) in found.items() if stored_hashes[name].hex() == digest}
        if lost := len(found) - len(intact):
            logger.warning(
                "%s: what the disk has of %d of %d complete tensors is not what was written: it is written again",
                self._folder,
                lost,
                len(found),
            )
        return intact

    def _begin(
        self, file: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
    ) -> bool:
        """Write a file's header and size, and return whether they were there already."""
        entries: dict[str, object] = {"__metadata__": metadata}
        spans, end = {}, 0
        # Widest dtypes first, so that every tensor starts at a multiple of its item size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
            start, end = end, end + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            spans[name] = start
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        header = struct.pack("<Q", len(header)) + header
        for name, start in spans.items():
            dtype, shape = tensors[name]
            self.places[name] = TensorInfo(file, dtype, shape, len(header) + start)
        stream = file.open("r+b" if file.exists() else "w+b", buffering=0)
        self._streams[file] = stream
        size = len(header) + end
        if os.fstat(stream.fileno()).st_size == size and stream.read(len(header)) == header:
            return True
        stream.seek(0)
        stream.write(header)
        stream.truncate(size)
        return False

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of the tensor `name` from row `start` on, converted to its dtype."""
        place = self.places[name]
        data = rows.detach().to("cpu", place.dtype).contiguous()
        row_bytes = place.nbytes // max(1, place.shape[0]) if place.shape else 0
        begin = start * row_bytes
        write_from(self._streams[place.file].fileno(), data, place.offset + begin)
        hashed = self._hashes.setdefault(name, _RunningHash())
        if hashed is not None and hashed.done == begin:
            hashed.update(begin, data)
        else:
            self._hashes[name] = None
        if self.flushes:
            self._flush(place.file, data.nbytes)

    def _flush(self, file: Path, nbytes: int) -> None:
        """Have what was written go to the disk in the meantime."""
        self._unflushed += nbytes
        if self._unflushed >= FLUSH_BYTES:
            self._unflushed = 0
            self._flushed.append(self._flusher.submit(_to_disk, self._streams[file].fileno()))

    def adopt(self, notes: Mapping[str, Any]) -> None:
        """Take over the tensors that a forked process completed, with its notes on them."""
        for name, note in notes.items():
            self.notes[name] = note
            self.pending.discard(name)
            self._flush(self.places[name].file, self.places[name].nbytes)

    def complete(self, name: str, note: Any = None) -> None:
        """Note in the journal that all rows of `name` are written, with anything that JSON can hold."""
        hashed = self._hashes.pop(name, None)
        if hashed is not None and hashed.done == self.places[name].nbytes:
            digest = hashed.hash.digest()
        else:
            with Checkpoint.open_file(self.places[name].file) as stored:
                digest = stored.tensor_hash(name)
        os.write(self._journal.fileno(), (json.dumps([name, note, digest.hex()]) + "\n").encode())
        self.notes[name] = note
        self.pending.discard(name)

    def write(self, name: str, tensor: torch.Tensor, note: Any = None) -> None:
        """Write the whole tensor `name` and note that it is complete.

        Raises:
            ValueError: if it was not announced or has another shape.
        """
        if name not in self.places or tuple(tensor.shape) != self.places[name].shape:
            raise ValueError(f"tensor {name} of shape {tuple(tensor.shape)} was not expected")
        self.write_rows(name, 0, tensor)
        self.complete(name, note)

    def finish(self, keep_journal: bool = False) -> None:
        """Check that every tensor was written, flush the files to disk and write the index.

        Args:
            keep_journal: for a folder that may still be gone on with until more is written beside the files.

        Raises:
            RuntimeError: if a tensor is missing.
        """
        if self.pending:
            raise RuntimeError(f"{len(self.pending)} tensors were never written, among them {min(self.pending)}")
        self._flusher.shutdown()
        # The system tells of a write that failed later once, to whoever asks first.
        for flushed in self._flushed:
            flushed.result()
        for stream in self._streams.values():
            os.fsync(stream.fileno())
        self.close()
        if not keep_journal:
            (self._folder / f".{self._stem}.journal").unlink()
        if len(self._streams) > 1:
            index = {
                "metadata": {"total_size": sum(place.nbytes for place in self.places.values())},
                "weight_map": {name: place.file.name for name, place in self.places.items()},
            }
            path = self._folder / f"{self._stem}.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def close(self) -> None:
        """Close the files; nothing more can be written."""
        self._flusher.shutdown(cancel_futures=True)
        self._journal.close()
        for stream in self._streams.values():
            stream.close()
