import os
import subprocess
import sys
from itertools import combinations

import pytest

from benchmarks.testbed.data import MODALITIES, load_task


@pytest.mark.parametrize("modality", MODALITIES)
class TestTask:
    def test_no_item_and_no_group_is_in_two_splits(self, modality):
        for a, b in combinations(load_task(modality).examples.values(), 2):
            for attribute in ("id", "item", "group"):
                assert not {getattr(example, attribute) for example in a} & {
                    getattr(example, attribute) for example in b
                }

    def test_every_item_is_there_once(self, modality):
        ids = [example.id for examples in load_task(modality).examples.values() for example in examples]
        assert len(ids) == len(set(ids))

    def test_there_is_enough_of_everything(self, modality):
        task = load_task(modality)
        assert len(task.examples["train"]) >= 500
        assert len(task.examples["validation"]) >= 32
        assert len(task.examples["test"]) >= 200
        for examples in task.examples.values():
            assert {example.answer for example in examples} == set(task.answers)

    def test_items_are_single_lines_behind_their_prefix(self, modality):
        task = load_task(modality)
        for example in task.examples["validation"]:
            assert "\n" not in example.item
            assert task.prompt(example).startswith(f"{modality.capitalize()}: {example.item}\n")

    def test_no_answer_begins_another(self, modality):
        for a, b in combinations(load_task(modality).answers, 2):
            assert not a.startswith(b)
            assert not b.startswith(a)


def test_no_molecule_shares_its_scaffold_with_another_split():
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles

    scaffolds = [
        {MurckoScaffoldSmiles(example.item) for example in examples}
        for examples in load_task("molecule").examples.values()
    ]
    assert all(not a & b for a, b in combinations(scaffolds, 2))


def test_no_protein_of_the_test_is_much_like_one_of_the_training():
    def kmers(sequence):
        return {sequence[i : i + 3] for i in range(len(sequence) - 2)}

    examples = load_task("protein").examples
    training = [kmers(example.item) for example in examples["train"]]
    for example in examples["test"][:50]:
        own = kmers(example.item)
        assert all(len(own & other) < 0.5 * min(len(own), len(other)) for other in training)


def test_splits_are_the_same_in_another_process():
    program = (
        "from benchmarks.testbed.data import load_task\n"
        "print([example.id for example in load_task('protein').examples['test'][:20]])"
    )
    # Another hash seed would reorder whatever depended on the order of a set.
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str([example.id for example in load_task("protein").examples["test"][:20]])
