"""Prompt and answer pairs as batches: lengths kept together, the loss on the answers only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from esmerge.mllm import MllmProcessor
from esmerge.modalities import Features
from lightning_modules.shared_prefix import SharedPrefixBatch, share_prefix
from lightning_modules.soft_tokens import ItemFeatures, Items, soft_ids

IGNORED_LABEL = -100  # what torch's cross_entropy leaves out by default


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and the answer to learn, as token ids.

    Attributes:
        items: that soft tokens are made of; the prompt has one placeholder for each.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    items: Items = field(default_factory=dict)


class AnswerBatch(NamedTuple):
    """Prompts with answers, and what each of the last `labels.shape[1]` positions is to predict."""

    tokens: SharedPrefixBatch
    labels: Tensor  # [rows, longest answer], IGNORED_LABEL where the position belongs to the prompt
    features: dict[str, Features] | None = None  # by modality, of the items; the prompts' ids are then soft ids


def collate_answers(examples: Sequence[TokenizedExample], features: ItemFeatures | None = None) -> AnswerBatch:
    """Left-padded, so that all answers end in the last column and only a few logits per row are ever needed.

    Args:
        features: of the examples' items; None if they have none.
    """
    longest = max(len(example.answer_ids) for example in examples)
    labels = torch.full((len(examples), longest), IGNORED_LABEL)
    for row, example in enumerate(examples):
        labels[row, -len(example.answer_ids) :] = torch.tensor(example.answer_ids)
    prompts, batches = [example.prompt_ids for example in examples], None
    if features is not None:
        prompts, batches = soft_ids(prompts, [example.items for example in examples], features)
    # The last answer token is predicted, never read.
    answers = [example.answer_ids[:-1] for example in examples]
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    return AnswerBatch(share_prefix(sequences, shortest_rest=longest), labels, batches or None)


class LengthGroupedSampler(Sampler[int]):
    """A new random order per epoch in which every batch holds items of nearly one length, so little is padding."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, batches_per_pool: int = 16) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.pool_size = batch_size * batches_per_pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        # Sorting within random pools keeps the batches' make-up random from epoch to epoch.
        pools = (order[start : start + self.pool_size] for start in range(0, len(order), self.pool_size))
        grouped = [index for pool in pools for index in sorted(pool, key=self.lengths.__getitem__)]
        batches = [grouped[start : start + self.batch_size] for start in range(0, len(grouped), self.batch_size)]
        # Only the last batch may be short: it stays where it is, or all batches after it would lose their shape.
        full = len(grouped) // self.batch_size
        shuffled = torch.randperm(full, generator=generator).tolist() + list(range(full, len(batches)))
        for batch in shuffled:
            yield from batches[batch]


def answer_loader(
    examples: Sequence[TokenizedExample], batch_size: int, seed: int, processor: MllmProcessor | None = None
) -> DataLoader[AnswerBatch]:
    """Batches for training; the order depends on the seed and the epoch alone.

    Args:
        processor: of a multimodal model; needed where examples have items.
    """
    features = None if processor is None else ItemFeatures(processor)
    return DataLoader(
        examples,  # type: ignore[arg-type]  # a sequence is all that a DataLoader needs
        batch_size=batch_size,
        sampler=LengthGroupedSampler([example_length(example, features) for example in examples], batch_size, seed),
        collate_fn=partial(collate_answers, features=features),
    )


def example_length(example: TokenizedExample, features: ItemFeatures | None) -> int:
    """Positions that an example takes, with one placeholder more for each item."""
    soft = 0
    if features is not None:
        soft = sum(features.count(modality, item) for modality, items in example.items.items() for item in items)
    return len(example.prompt_ids) + len(example.answer_ids) + soft
