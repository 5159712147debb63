"""What a merge was made from and how: the record beside a result, and what tells one merge from another."""

from collections.abc import Mapping
from typing import Any

import torch

from esmerge import results
from esmerge.checkpoint import Checkpoint
from esmerge.encoders import encoder_hash, encoders_of
from esmerge.merging import Merger
from esmerge.plan import Plan
from esmerge.remote_code import code_files
from esmerge.sources import Source, content_hash


def _probe_files(plan: Plan) -> list[str]:
    probe = plan.recipe.probe
    if probe is None or not plan.recipe.needs_probe:
        return []
    template = probe.chat_template if probe.chat_template and "{" not in probe.chat_template else None
    return [reference for reference in [probe.tensors, template, *(probe.data or {}).values()] if reference]


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


def merge_record(plan: Plan, merger: Merger, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, Any]:
    """What `esmerge.yaml` holds: the recipe, its pinned inputs, versions, and numbers of tensors."""
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
