"""Prompts with encoded items in batches of token ids: soft tokens as ids beyond every vocabulary.

The id at a placeholder's position says which soft token stands there, so prompts with items are split, padded and
shared as those of plain text are; ids become embeddings when the model runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esmerge.mllm import MllmForConditionalGeneration, MllmProcessor
from esmerge.modalities import Features

# No LLM has as many tokens.
FIRST_SOFT_ID = 1 << 32

# The items of one prompt by modality, in the order of their placeholders.
Items = Mapping[str, Sequence[str]]


class ItemFeatures:
    """What encoders take of items; made once for each item."""

    def __init__(self, processor: MllmProcessor) -> None:
        self.processor = processor
        self._made: dict[tuple[str, str], Features] = {}

    def of(self, modality: str, item: str) -> Features:
        """The features of one item, without a batch dimension."""
        if (modality, item) not in self._made:
            self._made[modality, item] = self.processor.modalities[modality].features(item)
        return self._made[modality, item]

    def count(self, modality: str, item: str) -> int:
        """How many soft tokens it becomes."""
        return self.processor.modalities[modality].soft_tokens(self.of(modality, item))

    def digest(self) -> str:
        """`xxh3:<hex>` of all that were made; it changes with whatever makes them, be it a file or another package."""
        import xxhash

        found = xxhash.xxh3_128()
        for key in sorted(self._made):
            found.update(repr(key).encode())
            for name, tensor in sorted(self._made[key].items()):
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return f"xxh3:{found.hexdigest()}"


def soft_ids(
    prompts: Sequence[Sequence[int]], items: Sequence[Items], features: ItemFeatures
) -> tuple[list[list[int]], dict[str, Features]]:
    """Token ids with soft tokens in them, and what the encoders need to make these.

    Args:
        prompts: token ids, with one placeholder for each item.
        items: of each prompt.
        features: of all items.

    Returns:
        For each prompt its ids, soft tokens counted from `FIRST_SOFT_ID` on as `soft_token_table` has them; and by
        modality the features of its items, each item once, as a batch.

    Raises:
        ValueError: if a prompt has not as many placeholders as items.
    """
    unique: dict[str, dict[str, None]] = {}
    for own in items:
        for modality, values in own.items():
            unique.setdefault(modality, {}).update(dict.fromkeys(values))
    ranges: dict[tuple[str, str], range] = {}
    start = FIRST_SOFT_ID
    for modality, distinct in unique.items():
        for item in distinct:
            ranges[modality, item] = range(start, start + features.count(modality, item))
            start = ranges[modality, item].stop
    owners = {token: modality for modality, token in features.processor.placeholder_ids.items()}
    modalities = features.processor.modalities
    batches = {m: modalities[m].collate([features.of(m, item) for item in found]) for m, found in unique.items()}
    return [_in_place(ids, own, owners, ranges) for ids, own in zip(prompts, items, strict=True)], batches


def _in_place(
    ids: Sequence[int], items: Items, owners: Mapping[int, str], ranges: Mapping[tuple[str, str], range]
) -> list[int]:
    counts = {modality: sum(owners.get(token) == modality for token in ids) for modality in owners.values()}
    for modality, count in counts.items():
        if count != len(items.get(modality, ())):
            raise ValueError(
                f"a prompt has {count} placeholders for {len(items.get(modality, ()))} items of {modality}"
            )
    queues = {modality: iter(values) for modality, values in items.items()}
    found: list[int] = []
    for token in ids:
        owner = owners.get(token)
        found.extend([token] if owner is None else ranges[owner, next(queues[owner])])
    return found


def soft_token_table(model: MllmForConditionalGeneration, features: Mapping[str, Features]) -> Tensor:
    """The soft tokens [n, hidden] of a batch, that of id `FIRST_SOFT_ID` first; gradients reach the encoders."""
    return torch.cat([model.get_modality_features(modality, **batch) for modality, batch in features.items()])


class WithSoftIds:
    """A multimodal model that takes the ids of `soft_ids`; otherwise it is called as its LLM is.

    Args:
        model: with encoders.
        table: soft tokens [n, hidden], from `soft_token_table`.
    """

    def __init__(self, model: MllmForConditionalGeneration, table: Tensor) -> None:
        self.model = model
        self.table = table
        self.config = model.config
        self.parameters = model.parameters

    def __call__(self, input_ids: Tensor, **inputs: Any) -> Any:
        """The LLM's output for ids [B, T]."""
        return self.model.language_model(inputs_embeds=self.embed(input_ids), **inputs)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The LLM's input [..., hidden] for ids of any shape [...]."""
        soft = input_ids >= FIRST_SOFT_ID
        embeds = self.model.get_input_embeddings()(input_ids.masked_fill(soft, 0))
        rows = self.table.to(embeds.device, embeds.dtype)[(input_ids - FIRST_SOFT_ID).clamp_min(0)]
        return torch.where(soft.unsqueeze(-1), rows, embeds)
