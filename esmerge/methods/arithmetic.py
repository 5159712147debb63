"""Weighted sums of deltas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from esmerge.methods.registry import Finite, merging_method


def weighted_sum(deltas: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum over i of weights[i] * deltas[i]."""
    merged = weights[0] * deltas[0]
    for weight, delta in zip(weights[1:], deltas[1:], strict=True):
        merged.addcmul_(weight.expand_as(delta), delta)
    return merged


def shares(weights: Tensor) -> Tensor:
    """Weights [S, ...] divided by their sum over S; zeros where that vanishes."""
    return divided(weights.clone(), weights.sum(dim=0))


def divided(merged: Tensor, divisor: Tensor) -> Tensor:
    """`merged / divisor`, in place; as it is where the divisor vanishes."""
    return merged.div_(torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor))


def average(deltas: Sequence[Tensor], weights: Tensor, *, normalize: bool = True) -> Tensor:
    """Sum of the weighted deltas, divided by the sum of the weights if `normalize`."""
    return weighted_sum(deltas, shares(weights) if normalize else weights)


def scaled_sum(deltas: Sequence[Tensor], weights: Tensor, *, normalize: bool = False, lambda_: float = 1.0) -> Tensor:
    """`average` times `lambda_`."""
    return average(deltas, weights, normalize=normalize).mul_(lambda_)


@merging_method(combine=average)
def linear(deltas: Sequence[Tensor], weights: Tensor, *, normalize: bool = True) -> Tensor:
    """Weighted average (Wortsman et al. 2022, "Model soups", arXiv 2203.05482, section 2, with weights).

    sum_i w_i delta_i / sum_i w_i.

    Args:
        normalize: divide by the sum of the weights.
    """
    return average(deltas, weights, normalize=normalize)


@merging_method(combine=scaled_sum)
def task_arithmetic(
    deltas: Sequence[Tensor], weights: Tensor, *, normalize: bool = False, lambda_: Finite = 1.0
) -> Tensor:
    """Scaled sum of task vectors (Ilharco et al. 2023, arXiv 2212.04089, section 2: theta + lambda sum tau_i).

    Args:
        normalize: divide by the sum of the weights.
        lambda_: scale of the result.
    """
    return scaled_sum(deltas, weights, normalize=normalize, lambda_=lambda_)
