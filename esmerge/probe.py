"""Probe inputs: prompts that hold a sample of every modality, or of a specialist's own, with masks of where it is."""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError
from esmerge.modalities.modality import MissingPackageError
from esmerge.tokenizer import NO_TEMPLATE, apply_chat_template, without_added_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ProbeBatch:
    """A few probe inputs, left-padded to one length.

    Attributes:
        inputs_embeds: [B, T, H].
        attention_mask: int64 [B, T], 0 for padding.
        masks: bool [M, B, T], the positions of each modality.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    masks: Tensor


@dataclass(frozen=True)
class Probe:
    """All probe inputs in batches, and the modalities in the order of the batches' masks."""

    modalities: tuple[str, ...]
    batches: list[ProbeBatch]

    @property
    def size(self) -> int:
        """Number of probe inputs."""
        return sum(len(batch.attention_mask) for batch in self.batches)


def batched(
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    masks: Mapping[str, Tensor],
    batch_size: int,
    source: str,
    keep_end: bool = False,
) -> Probe:
    """Cut ready tensors into batches.

    Args:
        inputs_embeds: [K, T, H].
        attention_mask: [K, T].
        masks: [K, T] per modality.
        batch_size: probe inputs per batch; gradient scores depend on it.
        source: the file they are from, for messages.
        keep_end: keep what follows the last modality position of a batch.

    Raises:
        InputError: if the shapes disagree, a value is not finite, or a modality is missing in an input.
    """
    count, length = attention_mask.shape
    if not count or not length:
        raise InputError(f"{source}: the probe is empty.")
    if inputs_embeds.shape[:2] != attention_mask.shape:
        raise InputError(
            f"{source}: inputs_embeds has shape {list(inputs_embeds.shape)}, attention_mask {[count, length]}; "
            "their first two sizes must agree."
        )
    if not inputs_embeds.isfinite().all():
        raise InputError(f"{source}: inputs_embeds has NaN or infinite values.")
    for name, mask in masks.items():
        if mask.shape != attention_mask.shape:
            raise InputError(f"{source}: mask.{name} has shape {list(mask.shape)}, expected {[count, length]}.")
        empty = (~(mask.bool() & attention_mask.bool()).any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise InputError(f"{source}: probe input {empty[0]} (counted from 0) has no position of {name}.")
    stacked = torch.stack([mask.bool() for mask in masks.values()]) & attention_mask.bool()
    batches = []
    for start in range(0, count, batch_size):
        rows = slice(start, start + batch_size)
        # What stands after the last modality position cannot reach it in a causal model; what stands before
        # the first token of the longest row is padding in all of them.
        stop = length if keep_end else int(stacked[:, rows].any(dim=(0, 1)).nonzero().max()) + 1
        first = int(attention_mask[rows].bool().any(dim=0).nonzero().min())
        columns = slice(first, stop)
        batches.append(
            ProbeBatch(inputs_embeds[rows, columns], attention_mask[rows, columns].long(), stacked[:, rows, columns])
        )
    return Probe(tuple(masks), batches)


def read_tensors(
    file: Path, modalities: Sequence[str], batch_size: int, hidden_size: int, keep_end: bool = False
) -> Probe:
    """A probe from ready tensors: `inputs_embeds`, `attention_mask` and `mask.<modality>`.

    Other tensors in the file are not read. What follows the last item is left out unless `keep_end`.

    Raises:
        InputError: if a tensor is missing, or does not fit the others or the model's hidden size.
    """
    with Checkpoint.open_file(file) as tensors:
        for name in ("inputs_embeds", "attention_mask"):
            if name not in tensors:
                raise InputError(f"{file} has no tensor {name}.")
        if len(tensors.info("attention_mask").shape) != 2:
            raise InputError(
                f"{file}: attention_mask has shape {list(tensors.info('attention_mask').shape)}, "
                "expected [inputs, positions]."
            )
        present = [name.removeprefix("mask.") for name in tensors if name.startswith("mask.")]
        check_modalities(present, modalities, str(file))
        embeds = tensors.read("inputs_embeds")
        if embeds.dim() != 3 or embeds.shape[-1] != hidden_size:
            raise InputError(
                f"{file}: inputs_embeds has shape {list(embeds.shape)}, expected [inputs, positions, {hidden_size}]."
            )
        return batched(
            embeds,
            tensors.read("attention_mask"),
            {name: tensors.read(f"mask.{name}") for name in modalities},
            batch_size,
            str(file),
            keep_end,
        )


def check_modalities(present: Sequence[str], specialists: Sequence[str], source: str) -> None:
    """Raise `InputError` unless the probe has exactly the specialists' modalities."""
    for name in present:
        if name not in specialists:
            raise InputError(
                f"{source} has the modality {name}, but no specialist has that name "
                f"(specialists: {', '.join(specialists)}): name the specialist after its modality."
            )
    for name in specialists:
        if name not in present:
            raise InputError(f"{source} has no modality {name}, which the specialist {name} needs.")


def read_items(file: Path, samples: int, modality: str) -> list[str]:
    """The first `samples` non-empty lines of a text file, one item per line."""
    return list(numbered_items(file, samples, modality).values())


def numbered_items(file: Path, samples: int, modality: str) -> dict[int, str]:
    """As `read_items`, each with the number of its line."""
    try:
        # Only what editors call a line is one; spreadsheets mark the beginning of their files.
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"probe.data.{modality}: {file} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"probe.data.{modality}: {file} is no UTF-8 text file.") from error
    items = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if len(items) < samples:
        raise InputError(
            f"probe.data.{modality}: {file} has {len(items)} items, probe.samples asks for {samples}: "
            "add items or lower probe.samples."
        )
    return dict(list(items.items())[:samples])


def check_items(items: Mapping[int, str], check: Callable[[str], object], source: str) -> None:
    """Have all items checked; `InputError` names the first that is at fault, and the lines of the others.

    Args:
        items: by the number of their line.
        check: raises `InputError` if an item is at fault.
        source: the file.
    """
    faults: dict[int, str] = {}
    known: dict[str, str | None] = {}
    for line, item in items.items():
        if item not in known:
            try:
                check(item)
                known[item] = None
            except MissingPackageError:
                raise
            except InputError as error:
                known[item] = str(error)
        if (fault := known[item]) is not None:
            faults[line] = fault
    if faults:
        first, *others = faults
        shown = [str(line) for line in others[:5]] + (["..."] if len(others) > 5 else [])
        also = f" (also at fault: {', '.join(shown)})" if others else ""
        raise InputError(f"{source}, line {first}{also}: {faults[first]}")


def fill_template(template: str, items: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
    """The template with its placeholders filled, and where each modality's item begins and ends in it.

    >>> fill_template("M: {m}!", {"m": "CCO"})
    ('M: CCO!', {'m': (3, 6)})
    """
    text, spans = "", {}
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field is not None:
            spans[field] = (len(text), len(text) + len(items[field]))
            text += items[field]
    return text, spans


def check_template(template: str, modalities: Sequence[str], source: str, unknown: str) -> None:
    """Raise `InputError` unless a template has each modality's placeholder, once, and no other.

    Args:
        source: the template's field.
        unknown: what is wrong with another placeholder, and what to do.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise InputError(f"{source} is no valid template ({error}); write literal braces twice.") from error
    for field in fields:
        if field not in modalities:
            raise InputError(f"{source} has the placeholder {{{field}}}, {unknown}.")
    for name in modalities:
        if fields.count(name) != 1:
            raise InputError(f"{source} must have the placeholder {{{name}}} once, it has {fields.count(name)}.")


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    templates: Sequence[str],
    items: Sequence[Mapping[str, str]],
    chat_template: str | None = None,
    keep_end: bool = False,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Each probe input as token ids [T] and masks [T] per modality.

    It is cut after the last modality position, whose embeddings do not depend on what follows, unless `keep_end`.

    The prompt is one user turn of the chat template, or all there is where that is `none`; templates for it take turns.
    A token belongs to a modality if its characters, as the tokenizer's offsets give them, overlap the item's: no
    pattern is ever searched for in token ids.

    Raises:
        InputError: if there is no chat template, or it changes the prompt.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{tokenizer.name_or_path} has no fast tokenizer, whose offsets the probe needs.")
    if not (chat_template or tokenizer.chat_template):
        raise InputError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: set probe.chat_template to a "
            "Jinja template or a file that holds one, or to none for prompts as they are."
        )
    prompts = []
    before = _rendered(tokenizer, _MARK, chat_template).partition(_MARK)[0]
    for row, template in zip(items, cycle(templates), strict=False):
        content, spans = fill_template(template, row)
        text = _rendered(tokenizer, content, chat_template)
        offset = len(before)
        if not text.startswith(before + content):
            # Templates commonly strip a turn's outer white space.
            offset -= len(content) - len(content.lstrip())
            if not text.startswith(before + content.strip()):
                raise InputError("the chat template changes the prompt's text, so its modalities cannot be located.")
        encoded = tokenizer(text, add_special_tokens=chat_template == NO_TEMPLATE, return_offsets_mapping=True)
        starts, ends = torch.tensor(encoded["offset_mapping"]).unbind(dim=1)
        masks = {}
        for name, (start, stop) in spans.items():
            masks[name] = (starts < stop + offset) & (ends > start + offset) & (ends > starts)
        length = max((int(mask.nonzero().max()) + 1 for mask in masks.values() if mask.any()), default=0)
        if keep_end:
            # An answer would begin there.
            length = len(without_added_end(encoded["input_ids"], text, tokenizer))
        ids = torch.tensor(encoded["input_ids"][:length])
        prompts.append((ids, {name: mask[:length] for name, mask in masks.items()}))
    return prompts


# Stands for the prompt where its place in the chat template is looked up: a private character, in no one's text.
_MARK = "\ue000"


def _rendered(tokenizer: "PreTrainedTokenizerBase", content: str, chat_template: str | None) -> str:
    if chat_template == NO_TEMPLATE:
        return content
    try:
        return apply_chat_template(tokenizer, [{"role": "user", "content": content}], chat_template)
    except Exception as error:  # whatever a template raises: Jinja's errors and Python's
        where = "probe.chat_template" if chat_template else f"the chat template of {tokenizer.name_or_path}"
        raise InputError(f"{where} cannot be used as a Jinja template: {error}") from error


def left_padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows [T_k] stacked to [K, max T], zeros to the left."""
    length = max(len(row) for row in rows)
    return torch.stack([torch.cat([row.new_zeros(length - len(row)), row]) for row in rows])


def text_probe(
    tokenizer: "PreTrainedTokenizerBase",
    templates: Sequence[str],
    data: Mapping[str, Sequence[str]],
    embed: Callable[[Tensor], Tensor],
    batch_size: int = 2,
    chat_template: str | None = None,
    soft_tokens: Mapping[str, Sequence[Tensor]] | None = None,
    keep_end: bool = False,
) -> Probe:
    """A probe from items through the tokenizer's chat template.

    Args:
        templates: each with one placeholder for every modality of `data`; they take turns.
        data: the items of each modality, equally many.
        embed: token ids [K, T] -> input embeddings [K, T, H].
        batch_size: probe inputs per batch (2 in the paper's code); gradient scores depend on it.
        chat_template: instead of the tokenizer's own; `none` for prompts as they are.
        soft_tokens: of the items of modalities with an encoder, [n_k, H] each; their items are then n_k placeholder
            tokens.
        keep_end: keep what follows the last item, up to where an answer would begin.
    """
    soft_tokens = soft_tokens or {}
    rows = [dict(zip(data, row, strict=True)) for row in zip(*data.values(), strict=True)]
    prompts = tokenize(tokenizer, templates, rows, chat_template, keep_end)
    parts = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        ids = left_padded([ids for ids, _ in part])
        masks = {name: left_padded([row[name] for _, row in part]) for name in data}
        attention = left_padded([torch.ones_like(ids) for ids, _ in part])
        for name in soft_tokens:
            # A placeholder's own embedding is never used, and need not exist.
            ids = ids.masked_fill(masks[name], 0)
        parts.append((ids, attention, masks))
    flat = torch.cat([ids.flatten() for ids, _, _ in parts])
    embedded = embed(flat[None])[0].split([ids.numel() for ids, _, _ in parts])
    batches: list[ProbeBatch] = []
    given = {name: iter(items) for name, items in soft_tokens.items()}
    for vectors, (ids, attention, masks) in zip(embedded, parts, strict=True):
        inputs_embeds = vectors.view(*ids.shape, -1)
        for name, items in given.items():
            tokens = torch.cat(list(islice(items, len(ids)))).to(inputs_embeds)
            if len(tokens) != int(masks[name].sum()):
                raise InputError(
                    f"the prompt has {int(masks[name].sum())} positions for {name}, its encoder makes {len(tokens)} "
                    "soft tokens: its placeholder must be one token of the tokenizer."
                )
            inputs_embeds = inputs_embeds.masked_scatter(masks[name].unsqueeze(-1).to(tokens.device), tokens)
        source = "probe inputs made from probe.data"
        batches += batched(inputs_embeds, attention, masks, batch_size, source, keep_end).batches
    return Probe(tuple(data), batches)
