import os
import pickle
from collections import OrderedDict

import pytest
import torch

from benchmarks.testbed.tensor_pickle import load_tensor_dictionary, load_text_dictionary


class RunsCommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class LoadsStorage:
    """Asks for torch's own loader, with a pickle inside the pickle."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_reads_what_torch_pickles():
    tensors = {"A549": torch.randn(5), "HELA": torch.arange(6.0).view(2, 3)[:, 1:]}
    loaded = load_tensor_dictionary(pickle.dumps(tensors))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"A549": evil}, lambda evil: OrderedDict(x=[evil])])
def test_refuses_a_pickle_that_runs_commands(tmp_path, wrap):
    trace = tmp_path / "ran"
    with pytest.raises(pickle.UnpicklingError, match=r"asks for (posix|nt)\.system"):
        load_tensor_dictionary(pickle.dumps(wrap(RunsCommand(f"touch {trace}"))))
    assert not trace.exists()


def test_refuses_a_pickle_inside_a_storage(tmp_path):
    trace = tmp_path / "ran"
    inner = tmp_path / "inner.pt"
    torch.save(RunsCommand(f"touch {trace}"), inner, _use_new_zipfile_serialization=False)
    with pytest.raises(pickle.UnpicklingError):
        load_tensor_dictionary(pickle.dumps({"A549": LoadsStorage(inner.read_bytes())}))
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"A549": 3}, {1: torch.zeros(1)}, torch.zeros(2)])
def test_refuses_anything_but_a_dictionary_of_tensors(content):
    with pytest.raises(pickle.UnpicklingError, match="something other than a dictionary"):
        load_tensor_dictionary(pickle.dumps(content))


def test_reads_texts_and_nothing_else():
    texts = {"Aspirin": "CC(=O)Oc1ccccc1C(=O)O"}
    assert load_text_dictionary(pickle.dumps(texts)) == texts
    with pytest.raises(pickle.UnpicklingError, match="something other than a dictionary from names to texts"):
        load_text_dictionary(pickle.dumps({"Aspirin": torch.zeros(1)}))
