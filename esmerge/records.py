"""What a merge was made from and how: the record beside a result, and what tells one merge from another."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from esmerge import results
from esmerge.checkpoint import Checkpoint, weights_stem
from esmerge.encoders import encoder_hash, encoders_of
from esmerge.errors import InputError
from esmerge.merging import Merger
from esmerge.modalities.registry import MODALITIES_FOLDER, WEIGHTS_STEM
from esmerge.plan import Plan
from esmerge.recipe import Recipe
from esmerge.remote_code import code_files
from esmerge.sources import Source, checkpoint_hash, content_hash, located


def _probe_files(plan: Plan) -> list[str]:
    probe = plan.recipe.probe
    if probe is None or not plan.recipe.needs_probe:
        return []
    files = [probe.tensors, probe.chat_template_file, *(probe.data or {}).values()]
    return [reference for reference in files if reference]


def fingerprint(plan: Plan) -> str:
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


def pinned_inputs(plan: Plan) -> dict[str, Any]:
    """What pins the inputs of a plan: commits, or hashes of what was read."""

    def pinned(source: Source, weights: Checkpoint) -> dict[str, str]:
        if source.commit:
            return {"source": source.reference, "commit": source.commit}
        where = located(source.reference, plan.recipe.folder)
        return {"source": where, "hash": content_hash(source.folder, weights)}

    pins = [pinned(source, own.checkpoint) for source, own in zip(plan.sources, plan.specialists, strict=True)]
    specialists = dict(zip(plan.recipe.specialists, pins, strict=True))
    for name, encoder in encoders_of(plan).items():
        specialists[name]["encoder"] = encoder_hash(encoder)
    inputs: dict[str, Any] = {"base": pinned(plan.base, plan.checkpoint), "specialists": specialists}
    if plan.trust_remote_code and (code := code_files(plan.base.folder)):
        inputs["base"]["code"] = {file.name: content_hash(file) for file in code}
    for reference in _probe_files(plan):
        inputs.setdefault("probe", {})[located(reference, plan.recipe.folder)] = content_hash(plan.path(reference))
    return inputs


def model_hashes(folder: Path) -> tuple[str, str]:
    """`xxh3:<hex>` of weights, configuration, tokenizer and encoders, and of weights and encoders alone.

    Neither is of cards, results or records beside them; the second stays when a configuration names another base.
    """
    with Checkpoint.open(folder, weights_stem(folder)) as checkpoint:
        whole, weights = content_hash(folder, checkpoint), f"xxh3:{checkpoint.content_hash()}"
    hashes: list[str] = []
    for modality in sorted((folder / MODALITIES_FOLDER).glob("*")):
        has_weights = any(modality.glob(f"{WEIGHTS_STEM}*.safetensors"))
        own = checkpoint_hash(modality, WEIGHTS_STEM) if has_weights else content_hash(modality)
        others = sorted(file for file in modality.glob("*.safetensors") if not file.name.startswith(WEIGHTS_STEM))
        hashes += [modality.name, own, *map(content_hash, others)]
    return hash_of_parts([whole, *hashes]), hash_of_parts([weights, *hashes])


def hash_of_parts(hashes: Sequence[str]) -> str:
    """One of the `model_hashes` of a model whose weights, and whose modalities' names and weights, have these."""
    import xxhash

    return f"xxh3:{xxhash.xxh3_128_hexdigest(json.dumps(list(hashes)).encode())}"


def is_recorded_base(base: Mapping[str, Any], recorded: Mapping[str, Any]) -> bool:
    """Whether a base is the one that a merge's record pins, as far as both tell.

    Args:
        base: its `hash`, one of the `model_hashes`, and `commit`, if it has one.
        recorded: `inputs.base` of the record.
    """
    if recorded.get("hash") and base.get("hash"):
        return bool(base["hash"] == hash_of_parts([recorded["hash"]]))
    return None in (base.get("commit"), recorded.get("commit")) or base["commit"] == recorded["commit"]


def check_pins(plan: Plan) -> None:
    """Read the inputs of a recipe that is a merge's record, and find out whether they are still what they were.

    Raises:
        InputError: if one of them is not.
    """
    pins = plan.recipe.pins
    if pins is None:
        return
    found = pinned_inputs(plan)

    def check(what: str, recorded: Any, now: Any) -> None:
        if recorded != now:
            raise InputError(
                f"{what} is not what it was when {pins.record} was written: bring that back, or take a copy of the "
                "record without its section inputs to merge what is there now."
            )

    for name, now in {"": found["base"], **found["specialists"]}.items():
        recorded = pins.inputs["specialists"].get(name) if name else pins.inputs.get("base")
        if recorded is None:
            continue
        field = f"specialists.{name}" if name else "base"
        check(f"{field}: {now['source']}", *([pin.get("commit"), pin.get("hash")] for pin in (recorded, now)))
        check(f"{field}: the encoder", recorded.get("encoder"), now.get("encoder"))
        check(f"{field}: the code in {now['source']}", recorded.get("code", now.get("code")), now.get("code"))
    files = {located(file, plan.recipe.folder): pin for file, pin in pins.inputs["probe"].items()}
    for file, now in found.get("probe", {}).items():
        check(f"probe: {file}", files.get(file, now), now)


def _located(recipe: Recipe) -> Recipe:
    """The recipe with paths that hold wherever it lies."""

    def locate(reference: str, _: str) -> str:
        return located(reference, recipe.folder)

    return recipe.with_references(locate, locate)


def merge_record(plan: Plan, merger: Merger, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """What `esmerge.yaml` holds: the recipe, its pinned inputs, versions, and numbers of tensors."""
    recipe = _located(plan.recipe).model_dump(mode="json", by_alias=True, exclude_none=True)
    # With the defaults of this version, which need not be those of another.
    recipe["method"] = {
        "name": plan.recipe.method.name,
        **plan.recipe.method.resolved.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
    record: dict[str, Any] = {
        "recipe": recipe,
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
