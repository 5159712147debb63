"""Specialists of a tiny base, trained as those of the testbed are."""

from dataclasses import replace

import pytest

from benchmarks.testbed.data import MODALITIES, Example, Task
from benchmarks.testbed.specialists import PLANS
from benchmarks.testbed.train import train

# The answer is in the item: learnt in a few steps.
ITEMS = {
    "molecule": [("C" * n, "Yes") if n % 2 else ("O" * n, "No") for n in range(1, 25)],
    "protein": [("M" * n, "Yes") if n % 2 else ("K" * n, "No") for n in range(1, 25)],
    "cell": [("CD3D", "Yes"), ("LYZ", "No")] * 12,
}


def _tiny_task(modality):
    examples = [Example(str(n), item, answer, str(n)) for n, (item, answer) in enumerate(ITEMS[modality])]
    splits = {"train": examples[:16], "validation": examples[16:20], "test": examples[20:]}
    return Task("tiny", modality, "Is it? Answer Yes or No.", ("Yes", "No"), splits)


@pytest.fixture(scope="session")
def plans(modality_settings):
    """The plans with tiny encoders."""
    return {m: replace(PLANS[m], epochs=2, batch_size=4, settings=modality_settings[m]) for m in MODALITIES}


@pytest.fixture(scope="session")
def trained(llama, plans, tmp_path_factory):
    """A folder with three specialists of a tiny base."""
    parent = tmp_path_factory.mktemp("trained")
    for modality in MODALITIES:
        (parent / modality).mkdir()
        train(llama / "base", _tiny_task(modality), plans[modality], parent / modality)
    return parent


@pytest.fixture(scope="session")
def tiny_task():
    """A function that gives the tiny task of a modality."""
    return _tiny_task
