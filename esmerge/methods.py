"""Merging methods: pure functions on a stack of deltas with broadcastable weights."""

from collections.abc import Sequence

from torch import Tensor


def linear(deltas: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of deltas ("model soups", Wortsman et al. 2022, arXiv 2203.05482).

    Args:
        deltas: S tensors of one shape.
        weights: [S, ...], broadcastable against the stack of deltas.
    """
    merged = weights[0] * deltas[0]
    for weight, delta in zip(weights[1:], deltas[1:], strict=True):
        merged = merged.addcmul(weight.expand_as(delta), delta)
    return merged
