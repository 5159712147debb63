"""Merges all tensors of a plan, several at a time, and writes them where they belong."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from esmerge import results
from esmerge.checkpoint import PARTIAL_FILES, Checkpoint, CheckpointWriter
from esmerge.deltas import Delta, LoraDelta, ValueDelta, is_finite
from esmerge.encoders import (
    LLM_PREFIX,
    Layout,
    copy_encoders,
    encoders_layout,
    write_mllm_files,
    write_modalities,
)
from esmerge.errors import InputError
from esmerge.hub import is_repo_id
from esmerge.memory import MemoryBudget, available_memory
from esmerge.merging import (
    Merger,
    Statistics,
    TensorStream,
    merge_factors,
    merge_low_rank,
    merged_blocks,
    summed_blocks,
)
from esmerge.plan import Plan
from esmerge.scores import BLOCK_ELEMENTS, row_blocks
from esmerge.sources import absolute, is_on_hub
from esmerge.specialists import LoraSpecialist, Specialist
from esmerge.targets import Target
from esmerge.vocabulary import write_tokenizer
from esmerge.workers import can_fork, each

logger = logging.getLogger(__name__)

# With several outputs, what is read of a tensor of up to this size over all inputs is kept until all have it.
_REMEMBERED_BYTES = 2 << 30

Observe = Callable[[str, Tensor, Sequence[Tensor]], None]


class Output:
    """One result being written: the tensors of a plan, merged in one way, into one folder.

    Args:
        plan: what is merged.
        merger: how.
        folder: an existing folder; what a killed run left there is kept.
        observe: called with each tensor's name, rows of its merged delta and of all deltas, for statistics.
    """

    targets: list[Target]
    writer: CheckpointWriter
    # Whether a target is so little work that threads would mostly wait for the interpreter.
    is_light = False

    def __init__(self, plan: Plan, merger: Merger, folder: Path, observe: Observe | None = None) -> None:
        self.plan, self.merger, self.folder = plan, merger, folder
        self.device = torch.device(plan.recipe.device)
        self.factors = plan.lora_specialists() if plan.recipe.space == "factors" else None
        self.folded = self.factors is not None and not _common_scaling(self.factors)
        self.observe = observe

    def key(self, target: Target) -> str:
        """The tensor whose completion says that a target is done."""
        raise NotImplementedError

    def write(self, target: Target, stream: TensorStream) -> None:
        """Merge a target and write it."""
        raise NotImplementedError

    def finish(self) -> dict[str, int]:
        """Finish the weights, write what belongs beside them, and return the counts of tensors."""
        raise NotImplementedError

    def recall(self, target: Target) -> bool:
        """Whether a target was written by an earlier run; its statistics are then taken over."""
        if self.key(target) in self.writer.pending:
            return False
        for name, (mean, std, energy) in (self.writer.notes[self.key(target)] or {}).items():
            self.merger.statistics[name] = Statistics(*(torch.tensor(v, dtype=torch.float64) for v in (mean, std)))
            if energy is not None:
                self.merger.kept_energy[name] = energy
        return True

    def _note(self, *names: str) -> dict[str, Any]:
        """What is known of merged tensors once they are written, for the journal."""
        note: dict[str, Any] = {}
        for name in names:
            statistics = self.merger.statistics[name]
            note[name] = [statistics.mean.tolist(), statistics.std.tolist(), self.merger.kept_energy.get(name)]
        return note

    def _merged_factors(self, target: Target, stream: TensorStream) -> tuple[Tensor, Tensor, float]:
        """B, A and their scaling, of a target merged in the space of factors."""
        deltas = [delta for delta in stream.deltas if isinstance(delta, LoraDelta)]
        module = target.name.removesuffix(".weight")
        b, a = merge_factors(self.merger, module, target.layer, deltas, self.folded, self.device)
        return b, a, 1.0 if self.folded else deltas[0].scaling

    def _factor_notes(self, target: Target) -> dict[str, Any]:
        module = target.name.removesuffix(".weight")
        return self._note(f"{module}.lora_b.weight", f"{module}.lora_a.weight")

    def _write_rows(self, target: Target, key: str, start: int, rows: Tensor) -> None:
        """Write rows of a tensor of the result; `InputError` if they are NaN or infinite, or become so in its dtype."""
        dtype = self.writer.places[key].dtype
        if dtype == torch.float16:
            data = rows.to(dtype)
            if not is_finite(data):
                if is_finite(rows):
                    raise InputError(
                        f"{key} has values up to {float(rows.abs().max()):.3g}, which float16 cannot hold; "
                        "set output.dtype to bfloat16 or float32."
                    )
                raise InputError(_not_finite(self.plan, target))
            rows = data
        elif rows.is_floating_point() and not is_finite(rows):
            raise InputError(_not_finite(self.plan, target))
        self.writer.write_rows(key, start, rows)

    def _show(self, target: Target, stream: TensorStream, start: int, stop: int, merged: Tensor) -> None:
        if self.observe is None:
            return
        # A method that takes whole tensors gives a whole one; deltas are kept in blocks.
        for first, last in stream.spans:
            if start <= first and last <= stop:
                part = merged[first - start : last - start] if merged.dim() else merged
                self.observe(target.name, part, stream.kept_block(first, last))


class AdapterOutput(Output):
    """A LoRA adapter as PEFT saves them."""

    def __init__(self, plan: Plan, merger: Merger, folder: Path, observe: Observe | None = None) -> None:
        super().__init__(plan, merger, folder, observe)
        self.targets = plan.merged
        dtype = getattr(torch, plan.recipe.output.dtype or "float32")
        rank = plan.recipe.output.rank or _sum_of_ranks(plan)
        self._ranks: dict[str, tuple[int, float]] = {}
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for target in self.targets:
            own_rank = self.factors[0].rank(target.name) if self.factors else rank
            scaling = self.factors[0].scaling(target.name) if self.factors and not self.folded else 1.0
            self._ranks[self._module(target)] = (own_rank, scaling * own_rank)
            layout[self._factor(target, "A")] = (dtype, (own_rank, target.shape[1]))
            layout[self._factor(target, "B")] = (dtype, (target.shape[0], own_rank))
        elements = sum(math.prod(shape) for _, shape in layout.values())
        self.is_light = self.factors is not None and elements <= len(layout) * BLOCK_ELEMENTS
        self.writer = CheckpointWriter(folder, layout, stem="adapter_model", max_shard_bytes=1 << 62)

    def key(self, target: Target) -> str:
        return self._factor(target, "B")

    def _module(self, target: Target) -> str:
        return target.written.removesuffix(".weight")

    def _factor(self, target: Target, letter: str) -> str:
        return f"base_model.model.{self._module(target)}.lora_{letter}.weight"

    def write(self, target: Target, stream: TensorStream) -> None:
        if self.factors is not None:
            stream.note_factors()
            b, a, scaling = self._merged_factors(target, stream)
            note = self._factor_notes(target)
        else:
            rank, scaling = self._ranks[self._module(target)][0], 1.0
            b, a = merge_low_rank(self.merger, target.name, target.layer, stream, rank)
            note = self._note(target.name)
        if self.observe is not None:
            for start, stop in stream.spans:
                self._show(target, stream, start, stop, b[start:stop] @ a * scaling)
        for letter, factor in (("A", a), ("B", b)):
            self._write_rows(target, self._factor(target, letter), 0, factor)
            self.writer.complete(self._factor(target, letter), note if letter == "B" else None)

    def finish(self) -> dict[str, int]:
        self.writer.finish(keep_journal=True)
        config = results.adapter_config(
            self._ranks,
            list(self.plan.checkpoint),
            _base_name(self.plan),
            self.plan.base.commit,
            _agreed(self.plan.specialists, "task_type") or "CAUSAL_LM",
        )
        results.write_json(self.folder / "adapter_config.json", config)
        results.copy_tokenizer(self.plan.base.folder, self.folder, self.plan.trust_remote_code)
        write_tokenizer(self.folder, self.plan.vocabulary)
        encoders = write_modalities(self.plan, self.folder)
        return {"merged": len(self.targets), "copied": 0, "own rows": 0, "encoders": encoders}


def _sum_of_ranks(plan: Plan) -> int:
    adapters = [specialist for specialist in plan.specialists if isinstance(specialist, LoraSpecialist)]
    return sum(max((adapter.rank(name) for name in adapter.modules), default=0) for adapter in adapters)


def _common_scaling(specialists: Sequence[LoraSpecialist]) -> bool:
    """Whether all specialists scale every module alike, so that their B factors compare as they are."""
    first = specialists[0]
    return all(other.scaling(name) == first.scaling(name) for other in specialists[1:] for name in first.modules)


def _base_name(plan: Plan) -> str:
    """What the result calls its base: a repository, where recipe or adapters name one, or the folder it was read from.

    It does not depend on the current folder.
    """
    if plan.base.commit:
        # It is one of this very repository; others may know the base by another name.
        return plan.base.reference
    named = _agreed(plan.specialists, "base_model_name_or_path")
    # Adapters also name a folder of the machine that trained them, or one relative to where that was done.
    folder = absolute(plan.recipe.folder)
    if named and is_repo_id(named) and all(is_on_hub(named, place) for place in (folder, *folder.parents)):
        return named
    return str(absolute(plan.base.folder))


def _agreed(specialists: Sequence[Specialist], field: str) -> str | None:
    """What all specialists' configs say in a field, or None if they differ or are silent."""
    values = {specialist.config.get(field) for specialist in specialists}
    return values.pop() if len(values) == 1 else None


class FullOutput(Output):
    """A full checkpoint as transformers saves them."""

    def __init__(self, plan: Plan, merger: Merger, folder: Path, observe: Observe | None = None) -> None:
        super().__init__(plan, merger, folder, observe)
        self.targets = plan.targets
        self._prefix = _prefix(plan)
        self.writer = CheckpointWriter(folder, _full_layout(plan))

    def key(self, target: Target) -> str:
        return self._prefix + target.written

    def write(self, target: Target, stream: TensorStream) -> None:
        note: dict[str, Any] = {}
        if not target.merged:
            for start, stop in stream.spans:
                rows = self.plan.checkpoint.read_range(target.stored, start, stop)
                self._write_rows(target, self.key(target), start, rows)
        elif self.factors is not None:
            stream.note_factors()
            b, a, scaling = self._merged_factors(target, stream)
            for start, stop in stream.spans:
                merged = b[start:stop] @ a * scaling
                self._show(target, stream, start, stop, merged)
                self._write_rows(target, self.key(target), start, merged.add_(stream.base(start, stop)))
            note = self._factor_notes(target)
        elif (summed := summed_blocks(self.merger, target.name, target.layer, stream)) is not None:
            for start, stop, rows in summed:
                if self.observe is not None:
                    self._show(target, stream, start, stop, rows - stream.base(start, stop))
                self._write_rows(target, self.key(target), start, rows)
            note = self._note(target.name)
        else:
            for start, stop, merged, base in merged_blocks(self.merger, target.name, target.layer, stream):
                self._show(target, stream, start, stop, merged)
                rows = merged.add_(stream.base(start, stop) if base is None else base)
                self._write_rows(target, self.key(target), start, rows)
            note = self._note(target.name)
        for row, values in _own_rows(self.plan, target, stream):
            self._write_rows(target, self.key(target), row, values)
        self.writer.complete(self.key(target), note)

    def finish(self) -> dict[str, int]:
        plan = self.plan
        encoders = copy_encoders(plan, self.writer)
        self.writer.finish(keep_journal=True)
        dtype = plan.recipe.output.dtype
        changes: dict[str, Any] = {"dtype": dtype} if dtype else {}
        if any(target.result_shape != target.shape for target in plan.targets):
            changes["vocab_size"] = plan.vocabulary.size
        if plan.untied:
            changes["tie_word_embeddings"] = False
        results.copy_model_files(plan.base.folder, self.folder, changes, plan.trust_remote_code)
        write_tokenizer(self.folder, plan.vocabulary)
        if plan.is_multimodal:
            write_mllm_files(plan, self.folder)
        else:
            write_modalities(plan, self.folder)
        merged = len(plan.merged)
        own_rows = sum(len(_owners(plan, target)) for target in plan.merged)
        return {"merged": merged, "copied": len(plan.targets) - merged, "own rows": own_rows, "encoders": encoders}


def _prefix(plan: Plan) -> str:
    """What names in a full checkpoint begin with: around the LLM of a multimodal model there is one more module."""
    return LLM_PREFIX if plan.is_multimodal else ""


def _full_layout(plan: Plan) -> Layout:
    """The tensors of a full checkpoint."""
    dtype = getattr(torch, plan.recipe.output.dtype) if plan.recipe.output.dtype else None
    prefix = _prefix(plan)
    own = {
        prefix + target.written: (
            dtype if dtype and target.dtype.is_floating_point else target.dtype,
            target.result_shape,
        )
        for target in plan.targets
    }
    return own | encoders_layout(plan)


def full_bytes(plan: Plan) -> int:
    """How large a full checkpoint is."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in _full_layout(plan).values())


# A target, and the outputs that want it.
_Pending = tuple[Target, Sequence[Output]]


# From so many bytes of the result on, forking costs less than it saves.
FORKED_BYTES = 256 << 20


@dataclass(frozen=True)
class _Done:
    """What a forked process knows once it has written a target.

    Attributes:
        changing: indices of specialists that changed something so far.
        notes: by name of the tensors that it completed.
        hashes: of the tensors that were read, as far as they were read whole and in order.
    """

    changing: set[int]
    notes: dict[str, Any]
    hashes: list[bytes | None]


def make_output(plan: Plan, merger: Merger, folder: Path, observe: Observe | None = None) -> Output:
    """The output that the plan's recipe asks for."""
    kind = AdapterOutput if plan.recipe.output.format == "adapter" else FullOutput
    return kind(plan, merger, folder, observe)


def write_all(plan: Plan, outputs: Sequence[Output], progress: bool) -> None:
    """Merge and write all targets into all outputs, the largest first, as many at a time as torch would use threads.

    Each tensor is read once, whatever the number of outputs, unless its inputs together are larger than 2 GiB.
    """
    pending = [(target, [output for output in outputs if not output.recall(target)]) for target in outputs[0].targets]
    groups = sorted(_sharing([(t, o) for t, o in pending if o]), key=lambda group: -_bytes(group))

    device, changing = torch.device(plan.recipe.device), set[int]()
    several = len(outputs) > 1

    def write(number: int) -> None:
        group = groups[number]
        if len(group) == 1:
            write_one(*group[0])
            return
        merger = group[0][1][0].merger  # of the only output
        # Their matcher is there until the last of them is merged.
        needed = max(merger.matcher_memory(target.name) for target, _ in group)
        with budget.room(needed), merger.sharing_matchers():
            for own in group:
                write_one(*own, has_room=True)

    def write_one(target: Target, wanting: Sequence[Output], has_room: bool = False) -> None:
        deltas = plan.deltas(target)
        stream = TensorStream(plan.checkpoint, target.stored, target.shape, deltas, device, several, changing)
        with ExitStack() as stack:
            if several and sum(c.info(name).nbytes for c, name in _inputs(plan, target)) <= _REMEMBERED_BYTES:
                for checkpoint, name in _inputs(plan, target):
                    stack.enter_context(checkpoint.remembering(name))
            if target.merged and not has_room:
                needed = max(output.merger.memory(target.name, stream) for output in wanting)
                stack.enter_context(budget.room(needed))
            for output in wanting:
                try:
                    output.write(target, stream)
                except (ValueError, torch.linalg.LinAlgError) as error:
                    # Methods that look for thresholds or singular values find none among values that are no numbers.
                    if (bad := _bad_input(plan, target)) is not None:
                        raise InputError(bad) from error
                    raise

    def write_and_tell(number: int) -> _Done:
        (output,) = outputs
        before = set(output.writer.pending)
        write(number)
        notes = {name: output.writer.notes[name] for name in before - output.writer.pending}
        return _Done(changing, notes, [checkpoint.finished_hash(name) for checkpoint, name in inputs_of(number)])

    def inputs_of(number: int) -> list[tuple[Checkpoint, str]]:
        return [own for target, _ in groups[number] for own in _inputs(plan, target)]

    def take_over(number: int, done: _Done) -> None:
        (output,) = outputs
        changing.update(done.changing)
        for (checkpoint, name), digest in zip(inputs_of(number), done.hashes, strict=True):
            checkpoint.adopt_hash(name, digest)
        output.writer.adopt(done.notes)
        for target, _ in groups[number]:
            output.recall(target)

    _keep_freed_memory()
    workers = max(1, min(torch.get_num_threads(), os.cpu_count() or 1))
    if all(output.is_light for output in outputs):
        workers = 1
    total = sum(map(_bytes, groups))
    # Of several outputs, what is read is shared and statistics are taken: that stays in one process.
    single = len(outputs) == 1 and outputs[0].observe is None
    forked = workers > 1 and single and total >= FORKED_BYTES and not PARTIAL_FILES and can_fork(device)
    # Half of it, as some is not given back at once.
    budget = MemoryBudget(available_memory(device) // 2, forked)
    for output in outputs:
        output.writer.flushes = not forked
    with (
        tqdm(total=total, desc="merging", unit="B", unit_scale=True, disable=not progress) as bar,
        single_threaded_operators(),
    ):
        for number, done in each(write_and_tell if forked else write, len(groups), workers, forked):
            if done is not None:
                take_over(number, done)
            bar.update(_bytes(groups[number]))
    if sum(map(len, groups)) == len(outputs[0].targets):
        for index, specialist in enumerate(plan.specialists):
            if index not in changing:
                logger.warning("specialist %s is identical to the base: its delta is zero everywhere", specialist.name)


def _keep_freed_memory() -> None:
    """Have glibc keep what blocks of rows leave behind for the next ones, instead of giving it back to the system.

    It learns from the largest block freed so far what is worth keeping; this one is never touched. Without it each
    block's pages are made anew, which takes as long as reading them.
    """
    torch.empty(30 << 20, dtype=torch.uint8)


def _not_finite(plan: Plan, target: Target) -> str:
    """The sentence that names the input with NaN or infinite values behind a tensor."""
    if (bad := _bad_input(plan, target)) is not None:
        return bad
    return f"the merged {target.written} has NaN or infinite values: lower the coefficients or the method's lambda."


def _inputs(plan: Plan, target: Target) -> list[tuple[Checkpoint, str]]:
    """The stored tensors that a target is merged from: the base's, and one of each specialist that changes it."""
    tensors = [(plan.checkpoint, target.stored)]
    for specialist, name in zip(plan.specialists, target.changed, strict=True):
        if name:
            tensors.append((specialist.checkpoint, specialist.stored_as(name)))
    return tensors


def _bad_input(plan: Plan, target: Target) -> str | None:
    for checkpoint, name in _inputs(plan, target):
        for start, stop in row_blocks(checkpoint.info(name).shape):
            if not is_finite(checkpoint.read_range(name, start, stop)):
                file = checkpoint.info(name).file
                return f"{file}: tensor {name} has NaN or infinite values; download or save it again."
    return None


def _owners(plan: Plan, target: Target) -> dict[int, list[int]]:
    """Row -> the specialists that alone have it, of a tensor with one row per token."""
    if target.rows != plan.vocabulary.size or not target.merged or target.layer is not None:
        return {}
    return plan.vocabulary.owners


def _own_rows(plan: Plan, target: Target, stream: TensorStream) -> Iterator[tuple[int, Tensor]]:
    """Rows of tokens that the base does not have: their specialist's own, or the mean of several."""
    for row, indices in _owners(plan, target).items():
        values = []
        for index in indices:
            delta = stream.deltas[index]
            if delta is not None and row < delta.shape[0]:
                values.append(_own_row(stream, delta, row))
        if len(values) == 1:
            yield row, values[0]
        elif values:
            yield row, torch.stack([value.float() for value in values]).mean(dim=0)
        elif row >= target.shape[0]:
            yield row, torch.zeros((1, *target.shape[1:]))


def _own_row(stream: TensorStream, delta: Delta, row: int) -> Tensor:
    if isinstance(delta, ValueDelta):
        return delta.values(row, row + 1).to(stream.device)
    known = row < stream.shape[0]
    base = stream.base(row, row + 1) if known else torch.zeros((1, *stream.shape[1:]), device=stream.device)
    return base + stream.delta_rows(delta, row, row + 1, base)


def _sharing(pending: Sequence[_Pending]) -> list[list[_Pending]]:
    """What can share a matcher together, if there is one output: of several, matchers together would be large."""
    if len({id(output) for _, wanting in pending for output in wanting}) != 1:
        return [[own] for own in pending]
    by_name = {own[0].name: own for own in pending}
    [output], *_ = (wanting for _, wanting in pending)
    return [[by_name[name] for name in group] for group in output.merger.sharing_groups(by_name)]


def _bytes(group: Sequence[_Pending]) -> int:
    return sum(target.dtype.itemsize * math.prod(target.shape) for target, _ in group)


@contextmanager
def single_threaded_operators() -> Iterator[None]:
    """Threads work on tensors of their own; torch's operators must not start more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
