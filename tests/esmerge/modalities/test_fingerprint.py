"""Molecules by fingerprint."""

import subprocess
import sys

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdFingerprintGenerator

from esmerge.errors import InputError
from esmerge.modalities import load_encoder, open_modality, save_encoder

SETTINGS = {"kind": "fingerprint", "placeholder": "<mol>", "n_bits": 64, "tokens": 3, "intermediate_size": 24}
MOLECULES = ["CCO", "c1ccccc1", "CC(=O)Oc1ccccc1C(=O)O"]


def test_features_are_log_counts(make):
    modality, _ = make({**SETTINGS, "n_bits": 2048})
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    for smiles in MOLECULES:
        counts = torch.zeros(2048)
        for bit, count in generator.GetCountFingerprint(Chem.MolFromSmiles(smiles)).GetNonzeroElements().items():
            counts[bit] = count
        torch.testing.assert_close(modality.features(smiles)["values"], torch.log(1 + counts))
    # One molecule, written in two ways.
    assert torch.equal(modality.features("OCC")["values"], modality.features("CCO")["values"])


def test_soft_tokens(make, run):
    modality, encoder = make(SETTINGS)
    together = run(modality, encoder, MOLECULES)
    for smiles, tokens in zip(MOLECULES, together, strict=True):
        assert tokens.shape == (3, 16)
        torch.testing.assert_close(run(modality, encoder, [smiles])[0], tokens, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_fresh_soft_tokens_are_as_large_as_word_embeddings(make, run):
    modality, _ = make({**SETTINGS, "intermediate_size": 256})
    scales = [tokens.std() for tokens in run(modality, modality.build(64), MOLECULES)]
    assert all(0.01 < scale < 0.04 for scale in scales)


@pytest.mark.parametrize("smiles", ["", "  ", "C1CC", "not a molecule", "C(C)(C)(C)(C)C"])
def test_invalid_smiles(make, smiles, capfd):
    modality, _ = make(SETTINGS)
    with pytest.raises(InputError, match="no valid SMILES") as error:
        modality.features(smiles)
    assert repr(smiles) in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_saved_and_loaded(make, run, tmp_path):
    modality, encoder = make(SETTINGS)
    save_encoder(modality, encoder, tmp_path)
    loaded = load_encoder(open_modality(tmp_path), tmp_path, 16)
    for before, after in zip(run(modality, encoder, MOLECULES), run(modality, loaded, MOLECULES), strict=True):
        assert torch.equal(before, after)
    half = load_encoder(modality, tmp_path, 16, dtype=torch.bfloat16)
    assert run(modality, half, MOLECULES)[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"projector\.bias has shape \[48\], expected \[72\]"):
        load_encoder(modality, tmp_path, 24)


def test_without_rdkit(tmp_path):
    """A package that fails to import, in front of the real one."""
    (tmp_path / "rdkit.py").write_text("raise ImportError\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from esmerge.errors import InputError
from esmerge.modalities import modality_from_settings
modality = modality_from_settings({SETTINGS!r}, "settings")
modality.build(8)
try:
    modality.features("CCO")
except InputError as error:
    sys.exit("pip install rdkit" not in str(error))
sys.exit(2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
