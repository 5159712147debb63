"""Gradient scores of a layer's parameters, taken while the gradient of a specialist's distance passes through it.

Source: arXiv 2603.14405, section on element-wise coefficients.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from esmerge.attach import Observer, is_linear
from esmerge.deltas import Delta, LoraDelta
from esmerge.errors import InputError
from esmerge.scores import Score, Scratch, dense_score, pair_score


class Gradients:
    """No gradients; the base of the two that take them.

    Attributes:
        wanted: whether there are parameters whose gradients are to be collected.
    """

    wanted = False

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self.deltas = dict(deltas)
        self.observers: dict[str, Observer] = {}
        self.leaves: list[str] = []
        # What the gradients that pass at the moment are multiplied by.
        self._scale = 1.0

    def start(self, layer: nn.Module) -> None:
        """Called once the deltas are attached to the layer."""

    def collect(self, distance: Tensor, scale: float = 1.0) -> None:
        """Called with each batch's distance.

        Args:
            scale: what it is multiplied by while gradients pass, so that these are no numbers too small for their
                dtype; scores are as without it.
        """
        self._scale = scale
        (distance * scale).backward()

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        """The scores over all batches, by tensor name inside the layer."""
        return {}


class FactorGradients(Gradients):
    """Gradient scores of the LoRA factors A and B as they are stored, without their scaling."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__(deltas)
        self.wanted = bool(deltas)
        self.observers = dict.fromkeys(deltas, self._observe)
        self._totals: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in deltas.items():
            assert isinstance(delta, LoraDelta)
            self._totals[name] = torch.zeros_like(delta.a), torch.zeros_like(delta.b)

    def _observe(self, name: str, x: Tensor, g: Tensor) -> None:
        delta = self.deltas[name]
        assert isinstance(delta, LoraDelta)
        delta = delta.cast(x.dtype)
        a, b = self._totals[name]
        a.add_(((g @ delta.b * delta.scaling).T @ x).abs(), alpha=1 / self._scale)
        b.add_((g.T @ (x @ delta.a.T * delta.scaling)).abs(), alpha=1 / self._scale)

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for name, pair in self._totals.items():
            for letter, total in zip("ab", pair, strict=True):
                found[f"{name.removesuffix('.weight')}.lora_{letter}.weight"] = dense_score(total)
        return found


class WeightGradients(Gradients):
    """Gradient scores of all parameters that any specialist changes.

    For linear layers from their inputs and the gradients of their outputs; whichever is smaller is kept, those or the
    matrices they multiply to. For other parameters from autograd.
    """

    def __init__(
        self, deltas: Mapping[str, Delta], touched: Sequence[str], layer: nn.Module, uncalled: Collection[str]
    ) -> None:
        super().__init__(deltas)
        self.wanted = bool(touched)
        linear = [name for name in touched if is_linear(layer, name) and name not in uncalled]
        self.observers = dict.fromkeys(linear, self._observe)
        self.leaves = [name for name in touched if name not in self.observers]
        self._parameters: dict[str, nn.Parameter] = {}
        # Inputs, gradients of outputs, and what these are multiplied by.
        self._pairs: dict[str, list[tuple[Tensor, Tensor, float]]] = {name: [] for name in linear}
        self._totals = {name: torch.zeros_like(layer.get_parameter(name), dtype=torch.float32) for name in self.leaves}

    def start(self, layer: nn.Module) -> None:
        self._parameters = {name: layer.get_parameter(name) for name in self.leaves}

    def _observe(self, name: str, x: Tensor, g: Tensor) -> None:
        if name in self._totals:
            self._add(name, x, g, self._scale)
            return
        self._pairs[name].append((x, g, self._scale))
        pair_bytes = sum(x.nbytes + g.nbytes for x, g, _ in self._pairs[name])
        if pair_bytes >= x.shape[1] * g.shape[1] * torch.float32.itemsize:
            self._totals[name] = torch.zeros(g.shape[1], x.shape[1], device=x.device)
            for pair in self._pairs.pop(name):
                self._add(name, *pair)

    def _add(self, name: str, x: Tensor, g: Tensor, scale: float) -> None:
        self._totals[name].add_((g.T @ x).abs_(), alpha=1 / scale)

    def collect(self, distance: Tensor, scale: float = 1.0) -> None:
        super().collect(distance, scale)
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._totals[name].add_(parameter.grad.float().abs(), alpha=1 / scale)
                parameter.grad = None

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        # One after the other, so that each tensor is gone when its score is made.
        found: dict[str, Score] = {}
        while self._totals:
            name, total = self._totals.popitem()
            found[name] = dense_score(total, scratch)
        while self._pairs:
            name, pairs = self._pairs.popitem()
            found[name] = pair_score(pairs, scratch)
        return found


def make_gradients(
    scores: Literal["factors", "weights"] | None,
    deltas: Mapping[str, Delta],
    touched: Sequence[str],
    layer: nn.Module,
    uncalled: Collection[str] = (),
) -> Gradients:
    """What takes the gradients that scores are made of.

    Args:
        scores: of what, if of anything.
        deltas: of a specialist, by parameter name inside the layer.
        touched: names of the parameters that any specialist changes.
        layer: of the base.
        uncalled: names of weights of its linear layers that it reads without calling them.

    Raises:
        InputError: if the factors of such a weight are to have scores.
    """
    if scores == "factors":
        if without := sorted(deltas.keys() & set(uncalled)):
            raise InputError(
                f"{without[0]} is a linear layer's that {type(layer).__name__} reads without calling it, so its "
                "factors have no gradients of their own: use space: weights."
            )
        return FactorGradients(deltas)
    if scores == "weights":
        return WeightGradients(deltas, touched, layer, uncalled)
    return Gradients(deltas)
