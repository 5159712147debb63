"""How much memory there is, from the machine and from the container it runs in."""

import psutil
import pytest
import torch

from esmerge import memory
from lightning_modules.memory import first_batch_size, free_memory

CPU = torch.device("cpu")


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A function that writes the limits of a container."""

    def container(most, used):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        monkeypatch.setattr(memory, "_CGROUP", tmp_path)

    return container


def test_the_smaller_of_machine_and_container_counts(container, tmp_path):
    container(5 << 20, 2 << 20)
    assert free_memory(CPU, 1) == 3 << 20
    assert free_memory(CPU, 3) == 1 << 20
    # What it has read of files is given back when something else needs the room.
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {1 << 20}\nactive_file 9\n")
    assert free_memory(CPU, 1) == 4 << 20
    for unlimited in ("max", 1 << 60):
        container(unlimited, 0)
        assert 0 < free_memory(CPU, 1) <= psutil.virtual_memory().total


def test_a_batch_is_at_least_one_row_and_at_most_all(container):
    container(10 << 20, 0)
    assert first_batch_size(CPU, 1, row_bytes=1 << 20, samples=100) == 6
    assert first_batch_size(CPU, 1, row_bytes=1 << 30, samples=100) == 1
    assert first_batch_size(CPU, 1, row_bytes=1 << 20, samples=4) == 4
    assert first_batch_size(CPU, 1, row_bytes=1, samples=100) == 32
