"""From a plan to what merges its tensors: coefficients, a method, and what linear layers read where it needs that."""

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from esmerge.coefficients import layer_coefficients
from esmerge.deltas import Delta
from esmerge.errors import InputError
from esmerge.layer_inputs import Inputs
from esmerge.merging import FixedCoefficients, Merger, SignalCoefficients, TensorStream, merge_to_delta
from esmerge.methods import METHODS, Method
from esmerge.methods.matching import Positions, Tokens
from esmerge.names import inner_name
from esmerge.plan import Plan
from esmerge.recipe import SignalsRecipe
from esmerge.signals import EmbeddingSignals, LayerMerge

logger = logging.getLogger(__name__)

# Until a specialist's own modality ends, until the last item ends, or all of it.
Reach = Literal["own", "items", "end"]


def make_merger(plan: Plan, signals: EmbeddingSignals | None) -> Merger:
    """The recipe's coefficients and method."""
    recipe = plan.recipe
    settings, names = recipe.coefficients, list(recipe.specialists)
    inputs = signals.inputs.get(inputs_key(plan), {}) if signals is not None else {}
    known = signals.merged.get(inputs_key(plan), {}) if signals is not None else {}
    _warn_of_averaged(plan, {*inputs, *known})
    if not isinstance(settings, SignalsRecipe):
        return replace(_fixed_merger(plan, inputs), known=known)
    assert signals is not None
    method, parameters = _method(plan)
    if method.name == "linear":
        # Each element's coefficients sum to 1 as the paper defines them; dividing again would change the last digits.
        parameters["normalize"] = False
    alpha = layer_alpha(plan, signals)
    coefficients = SignalCoefficients(
        outside=alpha.mean(dim=1) if settings.outside == "mean" else settings.outside_numbers(names),
        layer=None if settings.granularity == "element" else alpha,
        scores=None if settings.granularity == "layer" else signals.scores,
        tau=settings.tau,
    )
    return Merger(coefficients, method, parameters, recipe.seed, inputs)


def _fixed_merger(plan: Plan, inputs: Inputs) -> Merger:
    settings, names = plan.recipe.coefficients, list(plan.recipe.specialists)
    assert not isinstance(settings, SignalsRecipe)
    coefficients = FixedCoefficients(lambda name: settings.numbers(name, names))
    return Merger(coefficients, *_method(plan), plan.recipe.seed, inputs)


def _method(plan: Plan) -> tuple[Method, dict[str, Any]]:
    """The recipe's method, and all its parameters."""
    return METHODS[plan.recipe.method.name], plan.recipe.method.resolved.model_dump()


def layer_merge(plan: Plan) -> LayerMerge:
    """The merge of a plan whose layers read what merged layers hand on."""
    device = torch.device(plan.recipe.device)

    def merge_layer(number: int, inputs: Inputs) -> dict[str, Delta]:
        merger, deltas = _fixed_merger(plan, inputs), {}
        targets = {target.name: target for target in plan.merged if target.layer == number}
        for group in merger.sharing_groups(targets):
            with merger.sharing_matchers():
                for name in group:
                    own = targets[name]
                    stream = TensorStream(plan.checkpoint, own.stored, own.shape, plan.deltas(own), device)
                    deltas[inner_name(name)] = merge_to_delta(merger, name, number, stream)
        return deltas

    positions = positions_of(plan)
    assert positions is not None
    return LayerMerge(inputs_key(plan), positions, merge_layer)


def inputs_key(plan: Plan) -> str:
    """Under which signals keep what the linear layers of a plan's specialists read."""
    if plan.recipe.method.follows_merged:
        return plan.recipe.model_dump_json(include={"method", "coefficients"})
    return positions_of(plan) or ""


def reach_of(plan: Plan) -> Reach:
    """How far into each probe input a plan needs it."""
    positions = positions_of(plan)
    if positions in ("own_and_after", "whole"):
        return "end"
    return "own" if positions == "own" and not isinstance(plan.recipe.coefficients, SignalsRecipe) else "items"


def positions_of(plan: Plan) -> Positions | None:
    """Where the method needs what linear layers read; a method that leaves no choice takes all positions.

    If the recipe says nothing: a specialist's own modality, and in prompts of its own also what follows, where answers
    begin. All of a shared prompt are those up to its last item.
    """
    method = plan.recipe.method
    if not method.matches:
        return None
    tokens: Tokens | None = getattr(method.resolved, "tokens", "all")
    if plan.recipe.probe is None or plan.recipe.probe.is_shared:
        return tokens or "own"
    return "whole" if tokens == "all" else tokens or "own_and_after"


def layer_alpha(plan: Plan, signals: EmbeddingSignals) -> Tensor:
    """The layer-wise coefficients that the recipe makes of signals, float64 [S, L].

    Raises:
        InputError: if distances or coefficients are no numbers.
    """
    settings = plan.recipe.coefficients
    assert isinstance(settings, SignalsRecipe)
    if not signals.distances.isfinite().all():
        raise InputError(
            f"distances between embeddings are beyond all numbers with coefficients.p = {settings.p:g}: make it "
            "smaller."
        )
    own = range(len(plan.specialists))
    alpha = layer_coefficients(signals.distances, own, settings.alpha, settings.temperature)
    if not alpha.isfinite().all():
        raise InputError(
            f"no numbers come of coefficients.alpha = {settings.alpha:g} and temperature = {settings.temperature:g}: "
            "alpha must be smaller, or temperature larger."
        )
    return alpha


def _warn_of_averaged(plan: Plan, matched: Collection[str]) -> None:
    """Warn of matrices that a method that matches inputs can only average."""
    if not plan.recipe.method.matches:
        return
    matrices = [target.name for target in plan.merged if target.layer is not None and len(target.shape) > 1]
    averaged = [name for name in matrices if name not in matched]
    if averaged:
        logger.warning(
            "%s averages %d of %d matrices, %s first: they are no weights of torch.nn.Linear",
            plan.recipe.method.name,
            len(averaged),
            len(matrices),
            averaged[0],
        )
