"""Merged deltas, one weight matrix at a time, in blocks of rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esmerge.coefficients import combine, element_coefficients
from esmerge.deltas import LoraDelta
from esmerge.low_rank import balanced_factors, kept_energy, refactor, truncated_svd
from esmerge.methods import linear
from esmerge.scores import Score, row_blocks

Rows = Callable[[int, int], Tensor]


@dataclass
class Statistics:
    """What the coefficients of one tensor were: mean and population std over its elements, float64 [S]."""

    mean: Tensor
    std: Tensor


@dataclass
class Coefficients:
    """The coefficients of every specialist for every tensor.

    Attributes:
        layer: float64 [S, L]; None where only elements count.
        scores: by tensor name, a score per specialist; None where only layers count.
        tau: temperature of element-wise coefficients.
        statistics: of each tensor merged so far.
        kept_energy: of each tensor truncated so far, the share of the squared norm that was kept.
    """

    layer: Tensor | None
    scores: Mapping[str, Sequence[Score]] | None = None
    tau: float = 0.1
    statistics: dict[str, Statistics] = field(default_factory=dict)
    kept_energy: dict[str, float] = field(default_factory=dict)

    @property
    def elementwise(self) -> bool:
        """Whether elements of one tensor have different coefficients."""
        return self.scores is not None

    def scalars(self, name: str, number: int) -> Tensor:
        """Coefficients [S] of the whole tensor `name` in layer `number`, where they are not element-wise."""
        assert self.layer is not None
        weights = self.layer[:, number]
        self.statistics[name] = Statistics(weights, torch.zeros_like(weights))
        return weights

    def rows(self, name: str, number: int) -> Rows:
        """A function that gives the element-wise coefficients of rows start to stop, [S, rows, in]."""
        assert self.scores is not None
        scores = self.scores[name]
        means = torch.tensor([score.mean for score in scores])
        stds = torch.tensor([score.std for score in scores])

        def coefficient_rows(start: int, stop: int) -> Tensor:
            stacked = torch.stack([score.rows(start, stop) for score in scores])
            element = element_coefficients(stacked, means, stds, self.tau)
            return element if self.layer is None else combine(self.layer[:, number], element)

        return coefficient_rows

    def merge(self, name: str, number: int, shape: tuple[int, int], deltas: Sequence[Rows]) -> Tensor:
        """Weighted sum of S matrices [out, in], given as functions of a range of rows, float32."""
        if not self.elementwise:
            weights = self.scalars(name, number).float()
            blocks = [linear([rows(a, b) for rows in deltas], weights) for a, b in row_blocks(shape)]
            return torch.cat(blocks)
        coefficient_rows = self.rows(name, number)
        merged = torch.empty(shape)
        total = torch.zeros(len(deltas), dtype=torch.float64)
        squares = torch.zeros_like(total)
        for start, stop in row_blocks(shape):
            weights = coefficient_rows(start, stop)
            merged[start:stop] = linear([rows(start, stop) for rows in deltas], weights)
            doubles = weights.flatten(1).double()
            total += doubles.sum(dim=1)
            squares += doubles.square().sum(dim=1)
        mean = total / merged.numel()
        self.statistics[name] = Statistics(mean, (squares / merged.numel() - mean.square()).clamp_min(0).sqrt())
        return merged


def merge_factors(
    coefficients: Coefficients, module: str, number: int, deltas: Sequence[LoraDelta], folded: bool
) -> tuple[Tensor, Tensor]:
    """The paper's merge: A and B separately, each with its own coefficients.

    Args:
        module: canonical name.
        deltas: of equal ranks.
        folded: put each specialist's scaling into its B; the merged pair then has scaling 1.

    Returns:
        B [out, r] and A [r, in].
    """
    bs = [delta.folded_b if folded else delta.b for delta in deltas]
    pair = []
    for letter, tensors in (("b", bs), ("a", [delta.a for delta in deltas])):
        rows = [lambda start, stop, tensor=tensor: tensor[start:stop] for tensor in tensors]
        shape = (tensors[0].shape[0], tensors[0].shape[1])
        pair.append(coefficients.merge(f"{module}.lora_{letter}.weight", number, shape, rows))
    return pair[0], pair[1]


def merge_low_rank(
    coefficients: Coefficients,
    module: str,
    number: int,
    shape: tuple[int, int],
    deltas: Sequence[LoraDelta | None],
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The merged delta of a weight as factors of a given rank: B [out, rank] and A [rank, in].

    Exactly re-factored from the stacked factors where each specialist has one coefficient for the whole
    tensor; otherwise the leading singular triplets of the dense merged delta.

    Args:
        deltas: None for a specialist that leaves the module as it is.
    """
    name = f"{module}.weight"
    if not coefficients.elementwise:
        weights = coefficients.scalars(name, number).tolist()
        present = [(weight, delta) for weight, delta in zip(weights, deltas, strict=True) if delta is not None]
        bs = [delta.folded_b * weight for weight, delta in present]
        b, a, coefficients.kept_energy[name] = refactor(bs, [delta.a for _, delta in present], rank)
        return b, a
    merged = merge_dense(coefficients, module, number, shape, deltas)
    u, s, vt = truncated_svd(merged, min(rank, *shape))
    coefficients.kept_energy[name] = kept_energy(s, merged.square().sum(), rank)
    return balanced_factors(u, s, vt, rank)


def merge_dense(
    coefficients: Coefficients,
    module: str,
    number: int,
    shape: tuple[int, int],
    deltas: Sequence[LoraDelta | None],
) -> Tensor:
    """The merged delta of a weight, float32 [out, in]."""
    rows = [_zeros(shape[1]) if delta is None else delta.rows for delta in deltas]
    return coefficients.merge(f"{module}.weight", number, shape, rows)


def _zeros(width: int) -> Rows:
    return lambda start, stop: torch.zeros(stop - start, width)
