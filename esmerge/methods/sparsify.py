"""Which elements of a delta are kept: by magnitude, by chance, or both.

Each function takes a delta as blocks of rows that can be gone through more than once, and returns what sparsifies
these blocks, one after the other, into new memory. So no delta is ever held whole.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esmerge.methods.registry import Blocks

# Parts that stay in a core's cache while several operations go over them.
CACHE_ELEMENTS = 1 << 18
# Every so-many-th magnitude guesses the threshold. A prime, so that no width of a matrix is a multiple of it.
_SAMPLE_STRIDE = 61
# Standard deviations of the guessed rank that are looked at around it.
_MARGIN = 5.0
_BYTE = 1 << 8

Sparsify = Callable[[Tensor], Tensor]


def largest_magnitude(blocks: Blocks, rank: int) -> Tensor:
    """The `rank`-th largest magnitude among float32 blocks (1 for the largest), without sorting them.

    A sample brackets it; one pass counts what lies above the bracket and takes along the few elements inside it. Exact:
    the count tells where the bracket missed, and a wider one is then tried.

    Returns:
        A scalar tensor.
    """
    first, *others = islice(blocks(), 2)
    if not others and first.numel() <= CACHE_ELEMENTS and first.device.type == "cpu":
        return torch.as_tensor(_descending(first.reshape(-1).abs().numpy(), rank))
    parts, total = [], 0
    for block in blocks():
        parts.append(block.reshape(-1)[::_SAMPLE_STRIDE].abs())
        total += block.numel()
    sample = np.sort(torch.cat(parts).cpu().numpy())
    place = (1 - rank / total) * len(sample)
    margin = _MARGIN * (place * (1 - place / len(sample))) ** 0.5 + 2
    while True:
        low, high = _at(sample, place - margin), _at(sample, place + margin)
        above, equal, inside = 0, 0, []
        for block in blocks():
            # Numpy compares and counts several times faster than torch.
            values = block.reshape(-1).abs()
            part = values.numpy() if values.device.type == "cpu" else values
            above += _count(part > high)
            if low == high:  # as where most of a delta is zero: so many need not be kept
                equal += _count(part == low)
            else:
                inside.append(part[(part >= low) & (part <= high)])
        count = equal + sum(len(part) for part in inside)
        if above < rank <= above + count:
            if low == high:
                return torch.tensor(low)
            candidates = np.concatenate([part if isinstance(part, np.ndarray) else part.cpu() for part in inside])
            return torch.as_tensor(_descending(candidates, rank - above))
        if low == 0 and high == float("inf"):
            raise ValueError(f"there are {above + count} magnitudes that are numbers, so none of rank {rank}")
        margin *= 8


def _at(ordered: "np.ndarray[Any, Any]", place: float) -> float:
    """An element of a sample in ascending order; what bounds all magnitudes beyond its ends."""
    if place < 0:
        return 0.0
    return float(ordered[int(place)]) if place < len(ordered) else float("inf")


def _count(mask: Any) -> int:
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.count_nonzero())


def _descending(values: "np.ndarray[Any, Any]", rank: int) -> Any:
    place = len(values) - rank
    return np.partition(values, place)[place]


def keep_largest(blocks: Blocks, count: int, *, density: float) -> Sparsify:
    """Keep the share `density` of largest magnitudes. Elements equal to the smallest kept stay too."""
    if density >= 1 or not count:
        return _keep_all
    threshold = largest_magnitude(blocks, max(1, int(density * count)))
    # Hardshrink drops what is at most lambda, in one fast pass; the number just below keeps the threshold itself.
    below = float(torch.nextafter(threshold, torch.zeros_like(threshold)))
    return lambda block: F.hardshrink(block, below)


def keep_middle(blocks: Blocks, count: int, *, density: float, gamma: float) -> Sparsify:
    """Keep the share `density` of magnitudes after the share `gamma` of largest ones is left out.

    Fewer large ones are left out where both shares exceed the whole.
    """
    if density >= 1 or not count:
        return _keep_all
    kept = int(density * count)
    if not kept:
        return torch.zeros_like
    smallest = max(0, count - kept - int(gamma * count))
    low = largest_magnitude(blocks, count - smallest)
    below = float(torch.nextafter(low, torch.zeros_like(low)))
    high = float(largest_magnitude(blocks, count - smallest - kept + 1))
    return lambda block: F.hardshrink(block, below) - F.hardshrink(block, high)


def keep_random(blocks: Blocks, count: int, *, density: float, generator: torch.Generator | None) -> Sparsify:
    """Keep each element with probability `density`, divided by it.

    Args:
        generator: on the CPU it seeds a stream of bits that is several times faster than torch's own, in which
            probabilities are multiples of 2^-16. None draws the stream that `torch.bernoulli` draws on probabilities
            in float32, which is how PEFT does it.
    """
    if density >= 1:
        return _keep_all
    if generator is None or generator.device.type != "cpu":

        def sparsify_as_peft(block: Tensor) -> Tensor:
            drawn = torch.rand(block.shape, generator=generator, device=block.device)
            return drawn.lt_(density).mul_(block).div_(density)

        return sparsify_as_peft
    high, low = divmod(max(1, round(density * _BYTE**2)), _BYTE)
    zero = torch.zeros(())
    is_coin = (high, low) == (_BYTE // 2, 0)
    first, second = _Stream(generator, bits=1 if is_coin else 8), _Stream(generator) if low else None

    def sparsify(block: Tensor) -> Tensor:
        drawn = first.draw(block.numel())
        kept = drawn if is_coin else drawn < high
        if second is not None:
            # One byte decides nearly always; a second one where it is equal to the limit's.
            equal = np.flatnonzero(drawn == high)
            kept[equal] = second.draw(len(equal)) < low
        # Torch multiplies by floats faster than numpy and torch do by booleans.
        mask = torch.from_numpy(kept.view(np.int8).reshape(block.shape)).to(block.dtype)
        return torch.addcmul(zero, mask, block, value=1 / density, out=mask)

    return sparsify


class _Stream:
    """A stream of uniform bytes, or of bits."""

    def __init__(self, generator: torch.Generator, bits: int = 8) -> None:
        seed = int(torch.randint(1 << 62, (), generator=generator))
        self._words = np.random.Generator(np.random.SFC64(seed))
        self._bits = bits
        self._left = np.empty(0, dtype=np.uint8)

    def draw(self, count: int) -> "np.ndarray[Any, Any]":
        """The next ones, uint8 [count]; how elements come in blocks does not change what each of them gets."""
        words = -(-max(0, count - len(self._left)) * self._bits // 64)
        drawn = self._words.integers(1 << 64, size=words, dtype=np.uint64).view(np.uint8)
        if self._bits == 1:
            drawn = np.unpackbits(drawn)
        if len(self._left):
            drawn = np.concatenate([self._left, drawn])
        self._left = drawn[count:]
        return drawn[:count]


def keep_random_by_magnitude(
    blocks: Blocks, count: int, *, density: float, epsilon: float, generator: torch.Generator | None
) -> Sparsify:
    """Keep each element with a probability that grows with its rank in its row, divided by that probability.

    From density - epsilon for a row's smallest magnitude to density + epsilon for its largest (DELLA's MagPrune).

    Raises:
        ValueError: if these are no probabilities.
    """
    if density >= 1 or not count:
        return _keep_all
    check_probabilities(density, epsilon)

    def sparsify(block: Tensor) -> Tensor:
        rows = block.reshape(1, -1) if block.dim() < 2 else block
        ranks = rows.abs().argsort(dim=-1).argsort(dim=-1).to(block.dtype)
        probabilities = (density - epsilon) + ranks.mul_(2 * epsilon / max(1, rows.shape[-1] - 1))
        drawn = torch.rand(rows.shape, generator=generator, device=block.device)
        return (rows * (drawn < probabilities) / probabilities).reshape(block.shape)

    return sparsify


def check_probabilities(density: float, epsilon: float) -> None:
    """Raise `ValueError` unless density - epsilon and density + epsilon are probabilities of keeping an element."""
    if density < 1 and (density - epsilon <= 0 or density + epsilon >= 1):
        raise ValueError(f"density {density} plus and minus epsilon {epsilon} must lie between 0 and 1")


def _keep_all(block: Tensor) -> Tensor:
    return block.clone()
