"""SMILES by RDKit, which is imported when the first one is parsed."""

from typing import Any

from esmerge.errors import InputError
from esmerge.modalities.modality import MissingPackageError, shorten


def parse_smiles(smiles: str) -> Any:
    """The molecule, as RDKit has it.

    Raises:
        InputError: if the SMILES is not valid.
        MissingPackageError: without RDKit.
    """
    try:
        from rdkit import Chem, rdBase
    except ImportError as error:
        raise MissingPackageError("molecules need RDKit: pip install rdkit") from error
    # RDKit writes why it failed to the standard error output itself.
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles) if smiles.isascii() else None
    # Nothing at all is a molecule without atoms to RDKit.
    if molecule is None or not molecule.GetNumAtoms():
        raise InputError(f"{shorten(smiles)} is no valid SMILES: correct it or leave it out.")
    return molecule
