"""Scores a model on the held-out test sets of the three tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torchmetrics.functional.classification import binary_auroc
from transformers import PreTrainedTokenizerBase

from benchmarks.testbed.data import Example, Task
from benchmarks.testbed.tokenization import encode_answer, encode_prompt
from lightning_modules.likelihood import answer_log_likelihoods
from lightning_modules.shared_prefix import CausalLM


@dataclass(frozen=True)
class Score:
    """One number of the results table."""

    metric: str
    value: float
    samples: int


def metric_of(task: Task) -> str:
    """Area under the ROC curve for a yes/no question, accuracy for a choice of many."""
    return "AUROC" if task.answers == ("Yes", "No") else "accuracy"


def evaluate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    batch_size: int = 16,
) -> Score:
    """How well the model answers: its answer is the most likely one of the task's."""
    prompts = [encode_prompt(tokenizer, task.prompt(example)) for example in examples]
    answers = [encode_answer(tokenizer, answer) for answer in task.answers]
    scores = answer_log_likelihoods(model, prompts, answers, batch_size)
    truth = torch.tensor([task.answers.index(example.answer) for example in examples])
    metric = metric_of(task)
    if metric == "AUROC":
        value = binary_auroc(scores[:, 0] - scores[:, 1], (truth == 0).long())
    else:
        value = (scores.argmax(dim=1) == truth).float().mean()
    return Score(metric, value.item(), len(examples))
