"""The whole story on one page: from a recipe to a merged model."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmerge import results
from esmerge.checkpoint import Checkpoint
from esmerge.coefficients import layer_coefficients
from esmerge.comparison import DeltaComparison, DeltaObserver
from esmerge.deltas import Delta
from esmerge.distances import random_directions
from esmerge.encoders import encoder_hash, encoders_of
from esmerge.errors import InputError
from esmerge.merging import FixedCoefficients, Merger, SignalCoefficients, TensorStream, merge_to_delta
from esmerge.methods import METHODS, Method
from esmerge.names import inner_name
from esmerge.plan import Plan, make_plan, pin_recipe, with_recipe
from esmerge.recipe import Recipe, SignalsRecipe, override_recipe
from esmerge.remote_code import code_files
from esmerge.scores import Scratch
from esmerge.signals import EmbeddingSignals, Inputs, LayerMerge, Positions
from esmerge.sources import Source, content_hash
from esmerge.specialists import Specialist, are_twins
from esmerge.writing import Output, make_output, write_all

logger = logging.getLogger(__name__)


def merge(
    recipe: Recipe, output: Path, progress: bool = True, resume: bool = False, trust_remote_code: bool = False
) -> dict[str, int]:
    """Merge the specialists of a recipe into a model in the new folder `output`.

    Everything that headers and configs can tell is checked before anything is merged, and nothing is left behind if
    anything fails. On a CPU the same inputs, recipe and versions give the same bytes; with a probe also the number of
    threads must be the same, which the result's record states.

    Args:
        progress: show progress bars.
        resume: go on where a killed merge of the same recipe into the same folder stopped.
        trust_remote_code: let the base's own code run.

    Returns:
        How many tensors were merged, how many copied from the base, how many rows are a specialist's own, and how many
        tensors are of encoders.

    Raises:
        InputError: if the recipe or one of its inputs is at fault.
    """
    results.check_output(output)
    plan = make_plan(recipe, trust_remote_code)
    with ExitStack() as stack:
        folder = stack.enter_context(results.staged_folder(output, _fingerprint(plan), resume))
        scratch = stack.enter_context(Scratch(folder))
        signals = _signals(plan, scratch, progress)
        merger = make_merger(plan, signals)
        result = make_output(plan, merger, folder)
        write_all(plan, [result], progress)
        _warn_of_twins(plan.specialists)
        return _finish(plan, result, signals, _inputs(plan))


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

    The probe runs once, and each tensor's inputs are read once unless together they exceed 2 GiB.

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
    with ExitStack() as stack:
        folder = stack.enter_context(results.staged_folder(output, "", resume=False))
        scratch = stack.enter_context(Scratch(folder))
        probed = _shared_probe(list(plans.values()))
        signals = _signals(probed, scratch, progress, list(plans.values())) if probed else None
        observers = {name: DeltaObserver() for name in plans}
        outputs = {}
        for name, plan in plans.items():
            (folder / name).mkdir()
            outputs[name] = make_output(plan, make_merger(plan, signals), folder / name, observers[name])
        write_all(first, list(outputs.values()), progress)
        _warn_of_twins(first.specialists)
        inputs = _inputs(probed or first)
        found = {}
        for name, result in outputs.items():
            probed_too = plans[name].recipe.needs_probe
            kept = inputs if probed_too else {key: value for key, value in inputs.items() if key != "probe"}
            _finish(plans[name], result, signals, kept)
            energies = result.merger.kept_energy.values()
            found[name] = Comparison(observers[name].result(), sum(energies) / len(energies) if energies else None)
    return found


def _shared_probe(plans: Sequence[Plan]) -> Plan | None:
    """The plan whose signals serve all plans that need some; they must not ask for different ones."""
    probed = [plan for plan in plans if isinstance(plan.recipe.coefficients, SignalsRecipe)]
    measures = ("projections", "p", "distance", "tokens")
    for plan in probed[1:]:
        for field in measures:
            if getattr(plan.recipe.coefficients, field) != getattr(probed[0].recipe.coefficients, field):
                raise InputError(f"variants with different coefficients.{field} need a probe each: compare them apart.")
    # Scores that one of them does without are still needed by the others.
    scored = [plan for plan in probed if _granularity(plan) != "layer"]
    return next(iter(scored + probed + [plan for plan in plans if plan.recipe.needs_probe]), None)


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
    results.write_record(output.folder, _record(plan, output.merger, inputs, counts))
    return counts


def make_merger(plan: Plan, signals: EmbeddingSignals | None) -> Merger:
    """The recipe's coefficients and method."""
    recipe = plan.recipe
    settings, names = recipe.coefficients, list(recipe.specialists)
    inputs = signals.inputs.get(_inputs_key(plan), {}) if signals is not None else {}
    _warn_of_averaged(plan, inputs)
    if not isinstance(settings, SignalsRecipe):
        return _fixed_merger(plan, inputs)
    assert signals is not None
    method, parameters = _method(plan)
    if method.name == "linear":
        # Each element's coefficients sum to 1 as the paper defines them; dividing again would change the last digits.
        parameters["normalize"] = False
    alpha = _alpha(plan, signals)
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
    method = METHODS[plan.recipe.method.name]
    return method, method.parameters.model_validate(plan.recipe.method.parameters).model_dump()


def _layer_merge(plan: Plan) -> LayerMerge:
    """The merge of a plan whose layers read what merged layers hand on."""
    device = torch.device(plan.recipe.device)

    def merge_layer(number: int, inputs: Inputs) -> dict[str, Delta]:
        merger, deltas = _fixed_merger(plan, inputs), {}
        for target in plan.merged:
            if target.layer == number:
                stream = TensorStream(plan.checkpoint, target.stored, target.shape, plan.deltas(target), device)
                deltas[inner_name(target.name)] = merge_to_delta(merger, target.name, number, stream)
        return deltas

    positions = _positions(plan)
    assert positions is not None
    return LayerMerge(_inputs_key(plan), positions, merge_layer)


def _signals(plan: Plan, scratch: Scratch, progress: bool, others: Sequence[Plan] = ()) -> EmbeddingSignals | None:
    """What the probe tells, for a plan and for others with the same inputs; None if none of them needs one."""
    if not plan.recipe.needs_probe:
        return None
    from esmerge.probing import measure_signals

    plans = {_inputs_key(own): own for own in (plan, *others)}
    merges = [_layer_merge(own) for own in plans.values() if own.recipe.method.follows_merged]
    wanted = {_positions(own) for own in plans.values() if not own.recipe.method.follows_merged} - {None}
    return measure_signals(plan, scratch, progress, sorted(filter(None, wanted)), merges)


def _inputs_key(plan: Plan) -> str:
    """Under which signals keep what the linear layers of a plan's specialists read."""
    if plan.recipe.method.follows_merged:
        return plan.recipe.model_dump_json(include={"method", "coefficients"})
    return _positions(plan) or ""


def _positions(plan: Plan) -> Positions | None:
    """Where the method needs what linear layers read; a method that leaves no choice takes all positions."""
    method = plan.recipe.method
    if not method.matches:
        return None
    parameters = METHODS[method.name].parameters.model_validate(method.parameters)
    positions: Positions = getattr(parameters, "tokens", "all")
    return positions


def _warn_of_averaged(plan: Plan, inputs: Inputs) -> None:
    """Warn of matrices that a method that matches inputs can only average."""
    if not plan.recipe.method.matches:
        return
    matrices = [target.name for target in plan.merged if target.layer is not None and len(target.shape) == 2]
    averaged = [name for name in matrices if name not in inputs]
    if averaged:
        logger.warning(
            "%s averages %d of %d matrices, %s first: they are no weights of torch.nn.Linear",
            plan.recipe.method.name,
            len(averaged),
            len(matrices),
            averaged[0],
        )


def _alpha(plan: Plan, signals: EmbeddingSignals) -> Tensor:
    settings = plan.recipe.coefficients
    assert isinstance(settings, SignalsRecipe)
    own = range(len(plan.specialists))
    return layer_coefficients(signals.distances, own, settings.alpha, settings.temperature)


def _write_coefficients(plan: Plan, merger: Merger, signals: EmbeddingSignals | None, folder: Path) -> None:
    names = list(plan.recipe.specialists)
    tensors: dict[str, Tensor] = {}
    if signals is not None:
        tensors |= {"alpha": _alpha(plan, signals), "distances": signals.distances, "planes": signals.planes}
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
    for tensor, scores in signals.scores.items():
        count = scores[0].shape[0]
        element = elements.rows(tensor, 0)(0, count)
        for index, name in enumerate(names):
            tensors[f"score.{name}.{tensor}"] = scores[index].rows(0, count)
            tensors[f"element_coefficient.{name}.{tensor}"] = element[index]
    results.write_tensors(folder / "signals.safetensors", tensors)


def _probe_files(plan: Plan) -> list[str]:
    probe = plan.recipe.probe
    if probe is None or not plan.recipe.needs_probe:
        return []
    template = probe.chat_template if probe.chat_template and "{" not in probe.chat_template else None
    return [reference for reference in [probe.tensors, template, *(probe.data or {}).values()] if reference]


def _fingerprint(plan: Plan) -> str:
    """What tells one merge from another without reading the inputs: the recipe, and names, sizes and times of files.

    Of times, also that of the last change of a file's entry, which nobody can set.
    """
    folders = [plan.base.folder, *(source.folder for source in plan.sources)]
    folders += [encoder.folder for encoder in encoders_of(plan).values() if encoder.folder is not None]
    files = [file for folder in folders for file in sorted(folder.glob("*"))]
    files += [file for encoder in encoders_of(plan).values() for file in sorted(encoder.checkpoint.files)]
    files += [plan.path(reference) for reference in _probe_files(plan)]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    lines = [f"{name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}" for name, stat in stats]
    settings = {**results.versions(), **_threads(plan)}
    return "\n".join([plan.recipe.model_dump_json(by_alias=True), *lines, *map(str, settings.items())])


def _threads(plan: Plan) -> dict[str, int]:
    """The number of threads, where a result depends on it: products of matrices are added up in its order."""
    return {"threads": torch.get_num_threads()} if plan.recipe.needs_probe else {}


def _inputs(plan: Plan) -> dict[str, Any]:
    """What pins the inputs of a plan: commits, or hashes of what was read."""

    def pinned(source: Source, weights: Checkpoint) -> dict[str, str]:
        pin = {"commit": source.commit} if source.commit else {"hash": content_hash(source.folder, weights)}
        return {"source": source.reference, **pin}

    pins = [pinned(source, own.checkpoint) for source, own in zip(plan.sources, plan.specialists, strict=True)]
    specialists = dict(zip(plan.recipe.specialists, pins, strict=True))
    for name, encoder in encoders_of(plan).items():
        specialists[name]["encoder"] = encoder_hash(encoder)
    inputs: dict[str, Any] = {"base": pinned(plan.base, plan.checkpoint), "specialists": specialists}
    if plan.trust_remote_code and (code := code_files(plan.base.folder)):
        inputs["base"]["code"] = {file.name: content_hash(file) for file in code}
    for reference in _probe_files(plan):
        inputs.setdefault("probe", {})[reference] = content_hash(plan.path(reference))
    return inputs


def _record(plan: Plan, merger: Merger, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "recipe": plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
        "inputs": dict(inputs),
        "versions": results.versions(),
        **_threads(plan),
        "tensors": dict(counts),
    }
    left_out = {"base": plan.left_out, **{specialist.name: specialist.left_out for specialist in plan.specialists}}
    left_out = {name: counts for name, counts in left_out.items() if counts}
    if left_out:
        record["left_out"] = left_out
    if merger.kept_energy:
        energies = [merger.kept_energy[name] for name in sorted(merger.kept_energy)]
        record["kept_energy"] = {"mean": sum(energies) / len(energies), "minimum": min(energies)}
    return record


def _warn_of_twins(specialists: Sequence[Specialist]) -> None:
    """Warn of specialists that are the same; called when they were read, so that their hashes are known."""
    for one, other in itertools.combinations(specialists, 2):
        if are_twins(one, other):
            logger.warning("%s and %s are the same specialist: its delta counts twice", one.name, other.name)
