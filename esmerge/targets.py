"""Each tensor of the result: where it lies in the base, and what every specialist has for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from esmerge.checkpoint import Checkpoint, TensorInfo
from esmerge.configs import FLOAT8, ties_embeddings
from esmerge.errors import InputError
from esmerge.names import layer_of, natural_order
from esmerge.sources import Source
from esmerge.specialists import FullSpecialist, LoraSpecialist, Specialist
from esmerge.specialists.full import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS, embeddings_of
from esmerge.vocabulary import Vocabulary, join_vocabularies

MERGEABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What transformers calls the output embeddings of tied models, where it is not `lm_head`.
_HEADS = {"gpt_neox": "embed_out.weight", "biogpt": "output_projection.weight"}
# Tensors with one row per token.
_PER_TOKEN = (*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS, "lm_head.bias")


@dataclass(frozen=True)
class Target:
    """A tensor of the result.

    Attributes:
        name: canonical.
        stored: its name in the base's checkpoint, where its values are merged from.
        written: its name in the result; of an adapter, that of the module's weight.
        dtype, shape: as the base has it.
        rows: of the result; more than the base's where specialists have tokens of their own.
        changed: per specialist the canonical name of the delta that it adds here; None if it adds none.
    """

    name: str
    stored: str
    written: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: int
    changed: tuple[str | None, ...]

    @property
    def layer(self) -> int | None:
        """Number of its decoder layer; None outside the layers."""
        return layer_of(self.name)

    @property
    def merged(self) -> bool:
        """Whether any specialist changes it."""
        return any(self.changed)

    @property
    def result_shape(self) -> tuple[int, ...]:
        """Its shape in the result."""
        return (self.rows, *self.shape[1:]) if self.shape else ()


def match_targets(
    base: Source, checkpoint: Checkpoint, stored: dict[str, str], specialists: Sequence[Specialist]
) -> tuple[list[Target], bool]:
    """Each tensor of the base with what the specialists add to it, and whether tied embeddings come apart.

    Args:
        stored: canonical name -> the base's tensor.

    Raises:
        InputError: if a specialist lacks a tensor of the base, has others, or has it in a shape or dtype that does not
            fit.
    """
    head, embeddings = embeddings_of(stored)
    tied = head is None and embeddings is not None
    changes = [set(specialist.names) for specialist in specialists]
    # Only where the base ties them does an adapter tie its embeddings; a full checkpoint says so itself.
    ties = [s.ties_embeddings and (tied or isinstance(s, FullSpecialist)) for s in specialists]
    # Where the base's config ties what its tensors do not, transformers believes the tensors.
    untied = not tied and embeddings is not None and ties_embeddings(base.config())
    if tied:
        for specialist in specialists:
            if isinstance(specialist, LoraSpecialist):
                specialist.tied = embeddings
        # PEFT saves the output embeddings of such adapters once more.
        changes = [c - set(OUTPUT_EMBEDDINGS) if follows else c for c, follows in zip(changes, ties, strict=True)]
        # Tied embeddings stay tied only if every specialist changes both alike.
        apart = [
            not follows and bool(c & {embeddings, *OUTPUT_EMBEDDINGS}) for follows, c in zip(ties, changes, strict=True)
        ]
        untied = any(apart)
    entries = {name: (stored[name], stored[name]) for name in stored}
    if untied and tied:
        assert embeddings is not None
        head = _HEADS.get(str(base.config().get("model_type")), "lm_head.weight")
        entries[head] = (stored[embeddings], head)
    targets = []
    for name, (source, written) in entries.items():
        info = checkpoint.info(source)
        changed = []
        for follows, names in zip(ties, changes, strict=True):
            found: str | None = name if name in names else None
            if name == head and found is None and follows and embeddings in names:
                found = embeddings
            changed.append(found)
        if info.dtype in FLOAT8 or (any(changed) and info.dtype not in MERGEABLE):
            raise _quantised(info, source, "use the base")
        rows = info.shape[0] if info.shape else 1
        targets.append(Target(name, source, written, info.dtype, info.shape, rows, tuple(changed)))
    for specialist, names in zip(specialists, changes, strict=True):
        _check_names(base, checkpoint, entries, specialist, names)
    for target in targets:
        for specialist, changed_name in zip(specialists, target.changed, strict=True):
            if changed_name:
                _check_shape(base, target, specialist, changed_name)
    # There is nothing to merge in a tensor without elements.
    nothing = (None,) * len(specialists)
    targets = [replace(target, changed=nothing) if 0 in target.shape else target for target in targets]
    return sorted(targets, key=lambda target: (target.layer is None, natural_order(target.name))), untied


def _quantised(info: TensorInfo, tensor: str, who: str) -> InputError:
    return InputError(
        f"{info.file}: tensor {tensor} is stored as {info.dtype}; quantised weights cannot be merged: {who} in "
        "bfloat16, float16 or float32."
    )


def _check_names(
    base: Source,
    checkpoint: Checkpoint,
    entries: Mapping[str, tuple[str, str]],
    specialist: Specialist,
    names: set[str],
) -> None:
    unknown = sorted(names - entries.keys(), key=natural_order)
    if unknown and specialist.stored_as(unknown[0]).endswith("lora_B.bias"):
        raise InputError(
            f"specialist {specialist.name}: {specialist.folder} has {specialist.stored_as(unknown[0])} (lora_bias), "
            f"but the base {base.reference} has no bias there to add it to: train without lora_bias, or save it "
            "without them."
        )
    if unknown:
        raise InputError(
            f"specialist {specialist.name}: {specialist.folder} has {len(unknown)} tensors that change nothing in the "
            f"base {base.reference}, e.g. {specialist.stored_as(unknown[0])}: it was trained from another base, or "
            "save it without them."
        )
    if isinstance(specialist, FullSpecialist):
        # Buffers of whole numbers, such as masks, are the base's; newer versions save fewer of them.
        known = {*names, *specialist.integers}
        missing = [
            name
            for name, (tensor, _) in entries.items()
            if checkpoint.info(tensor).dtype.is_floating_point
            and name not in known
            and not (name in OUTPUT_EMBEDDINGS and specialist.ties_embeddings)
        ]
        if missing:
            raise InputError(
                f"specialist {specialist.name}: {specialist.folder} lacks {len(missing)} tensors of the base "
                f"{base.reference}, e.g. {entries[missing[0]][0]}: it is incomplete, or of another base."
            )
        _check_integers(base, checkpoint, entries, specialist)


def _check_integers(
    base: Source, checkpoint: Checkpoint, entries: Mapping[str, tuple[str, str]], specialist: FullSpecialist
) -> None:
    """A specialist's tensors of whole numbers cannot be merged: they must be the base's, or be buffers of its own."""
    for name in specialist.integers:
        tensor = specialist.stored_as(name)
        info = specialist.checkpoint.info(tensor)
        if name not in entries:
            what = "buffers of whole numbers that the base does not have"
            specialist.left_out[what] = specialist.left_out.get(what, 0) + 1
        elif checkpoint.info(entries[name][0]).dtype.is_floating_point:
            raise _quantised(info, tensor, "save the specialist")
        elif not specialist.checkpoint.same_tensor(tensor, checkpoint, entries[name][0]):
            raise InputError(
                f"{info.file}: tensor {tensor} ({info.dtype}) is not that of the base {base.reference}, and whole "
                f"numbers cannot be merged: {specialist.name} was trained from another base."
            )


def _check_shape(base: Source, target: Target, specialist: Specialist, name: str) -> None:
    shape = specialist.shape(name)
    info = specialist.checkpoint.info(specialist.stored_as(name))
    if info.dtype not in MERGEABLE:
        raise _quantised(info, specialist.stored_as(name), "save the specialist")
    per_token = target.name in _PER_TOKEN and len(shape) == len(target.shape)
    if shape and shape != target.shape and not (per_token and shape[1:] == target.shape[1:]):
        raise InputError(
            f"specialist {specialist.name}: {specialist.folder} changes {target.stored} with shape {list(shape)}, in "
            f"the base {base.reference} it has shape {list(target.shape)}: it was trained from another base."
        )


def join_targets(
    base: Source, targets: list[Target], specialists: Sequence[Specialist]
) -> tuple[list[Target], Vocabulary]:
    """The union of the vocabularies, and the targets with as many rows as that has.

    Raises:
        InputError: if the vocabularies do not fit each other.
    """
    per_token = [target for target in targets if target.name in _PER_TOKEN]
    rows = max((target.rows for target in per_token), default=0)
    counts = []
    for index, specialist in enumerate(specialists):
        shapes = [specialist.shape(t.changed[index] or "") for t in per_token if t.changed[index]]
        counts.append(max([shape[0] for shape in shapes if shape], default=rows))
    named = [(s.name, s.folder, count) for s, count in zip(specialists, counts, strict=True)]
    vocabulary = join_vocabularies(base.folder, rows, named)
    return [replace(t, rows=vocabulary.size) if t.name in _PER_TOKEN else t for t in targets], vocabulary
