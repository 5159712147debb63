"""Which elements of a delta are kept: by magnitude, by chance, or both.

Each function takes a delta as blocks of rows that can be gone through more than once, and returns what sparsifies
these blocks, one after the other. So no delta is ever held whole.
"""

from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esmerge.methods.registry import Blocks

# Parts that stay in a core's cache while several operations go over them.
CACHE_ELEMENTS = 1 << 18
_MAGNITUDE_BITS = 0x7FFFFFFF

Sparsify = Callable[[Tensor], Tensor]


def largest_magnitude(blocks: Blocks, rank: int) -> Tensor:
    """The `rank`-th largest magnitude among float32 blocks (1 for the largest), without sorting them.

    The bits of a positive float order as the float does. One pass counts the upper 16 bits, a second sorts the few
    elements whose upper bits are those of the wanted one: exact, and many times faster than a full sort.

    Returns:
        A scalar tensor.
    """
    first, *others = islice(blocks(), 2)
    if not others and first.numel() <= CACHE_ELEMENTS and first.device.type == "cpu":
        # Counting pays only where there is much to count.
        place = first.numel() - rank
        return torch.from_numpy(np.partition(first.abs().view(-1).numpy(), place))[place]
    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for part in _parts(blocks):
        counts += torch.bincount(part >> 16, minlength=1 << 15).cpu()
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    rest = rank - (int(above[place - 1]) if place else 0)
    upper = (1 << 15) - 1 - place
    candidates = torch.cat([part[part >> 16 == upper] for part in _parts(blocks)])
    return candidates.sort(descending=True).values[rest - 1].view(torch.float32)


def _parts(blocks: Blocks) -> Iterator[Tensor]:
    for block in blocks():
        for part in block.reshape(-1).split(CACHE_ELEMENTS):
            yield part.view(torch.int32) & _MAGNITUDE_BITS


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

    Draws the stream that `torch.bernoulli` draws on probabilities in float32, which is how PEFT does it.
    """
    if density >= 1:
        return _keep_all

    def sparsify(block: Tensor) -> Tensor:
        drawn = torch.rand(block.shape, generator=generator, device=block.device)
        return drawn.lt_(density).mul_(block).div_(density)

    return sparsify


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
    return block
