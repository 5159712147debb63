"""How alike two items of a modality are, and when they are the same."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from esmerge.errors import InputError

Matrix = NDArray[np.float32]
Features = set[Hashable]

MORGAN_RADIUS = 2
MORGAN_BITS = 2048
RESIDUES_PER_WORD = 3


class SimilarityIndex:
    """Compares items of a modality with fixed others, by the Jaccard index of sets of features.

    The features are the bits of Morgan fingerprints for molecules (whose index is then called Tanimoto's), the words
    of three residues for proteins, the genes for cells. A molecule that RDKit cannot read is like no other.

    Args:
        modality: one of those in `benchmarks.tasks.task.SIMILARITIES`.
        others: items of it; each is looked at once however often it is there.
        needed_by: what an error about a missing RDKit names.
    """

    def __init__(self, modality: str, others: Sequence[str], needed_by: str) -> None:
        self._modality = modality
        self._needed_by = needed_by
        unique = list(dict.fromkeys(others))
        number = {item: column for column, item in enumerate(unique)}
        self._columns = np.array([number[item] for item in others], dtype=np.intp)
        features = self._features(unique)
        self._vocabulary = {feature: row for row, feature in enumerate(dict.fromkeys(f for s in features for f in s))}
        self._others = self._indicators(features).T
        self._sizes = np.array([len(found) for found in features], dtype=np.float32)

    def __call__(self, items: Sequence[str]) -> Matrix:
        """The similarity of items to all others, [items, others], from 0 to 1."""
        features = self._features(items)
        common = self._indicators(features) @ self._others  # whole numbers, which float32 holds exactly
        sizes = np.array([len(found) for found in features], dtype=np.float32)
        either = sizes[:, None] + self._sizes[None, :] - common
        found: Matrix = np.divide(common, either, out=np.zeros_like(common), where=either > 0)
        return found[:, self._columns]

    def _indicators(self, features: Sequence[Features]) -> Matrix:
        indicators = np.zeros((len(features), len(self._vocabulary)), dtype=np.float32)
        for row, found in enumerate(features):
            indicators[row, [self._vocabulary[f] for f in found if f in self._vocabulary]] = 1
        return indicators

    def _features(self, items: Sequence[str]) -> list[Features]:
        if self._modality == "molecule":
            return _fingerprints(items, self._needed_by)
        return [_words(item) if self._modality == "protein" else _genes(item) for item in items]


def canonical(modality: str | None, items: Sequence[str], needed_by: str) -> list[str]:
    """For each item a spelling that all spellings of the same share; text has but one."""
    unique = list(dict.fromkeys(items))
    if modality == "molecule":
        molecules = zip(unique, _molecules(unique, needed_by), strict=True)
        spelled = {item: item if molecule is None else _smiles(molecule) for item, molecule in molecules}
    elif modality == "protein":
        spelled = {item: item.upper() for item in unique}
    elif modality == "cell":
        spelled = {item: ", ".join(sorted(_genes(item))) for item in unique}
    else:
        return list(items)
    return [spelled[item] for item in items]


def scaffolds(items: Sequence[str], needed_by: str) -> list[str]:
    """The Murcko scaffold of each molecule; molecules without a ring share the empty one."""
    molecules = _molecules(items, needed_by)
    from rdkit.Chem.Scaffolds import MurckoScaffold

    return [
        item if molecule is None else MurckoScaffold.MurckoScaffoldSmiles(mol=molecule)
        for item, molecule in zip(items, molecules, strict=True)
    ]


def _molecules(items: Sequence[str], needed_by: str) -> list[Any]:
    """RDKit's molecules; None where it cannot read a SMILES."""
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise InputError(f"{needed_by} compares molecules by RDKit: pip install 'esmerge[molecules]'.") from error
    with rdBase.BlockLogs():  # about each that is not valid, RDKit would print several lines
        return [Chem.MolFromSmiles(item) for item in items]


def _smiles(molecule: Any) -> str:
    from rdkit import Chem

    return str(Chem.MolToSmiles(molecule))


def _fingerprints(items: Sequence[str], needed_by: str) -> list[Features]:
    molecules = _molecules(items, needed_by)
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=MORGAN_RADIUS, fpSize=MORGAN_BITS)
    return [
        set() if molecule is None else set(generator.GetFingerprint(molecule).GetOnBits()) for molecule in molecules
    ]


def _words(item: str) -> Features:
    sequence = item.upper()
    starts = range(max(1, len(sequence) - RESIDUES_PER_WORD + 1))
    return {sequence[start : start + RESIDUES_PER_WORD] for start in starts}


def _genes(item: str) -> set[Any]:
    return {gene.strip() for gene in item.split(",")} - {""}
