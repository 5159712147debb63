"""Scores over resamples of test samples, the same for all rows and trainings: what chance would have made of them."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.testbed.study.tasks import partners
from lightning_modules.evaluation_results import RESULTS_FOLDER, outcomes_of, read_results, results_file
from lightning_modules.metrics import Outcomes, resample_weights, weighted_values
from lightning_modules.sample_log import Record, log_file, read_log

# What of pairs is drawn: molecules and partners, each by itself; only ones of these; or the pairs as they are.
Unit = Literal["both", "molecules", "partners", "pairs"]


def resampled_scores(folder: Path, tasks: Sequence[str], unit: Unit = "both") -> Tensor:
    """A model's score on each task over resamples of its groups of samples.

    Args:
        folder: of the model's results.
        tasks: each gets resamples of its own.
        unit: what is drawn of a task about pairs.

    Returns:
        float64 [tasks, resamples].
    """
    return torch.stack([_resampled(folder, task, seed, unit) for seed, task in enumerate(tasks)])


def _resampled(folder: Path, task: str, seed: int, unit: Unit) -> Tensor:
    result = read_results(results_file(folder, task))
    records = read_log(log_file(folder / RESULTS_FOLDER, task))
    outcomes = outcomes_of(records, result["task"]["choices"], result["settings"]["choice_lengths"])
    metric = next(iter(result["scores"]))
    known = partners(task)
    weights = _of_pairs(outcomes, records, known, seed, unit) if known else resample_weights(outcomes, seed)
    return torch.cat([weighted_values(outcomes, [metric], own)[metric] for own in weights])


def _of_pairs(
    outcomes: Outcomes, records: Sequence[Record], known: Mapping[str, tuple[str, str]], seed: int, unit: Unit
) -> Iterator[Tensor]:
    """How often each pair is drawn.

    Of both partners, as often as its molecule was drawn, times as often as its partner was (Owen 2007, doi
    10.1214/07-AOAS122): intervals are too wide rather than too narrow, by up to the root of 3 where hardly any molecule
    or partner is in several pairs.
    """
    pairs = [known[record["id"]] for record in records]
    if unit == "pairs":
        return resample_weights(replace(outcomes, groups=_numbers(pairs)), seed)
    molecules, others = (
        resample_weights(replace(outcomes, groups=_numbers(names)), 2 * seed + side)
        for side, names in enumerate(zip(*pairs, strict=True))
    )
    if unit == "both":
        return (first * second for first, second in zip(molecules, others, strict=True))
    return molecules if unit == "molecules" else others


def _numbers(names: Sequence[Hashable]) -> Tensor:
    index = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([index[name] for name in names])


def resampled_differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """The mean difference between two rows where trainings are drawn again as well as samples.

    Args:
        ours, theirs: [trainings, tasks, resamples], of the same trainings.

    Returns:
        [resamples].
    """
    count, _, resamples = ours.shape
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (count, resamples), generator=generator)
    return (ours - theirs).mean(dim=1).gather(0, drawn).mean(dim=0)
