"""What pairs tell without a model: how the items of one side do on average, and both sides added.

A row of the study that knows one side only cannot be expected to exceed that side's main effect.
"""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torchmetrics.functional.classification import binary_auroc

from benchmarks.testbed import binding, drug_responses
from benchmarks.testbed.splits import Rows


@dataclass(frozen=True)
class MainEffects:
    """Areas under the ROC curve on the first test pairs of a task.

    Attributes:
        molecule: by the molecule's mean over training pairs.
        partner: by the partner's mean.
        both: by the sum of both.
    """

    molecule: float
    partner: float
    both: float


class _Pair(NamedTuple):
    molecule: str
    partner: str
    value: float


def drug_and_cell(samples: int) -> MainEffects:
    """Of `gdsc2_mid_potency`. Test cell lines are in no training pair: theirs is the mean of their other test pairs.

    So the partner's effect is what an ideal reading of the cell line would tell, not what a model could have learnt.
    """
    data = drug_responses.drug_responses()
    tables = drug_responses.pairs_of_middling_drugs()
    response = {f"{drug} on {cell}": value for (cell, drug), value in data.response.items()}
    training = [_Pair(row["molecule"], row["cell line"], -response[row["id"]]) for row in tables["train"]]
    of_drug = _means([(pair.molecule, pair.value) for pair in training])
    test = [_Pair(row["molecule"], row["cell line"], -response[row["id"]]) for row in tables["test"]]
    beyond: dict[str, list[float]] = defaultdict(list)
    for pair in test:
        beyond[pair.partner].append(pair.value - of_drug[pair.molecule])
    asked = test[:samples]
    cells = [_mean_of_others(beyond[pair.partner], pair.value - of_drug[pair.molecule]) for pair in asked]
    return _effects([of_drug[pair.molecule] for pair in asked], cells, _positive(tables["test"][:samples]))


def drug_and_target(samples: int) -> MainEffects:
    """Of `pydta`, whose molecules and proteins are in training pairs too; the mean of all for others."""
    tables = binding.pydta()
    training = [_Pair(row["molecule"], row["protein"], float(row["binds"])) for row in tables["train"]]
    overall = statistics.fmean(pair.value for pair in training)
    molecules = _means([(pair.molecule, pair.value) for pair in training])
    proteins = _means([(pair.partner, pair.value) for pair in training])
    asked = tables["test"][:samples]
    ours = [molecules.get(row["molecule"], overall) for row in asked]
    theirs = [proteins.get(row["protein"], overall) for row in asked]
    return _effects(ours, theirs, _positive(asked))


def _positive(rows: Rows) -> list[int]:
    return [int(row.get("answer", row.get("binds")) in ("sensitive", "1")) for row in rows]


def _means(values: Sequence[tuple[str, float]]) -> Mapping[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in values:
        found[name].append(value)
    return {name: statistics.fmean(own) for name, own in found.items()}


def _mean_of_others(values: Sequence[float], own: float) -> float:
    return (sum(values) - own) / max(1, len(values) - 1)


def _effects(molecules: Sequence[float], partners: Sequence[float], positive: Sequence[int]) -> MainEffects:
    both = [a + b for a, b in zip(molecules, partners, strict=True)]
    return MainEffects(*(_auroc(values, positive) for values in (molecules, partners, both)))


def _auroc(values: Sequence[float], positive: Sequence[int]) -> float:
    # Of ranks: torchmetrics takes what lies outside 0 and 1 for logits.
    ranks = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True)[1].double() / len(values)
    return float(binary_auroc(ranks, torch.tensor(positive)))
