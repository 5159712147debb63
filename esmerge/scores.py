"""Gradient scores of parameters: sums of absolute gradients over probe batches, kept small or on disk."""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from esmerge.rawio import read_into, write_from

# Rows are handled in blocks of about this many elements: the temporaries stay in the cache's reach.
BLOCK_ELEMENTS = 1 << 18
# What rows of a score have in common is kept while it is read, up to this size.
_READ_ONCE_BYTES = 64 << 20


def row_blocks(shape: Sequence[int], together: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows that cut a tensor of `shape` into blocks of about `BLOCK_ELEMENTS`, or so many of these together.

    A scalar is one row.
    """
    rows = shape[0] if shape else 1
    height = max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:]))) * together
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


Reader = Callable[[int, int], Tensor]


class Score(Protocol):
    """The score of one tensor for one specialist; NaN and infinite entries count as zero.

    Attributes:
        shape: of the tensor.
        mean, std: population mean and standard deviation of all its elements.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float: ...
    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the score, float32 [stop - start, ...]."""
        ...

    def reader(self) -> "Reader":
        """The same for many calls: what they have in common is read once, if it is not too large."""
        ...


class Scratch:
    """A temporary file for tensors that are written once and read back in parts.

    It has no name in the file system (where that is possible), so nothing is left behind after a crash.

    Args:
        folder: on the disk that has room for it; None for the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed on exit)
        self._end = 0

    def put(self, tensor: Tensor, scales: Tensor | None = None) -> "Spooled":
        """Append a tensor and return the handle that reads it.

        Args:
            scales: what its rows are multiplied by as they are read, float32 [n].
        """
        start = self._end
        write_from(self._file.fileno(), tensor.detach().cpu().contiguous(), start)
        self._end += tensor.numel() * tensor.dtype.itemsize
        return Spooled(self, start, tuple(tensor.shape), tensor.dtype, None if scales is None else scales.cpu())

    def mark(self) -> int:
        """Where the next tensor will be, for `rewind`."""
        return self._end

    def rewind(self, mark: int) -> None:
        """Give up all that was put since."""
        self._end = mark

    def read(self, tensor: Tensor, offset: int) -> None:
        """Fill a contiguous tensor from the bytes at `offset`."""
        read_into(self._file.fileno(), tensor, offset)

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class Spooled:
    """A tensor in a scratch file, of `dtype` there.

    Attributes:
        scales: what its rows are multiplied by as they are read, float32 [n]; None for nothing.
    """

    scratch: Scratch
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the tensor; float32 if they are scaled."""
        tensor = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        self.scratch.read(tensor, self.offset + start * math.prod(self.shape[1:]) * self.dtype.itemsize)
        return tensor if self.scales is None else tensor.float() * self.scales[start:stop, None]


@dataclass(frozen=True)
class DenseScore:
    """A score whose every element is kept, in memory or in a scratch file."""

    values: Tensor | Spooled
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        if isinstance(self.values, Spooled):
            return self.values.rows(start, stop)
        return self.values[start:stop]

    def reader(self) -> Reader:
        return self.rows


def dense_score(values: Tensor, scratch: Scratch | None = None) -> DenseScore:
    """A score from accumulated absolute gradients, float32, which it may change; spooled if a scratch file is given."""
    torch.nan_to_num_(values, nan=0.0, posinf=0.0, neginf=0.0)
    # In blocks, as a copy in float64 of a whole matrix would be the largest thing in memory.
    blocks = [values[start:stop] for start, stop in row_blocks(values.shape)]
    mean = sum(float(block.sum(dtype=torch.float64)) for block in blocks) / values.numel()
    squares = sum(float((block - mean).square_().sum(dtype=torch.float64)) for block in blocks)
    return DenseScore(scratch.put(values) if scratch else values.cpu(), mean, math.sqrt(squares / values.numel()))


@dataclass(frozen=True)
class PairScore:
    """A score kept as what it is made of: a linear layer's inputs and the gradients of its outputs.

    The gradient of the weight over one batch is g^T x, so for few tokens the pair is far smaller than the
    matrix. Rows are made when they are asked for.
    """

    inputs: Spooled
    gradients: Spooled
    lengths: tuple[int, ...]
    scales: tuple[float, ...]
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.gradients.shape[0], self.inputs.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        return self._rows(self._all_inputs(), start, stop)

    def reader(self) -> Reader:
        if math.prod(self.inputs.shape) * self.inputs.dtype.itemsize > _READ_ONCE_BYTES:
            return self.rows
        return partial(self._rows, self._all_inputs())

    def _all_inputs(self) -> Tensor:
        return self.inputs.rows(0, self.inputs.shape[0])

    def _rows(self, inputs: Tensor, start: int, stop: int) -> Tensor:
        return _absolute_products(self.gradients.rows(start, stop), inputs, self.lengths, self.scales)


def pair_score(pairs: Sequence[tuple[Tensor, Tensor, float]], scratch: Scratch) -> PairScore:
    """A score from each batch's inputs [n_b, in] and output gradients [n_b, out] of a linear layer, and their scale."""
    lengths, scales = tuple(len(x) for x, _, _ in pairs), tuple(scale for _, _, scale in pairs)
    stacked = torch.cat([x for x, _, _ in pairs]).cpu()
    # Transposed, so that rows of the score are rows of the file.
    transposed = torch.cat([g for _, g, _ in pairs]).cpu().T.contiguous()
    total = squares = 0.0
    for start, stop in row_blocks((len(transposed), stacked.shape[1])):
        block = _absolute_products(transposed[start:stop], stacked, lengths, scales)
        total += float(block.sum(dtype=torch.float64))
        squares += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
    count = len(transposed) * stacked.shape[1]
    mean = total / count
    std = math.sqrt(max(0.0, squares / count - mean * mean))
    return PairScore(scratch.put(stacked), scratch.put(transposed), lengths, scales, mean, std)


def _absolute_products(gradients: Tensor, inputs: Tensor, lengths: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Sum over batches of |g_b^T x_b| / scale_b, float32 [rows, in], from g^T [rows, n] and x [n, in]."""
    if inputs.dtype == torch.float16:  # which CPUs multiply slowly
        gradients, inputs = gradients.float(), inputs.float()
    total = torch.zeros(len(gradients), inputs.shape[1])
    parts = zip(gradients.split(list(lengths), dim=1), inputs.split(list(lengths)), scales, strict=True)
    for g, x, scale in parts:
        total.add_((g @ x).abs_(), alpha=1 / scale)
    return torch.nan_to_num_(total, nan=0.0, posinf=0.0, neginf=0.0)
