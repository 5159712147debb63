"""Sparsify, weigh, elect a sign, add: task arithmetic on sparse deltas.

Each method is a way to sparsify, with or without the election of a sign.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esmerge.methods.arithmetic import scaled_sum
from esmerge.methods.registry import Finite, Fraction, Sparsifier, merging_method
from esmerge.methods.sparsify import (
    CACHE_ELEMENTS,
    check_probabilities,
    keep_largest,
    keep_middle,
    keep_random,
    keep_random_by_magnitude,
)

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def elected_sum(deltas: Sequence[Tensor], weights: Tensor, *, normalize: bool = True, lambda_: float = 1.0) -> Tensor:
    """Sum of the weighted deltas that agree with the sign of their total (TIES, arXiv 2306.01708, section 3).

    The sign of each element is that of the sum of all weighted deltas, positive if that is zero; only elements of
    that sign are added up.

    Args:
        deltas: overwritten.
        normalize: divide each element by the sum of the weights that took part in it.
        lambda_: scale of the result.
    """
    shape, scalar = deltas[0].shape, weights[0].numel() == 1
    whole: _Weights = weights.flatten().tolist() if scalar else weights
    add = _agreeing_mean if normalize else _agreeing_sum
    if deltas[0].numel() <= CACHE_ELEMENTS:
        merged = add(whole, deltas)
    else:
        flat = [delta.reshape(-1) for delta in deltas]
        spans = [slice(start, start + CACHE_ELEMENTS) for start in range(0, len(flat[0]), CACHE_ELEMENTS)]
        rows = weights if scalar else weights.expand(-1, *shape).reshape(len(deltas), -1)
        parts = [add(whole if scalar else rows[:, span], [delta[span] for delta in flat]) for span in spans]
        merged = torch.cat(parts).reshape(shape)
    return merged if lambda_ == 1 else merged.mul_(lambda_)


# Numbers, or tensors that broadcast against the deltas.
_Weights = Sequence[float] | Tensor


# Arithmetic on floats is several times faster than masks of booleans, and in place than into new memory. Operators on
# single numbers are left to Python: each one of torch's may hand the interpreter to another thread.
def _agreeing_sum(weights: _Weights, deltas: Sequence[Tensor]) -> Tensor:
    """Sum of what agrees with the total's sign: half of the total and of the sum of magnitudes with that sign."""
    if not isinstance(weights, Tensor) and min(weights) > 0 and len(set(weights)) == 1:
        total = _added(deltas)
        magnitudes, *others = deltas
        magnitudes.abs_()
        for other in others:
            magnitudes += other.abs_()
        # New memory would cost more than what is done in it.
        signs = _sign_bits(total, out=others[0] if others else None)
        return total.add_(_set_bits(magnitudes, signs)).mul_(0.5 * weights[0])
    halves = [0.5 * weight for weight in weights]
    total = deltas[0].mul_(halves[0])
    magnitudes = total.abs()
    for half, delta in zip(halves[1:], deltas[1:], strict=True):
        _add_product(total, delta, half)
        _add_product(magnitudes, delta.abs_(), abs(half))
    return _set_bits(magnitudes, _sign_bits(total)).add_(total)


def _added(deltas: Sequence[Tensor]) -> Tensor:
    if len(deltas) == 1:
        return deltas[0].clone()
    total = deltas[0] + deltas[1]
    for delta in deltas[2:]:
        total += delta
    return total


def _agreeing_mean(weights: _Weights, deltas: Sequence[Tensor]) -> Tensor:
    """The same sum, divided by the sum of the weights that took part in it."""
    are_positive = not isinstance(weights, Tensor) and min(weights) > 0
    if are_positive and len(set(weights)) == 1:
        weights, weighted = [1.0] * len(deltas), deltas  # equal ones cancel out
    else:
        weighted = [delta.mul_(weight) for weight, delta in zip(weights, deltas, strict=True)]
    total = _added(weighted)
    signs = _sign_bits(total)
    sign = _set_bits(torch.ones_like(total), signs)
    total.zero_()
    divisor = torch.zeros_like(total)
    for weight, part in zip(weights, weighted, strict=True):
        agreeing = part.mul_(sign).relu_()  # what agrees is positive now
        total += agreeing
        _add_product(divisor, agreeing.sign_(), weight)
    # Where nothing took part both are zero; another divisor keeps that, and lets NaN from the inputs through.
    if are_positive:
        divisor.clamp_min_(min(weights))
    else:
        divisor.add_(1 - divisor.sign().abs_())
    return _set_bits(total, signs).div_(divisor)


def _add_product(total: Tensor, values: Tensor, weight: float | Tensor) -> None:
    if isinstance(weight, Tensor):
        total.addcmul_(values, weight)
    else:
        total.add_(values, alpha=weight)


# A sign is one bit, and these take a fraction of the time of `copysign`.
def _sign_bits(values: Tensor, out: Tensor | None = None) -> Tensor:
    integers = _INTEGERS[values.element_size()]
    smallest = torch.iinfo(integers).min
    return torch.bitwise_and(values.view(integers), smallest, out=None if out is None else out.view(integers))


def _set_bits(values: Tensor, bits: Tensor) -> Tensor:
    """Floating-point values with more of their bits set, in place."""
    values.view(bits.dtype).bitwise_or_(bits)
    return values


def _sparse(deltas: Sequence[Tensor], sparsifier: Sparsifier, **parameters: object) -> list[Tensor]:
    """Each delta, whole, sparsified."""
    return [sparsifier(lambda delta=delta: [delta], delta.numel(), **parameters)(delta) for delta in deltas]


@merging_method(combine=scaled_sum, sparsify=keep_largest)
def magnitude_prune(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    normalize: bool = False,
    lambda_: Finite = 1.0,
) -> Tensor:
    """Task arithmetic on the largest elements of each delta (pruning of Han et al. 2015, arXiv 1506.02626, section 3).

    As PEFT's `magnitude_prune`: lambda sum w_i (m_i * tau_i), m_i = 1 where |tau_i| is at least its threshold.

    Args:
        density: share of elements kept, by magnitude.
        normalize: divide by the sum of the weights.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_largest, density=density)
    return scaled_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=elected_sum, sparsify=keep_largest)
def ties(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    normalize: bool = True,
    lambda_: Finite = 1.0,
) -> Tensor:
    """Trim, elect sign, merge (Yadav et al. 2023, arXiv 2306.01708, algorithm 1).

    Args:
        density: share of elements kept, by magnitude.
        normalize: divide each element by the weights that took part in it.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_largest, density=density)
    return elected_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=scaled_sum, sparsify=keep_random)
def dare_linear(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    normalize: bool = False,
    lambda_: Finite = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random and rescale, then add (Yu et al. 2024, "DARE", arXiv 2311.03099, section 3.2).

    tau_i becomes m_i * tau_i / density, m_i being 1 with probability `density` (their eq. 1, p = 1 - density).

    Args:
        density: share of elements kept; the kept ones are divided by it.
        normalize: divide by the sum of the weights.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_random, density=density, generator=generator)
    return scaled_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=elected_sum, sparsify=keep_random)
def dare_ties(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    normalize: bool = False,
    lambda_: Finite = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random and rescale (DARE, arXiv 2311.03099, eq. 1), then elect sign and merge as TIES does.

    Args:
        density: share of elements kept; the kept ones are divided by it.
        normalize: divide each element by the weights that took part in it.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_random, density=density, generator=generator)
    return elected_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=scaled_sum, sparsify=keep_middle)
def breadcrumbs(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    gamma: Fraction = 0.01,
    normalize: bool = False,
    lambda_: Finite = 1.0,
) -> Tensor:
    """Drop the smallest and the very largest elements, then add (Davari & Belilovsky 2023, arXiv 2312.06795, eq. 2).

    Args:
        density: share of elements kept.
        gamma: share of largest magnitudes left out.
        normalize: divide by the sum of the weights.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_middle, density=density, gamma=gamma)
    return scaled_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=elected_sum, sparsify=keep_middle)
def breadcrumbs_ties(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    gamma: Fraction = 0.01,
    normalize: bool = False,
    lambda_: Finite = 1.0,
) -> Tensor:
    """Breadcrumbs (arXiv 2312.06795, eq. 2), then elect sign and merge as TIES does.

    Args:
        density: share of elements kept.
        gamma: share of largest magnitudes left out.
        normalize: divide each element by the weights that took part in it.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_middle, density=density, gamma=gamma)
    return elected_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=scaled_sum, sparsify=keep_random_by_magnitude, check=check_probabilities)
def della_linear(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    epsilon: Fraction = 0.15,
    normalize: bool = False,
    lambda_: Finite = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop at random, small elements rather than large ones, rescale, then add (Deep et al. 2024, arXiv 2406.11617).

    Their MagPrune (section 3.1): element of rank r (0 the smallest) among n of its row stays with probability
    p_r = density - epsilon + 2 epsilon r / (n - 1), and is divided by p_r.

    Args:
        density: mean share of elements kept.
        epsilon: half the spread of the keeping probabilities over the ranks of a row.
        normalize: divide by the sum of the weights.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_random_by_magnitude, density=density, epsilon=epsilon, generator=generator)
    return scaled_sum(sparse, weights, normalize=normalize, lambda_=lambda_)


@merging_method(combine=elected_sum, sparsify=keep_random_by_magnitude, check=check_probabilities)
def della(
    deltas: Sequence[Tensor],
    weights: Tensor,
    *,
    density: Fraction = 1.0,
    epsilon: Fraction = 0.15,
    normalize: bool = True,
    lambda_: Finite = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """DELLA (arXiv 2406.11617, section 3): MagPrune as in `della_linear`, then elect sign and merge.

    Args:
        density: mean share of elements kept.
        epsilon: half the spread of the keeping probabilities over the ranks of a row.
        normalize: divide each element by the weights that took part in it.
        lambda_: scale of the result.
    """
    sparse = _sparse(deltas, keep_random_by_magnitude, density=density, epsilon=epsilon, generator=generator)
    return elected_sum(sparse, weights, normalize=normalize, lambda_=lambda_)
