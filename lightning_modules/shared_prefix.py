"""Prompts of one task begin alike (system message, user header, prefix): that part is computed once per batch.

Causal attention makes this exact, gradients included: what a token sees depends on earlier tokens only, so the keys
and values of the common beginning are the same in every row.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel

CausalLM: TypeAlias = PreTrainedModel | PeftModel

# Kinds of layers in which a mask decides about what a token sees.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class SharedPrefixBatch(NamedTuple):
    """Token sequences, split into their common beginning and the left-padded rest of each."""

    prefix_ids: Tensor  # [prefix]
    input_ids: Tensor  # [rows, rest]
    attention_mask: Tensor  # [rows, prefix + rest], zero at the padding

    def to(self, device: torch.device) -> "SharedPrefixBatch":
        return SharedPrefixBatch(*(tensor.to(device) for tensor in self))

    def position_ids(self) -> Tensor:
        """[rows, rest]: each token's distance from its sequence's own beginning, wherever the padding put that."""
        return (self.attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, len(self.prefix_ids) :]

    def without_sharing(self) -> "SharedPrefixBatch":
        """The same sequences with no common part: plain left-padded rows."""
        prefix = self.prefix_ids.tolist()
        kept = self.attention_mask[:, len(prefix) :].bool()
        rows = [prefix + ids[mask].tolist() for ids, mask in zip(self.input_ids, kept, strict=True)]
        return SharedPrefixBatch(self.prefix_ids[:0], *pad_left(rows)).to(self.input_ids.device)


def share_prefix(sequences: Sequence[Sequence[int]], shortest_rest: int = 1) -> SharedPrefixBatch:
    """Splits `sequences` after their common beginning, leaving at least `shortest_rest` tokens of each."""
    longest = max(0, min(len(sequence) for sequence in sequences) - shortest_rest)
    return split_prefix(sequences, common_beginning([sequence[:longest] for sequence in sequences]))


def split_prefix(sequences: Sequence[Sequence[int]], prefix: int) -> SharedPrefixBatch:
    """Splits `sequences` after their first `prefix` tokens, which all have in common."""
    input_ids, rest_mask = pad_left([sequence[prefix:] for sequence in sequences])
    attention_mask = torch.cat([rest_mask.new_ones(len(sequences), prefix), rest_mask], dim=1)
    return SharedPrefixBatch(torch.tensor(sequences[0][:prefix], dtype=torch.long), input_ids, attention_mask)


def common_beginning(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences have in common at their beginning."""
    # What the first and the last in lexicographic order share, everything between them shares too.
    first, last = min(map(list, sequences)), max(map(list, sequences))
    for position, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return position
    return min(len(first), len(last))


def pad_left(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [rows, longest]. Padding uses token 0: no one attends to it, so any id would do."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence)
        ids[row, start:] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start:] = 1
    return ids, mask


def last_logits(model: CausalLM, batch: SharedPrefixBatch, last: int) -> Tensor:
    """The logits of the `last` positions of every row: [rows, last, vocabulary]."""
    if not has_free_positions(model):
        return _last_logits_unshifted(model, batch, last)
    if batch.attention_mask.shape[1] > attention_span(model):
        batch = batch.without_sharing()
    logits: Tensor = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids(),
        past_key_values=prefix_cache(model, batch),
        logits_to_keep=last_positions(last, batch.input_ids.device),
    ).logits
    return logits


def _last_logits_unshifted(model: CausalLM, batch: SharedPrefixBatch, last: int) -> Tensor:
    """The same for any causal model: rows begin at the first position, and what follows a row's end changes nothing."""
    whole = batch.without_sharing()
    lengths = whole.attention_mask.sum(dim=1).tolist()
    width = max(lengths)
    ids, mask = torch.zeros_like(whole.input_ids), torch.zeros_like(whole.attention_mask)
    for row, length in enumerate(lengths):
        ids[row, :length] = whole.input_ids[row, width - length :]
        mask[row, :length] = 1
    # Of rows that are shorter than that, the first positions are what no one asks for.
    places = (torch.tensor(lengths)[:, None] + torch.arange(-last, 0)).clamp_min(0).to(ids.device)
    first = int(places.min())
    kept = torch.arange(first, width, device=ids.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    return logits.gather(1, (places - first)[:, :, None].expand(-1, -1, logits.shape[2]))


def plain_model(model: CausalLM) -> Any:
    """The LLM of transformers in a model that may have soft tokens put in, encoders or an adapter."""
    # Soft tokens are put in by something that only stands in the model's place.
    model = getattr(model, "model", model) if not isinstance(model, torch.nn.Module) else model
    plain: Any = getattr(model, "language_model", model)
    return plain.get_base_model() if isinstance(plain, PeftModel) else plain


def has_free_positions(model: CausalLM) -> bool:
    """Whether a token may stand anywhere in a row, its position and what it sees being told by `position_ids` and mask.

    Then rows can be padded on the left, and go on from what others began with. Recurrent, convolutional and linear
    layers take the tokens as they come; ALiBi counts places in the row.
    """
    plain = plain_model(model)
    config = plain.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ()
    return (
        "position_ids" in inspect.signature(plain.forward).parameters
        and not getattr(plain, "_is_stateful", False)
        and not getattr(config, "alibi", False)
        and all(kind in _ATTENTION for kind in layers)
    )


def prefix_cache(model: CausalLM, batch: SharedPrefixBatch, rows: int | None = None) -> Cache | None:
    """Keys and values of the common beginning, for as many rows as the batch has; None without a common beginning."""
    if len(batch.prefix_ids) == 0:
        return None
    cache: Cache = model(input_ids=batch.prefix_ids[None], use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(batch.input_ids) if rows is None else rows)
    return cache


def last_positions(count: int, device: torch.device) -> Tensor:
    """`logits_to_keep` for the last `count` positions.

    As the plain number it would make the model slice its hidden states; the slice is not contiguous, and multiplying
    it copies the output embedding once per row: 100 times slower on a CPU. Indices give a fresh, contiguous tensor.
    """
    return torch.arange(-count, 0, device=device)


def attention_span(model: CausalLM) -> float:
    """How many positions back every layer can see; a window counts the padding inside a row as well."""
    config = model.config.get_text_config()
    spans = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size"))
    return min((span for span in spans if span), default=float("inf"))
