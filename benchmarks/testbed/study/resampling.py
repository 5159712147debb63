"""Scores over resamples of test samples, the same for all rows and trainings: what chance would have made of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.evaluation_results import RESULTS_FOLDER, outcomes_of, read_results, results_file
from lightning_modules.metrics import resample_weights, weighted_values
from lightning_modules.sample_log import log_file, read_log


def resampled_scores(folder: Path, tasks: Sequence[str]) -> Tensor:
    """A model's score on each task over resamples of its groups of samples.

    Args:
        folder: of the model's results.
        tasks: each gets resamples of its own.

    Returns:
        float64 [tasks, resamples].
    """
    return torch.stack([_resampled(folder, task, seed) for seed, task in enumerate(tasks)])


def _resampled(folder: Path, task: str, seed: int) -> Tensor:
    result = read_results(results_file(folder, task))
    records = read_log(log_file(folder / RESULTS_FOLDER, task))
    outcomes = outcomes_of(records, result["task"]["choices"], result["settings"]["choice_lengths"])
    metric = next(iter(result["scores"]))
    drawn = [weighted_values(outcomes, [metric], weights)[metric] for weights in resample_weights(outcomes, seed)]
    return torch.cat(drawn)


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
