"""The whole story on one page: from a recipe to a merged model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from esmerge import results
from esmerge.backbone import Backbone
from esmerge.checkpoint import CheckpointWriter
from esmerge.coefficients import layer_coefficients, normalize_weights
from esmerge.distances import random_directions
from esmerge.errors import InputError
from esmerge.merging import Coefficients, merge_dense, merge_factors, merge_low_rank
from esmerge.plan import Module, Plan, agreed, common_scaling, make_plan
from esmerge.probe import Probe, read_items, read_tensors, text_probe
from esmerge.recipe import EmbeddingSignals, Recipe
from esmerge.scores import Scratch
from esmerge.signals import EmbeddingSignals as Signals
from esmerge.signals import SignalSettings, embedding_signals
from esmerge.sources import ContentHashes, Source


def merge(recipe: Recipe, output: Path, progress: bool = True) -> dict[str, int]:
    """Merge the specialists of a recipe into a model in the new folder `output`.

    Everything that headers and configs can tell is checked before any weight is read, and nothing is left
    behind if anything fails.

    Args:
        progress: show progress bars.

    Returns:
        How many tensors were merged and how many copied.

    Raises:
        InputError: if the recipe or one of its inputs is at fault.
    """
    results.check_output(output)
    plan = make_plan(recipe)
    with ExitStack() as stack:
        folder = stack.enter_context(results.staged_folder(output))
        hashes = stack.enter_context(ContentHashes(_local_inputs(plan)))
        scratch = stack.enter_context(Scratch(folder))
        coefficients, signals = _coefficients(plan, scratch, progress)
        write = _write_adapter if recipe.output.format == "adapter" else _write_full
        counts = write(plan, coefficients, folder, progress)
        _write_coefficients(plan, coefficients, signals, folder)
        if recipe.output.signals and signals is not None:
            _write_signals(plan, coefficients, signals, folder)
        results.write_record(folder, _record(plan, coefficients, hashes, counts))
    return counts


def _coefficients(plan: Plan, scratch: Scratch, progress: bool) -> tuple[Coefficients, Signals | None]:
    settings, names = plan.recipe.coefficients, list(plan.recipe.specialists)
    if not isinstance(settings, EmbeddingSignals):
        numbers = dict.fromkeys(names, 1.0) if settings.from_ == "uniform" else settings.from_
        weights = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
        if plan.recipe.method.normalize:
            weights = normalize_weights(weights)
        return Coefficients(weights[:, None].expand(-1, plan.num_layers)), None
    assert plan.recipe.probe is not None
    dtype = getattr(torch, plan.recipe.probe.dtype) if plan.recipe.probe.dtype else None
    backbone = Backbone(plan.base.folder, dtype, plan.recipe.device)
    probe = _probe(plan, backbone)
    signals = embedding_signals(
        backbone,
        plan.specialists,
        probe,
        SignalSettings(
            scores=None if settings.granularity == "layer" else plan.recipe.space,
            projections=settings.projections,
            p=settings.p,
            distance=settings.distance,
            tokens=settings.tokens,
            seed=plan.recipe.seed,
            keep_responses=plan.recipe.output.signals,
        ),
        scratch,
        progress,
    )
    layer = None if settings.granularity == "element" else _alpha(plan, signals)
    scores = None if settings.granularity == "layer" else signals.scores
    return Coefficients(layer, scores, settings.tau), signals


def _alpha(plan: Plan, signals: Signals) -> Tensor:
    settings = plan.recipe.coefficients
    assert isinstance(settings, EmbeddingSignals)
    own = range(len(plan.specialists))
    return layer_coefficients(signals.distances, own, settings.alpha, settings.temperature)


def _probe(plan: Plan, backbone: Backbone) -> Probe:
    recipe, names = plan.recipe.probe, list(plan.recipe.specialists)
    assert recipe is not None
    if recipe.tensors is not None:
        return read_tensors(plan.path(recipe.tensors), names, recipe.batch_size, backbone.hidden_size)
    from transformers import AutoTokenizer

    assert recipe.data is not None and recipe.samples is not None and recipe.template is not None
    items = {name: read_items(plan.path(recipe.data[name]), recipe.samples, name) for name in names}
    chat_template = recipe.chat_template
    if chat_template is not None and plan.path(chat_template).is_file():
        chat_template = plan.path(chat_template).read_text(encoding="utf-8")
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.base.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise InputError(f"{plan.base.folder}: the base's tokenizer cannot be loaded: {error}") from error
    return text_probe(tokenizer, recipe.template, items, backbone.embed, recipe.batch_size, chat_template)


def _write_adapter(plan: Plan, coefficients: Coefficients, folder: Path, progress: bool) -> dict[str, int]:
    factors = plan.recipe.space == "factors"
    folded = not common_scaling(plan.specialists)
    dtype = getattr(torch, plan.recipe.output.dtype or "float32")
    total = sum(max(specialist.rank(name) for name in specialist.modules) for specialist in plan.specialists)
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for module in plan.modules:
        rank = plan.specialists[0].rank(module.name) if factors else plan.recipe.output.rank or total
        scaling = plan.specialists[0].scalings[module.name] if factors and not folded else 1.0
        ranks[module.in_base] = (rank, scaling * rank)
        shapes[_factor_name(module, "A")] = (dtype, (rank, module.shape[1]))
        shapes[_factor_name(module, "B")] = (dtype, (module.shape[0], rank))
    writer = CheckpointWriter(folder, shapes, stem="adapter_model", max_shard_bytes=1 << 62)
    for module in tqdm(plan.modules, desc="merging", unit="module", disable=not progress):
        deltas = [s.delta(module.name) if module.name in s.modules else None for s in plan.specialists]
        if factors:
            present = [delta for delta in deltas if delta is not None]
            b, a = merge_factors(coefficients, module.name, module.layer, present, folded)
        else:
            rank = ranks[module.in_base][0]
            b, a = merge_low_rank(coefficients, module.name, module.layer, module.shape, deltas, rank)
        writer.write(_factor_name(module, "A"), a)
        writer.write(_factor_name(module, "B"), b)
    writer.finish()
    config = results.adapter_config(
        ranks,
        list(plan.checkpoint),
        agreed(plan.specialists, "base_model_name_or_path") or plan.base.reference,
        plan.base.commit,
        agreed(plan.specialists, "task_type"),
    )
    results.write_json(folder / "adapter_config.json", config)
    results.copy_tokenizer(plan.base.folder, folder)
    return {"merged": len(shapes), "copied": 0}


def _factor_name(module: Module, letter: str) -> str:
    return f"base_model.model.{module.in_base}.lora_{letter}.weight"


def _write_full(plan: Plan, coefficients: Coefficients, folder: Path, progress: bool) -> dict[str, int]:
    wanted = getattr(torch, plan.recipe.output.dtype) if plan.recipe.output.dtype else None
    modules = {module.tensor: module for module in plan.modules}
    folded = not common_scaling(plan.specialists)
    shapes = {}
    for name, info in plan.checkpoint.tensors.items():
        shapes[name] = (wanted if wanted and info.dtype.is_floating_point else info.dtype, info.shape)
    writer = CheckpointWriter(folder, shapes)
    for name in tqdm(plan.checkpoint, total=len(shapes), desc="merging", unit="tensor", disable=not progress):
        tensor = plan.checkpoint.read(name)
        if name in modules:
            module = modules[name]
            deltas = [s.delta(module.name) if module.name in s.modules else None for s in plan.specialists]
            if plan.recipe.space == "factors":
                present = [delta for delta in deltas if delta is not None]
                b, a = merge_factors(coefficients, module.name, module.layer, present, folded)
                merged = b @ a * (1.0 if folded else present[0].scaling)
            else:
                merged = merge_dense(coefficients, module.name, module.layer, module.shape, deltas)
            tensor = merged.add_(tensor)
        writer.write(name, tensor)
    writer.finish()
    results.copy_model_files(plan.base.folder, folder, wanted)
    return {"merged": len(modules), "copied": len(shapes) - len(modules)}


def _write_coefficients(plan: Plan, coefficients: Coefficients, signals: Signals | None, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    if signals is not None:
        tensors |= {"alpha": _alpha(plan, signals), "distances": signals.distances, "planes": signals.planes}
    elif coefficients.layer is not None:
        tensors["alpha"] = coefficients.layer
    for name, statistics in coefficients.statistics.items():
        tensors[f"lambda.mean.{name}"] = statistics.mean
        tensors[f"lambda.std.{name}"] = statistics.std
    names = list(plan.recipe.specialists)
    file = folder / results.COEFFICIENTS_FILE
    results.write_tensors(file, tensors, {"specialists": names, "modalities": names})


def _write_signals(plan: Plan, coefficients: Coefficients, signals: Signals, folder: Path) -> None:
    settings = plan.recipe.coefficients
    assert isinstance(settings, EmbeddingSignals)
    hidden = next(iter(signals.responses.values())).shape[-1]
    tensors = {"directions": random_directions(settings.projections, hidden, plan.recipe.seed)}
    names = list(plan.recipe.specialists)
    for (modality, layer), response in signals.responses.items():
        for model, rows in zip(["base", *names], response, strict=True):
            tensors[f"pooled.{model}.{modality}.{layer}"] = rows
    for tensor, scores in signals.scores.items():
        rows_of = Coefficients(None, signals.scores, settings.tau).rows(tensor, 0)
        element = rows_of(0, scores[0].shape[0])
        for index, name in enumerate(names):
            tensors[f"score.{name}.{tensor}"] = scores[index].rows(0, scores[index].shape[0])
            tensors[f"element_coefficient.{name}.{tensor}"] = element[index]
    results.write_tensors(folder / "signals.safetensors", tensors)


def _local_inputs(plan: Plan) -> list[Path]:
    """Folders and files that no commit pins."""
    paths = [source.folder for source in [plan.base, *plan.sources] if source.commit is None]
    probe = plan.recipe.probe
    if probe is not None and isinstance(plan.recipe.coefficients, EmbeddingSignals):
        paths += [plan.path(reference) for reference in [probe.tensors, *(probe.data or {}).values()] if reference]
    return paths


def _record(plan: Plan, coefficients: Coefficients, hashes: ContentHashes, counts: dict[str, int]) -> dict[str, Any]:
    def pinned(source: Source) -> dict[str, str]:
        pin = {"commit": source.commit} if source.commit else {"hash": hashes.result(source.folder)}
        return {"source": source.reference, **pin}

    specialists = zip(plan.recipe.specialists, plan.sources, strict=True)
    inputs: dict[str, Any] = {
        "base": pinned(plan.base),
        "specialists": {name: pinned(source) for name, source in specialists},
    }
    probe = plan.recipe.probe
    if probe is not None and isinstance(plan.recipe.coefficients, EmbeddingSignals):
        for reference in [probe.tensors, *(probe.data or {}).values()]:
            if reference:
                inputs.setdefault("probe", {})[reference] = hashes.result(plan.path(reference))
    record: dict[str, Any] = {
        "recipe": plan.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
        "inputs": inputs,
        "versions": results.versions(),
        "tensors": counts,
    }
    if coefficients.kept_energy:
        energies = list(coefficients.kept_energy.values())
        record["kept_energy"] = {"mean": sum(energies) / len(energies), "minimum": min(energies)}
    return record
