"""Answers the questions of tasks with a model, by the likelihood of the choices or by what it generates."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.memory import is_out_of_memory
from esmerge.mllm import MllmForConditionalGeneration
from lightning_modules.evaluation_data import EvaluatedTask, PromptBatch
from lightning_modules.likelihood import AnswerScorer
from lightning_modules.memory import bytes_per_row, first_batch_size, release_memory
from lightning_modules.sample_log import Record
from lightning_modules.sharding import shard_llm
from lightning_modules.shared_prefix import has_free_positions, pad_left
from lightning_modules.soft_tokens import WithSoftIds, soft_ids, soft_token_table

logger = logging.getLogger(__name__)

# What models with learned positions call them.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")

ScoreKind = Literal["likelihood", "generate"]
Normalisation = Literal["none", "tokens", "characters"]


class Evaluation(LightningModule):
    """Asks a model every question of some tasks; one dataloader per task, in their order.

    Args:
        load: gives the model in evaluation mode; called once the process knows its device.
        tasks: with their prompts, and the logs that the records go to.
        score: by `likelihood` the most likely choice is the answer; by `generate` it is read from generated text.
        normalise: what a choice's log-likelihood is divided by before choices are compared.
        sharded: whether the ranks share the LLM's weights among them (FSDP).
    """

    def __init__(
        self,
        load: Callable[[], MllmForConditionalGeneration],
        tasks: Sequence[EvaluatedTask],
        score: ScoreKind,
        normalise: Normalisation = "none",
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.load = load
        self.tasks = tasks
        self.score = score
        self.normalise = normalise
        self.sharded = sharded
        self.model: MllmForConditionalGeneration | None = None
        self._ends: list[int] = []
        self._scorer: tuple[str, AnswerScorer] | None = None
        self._started: dict[str, float] = {}
        self._ended: dict[str, float] = {}

    def configure_model(self) -> None:
        """Load the model; called by Lightning in every process, possibly more than once."""
        if self.model is None:
            self.model = self.load()
            # Of a multimodal checkpoint, the LLM inside knows nothing of the checkpoint's generation_config.json.
            self._ends = _ids(self.model.generation_config.eos_token_id)
            # transformers fills what is not asked for from here: beams, penalties, words that may not be said.
            self.llm.generation_config = GenerationConfig()
            for task in self.tasks:
                self._check_context(task)
            if self.sharded:
                shard_llm(self.model.language_model, self.device_mesh["data_parallel"])

    def _check_context(self, task: EvaluatedTask) -> None:
        """Say how many samples are longer than what the LLM was made for; `InputError` if it cannot take them."""
        most = getattr(self.llm.config.get_text_config(), "max_position_embeddings", None)
        new = task.task.max_new_tokens if self.score == "generate" else max(len(ids) - 1 for ids in task.choice_ids)
        too_long = [length + new for length in task.lengths if most and length + new > most]
        if not too_long:
            return
        said = (
            f"{len(too_long)} of the {len(task.samples)} samples of {task.task.name} are up to {max(too_long)} tokens "
            f"long with their answers, more than the {most} positions of the model"
        )
        # A table of positions ends; those that are computed go on, to where the model has never been.
        if any(name.endswith(_POSITION_TABLES) for name, _ in self.llm.named_modules()):
            raise InputError(f"{said}: leave them out, or evaluate a model with a longer context.")
        if rank_zero_only.rank == 0:
            logger.warning("%s: what it says about them means little.", said)

    def test_step(self, batch: PromptBatch, batch_index: int, dataloader_idx: int = 0) -> None:
        task = self.tasks[dataloader_idx]
        if self._alone:
            self._answer_and_log(task, batch)
        elif self._failure() is None:
            try:
                self._answer_and_log(task, batch)
            except InputError as error:
                self.tasks[0].log.fail(str(error))

    def _answer_and_log(self, task: EvaluatedTask, batch: PromptBatch) -> None:
        self._started.setdefault(task.task.name, time.perf_counter())
        records = self.answer(task, batch.samples)
        if batch.counts:
            task.log.append(records, self.global_rank)
        self._ended[task.task.name] = time.perf_counter()

    @property
    def _alone(self) -> bool:
        """Whether an error of this process concerns no other that could still be told of it.

        Ranks that share weights cannot be: they wait for each other within a forward.
        """
        return self.trainer.world_size == 1 or self.sharded

    def _failure(self) -> str | None:
        """What the first rank that failed says, for all to stop and one of them to tell the user."""
        return self.tasks[0].log.failure()

    def on_test_epoch_end(self) -> None:
        """All records are on the disk before any process goes on."""
        for task in self.tasks:
            task.log.close()
        self.trainer.strategy.barrier()
        if self.global_rank == 0 and (failure := self._failure()) is not None:
            raise InputError(failure)

    def speed(self, task: EvaluatedTask) -> dict[str, float]:
        """How long this process was at a task, with how many samples, on all devices together."""
        name = task.task.name
        seconds = self._ended[name] - self._started[name] if name in self._ended else 0.0
        computed = task.pending
        return {
            "seconds": seconds,
            "samples_computed": computed,
            "samples_per_second": computed / seconds if seconds else 0.0,
        }

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The LLM's."""
        return next(self.llm.parameters()).dtype

    @torch.inference_mode()
    def find_batch_size(self, task: EvaluatedTask) -> int:
        """The largest batch size that memory allows: an estimate, halved as long as the longest prompts do not fit.

        All ranks come to the same. Where they share weights the estimate has to do: one that fails in the middle of a
        forward would leave the others waiting.
        """
        longest = sorted(range(len(task.samples)), key=lambda index: -task.lengths[index])
        new = task.task.max_new_tokens if self.score == "generate" else sum(len(ids) - 1 for ids in task.choice_ids)
        row_bytes = bytes_per_row(
            self.llm.config.get_text_config(),
            self.dtype_of_weights.itemsize,
            task.longest + new,
            1 if self.score == "generate" else 1 + new,
        )
        processes = self.trainer.world_size
        size = first_batch_size(self.device, processes, row_bytes, len(task.samples))
        if self.sharded:
            return self._least(size)
        while True:
            size = self._least(size)
            fits = self._fits(task, longest[:size])
            if self._least(int(fits)) or size == 1:
                # A single sample that does not fit is reported when it is its turn.
                return size
            size //= 2

    def _fits(self, task: EvaluatedTask, samples: Sequence[int]) -> bool:
        try:
            if self.score == "likelihood":
                self._score(task, samples)
            else:
                prompts, reader = self._read(task, samples)
                ids, mask = (tensor.to(self.device) for tensor in pad_left(prompts))
                reader(input_ids=ids, attention_mask=mask, logits_to_keep=1)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        release_memory()
        return False

    def _least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return int(self.trainer.strategy.reduce(torch.tensor(number, device=self.device), reduce_op="min"))

    def _most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return -self._least(-number)

    def answer(self, task: EvaluatedTask, samples: Sequence[int]) -> list[Record]:
        """Records of some samples; where memory does not suffice for all at once, of halves of them."""
        try:
            return self._score(task, samples) if self.score == "likelihood" else self._generate(task, samples)
        except (RuntimeError, MemoryError) as error:
            # Ranks that share weights cannot go separate ways.
            if not is_out_of_memory(error) or self.sharded:
                raise
            if len(samples) == 1:
                raise InputError(
                    f"the memory does not suffice for a single sample of {task.task.name}, "
                    f"{task.lengths[samples[0]]} tokens long: use --dtype bfloat16, or --strategy fsdp on "
                    "several GPUs."
                ) from error
        # Outside of the handler, whose traceback would keep the tensors alive.
        release_memory()
        half = len(samples) // 2
        return self.answer(task, samples[:half]) + self.answer(task, samples[half:])

    def _read(self, task: EvaluatedTask, samples: Sequence[int]) -> tuple[list[list[int]], WithSoftIds]:
        """Prompts with soft tokens in them, and what reads them; items are encoded once for all of them."""
        assert self.model is not None
        ids = [task.prompt_ids[index] for index in samples]
        prompts, features = soft_ids(ids, [task.items[index] for index in samples], task.features)
        if features:
            batches = {name: {k: t.to(self.device) for k, t in batch.items()} for name, batch in features.items()}
            table = soft_token_table(self.model, batches)
        else:
            embeddings: Any = self.model.get_input_embeddings().weight
            table = embeddings[:1]  # never looked at
        return prompts, WithSoftIds(self.model, table)

    def _score(self, task: EvaluatedTask, samples: Sequence[int]) -> list[Record]:
        if self._scorer is None or self._scorer[0] != task.task.name:
            # The beginning that prompts of another task share is of no use any more.
            self._scorer = None
            self._scorer = task.task.name, AnswerScorer(self.llm, task.choice_ids, task.beginning, task.longest)
        scorer = self._scorer[1]
        prompts, reader = self._read(task, samples)
        scores = scorer(prompts, reader).cpu()
        self._check_numbers(task, samples, scores)
        compared = scores / divisors(task.task, task.choice_ids, self.normalise)
        choices = task.task.choices
        return [
            {
                **_asked(task, index),
                "prediction": choices[best],
                "log_likelihoods": dict(zip(choices, row, strict=True)),
            }
            for index, best, row in zip(samples, compared.argmax(dim=1).tolist(), scores.tolist(), strict=True)
        ]

    def _generate(self, task: EvaluatedTask, samples: Sequence[int]) -> list[Record]:
        if not has_free_positions(self.llm):
            return self._generate_one_by_one(task, samples)
        return self._generate_together(task, samples)

    def _generate_one_by_one(self, task: EvaluatedTask, samples: Sequence[int]) -> list[Record]:
        """For models whose rows cannot be padded."""
        # Ranks that share weights run the model equally often.
        calls = self._most(len(samples)) if self.sharded else len(samples)
        asked = [*samples, *[samples[-1]] * (calls - len(samples))]
        records = [self._generate_together(task, [sample])[0] for sample in asked]
        return records[: len(samples)]

    def _generate_together(self, task: EvaluatedTask, samples: Sequence[int]) -> list[Record]:
        prompts, reader = self._read(task, samples)
        ids, mask = (tensor.to(self.device) for tensor in pad_left(prompts))
        # Of embeddings, transformers gives back the new tokens alone; not all models take them.
        has_items = any(task.items[index] for index in samples)
        read = {"inputs_embeds": reader.embed(ids)} if has_items else {"input_ids": ids}
        made = self.llm.generate(
            **read,
            attention_mask=mask,
            generation_config=self._greedily(task),
            logits_processor=LogitsProcessorList([_Numbers(partial(self._check_numbers, task, samples))]),
            synced_gpus=self.sharded,
        )
        new = made if has_items else made[:, ids.shape[1] :]
        texts = task.tokenizer.batch_decode(new, skip_special_tokens=True)
        records = []
        for index, text in zip(samples, texts, strict=True):
            found = task.task.parse(text)
            records.append(
                {
                    **_asked(task, index),
                    "prediction": None if found is None else task.task.choices[found],
                    "generated": text,
                }
            )
        return records

    def _greedily(self, task: EvaluatedTask) -> GenerationConfig:
        """Ends at whatever the tokenizer or the model call an end: chat models often have one more for turns."""
        ends = {*self._ends, *_ids(task.tokenizer.eos_token_id)}
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=task.task.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=task.tokenizer.pad_token_id,
        )

    def _check_numbers(self, task: EvaluatedTask, samples: Sequence[int], scores: Tensor) -> None:
        """Raise `InputError` where what the model gave for a sample, a row of scores each, is NaN."""
        bad = scores.isnan().any(dim=1).nonzero().flatten().tolist()
        if bad:
            dtype = str(self.dtype_of_weights).removeprefix("torch.")
            remedy = {"float16": "use --dtype bfloat16 or float32", "bfloat16": "use --dtype float32"}
            raise InputError(
                f"the model's likelihoods for the sample {task.samples[samples[bad[0]]].id} of {task.task.name} are "
                f"NaN in {dtype}: {remedy.get(dtype, 'look for NaN among the weights')}."
            )

    @property
    def llm(self) -> Any:
        """The LLM inside the model: transformers' or PEFT's."""
        assert self.model is not None
        return self.model.language_model


class _Numbers(LogitsProcessor):
    """Looks at the logits of each step."""

    def __init__(self, check: Callable[[Tensor], None]) -> None:
        self.check = check

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.check(scores)
        return scores


def _ids(found: int | Sequence[int] | None) -> list[int]:
    return [found] if isinstance(found, int) else list(found or ())


def _asked(task: EvaluatedTask, index: int) -> Record:
    sample = task.samples[index]
    group = {} if sample.group is None else {"group": sample.group}
    return {"id": sample.id, "answer": task.task.choices[sample.answer], **group}


def divisors(task: Task, choice_ids: Sequence[Sequence[int]], normalise: Normalisation) -> Tensor:
    """What the choices' log-likelihoods are divided by, float32 [K]."""
    lengths = {
        "none": [1 for _ in task.choices],
        "tokens": [len(ids) for ids in choice_ids],
        "characters": [len(choice) for choice in task.choices],
    }
    return torch.tensor(lengths[normalise], dtype=torch.float32)
