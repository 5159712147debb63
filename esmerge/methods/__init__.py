"""Merging methods: pure functions on a stack of deltas with broadcastable weights.

Every method is `method(deltas, weights, *, parameters) -> merged delta`: S float32 tensors of one shape, and weights
[S, ...] that broadcast against their stack: one number per specialist, or (but for methods that match inputs) one per
element. A module is a family; a function under `@merging_method` is known to recipes by its name, its keyword
parameters by theirs.
"""

from esmerge.methods.arithmetic import linear, task_arithmetic
from esmerge.methods.geometric import karcher, model_stock, slerp
from esmerge.methods.matching import embedding_matching, regmean
from esmerge.methods.registry import METHODS, Method, merging_method
from esmerge.methods.selective import pcb, sce
from esmerge.methods.sparse import (
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    magnitude_prune,
    ties,
)
from esmerge.methods.spectral import iso_c, tsv

__all__ = [
    "METHODS",
    "Method",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "embedding_matching",
    "iso_c",
    "karcher",
    "linear",
    "magnitude_prune",
    "merging_method",
    "model_stock",
    "pcb",
    "regmean",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "tsv",
]
