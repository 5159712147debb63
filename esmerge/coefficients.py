"""Merging coefficients from embedding signals: pure functions on tensors.

Source: "ES-Merging: Biological MLLM Merging via Embedding Space Signals" (arXiv 2603.14405), and the
procedure its authors released, which settles what the paper leaves open. S specialists, M modalities,
L decoder layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-12


def layer_coefficients(
    distances: Tensor, primary: Sequence[int], alpha: float = 1.0, temperature: float = 0.5
) -> Tensor:
    """Layer-wise coefficients: how much each specialist moves the embeddings at each layer.

    The growth of the distance from layer to layer is z-scored over the layers; a specialist's score is
    that of its own modality plus `alpha` times those of the others; a softmax over the specialists at
    `temperature` turns the scores of one layer into coefficients.

    Args:
        distances: [S, M, L], distance between specialist and base on a modality's tokens after each layer.
        primary: index of each specialist's own modality, [S].
        alpha: weight of the other modalities.
        temperature: of the softmax over the specialists.

    Returns:
        float64 [S, L]; the coefficients of a layer sum to 1.
    """
    distances = distances.double()
    growth = torch.diff(distances, dim=-1, prepend=torch.zeros_like(distances[..., :1]))
    spread = growth.std(dim=-1, correction=0, keepdim=True).clamp_min(EPSILON)
    z = (growth - growth.mean(dim=-1, keepdim=True)) / spread
    own = z[range(len(primary)), list(primary)]
    return torch.softmax((own + alpha * (z.sum(dim=1) - own)) / temperature, dim=0)


def element_coefficients(scores: Tensor, means: Tensor, stds: Tensor, tau: float = 0.1) -> Tensor:
    """Element-wise coefficients: softmax over the specialists of z-scored gradient magnitudes.

    Args:
        scores: [S, ...], sums of absolute gradients, or a block of rows of them.
        means, stds: [S], population mean and standard deviation of each specialist's whole tensor.
        tau: temperature of the softmax over the specialists.

    Returns:
        The shape of `scores`; sums to 1 over the specialists.
    """
    shape = (-1,) + (1,) * (scores.dim() - 1)
    # In place: memory that is fresh for each step costs several times what the arithmetic does.
    z = (scores - means.to(scores).view(shape)).div_(stds.to(scores).clamp_min(EPSILON).view(shape)).div_(tau)
    exponentials = z.sub_(z.amax(dim=0)).exp_()
    return exponentials.div_(exponentials.sum(dim=0))


def combine(layer: Tensor, element: Tensor) -> Tensor:
    """Final coefficients: the product of layer-wise [S] and element-wise [S, ...] ones, renormalised."""
    product = layer.to(element).view((-1,) + (1,) * (element.dim() - 1)) * element
    return product.div_(product.sum(dim=0) + EPSILON)


def normalize_weights(weights: Tensor) -> Tensor:
    """Weights [S] scaled to sum 1, as mergekit's `normalize: true` does."""
    return weights / weights.sum()
