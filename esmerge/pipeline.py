"""The whole story on one page: from a recipe to a merged model."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmerge import results
from esmerge.comparison import DeltaComparison, DeltaObserver
from esmerge.distances import random_directions
from esmerge.errors import InputError
from esmerge.merging import Merger, SignalCoefficients
from esmerge.methods.matching import Positions
from esmerge.plan import Plan, make_plan, pin_recipe, with_recipe
from esmerge.plan_merger import Reach, inputs_key, layer_alpha, layer_merge, make_merger, positions_of, reach_of
from esmerge.recipe import Recipe, SignalsRecipe, override_recipe
from esmerge.records import check_pins, fingerprint, merge_record, pinned_inputs
from esmerge.scores import Scratch, row_blocks
from esmerge.signals import EmbeddingSignals
from esmerge.specialists import Specialist, are_twins
from esmerge.writing import Output, full_bytes, make_output, write_all

logger = logging.getLogger(__name__)


def merge(
    recipe: Recipe, output: Path, progress: bool = True, resume: bool = False, trust_remote_code: bool = False
) -> dict[str, int]:
    """Merge the specialists of a recipe into a model in the new folder `output`.

    Everything that headers and configs can tell is checked before anything is merged, and nothing is left behind if
    anything fails, except for what `resume` goes on from: tensors that are complete when Ctrl-C, a killed process or a
    full disk ends the merge. On a CPU the same inputs, recipe and versions give the same bytes; with a probe also the
    number of threads must be the same, which the result's record states.

    Args:
        progress: show progress bars.
        resume: go on where an unfinished merge of the same recipe into the same folder stopped.
        trust_remote_code: let the base's own code run.

    Returns:
        How many tensors were merged, how many copied from the base, how many rows are a specialist's own, and how many
        tensors are of encoders.

    Raises:
        InputError: if the recipe or one of its inputs is at fault.
        Interrupted: at Ctrl-C, if `resume` can go on.
    """
    results.check_output(output)
    plan = make_plan(recipe, trust_remote_code)
    if plan.recipe.output.format == "full":
        results.check_room(output, full_bytes(plan))
    check_pins(plan)
    with ExitStack() as stack:
        staged = results.staged_folder(output, fingerprint(plan), resume, same_threads=plan.recipe.needs_probe)
        folder = stack.enter_context(staged)
        scratch = stack.enter_context(Scratch(folder))
        signals = _signals([plan], scratch, progress).get(reach_of(plan))
        merger = make_merger(plan, signals)
        result = make_output(plan, merger, folder)
        write_all(plan, [result], progress)
        _warn_of_twins(plan.specialists)
        return _finish(plan, result, signals, pinned_inputs(plan))


@dataclass(frozen=True)
class Comparison:
    """What one of several results is like.

    Attributes:
        deltas: its merged delta against the specialists' deltas.
        kept_energy: mean over the tensors of an adapter, of the share of the squared norm kept; None for a full one.
    """

    deltas: DeltaComparison
    kept_energy: float | None


def compare(
    recipe: Recipe,
    variants: Mapping[str, Mapping[str, Any]],
    output: Path,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, Comparison]:
    """Merge the same specialists in several ways, each into its own folder in the new folder `output`.

    The probe runs once for all variants that need it equally far, and each tensor's inputs are read once unless
    together they exceed 2 GiB.

    Args:
        variants: by the name of its folder, the fields `method` and `coefficients` of a recipe, as far as they differ.
        trust_remote_code: let the base's own code run.

    Returns:
        What the results differ in, by variant.

    Raises:
        InputError: if the recipe, a variant or an input is at fault.
    """
    results.check_output(output)
    for name, fields in variants.items():
        if other := sorted(fields.keys() - {"method", "coefficients"}):
            raise InputError(
                f"variant {name}: {other[0]} cannot vary in one comparison, only method and coefficients can."
            )
    recipe = pin_recipe(recipe)
    recipes = {name: override_recipe(recipe, fields, f"variant {name}") for name, fields in variants.items()}
    first = make_plan(next(iter(recipes.values())), trust_remote_code)
    plans = {name: with_recipe(first, variant) for name, variant in recipes.items()}
    if recipe.output.format == "full":
        results.check_room(output, sum(full_bytes(plan) for plan in plans.values()))
    check_pins(next((plan for plan in plans.values() if plan.recipe.needs_probe), first))
    with ExitStack() as stack:
        folder = stack.enter_context(results.staged_folder(output, None, resume=False))
        scratch = stack.enter_context(Scratch(folder))
        probed = [plan for plan in plans.values() if plan.recipe.needs_probe]
        _check_measures(probed)
        signals = _signals(probed, scratch, progress)
        observers = {name: DeltaObserver() for name in plans}
        outputs = {}
        for name, plan in plans.items():
            (folder / name).mkdir()
            merger = make_merger(plan, signals.get(reach_of(plan)))
            outputs[name] = make_output(plan, merger, folder / name, observers[name])
        write_all(first, list(outputs.values()), progress)
        _warn_of_twins(first.specialists)
        inputs = pinned_inputs(next(iter(probed), first))
        found = {}
        for name, result in outputs.items():
            probed_too = plans[name].recipe.needs_probe
            kept = inputs if probed_too else {key: value for key, value in inputs.items() if key != "probe"}
            _finish(plans[name], result, signals.get(reach_of(plans[name])), kept)
            energies = result.merger.kept_energy.values()
            found[name] = Comparison(observers[name].result(), sum(energies) / len(energies) if energies else None)
    return found


def _check_measures(plans: Sequence[Plan]) -> None:
    """Raise `InputError` if plans ask for signals that are measured differently."""
    probed = [plan for plan in plans if isinstance(plan.recipe.coefficients, SignalsRecipe)]
    for plan in probed[1:]:
        for field in ("projections", "p", "distance", "tokens"):
            if getattr(plan.recipe.coefficients, field) != getattr(probed[0].recipe.coefficients, field):
                raise InputError(f"variants with different coefficients.{field} need a probe each: compare them apart.")


def _serving(plans: Sequence[Plan]) -> Plan:
    """The plan whose signals serve all of them."""
    probed = [plan for plan in plans if isinstance(plan.recipe.coefficients, SignalsRecipe)]
    # Scores that one of them does without are still needed by the others.
    scored = [plan for plan in probed if _granularity(plan) != "layer"]
    return (scored + probed + list(plans))[0]


def _granularity(plan: Plan) -> str | None:
    settings = plan.recipe.coefficients
    return settings.granularity if isinstance(settings, SignalsRecipe) else None


def _finish(plan: Plan, output: Output, signals: EmbeddingSignals | None, inputs: Mapping[str, Any]) -> dict[str, int]:
    """Write what stands beside the weights."""
    counts = output.finish()
    if not isinstance(plan.recipe.coefficients, SignalsRecipe):
        signals = None  # the probe served the method alone
    _write_coefficients(plan, output.merger, signals, output.folder)
    if plan.recipe.output.signals and signals is not None:
        _write_signals(plan, output.merger, signals, output.folder)
    results.write_record(output.folder, merge_record(plan, output.merger, inputs, counts))
    return counts


def _signals(plans: Sequence[Plan], scratch: Scratch, progress: bool) -> dict[Reach, EmbeddingSignals]:
    """What the probe tells for plans with the same inputs, by how far it runs for them.

    A plan's result then has the same bits whatever other plans stand beside it.
    """
    groups: dict[Reach, list[Plan]] = {}
    for plan in plans:
        if plan.recipe.needs_probe:
            groups.setdefault(reach_of(plan), []).append(plan)
    if not groups:
        return {}
    from esmerge.probing import measure_signals

    found = {}
    for reach, group in groups.items():
        unlike = {inputs_key(own): own for own in group}
        merges = [layer_merge(own) for own in unlike.values() if own.recipe.method.follows_merged]
        wanted = {positions_of(own) for own in group if not own.recipe.method.follows_merged}
        inputs: list[Positions] = sorted(filter(None, wanted))
        found[reach] = measure_signals(_serving(group), scratch, progress, inputs, merges, reach == "end")
    return found


def _write_coefficients(plan: Plan, merger: Merger, signals: EmbeddingSignals | None, folder: Path) -> None:
    names = list(plan.recipe.specialists)
    tensors: dict[str, Tensor] = {}
    if signals is not None:
        tensors |= {"alpha": layer_alpha(plan, signals), "distances": signals.distances, "planes": signals.planes}
    elif plan.num_layers:
        # The mean over a layer's tensors: one number wherever the recipe gives one.
        layers = [
            [name for t in plan.merged if t.layer == number for name in plan.coefficient_names(t)]
            for number in range(plan.num_layers)
        ]
        means = [[merger.coefficients.scalars(name, number) for name in layer] for number, layer in enumerate(layers)]
        empty = torch.zeros(len(names), dtype=torch.float64)
        tensors["alpha"] = torch.stack(
            [torch.stack([mean for mean in row if mean is not None]).mean(dim=0) if row else empty for row in means],
            dim=1,
        )
    for name, statistics in merger.statistics.items():
        tensors[f"lambda.mean.{name}"] = statistics.mean
        tensors[f"lambda.std.{name}"] = statistics.std
    metadata = {"specialists": names, "modalities": names}
    results.write_tensors(folder / results.COEFFICIENTS_FILE, dict(sorted(tensors.items())), metadata)


def _write_signals(plan: Plan, merger: Merger, signals: EmbeddingSignals, folder: Path) -> None:
    settings = plan.recipe.coefficients
    assert isinstance(settings, SignalsRecipe) and isinstance(merger.coefficients, SignalCoefficients)
    hidden = next(iter(signals.responses.values())).shape[-1]
    tensors = {"directions": random_directions(settings.projections, hidden, plan.recipe.seed)}
    names = list(plan.recipe.specialists)
    for (modality, layer), response in signals.responses.items():
        for model, rows in zip(["base", *names], response, strict=True):
            tensors[f"pooled.{model}.{modality}.{layer}"] = rows
    elements = SignalCoefficients(merger.coefficients.outside, None, signals.scores, settings.tau)

    def blocks() -> Iterator[tuple[str, int, Tensor]]:
        for tensor, scores in signals.scores.items():
            coefficients = elements.rows(tensor, 0)
            for start, stop in row_blocks(scores[0].shape):
                rows = coefficients(start, stop)
                for index, name in enumerate(names):
                    yield f"score.{name}.{tensor}", start, scores[index].rows(start, stop)
                    yield f"element_coefficient.{name}.{tensor}", start, rows[index]

    shapes = {
        f"{kind}.{name}.{tensor}": scores[0].shape
        for tensor, scores in signals.scores.items()
        for kind in ("score", "element_coefficient")
        for name in names
    }
    results.write_tensors(folder / "signals.safetensors", tensors, blocks=blocks(), shapes=shapes)


def _warn_of_twins(specialists: Sequence[Specialist]) -> None:
    """Warn of specialists that are the same; called when they were read, so that their hashes are known."""
    for one, other in itertools.combinations(specialists, 2):
        if are_twins(one, other):
            logger.warning("%s and %s are the same specialist: its delta counts twice", one.name, other.name)
