"""What a specialist adds to a tensor of the base, as low-rank factors or as values, in blocks of rows."""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from esmerge.checkpoint import Checkpoint


class Delta(Protocol):
    """The difference between a specialist's tensor and the base's.

    Attributes:
        shape: of the specialist's tensor; with more rows than the base's where it has tokens of its own.
        needs_base: whether `rows` needs the base's values.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def needs_base(self) -> bool: ...
    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows start to stop of the delta in float32, given the same rows of the base in float32."""
        ...


@dataclass(frozen=True)
class LoraDelta:
    """The delta `scaling * B @ A` of one weight matrix.

    Attributes:
        a: float32 [r, in].
        b: float32 [out, r].
        scaling: alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float
    needs_base = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]

    @property
    def folded_b(self) -> Tensor:
        """B with the scaling in it, [out, r]."""
        return self.b * self.scaling

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the dense delta, [stop - start, in]."""
        return (self.b[start:stop] * self.scaling) @ self.a

    def cast(self, dtype: torch.dtype) -> "LoraDelta":
        """The same delta in another dtype."""
        return replace(self, a=self.a.to(dtype), b=self.b.to(dtype))

    def to(self, device: torch.device) -> "LoraDelta":
        """The same delta on another device."""
        return replace(self, a=self.a.to(device), b=self.b.to(device))


@dataclass(frozen=True)
class DoraDelta:
    """The delta of a weight-decomposed adapter (Liu et al. 2024, "DoRA", arXiv 2402.09353, eq. 5).

    The weight becomes `m (W + scaling B A) / |W + scaling B A|`, norms taken over each output's row.

    Attributes:
        lora: the low-rank part.
        magnitude: m, float32 [out].
    """

    lora: LoraDelta
    magnitude: Tensor
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.lora.shape

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the dense delta, [stop - start, in]."""
        assert base is not None
        directed = base + self.lora.rows(start, stop)
        scale = self.magnitude[start:stop, None] / directed.norm(dim=1, keepdim=True)
        return directed.mul_(scale).sub_(base)


@dataclass(frozen=True)
class ValueDelta:
    """The delta of a tensor that a specialist stores whole, read when it is asked for.

    Attributes:
        checkpoint: where it is stored.
        name: under which name.
    """

    checkpoint: Checkpoint
    name: str
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.info(self.name).shape

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the difference."""
        assert base is not None
        # A copy even where it is stored in float32: what was read belongs to nobody else, so it may be changed.
        return self.checkpoint.read_range(self.name, start, stop).float().sub_(base)

    def values(self, start: int, stop: int) -> Tensor:
        """Rows of the specialist's own tensor, in the dtype they are stored in."""
        return self.checkpoint.read_range(self.name, start, stop)


@dataclass(frozen=True)
class ShiftDelta:
    """A delta that is stored as such, e.g. the bias of a LoRA branch.

    Attributes:
        shift: float32, the shape of the tensor it is added to.
    """

    shift: Tensor
    needs_base = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.shift.shape)

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the shift."""
        return self.shift[start:stop]


@dataclass(frozen=True)
class RowDelta:
    """A delta of a few rows, as PEFT's trainable tokens: these rows are replaced.

    Attributes:
        indices: int64 [n], ascending.
        values: float32 [n, in], the new rows.
        shape: of the whole tensor.
        others: the delta of all other rows; None if they stay.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]
    others: "Delta | None" = None
    needs_base = True

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the dense delta."""
        assert base is not None
        dense = torch.zeros_like(base) if self.others is None else self.others.rows(start, stop, base)
        chosen = (self.indices >= start) & (self.indices < stop)
        places = self.indices[chosen] - start
        dense[places] = self.values[chosen] - base[places]
        return dense


@dataclass(frozen=True)
class SumDelta:
    """Two deltas of one tensor, e.g. resized embeddings with low-rank factors on them.

    Attributes:
        first, second: of the same shape.
    """

    first: Delta
    second: Delta
    needs_base = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def rows(self, start: int, stop: int, base: Tensor | None = None) -> Tensor:
        """Rows of the sum."""
        return self.first.rows(start, stop, base) + self.second.rows(start, stop, base)


def is_finite(rows: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # One sum nearly always tells, at a fraction of what looking at each costs; only large values overflow it.
    total = rows.sum(dtype=rows.dtype if rows.dtype == torch.float64 else torch.float32)
    return math.isfinite(total.item()) or bool(rows.isfinite().all())
