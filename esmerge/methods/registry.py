"""The names under which recipes know merging methods, and the parameters these take."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Protocol, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor

MergeFunction = Callable[..., Tensor]
# A tensor's blocks of rows, from the first on, as often as they are asked for.
Blocks = Callable[[], Iterable[Tensor]]
# (blocks of one delta, number of its elements, generator, **parameters) -> what sparsifies the blocks, in their order
Sparsifier = Callable[..., Callable[[Tensor], Tensor]]


class Matcher(Protocol):
    """How deltas are merged whose products with their layer's inputs are matched; one serves all that read the same."""

    def product(self, index: int, rows: Tensor) -> Tensor:
        """What rows [h, in] of a specialist's delta, or of its factor A, enter the sum with."""
        ...

    def solve(self, rows: Tensor) -> Tensor:
        """Rows [h, in] of the merged delta, or of factors that stand for it, from those of the sum."""
        ...

    def merge(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of the merged delta from those of each specialist's."""
        ...


# (inputs [n_i, in] of a linear layer in each specialist, a weight for each, **parameters)
MakeMatcher = Callable[..., Matcher]

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

# Keyword arguments that the engine gives, not the recipe.
_GIVEN = ("base", "generator", "inputs")


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        name: in recipes.
        function: `(deltas, weights, **parameters) -> Tensor`.
        parameters: a model of its keyword parameters, with their defaults and bounds.
        combine: merges blocks of rows, `(deltas, weights, **parameters) -> Tensor`, where an element of the result
            depends on the same element of its inputs alone, once `sparsify` has been applied; None for a method that
            needs whole tensors.
        sparsify: makes what sparsifies each delta before it is combined, block by block; None for nothing.
        match: makes what merges the deltas of a linear layer's weight from its inputs in each specialist, of which the
            function takes the latter as `inputs`; other tensors are combined. None for a method that needs no inputs.
        needs_base: takes the base's tensor as `base`.
        random: takes a `generator`.
        specialists: how many it can merge; None for any number.
        check: raises `ValueError` for parameters that do not fit each other.
    """

    name: str
    function: MergeFunction
    parameters: type[BaseModel]
    combine: MergeFunction | None
    sparsify: Sparsifier | None
    match: MakeMatcher | None
    needs_base: bool
    random: bool
    specialists: int | None
    check: Callable[..., None] | None


METHODS: dict[str, Method] = {}


def merging_method(
    *,
    combine: MergeFunction | None = None,
    sparsify: Sparsifier | None = None,
    match: MakeMatcher | None = None,
    specialists: int | None = None,
    check: Callable[..., None] | None = None,
) -> Callable[[MergeFunction], MergeFunction]:
    """Make a function known to recipes under its own name.

    Its keyword-only parameters, with annotations and defaults, are the method's parameters; a trailing underscore is
    not part of a parameter's name. `base`, `generator` and `inputs` are given by the engine. The function must agree
    with `combine` after `sparsify` where these are given.
    """

    def register(function: MergeFunction) -> MergeFunction:
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        names = [keyword.name for keyword in keywords]
        hints = get_type_hints(function, include_extras=True)
        fields: dict[str, Any] = {
            keyword.name: (hints[keyword.name], Field(keyword.default, alias=keyword.name.rstrip("_")))
            for keyword in keywords
            if keyword.name not in _GIVEN
        }
        name = function.__name__
        config = ConfigDict(extra="forbid", populate_by_name=True)
        model = create_model(name, __config__=config, **fields)
        METHODS[name] = Method(
            name, function, model, combine, sparsify, match, "base" in names, "generator" in names, specialists, check
        )
        return function

    return register


def accepted(function: Callable[..., Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Those of the parameters that a function takes."""
    names = _parameter_names(function)
    return {name: value for name, value in parameters.items() if name in names}


@cache
def _parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
