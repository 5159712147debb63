"""What several merges of the same specialists differ in: accumulates statistics of merged deltas."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DeltaComparison:
    """How a merged delta relates to the specialists' deltas, over all tensors.

    Attributes:
        norm: Frobenius norm of the merged delta.
        cosines: to each specialist's delta; nan where one of them is zero.
        sign_conflicts: per specialist the share of its non-zero elements whose sign the merged delta opposes.
    """

    norm: float
    cosines: list[float]
    sign_conflicts: list[float]


class DeltaObserver:
    """Sums up, tensor by tensor and block by block, what a `DeltaComparison` needs."""

    def __init__(self) -> None:
        # By tensor, so that the sums do not depend on which thread was first.
        self._sums: dict[str, Tensor] = {}

    def __call__(self, name: str, merged: Tensor, deltas: Sequence[Tensor]) -> None:
        """Add rows of a tensor's merged delta and the same rows of the specialists' deltas."""
        rows = [[merged.square().sum(), *([merged.new_zeros(())] * 3)]]
        for delta in deltas:
            product = merged * delta
            rows.append([delta.square().sum(), product.sum(), (product < 0).sum(), delta.count_nonzero()])
        sums = torch.stack([torch.stack([entry.double().cpu() for entry in row]) for row in rows])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def result(self) -> DeltaComparison:
        """The statistics over all tensors seen."""
        total = torch.stack([self._sums[name] for name in sorted(self._sums)]).sum(dim=0)
        norm = math.sqrt(float(total[0, 0]))
        cosines, conflicts = [], []
        for squares, products, opposed, nonzero in total[1:].tolist():
            scale = norm * math.sqrt(squares)
            cosines.append(products / scale if scale else math.nan)
            conflicts.append(opposed / nonzero if nonzero else 0.0)
        return DeltaComparison(norm, cosines, conflicts)
