"""The prompts of tasks as batches that are the same whatever the number of devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from benchmarks.tasks.task import Task
from lightning_modules.batching import UnrepeatedBatches, plan_batches
from lightning_modules.likelihood import shared_beginning
from lightning_modules.sample_log import UnfinishedRun
from lightning_modules.samples import Sample
from lightning_modules.soft_tokens import ItemFeatures, Items


@dataclass
class EvaluatedTask:
    """A task, ready for one model.

    Attributes:
        task: what is asked.
        samples: about what.
        prompt_ids: of each sample, with one placeholder for each item.
        items: of each prompt.
        features: of all items.
        choice_ids: of each choice.
        tokenizer: of the model.
        log: where the records go.
        beginning: token ids that all prompts begin with, before the first item.
        lengths: positions of each prompt, soft tokens among them.
        longest: of the lengths.
        pending: how many samples are computed in this run, on all devices.
    """

    task: Task
    samples: list[Sample]
    prompt_ids: list[list[int]]
    items: list[Items]
    features: ItemFeatures
    choice_ids: list[list[int]]
    tokenizer: Any
    log: UnfinishedRun
    beginning: list[int] = field(init=False)
    lengths: list[int] = field(init=False)
    longest: int = field(init=False)
    pending: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        # Of all samples, so that it does not depend on what is in a batch or left to do.
        placeholders = set(self.features.processor.placeholder_ids.values())
        beginning = shared_beginning(self.prompt_ids)
        self.beginning = list(takewhile(lambda token: token not in placeholders, beginning))
        self.lengths = [
            len(ids) + sum(self.features.count(name, item) - 1 for name, values in items.items() for item in values)
            for ids, items in zip(self.prompt_ids, self.items, strict=True)
        ]
        self.longest = max(self.lengths)


class PromptBatch(NamedTuple):
    """Samples that are computed together.

    Attributes:
        samples: their indices in the task.
        counts: whether their records are wanted.
    """

    samples: list[int]
    counts: bool


class _Batches(Dataset[PromptBatch]):
    def __init__(self, plan: Sequence[Sequence[int]]) -> None:
        self.plan = plan

    def __getitem__(self, number: tuple[int, bool]) -> PromptBatch:
        return PromptBatch(list(self.plan[number[0]]), number[1])


class EvaluationData(LightningDataModule):
    """One dataloader per task, over those batches that are not in its log yet.

    Args:
        tasks: to evaluate.
        batch_size: prompts at a time; None to find it.
        find_batch_size: called with a task once its model is on its device.
    """

    def __init__(
        self,
        tasks: Sequence[EvaluatedTask],
        batch_size: int | None,
        find_batch_size: Callable[[EvaluatedTask], int],
    ) -> None:
        super().__init__()
        self.tasks = tasks
        self.batch_size = batch_size
        self.find_batch_size = find_batch_size
        # A rank without a batch left still takes part.
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def test_dataloader(self) -> list[DataLoader[PromptBatch]]:
        return [self._loader(task) for task in self.tasks]

    def _loader(self, task: EvaluatedTask) -> DataLoader[PromptBatch]:
        assert self.trainer is not None
        size = self.batch_size or task.log.note("batch_size") or self._found(task)
        plan = plan_batches(task.lengths, size)
        done = task.log.records().keys()
        # A batch that was interrupted is computed again as a whole: alone, its rest would be rounded differently.
        pending = [
            number for number, batch in enumerate(plan) if not all(task.samples[index].id in done for index in batch)
        ]
        task.pending = sum(len(plan[number]) for number in pending)
        sampler = UnrepeatedBatches(pending, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(_Batches(plan), batch_size=None, sampler=sampler)

    def _found(self, task: EvaluatedTask) -> int:
        assert self.trainer is not None
        size = self.find_batch_size(task)
        if self.trainer.is_global_zero:
            task.log.note("batch_size", size)
        return size
