"""Work that waits for memory."""

import multiprocessing
import threading
import time

import pytest
import torch

from esmerge.memory import MemoryBudget, available_memory


@pytest.mark.parametrize("forked", [False, True], ids=["threads", "processes"])
@pytest.mark.parametrize(("needs", "most"), [((4, 4, 4, 6, 0, 1), 10), ((4, 25, 4, 25), 25)], ids=["shared", "alone"])
def test_as_much_runs_at_a_time_as_there_is_memory(needs, most, forked):
    context = multiprocessing.get_context("fork")
    budget = MemoryBudget(10, forked)
    running, highest = context.Value("q", 0), context.Value("q", 0)

    def work(needed):
        with budget.room(needed):
            with running.get_lock():
                running.value += needed
                highest.value = max(highest.value, running.value)
            time.sleep(0.05)
            with running.get_lock():
                running.value -= needed

    kind = context.Process if forked else threading.Thread
    workers = [kind(target=work, args=(needed,)) for needed in needs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert running.value == 0
    assert max(needs) <= highest.value <= most


def test_what_raises_gives_back_what_it_had():
    budget = MemoryBudget(10)
    with pytest.raises(RuntimeError), budget.room(10):
        raise RuntimeError
    with budget.room(10):
        pass


def test_there_is_some_memory():
    assert available_memory(torch.device("cpu")) > 1 << 20
