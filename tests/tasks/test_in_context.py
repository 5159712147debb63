"""In-context examples: the right ones, in order, and never the row asked about."""

import random

import numpy as np
import pytest
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator

from lightning_modules.samples import Item, load_samples
from lightning_modules.similarity import SimilarityIndex
from lightning_modules.tasks import load_task

SMILES = ["CCO", "CCCO", "CCN", "c1ccccc1", "Cc1ccccc1", "CC(=O)O", "CC(=O)Oc1ccccc1C(=O)O", "C1CCNCC1", "CCS", "C#N"]


def items(turn):
    return [part.value for part in turn.parts if isinstance(part, Item)]


def examples(sample):
    """The items of each example of a sample, where examples are turns."""
    return [tuple(items(turn)) for turn in sample.turns if turn.role == "user"][:-1]


def tanimoto(a, b):
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    return DataStructs.TanimotoSimilarity(*(generator.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in (a, b)))


@pytest.fixture
def about_molecules(content):
    content |= {"columns": {"molecule": "Drug"}, "prompt": "Molecule: {molecule}", "answer_prefix": "Final answer: "}
    return content | {"examples": {"rank_by": ["molecule"], "count": 3}}


def rows(smiles):
    return [(molecule, "MKT", number % 2) for number, molecule in enumerate(smiles)]


def test_similarity_of_molecules_is_tanimoto_on_morgan_fingerprints():
    found = SimilarityIndex("molecule", SMILES, "a test")(SMILES[:4])
    np.testing.assert_allclose(found, [[tanimoto(a, b) for b in SMILES] for a in SMILES[:4]], atol=1e-6)


def test_similarity_of_gene_sets_and_of_proteins():
    cells = SimilarityIndex("cell", ["A,B,C", "D", "C, B , A"], "a test")(["A, B", "D,E"])
    np.testing.assert_allclose(cells, [[2 / 3, 0, 2 / 3], [0, 1 / 2, 0]], atol=1e-6)
    proteins = SimilarityIndex("protein", ["MKTA", "MK", "GGGG"], "a test")(["MKT", "mk"])
    np.testing.assert_allclose(proteins, [[1 / 2, 0, 0], [0, 1, 0]], atol=1e-6)


def test_the_most_similar_molecules_are_chosen_and_the_most_similar_is_first(write, about_molecules):
    queries = ["CCCCO", "Oc1ccccc1"]
    samples = load_samples(load_task(write(about_molecules, train=rows(SMILES), test=rows(queries))))
    for query, sample in zip(queries, samples, strict=True):
        ranked = sorted(SMILES, key=lambda smiles: -tanimoto(query, smiles))  # stable: ties stay in order
        assert [example[0] for example in examples(sample)] == ranked[:3]


def test_examples_are_turns_with_their_answers(write, about_molecules):
    path = write(about_molecules, train=rows(["CCO", "CCN"]), test=rows(["CCS"]))
    turns = load_samples(load_task(path))[0].turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    answers = {"CCO": "Final answer: No", "CCN": "Final answer: Yes"}
    for question, answer in ((turns[1], turns[2]), (turns[3], turns[4])):
        assert answer.parts == (answers[items(question)[0]],)


def test_a_template_puts_examples_inside_the_question(write, about_molecules):
    about_molecules["prompt"] = "Examples:\n{examples}\nMolecule: {molecule}"
    about_molecules["examples"] |= {"template": "{molecule} -> {answer}\n", "count": 2}
    path = write(about_molecules, train=rows(["CCO"]), test=rows(["CCS"]))
    parts = load_samples(load_task(path))[0].turns[-1].parts
    assert parts == ("Examples:\n", Item("molecule", "CCO"), " -> No\n\nMolecule: ", Item("molecule", "CCS"))


def test_a_molecule_in_another_spelling_is_no_example_of_itself(write, about_molecules):
    spellings = ["OCC", "C(C)O", "C(O)C", "[CH3][CH2][OH]"]
    path = write(about_molecules, train=rows([*spellings, "CCN", "CCO"]), test=rows(["CCO"]))
    assert examples(load_samples(load_task(path))[0]) == [("CCN",)]


def test_no_row_is_its_own_example_when_the_training_split_is_asked(write, about_molecules):
    task = load_task(write(about_molecules, train=rows(SMILES), test=rows(["CCS"])))
    for sample, smiles in zip(load_samples(task, "train"), SMILES, strict=True):
        assert len(examples(sample)) == 3
        assert (smiles,) not in examples(sample)


def test_examples_come_from_the_training_split_alone(write, about_molecules):
    path = write(about_molecules, train=rows(["C#N", "c1ccccc1"]), test=rows(["CCO", "CCCO", "CCCCO"]))
    for sample in load_samples(load_task(path)):
        assert set(examples(sample)) == {("C#N",), ("c1ccccc1",)}


def test_pairs_of_the_same_protein_come_first_then_similar_proteins(write, content):
    content["examples"] = {"rank_by": ["molecule"], "same_first": "protein", "count": 3}
    train = [
        ("c1ccccc1", "GGGGG", 0),
        ("CCN", "MKTAYIAK", 1),
        ("CCCO", "MKTAYIAG", 0),  # the most similar other protein
        ("CCO", "GSHMLEDP", 1),
        ("c1ccncc1", "MKTAYIAK", 0),
        ("CCO", "MKTAYIAK", 1),  # the pair asked about
    ]
    path = write(content, train=train, test=[("OCC", "MKTAYIAK", 1)])
    found = examples(load_samples(load_task(path))[0])
    assert found == [("MKTAYIAK", "CCN"), ("MKTAYIAK", "c1ccncc1"), ("MKTAYIAG", "CCCO")]


def test_many_pairs_of_the_same_protein_are_ranked_by_their_molecules(write, content):
    content["examples"] = {"rank_by": ["molecule"], "same_first": "protein", "count": 3}
    train = [(smiles, "MKTAY", 0) for smiles in SMILES] + [("CCCCCO", "GGGGG", 1)]
    path = write(content, train=train, test=[("CCCCO", "MKTAY", 1)])
    ranked = sorted(SMILES, key=lambda smiles: -tanimoto("CCCCO", smiles))
    assert examples(load_samples(load_task(path))[0]) == [("MKTAY", smiles) for smiles in ranked[:3]]


@pytest.fixture
def about_pairs(content):
    content["columns"] = {"molecule_1": "A", "molecule_2": "B", "cell": "Genes"}
    content["prompt"] = "{molecule_1} {molecule_2} {cell}"
    return content | {
        "examples": {"rank_by": ["molecule_1", "molecule_2"], "same_first": "cell", "count": 2},
    }


def test_pairs_of_drugs_are_ranked_by_mean_similarity(write, about_pairs):
    pairs = [(a, b) for a in SMILES[:5] for b in SMILES[5:]]
    train = [(a, b, "X,Y", 1) for a, b in pairs]
    path = write(about_pairs, train=train, test=[("CCCCO", "CCSC", "X,Y", 1)], header=("A", "B", "Genes", "Y"))
    ranked = sorted(pairs, key=lambda pair: -(tanimoto("CCCCO", pair[0]) + tanimoto("CCSC", pair[1])))
    assert [example[:2] for example in examples(load_samples(load_task(path))[0])] == ranked[:2]


def test_a_pair_of_drugs_in_the_other_order_is_the_same_pair(write, about_pairs):
    train = [("CCN", "CCO", "Y, X", 1), ("OCC", "NCC", "X,Y", 0), ("CCO", "CCN", "X,Z", 1), ("CCO", "CCS", "X,Y", 1)]
    path = write(about_pairs, train=train, test=[("CCO", "CCN", "X,Y", 1)], header=("A", "B", "Genes", "Y"))
    found = examples(load_samples(load_task(path))[0])
    assert found == [("CCO", "CCS", "X,Y"), ("CCO", "CCN", "X,Z")]


def test_a_molecule_that_cannot_be_read_is_like_no_other(write, about_molecules):
    path = write(about_molecules, train=rows(["CCO", "nonsense", "CCN"]), test=rows(["CCS", "rubbish"]))
    readable, unreadable = load_samples(load_task(path))
    assert examples(readable)[-1] == ("nonsense",)
    assert [example[0] for example in examples(unreadable)] == ["CCO", "nonsense", "CCN"]


def test_ties_are_taken_in_the_order_of_the_data(write, about_molecules):
    about_molecules["columns"] = {"cell": "Drug"}
    about_molecules |= {"prompt": "{cell}", "examples": {"rank_by": ["cell"], "count": 3}}
    genes = [f"A,G{number}" for number in range(300)]
    random.Random(0).shuffle(genes)
    task = load_task(write(about_molecules, train=rows(genes), test=rows([f"A,T{number}" for number in range(300)])))
    assert all(examples(sample) == [(gene,) for gene in genes[:3]] for sample in load_samples(task))
