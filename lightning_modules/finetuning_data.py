"""Training data in rounds: the stretches between two validations, each of which can be gone on from."""

from collections.abc import Sequence
from functools import partial

from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader

from esmerge.mllm import MllmProcessor
from lightning_modules.batching import plan_batches
from lightning_modules.data import AnswerBatch, LengthGroupedSampler, TokenizedExample, collate_answers, example_length
from lightning_modules.soft_tokens import ItemFeatures


class FinetuningData(LightningDataModule):
    """Every round is an epoch to Lightning, and its batches follow from its number alone.

    Args:
        training: examples of all tasks.
        validation: examples of all tasks; none for no validation.
        processor: of the model.
        batch_size: examples per device and step.
        epochs: passes over the training examples.
        rounds_per_epoch: validations per pass.
        seed: of the order.
        ranks: processes, each of which takes its share of every step.
    """

    def __init__(
        self,
        training: Sequence[TokenizedExample],
        validation: Sequence[TokenizedExample],
        processor: MllmProcessor,
        batch_size: int,
        epochs: int,
        rounds_per_epoch: int,
        seed: int,
        ranks: int,
    ) -> None:
        super().__init__()
        self.training = training
        self.validation = validation
        self.features = ItemFeatures(processor)
        self.batch_size = batch_size
        self.ranks = ranks
        self.sampler = LengthGroupedSampler([self._length(example) for example in training], batch_size, seed)
        self.steps_per_epoch = -(-len(training) // (batch_size * ranks))
        self.steps = self.steps_per_epoch * epochs
        self.steps_per_round = -(-self.steps_per_epoch // rounds_per_epoch)
        self.rounds = -(-self.steps // self.steps_per_round)

    def _length(self, example: TokenizedExample) -> int:
        return example_length(example, self.features)

    def train_dataloader(self) -> DataLoader[AnswerBatch]:
        """The batches of the current round, this rank's share of them."""
        assert self.trainer is not None
        # Unlike the current epoch, also right when a training goes on.
        number = self.trainer.fit_loop.epoch_progress.current.processed
        return self._loader(self.training, self.round_batches(number, self.trainer.global_rank))

    def round_batches(self, number: int, rank: int) -> list[list[int]]:
        """A rank's batches in a round, as indices of examples."""
        first = number * self.steps_per_round
        steps = range(first, min(first + self.steps_per_round, self.steps))
        epochs = {step // self.steps_per_epoch: None for step in steps}
        batches = {epoch: self._epoch_batches(epoch) for epoch in epochs}
        places = ((step // self.steps_per_epoch, step % self.steps_per_epoch * self.ranks + rank) for step in steps)
        # Where the last step of an epoch lacks batches, its first ones come again.
        return [batches[epoch][place % len(batches[epoch])] for epoch, place in places]

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        self.sampler.set_epoch(epoch)
        order = list(self.sampler)
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def val_dataloader(self) -> list[DataLoader[AnswerBatch]]:
        """This rank's share of the validation examples, each of them on one rank."""
        assert self.trainer is not None
        if not self.validation:
            return []
        lengths = [self._length(example) for example in self.validation]
        # Ranks wait for each other after each loop, so none may be without a batch.
        plan = plan_batches(lengths, min(self.batch_size, max(1, len(lengths) // self.ranks)))
        return [self._loader(self.validation, plan[self.trainer.global_rank :: self.ranks])]

    def _loader(self, examples: Sequence[TokenizedExample], batches: list[list[int]]) -> DataLoader[AnswerBatch]:
        return DataLoader(
            examples,  # type: ignore[arg-type]  # a sequence is all that a DataLoader needs
            batch_sampler=batches,
            collate_fn=partial(collate_answers, features=self.features),
        )
