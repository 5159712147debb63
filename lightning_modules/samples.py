"""Tasks as conversations: the questions that a model is asked, with items of modalities in their places."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.tasks.task import ANSWER, EXAMPLES, Task, split_template
from lightning_modules.in_context import choose_examples
from lightning_modules.task_data import Row, load_rows


@dataclass(frozen=True)
class Item:
    """Something of a modality, not yet encoded.

    Attributes:
        modality: "molecule".
        value: a SMILES, a protein sequence, a list of genes.
    """

    modality: str
    value: str


Part = str | Item


@dataclass(frozen=True)
class Turn:
    """What one side says; no two texts follow each other among the parts."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique within a split of a task, and the same in every run.
        turns: the system prompt if there is one, in-context examples if they are turns, the question.
        answer: index into the task's choices.
        group: relatives have the same.
    """

    id: str
    turns: tuple[Turn, ...]
    answer: int
    group: str | None


def load_samples(task: Task, split: str | None = None, limit: int | None = None) -> list[Sample]:
    """The questions of one split, in the order of the data.

    Args:
        task: as `load_task` gives it.
        split: its name in the data; by default the one that the task evaluates.
        limit: take only that many rows, the first ones.

    Raises:
        InputError: if the data cannot be had or does not fit the task; one sentence.
    """
    sources = [task.split.training] if task.examples is not None else []
    rows, *others = load_rows(task, split or task.split.evaluated, *sources)
    rows = rows[:limit]
    examples: Sequence[Sequence[Row]] = choose_examples(task, rows, *others) if others else [()] * len(rows)
    return [_sample(task, row, chosen) for row, chosen in zip(rows, examples, strict=True)]


def _sample(task: Task, row: Row, examples: Sequence[Row]) -> Sample:
    turns = [Turn("system", (task.system,))] if task.system is not None else []
    template = task.examples.template if task.examples is not None else None
    inside: list[Part] = []
    for example in examples:
        if template is None:
            turns.append(Turn("user", _join(_fill(task, task.prompt, example))))
            turns.append(Turn("assistant", (task.answer_prefix + task.choices[example.answer],)))
        else:
            inside.extend(_fill(task, template, example))
    turns.append(Turn("user", _join(_fill(task, task.prompt, row, inside))))
    return Sample(row.id, tuple(turns), row.answer, row.group)


def _fill(task: Task, template: str, row: Row, examples: Sequence[Part] = ()) -> Iterator[Part]:
    """The parts of a template with a row's values in it."""
    for text, name in split_template(template):
        yield text
        if name == EXAMPLES:
            yield from examples
        elif name == ANSWER:
            yield task.choices[row.answer]
        elif name is not None:
            modality = task.modality(name)
            yield row.values[name] if modality is None else Item(modality, row.values[name])


def _join(parts: Iterator[Part]) -> tuple[Part, ...]:
    """Neighbouring texts as one; empty ones fall away."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return tuple(joined)
