"""Which molecules bind which proteins: pairs to ask about, and how readily each side binds at all."""

import csv
import io
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from rdkit import Chem

from benchmarks.testbed.drug_responses import drug_structures
from benchmarks.testbed.packages import fetch_packages, read_member
from benchmarks.testbed.splits import Split, Tables, cluster_sequences, rows_in_stratified_order, with_balanced_labels

STRONG_BINDING = 7.0  # pKd: a dissociation constant of 100 nM
STRONG_BINDING_KIBA = 12.1  # KIBA score; the threshold that is usual for this data set

_FILES: dict[Split, str] = {"train": "train", "validation": "val", "test": "test"}
Pair = tuple[str, str, float]  # a molecule, a protein, their affinity


def pydta() -> Tables:
    """Pairs of a drug and a target in the splits that come with them."""
    tables: Tables = {}
    for split, pairs in _pydta_pairs().items():
        rows = [
            {
                "id": f"{split}-{number}",
                "molecule": molecule,
                "protein": protein,
                "binds": str(int(affinity >= STRONG_BINDING)),
            }
            for number, (molecule, protein, affinity) in enumerate(pairs, start=1)
        ]
        tables[split] = rows
    return with_balanced_labels(tables, "binds")


def kiba() -> Tables:
    """Pairs of a ligand and a protein; validation and test share neither with training, nor drugs with GDSC2."""
    drugs = {_spelling(smiles) for smiles in drug_structures().values()}
    tables = _kiba_pairs()
    for split in ("validation", "test"):
        tables[split] = [row for row in tables[split] if _spelling(row["molecule"]) not in drugs]
    return with_balanced_labels(tables, "binds")


def _kiba_pairs() -> Tables:
    package = fetch_packages("pydebiaseddta")["pydebiaseddta"]
    tables: Tables = {}
    for split, name in _FILES.items():
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
        tables[split] = rows
    return tables


def ligands() -> Tables:
    """Molecules of the training pairs of pydta, all for training; none of those in KIBA's evaluated pairs."""
    evaluated = {_spelling(molecule) for molecule in _evaluated_in_kiba("molecule")}
    return _readiness("molecule", lambda molecules: [_spelling(molecule) not in evaluated for molecule in molecules])


def targets() -> Tables:
    """Proteins of the training pairs of pydta, all for training; no relatives of those in KIBA's evaluated pairs."""
    evaluated = _evaluated_in_kiba("protein")

    def unrelated(proteins: Sequence[str]) -> list[bool]:
        clusters = cluster_sequences([*proteins, *evaluated])
        taken = set(clusters[len(proteins) :])
        return [cluster not in taken for cluster in clusters[: len(proteins)]]

    return _readiness("protein", unrelated)


def _readiness(column: str, usable: Callable[[Sequence[str]], list[bool]]) -> Tables:
    """Items of one side of pydta's training pairs; one binds readily if its mean affinity is above their median."""
    side = {"molecule": 0, "protein": 1}[column]
    affinities: dict[str, list[float]] = defaultdict(list)
    for pair in _pydta_pairs()["train"]:
        affinities[str(pair[side])].append(pair[2])
    means = {item: statistics.fmean(values) for item, values in affinities.items()}
    threshold = statistics.median(means.values())
    rows = [
        {"id": f"{column}-{number}", column: item, "binds": "yes" if mean > threshold else "no"}
        for number, ((item, mean), keep) in enumerate(zip(means.items(), usable(list(means)), strict=True), start=1)
        if keep
    ]
    return {"train": rows_in_stratified_order(rows, "binds")}


def _pydta_pairs() -> dict[Split, list[Pair]]:
    package = fetch_packages("pydta")["pydta"]
    loaded = json.loads(read_member(package, "pydta/data/dta_sample_data/dta_sample_data.json"))
    return {split: list(zip(*loaded[name], strict=True)) for split, name in _FILES.items()}


def _evaluated_in_kiba(column: str) -> list[str]:
    tables = _kiba_pairs()
    return sorted({row[column] for split in ("validation", "test") for row in tables[split]})


def _spelling(smiles: str) -> str:
    """The same for all spellings of a molecule and its stereoisomers."""
    return str(Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False))
