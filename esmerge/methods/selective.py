"""Coefficients of elements from the deltas themselves."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esmerge.methods.registry import Finite, Fraction, merging_method
from esmerge.methods.sparsify import largest_magnitude


@merging_method()
def sce(deltas: Sequence[Tensor], weights: Tensor, *, select_topk: Fraction = 1.0) -> Tensor:
    """Select, calculate, erase (Wan et al. 2024, "FuseChat", arXiv 2408.07990, section 3.3).

    Keep the elements whose deltas vary most between specialists; weigh each specialist by the mean square of its
    kept delta, eta_i = |delta_i|^2 / sum_j |delta_j|^2 (and by the weight given); drop what disagrees with the sign of
    the sum.

    Args:
        select_topk: share of elements kept, of those that vary at all.
    """
    stack = torch.stack(list(deltas))
    if select_topk < 1:
        variance = stack.var(dim=0, correction=0)
        kept = int(int(variance.count_nonzero()) * select_topk)
        if not kept:
            return torch.zeros_like(deltas[0])
        stack *= variance >= largest_magnitude(lambda: [variance], kept)
    sign = torch.where(stack.sum(dim=0) >= 0, 1.0, -1.0)
    agrees = stack * sign > 0
    squares = stack.square().reshape(len(deltas), -1).mean(dim=1)
    total = squares.sum()
    own = squares / total if total >= 1e-6 else torch.full_like(squares, 1 / len(deltas))
    combined = own.view((-1,) + (1,) * deltas[0].dim()) * weights * len(deltas) * agrees
    return (stack * combined).sum(dim=0) / combined.sum(dim=0).clamp_min(1e-6)


@merging_method()
def pcb(deltas: Sequence[Tensor], weights: Tensor, *, density: Fraction = 0.1, lambda_: Finite = 1.0) -> Tensor:
    """Parameter competition balancing (Du et al. 2024, arXiv 2410.02396, section 3), per tensor.

    As in the authors' code: an element's score is exp(S m^2) tanh(delta_i sum_j delta_j), balance within a task times
    balance between tasks, with m the magnitude scaled to [0, 1]; only the share `density` of highest scores counts, and
    the scores, scaled to [0, 1], are the coefficients. The outermost 0.01 % of magnitudes are clipped.

    Args:
        density: share of elements that keep a coefficient.
        lambda_: scale of the result.
    """
    # In place wherever it can be: whole tensors are large.
    flat = torch.stack([delta.reshape(-1) for delta in deltas])
    count, size = flat.shape
    magnitudes = _clip(flat.abs(), 1e-4, 1e-4)
    score = _to_unit_range(magnitudes.clone()).square_().mul_(count).exp_()
    score.mul_((flat * flat.sum(dim=0)).tanh_())
    scale = _to_unit_range(_clip(score, 1 - density, 0.0))
    scale.mul_(weights.expand(count, *deltas[0].shape).reshape(count, size))
    merged = flat.sign_().mul_(magnitudes).mul_(scale).sum(dim=0).div_(scale.sum(dim=0).clamp_min_(1e-12))
    return merged.reshape(deltas[0].shape).mul_(lambda_)


def _clip(rows: Tensor, low: float, high: float) -> Tensor:
    size = rows.shape[1]
    places = [min(size - 1, int(size * low)), max(0, int(size * (1 - high) - 1))]
    smallest, largest = _in_order(rows, places).unbind(dim=1)
    return rows.clamp_(smallest[:, None], torch.maximum(smallest, largest)[:, None])


def _in_order(rows: Tensor, places: list[int]) -> Tensor:
    """What stands in some places of each row once it is sorted."""
    if rows.device.type != "cpu":
        return rows.sort(dim=1).values[:, places]
    # Without sorting the rest, which takes seven times as long.
    known = rows.detach() if rows.dtype == torch.float64 else rows.detach().float()  # numpy has no bfloat16
    found = np.stack([np.partition(row, places)[places] for row in known.numpy()])
    return torch.from_numpy(found).to(rows.dtype)


def _to_unit_range(rows: Tensor) -> Tensor:
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    return rows.sub_(low).div_((high - low).clamp_min(1e-30))
