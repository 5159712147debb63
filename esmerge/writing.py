"""Merges all tensors of a plan, several at a time, and writes them where they belong."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from esmerge import results
from esmerge.checkpoint import CheckpointWriter
from esmerge.deltas import Delta, ValueDelta
from esmerge.errors import InputError
from esmerge.merging import Merger, Statistics, TensorStream, merge_factors, merge_low_rank, merged_blocks
from esmerge.plan import Plan, Target, agreed, common_scaling
from esmerge.specialists import LoraSpecialist
from esmerge.vocabulary import write_tokenizer


def write_adapter(plan: Plan, merger: Merger, folder: Path, progress: bool) -> dict[str, int]:
    """Write the merged LoRA adapter; returns the counts of tensors."""
    targets, device = plan.merged, torch.device(plan.recipe.device)
    factors = plan.lora_specialists() if plan.recipe.space == "factors" else None
    folded = factors is not None and not common_scaling(factors)
    dtype = getattr(torch, plan.recipe.output.dtype or "float32")
    rank = plan.recipe.output.rank or _sum_of_ranks(plan)
    ranks: dict[str, tuple[int, float]] = {}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for target in targets:
        own_rank = factors[0].rank(target.name) if factors else rank
        scaling = factors[0].scaling(target.name) if factors and not folded else 1.0
        ranks[_module(plan, target)] = (own_rank, scaling * own_rank)
        layout[_factor_name(plan, target, "A")] = (dtype, (own_rank, target.shape[1]))
        layout[_factor_name(plan, target, "B")] = (dtype, (target.shape[0], own_rank))
    writer = CheckpointWriter(folder, layout, stem="adapter_model", max_shard_bytes=1 << 62)

    def write(target: Target) -> None:
        if factors is not None:
            deltas = [specialist.delta(target.name, target.shape) for specialist in factors]
            module = target.name.removesuffix(".weight")
            b, a = merge_factors(merger, module, target.layer or 0, deltas, folded, device)  # type: ignore[arg-type]
            noted = [f"{module}.lora_b.weight", f"{module}.lora_a.weight"]
        else:
            own_rank = ranks[_module(plan, target)][0]
            stream = TensorStream(plan.checkpoint, target.stored, target.shape, plan.deltas(target), device)
            b, a = merge_low_rank(merger, target.name, target.layer, stream, own_rank)
            noted = [target.name]
        writer.write(_factor_name(plan, target, "A"), a)
        writer.write_rows(_factor_name(plan, target, "B"), 0, b)
        writer.complete(_factor_name(plan, target, "B"), _note(merger, noted))

    _each(targets, lambda t: _factor_name(plan, t, "B"), writer, merger, write, progress)
    config = results.adapter_config(
        ranks,
        list(plan.checkpoint),
        agreed(plan.specialists, "base_model_name_or_path") or plan.base.reference,
        plan.base.commit,
        agreed(plan.specialists, "task_type") or "CAUSAL_LM",
    )
    results.write_json(folder / "adapter_config.json", config)
    results.copy_tokenizer(plan.base.folder, folder)
    return {"merged": len(layout), "copied": 0, "own rows": 0}


def _sum_of_ranks(plan: Plan) -> int:
    adapters = [specialist for specialist in plan.specialists if isinstance(specialist, LoraSpecialist)]
    return sum(max(adapter.rank(name) for name in adapter.modules) for adapter in adapters)


def _module(plan: Plan, target: Target) -> str:
    """The module's name as the adapters have it, or as the base's checkpoint does."""
    names = {s.modules[target.name] for s in plan.specialists if target.name in s.modules}
    return names.pop() if len(names) == 1 else target.stored.removesuffix(".weight")


def _factor_name(plan: Plan, target: Target, letter: str) -> str:
    return f"base_model.model.{_module(plan, target)}.lora_{letter}.weight"


def write_full(plan: Plan, merger: Merger, folder: Path, progress: bool) -> dict[str, int]:
    """Write the merged full checkpoint; returns the counts of tensors."""
    wanted = getattr(torch, plan.recipe.output.dtype) if plan.recipe.output.dtype else None
    device = torch.device(plan.recipe.device)
    factors = plan.lora_specialists() if plan.recipe.space == "factors" else None
    folded = factors is not None and not common_scaling(factors)
    layout = {
        target.written: (wanted if wanted and target.dtype.is_floating_point else target.dtype, target.result_shape)
        for target in plan.targets
    }
    writer = CheckpointWriter(folder, layout)

    def write_rows(target: Target, start: int, rows: Tensor) -> None:
        # One sum tells whether any of them is NaN or infinite, at a fraction of what looking at each would cost.
        if rows.is_floating_point() and not rows.sum(dtype=torch.float64).isfinite():
            raise InputError(_not_finite(plan, target))
        writer.write_rows(target.written, start, rows)

    def write(target: Target) -> None:
        stream = TensorStream(plan.checkpoint, target.stored, target.shape, plan.deltas(target), device)
        noted = [target.name]
        if not target.merged:
            noted = []
            for start, stop in stream.spans:
                write_rows(target, start, plan.checkpoint.read_range(target.stored, start, stop))
        elif factors is not None:
            module = target.name.removesuffix(".weight")
            deltas = [specialist.delta(target.name, target.shape) for specialist in factors]
            b, a = merge_factors(merger, module, target.layer or 0, deltas, folded, device)  # type: ignore[arg-type]
            scaled = b if folded else b * factors[0].scaling(target.name)
            for start, stop in stream.spans:
                write_rows(target, start, stream.base(start, stop).addmm_(scaled[start:stop], a))
            noted = [f"{module}.lora_b.weight", f"{module}.lora_a.weight"]
        else:
            for start, stop, merged, base in merged_blocks(merger, target.name, target.layer, stream):
                base = stream.base(start, stop) if base is None else base
                write_rows(target, start, merged.add_(base))
        _write_own_rows(plan, target, stream, writer)
        writer.complete(target.written, _note(merger, noted))

    _each(plan.targets, lambda target: target.written, writer, merger, write, progress)
    changes: dict[str, Any] = {"dtype": str(wanted).removeprefix("torch.")} if wanted else {}
    if any(target.result_shape != target.shape for target in plan.targets):
        changes["vocab_size"] = plan.vocabulary.size
    if plan.untied:
        changes["tie_word_embeddings"] = False
    results.copy_model_files(plan.base.folder, folder, changes)
    write_tokenizer(plan.base.folder, folder, plan.vocabulary)
    merged = len(plan.merged)
    return {
        "merged": merged,
        "copied": len(plan.targets) - merged,
        "own rows": sum(len(_owners(plan, target)) for target in plan.merged),
    }


def _not_finite(plan: Plan, target: Target) -> str:
    """The sentence that names the input with NaN or infinite values behind a tensor."""
    tensors = [(plan.checkpoint, target.stored)]
    for specialist, name in zip(plan.specialists, target.changed, strict=True):
        if name:
            tensors.append((specialist.checkpoint, specialist.stored_as(name)))
    for checkpoint, name in tensors:
        if not checkpoint.read(name).isfinite().all():
            return f"{checkpoint.info(name).file}: tensor {name} has NaN or infinite values; download or save it again."
    return f"the merged {target.written} has NaN or infinite values: lower the coefficients or the method's lambda."


def _owners(plan: Plan, target: Target) -> dict[int, list[int]]:
    """Row -> the specialists that alone have it, of a tensor with one row per token."""
    if target.rows != plan.vocabulary.size or not target.merged or target.layer is not None:
        return {}
    return plan.vocabulary.owners


def _write_own_rows(plan: Plan, target: Target, stream: TensorStream, writer: CheckpointWriter) -> None:
    """Rows of tokens that the base does not have: their specialist's own, or the mean of several."""
    for row, indices in _owners(plan, target).items():
        values = []
        for index in indices:
            delta = stream.deltas[index]
            if delta is not None and row < delta.shape[0]:
                values.append(_own_row(stream, delta, row))
        if len(values) == 1:
            writer.write_rows(target.written, row, values[0])
        elif values:
            writer.write_rows(target.written, row, torch.stack([value.float() for value in values]).mean(dim=0))
        elif row >= target.shape[0]:
            writer.write_rows(target.written, row, torch.zeros((1, *target.shape[1:])))


def _own_row(stream: TensorStream, delta: Delta, row: int) -> Tensor:
    if isinstance(delta, ValueDelta):
        return delta.values(row, row + 1)
    base = stream.base(row, row + 1)
    return base + delta.rows(row, row + 1, base)


def _note(merger: Merger, names: Sequence[str]) -> dict[str, Any]:
    """What is known of merged tensors once they are written, for the journal."""
    note: dict[str, Any] = {}
    for name in names:
        statistics = merger.statistics[name]
        note[name] = [statistics.mean.tolist(), statistics.std.tolist(), merger.kept_energy.get(name)]
    return note


def _recall(merger: Merger, note: dict[str, Any] | None) -> None:
    for name, (mean, std, energy) in (note or {}).items():
        merger.statistics[name] = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in (mean, std)))
        if energy is not None:
            merger.kept_energy[name] = energy


def _each(
    targets: Sequence[Target],
    key: Callable[[Target], str],
    writer: CheckpointWriter,
    merger: Merger,
    write: Callable[[Target], None],
    progress: bool,
) -> None:
    """Write all targets that are not written yet, the largest first, on as many threads as torch would use."""
    for target in targets:
        if key(target) not in writer.pending:
            _recall(merger, writer.notes[key(target)])
    pending = [target for target in targets if key(target) in writer.pending]
    pending.sort(key=lambda target: -_bytes(target))
    bar = tqdm(
        total=sum(map(_bytes, pending)), desc="merging", unit="B", unit_scale=True, disable=not progress, smoothing=0.05
    )
    workers = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    with (
        bar,
        _single_threaded_operators(),
        ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        futures = {pool.submit(write, target): target for target in pending}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update(_bytes(futures[future]))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    writer.finish()


def _bytes(target: Target) -> int:
    count = target.dtype.itemsize
    for size in target.shape:
        count *= size
    return count


@contextmanager
def _single_threaded_operators() -> Iterator[None]:
    """Threads work on tensors of their own; torch's operators must not start more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
