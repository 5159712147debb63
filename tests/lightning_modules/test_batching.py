import random

import pytest

from lightning_modules.batching import UnrepeatedBatches, plan_batches


def test_every_index_is_in_one_batch_and_the_longest_come_first():
    lengths = [random.Random(0).randrange(50) for _ in range(37)]
    plan = plan_batches(lengths, 5)
    assert sorted(index for batch in plan for index in batch) == list(range(37))
    assert [len(batch) for batch in plan] == [5] * 7 + [2]
    ordered = [lengths[index] for batch in plan for index in batch]
    assert ordered == sorted(lengths, reverse=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("pending", [[], [4], [0, 1, 2, 5, 9, 11, 12]])
def test_every_batch_counts_once_and_ranks_get_equally_many(pending, ranks):
    samplers = [UnrepeatedBatches(pending, rank, ranks) for rank in range(ranks)]
    given = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in given} == {len(samplers[0])}
    assert sorted(number for batches in given for number, counts in batches if counts) == pending
    assert all(number in pending for batches in given for number, _ in batches)
