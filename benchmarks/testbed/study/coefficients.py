"""What coefficients from embedding signals are like, in a sentence each."""

from collections.abc import Mapping
from statistics import median

from torch import Tensor

from benchmarks.testbed.study.jobs import AS_PUBLISHED

# One specialist has a layer almost alone.
_ALONE = 0.9


def layers_sentence(tensors: Mapping[str, Tensor]) -> str:
    """How layer-wise coefficients `alpha` [S, L] share layers out."""
    largest, leader = tensors["alpha"].max(dim=0)
    layers = len(leader)
    alone = int((largest > _ALONE).sum())
    changes = int((leader[1:] != leader[:-1]).sum())
    return (
        f"{alone} of {layers} layers have one coefficient above {_ALONE}, and the largest is another specialist's at "
        f"{changes} of {layers - 1} steps from a layer to the next."
    )


def elements_sentence(tensors: Mapping[str, Tensor]) -> str:
    """How element-wise coefficients spread, from their mean and deviation in every tensor."""
    means = [number for name, own in tensors.items() if name.startswith("lambda.mean.") for number in own.tolist()]
    deviations = [number for name, own in tensors.items() if name.startswith("lambda.std.") for number in own.tolist()]
    return (
        f"the mean of a specialist's coefficients in a tensor lies between {min(means):.3f} and {max(means):.3f}, "
        f"their standard deviation in it is {median(deviations):.3f} (median)."
    )


# Of which rows coefficients are told, and how.
SHOWN_COEFFICIENTS = {AS_PUBLISHED: layers_sentence, "es_element_factors": elements_sentence}
