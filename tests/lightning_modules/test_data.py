from lightning_modules.data import (
    IGNORED_LABEL,
    LengthGroupedSampler,
    TokenizedExample,
    answer_loader,
    collate_answers,
)


def test_only_answers_are_labels():
    batch = collate_answers([TokenizedExample([1, 2, 3], [7]), TokenizedExample([1, 5], [8, 9])])
    # Logits of the last two positions: the first row's prompt ends in the last, the second's in the one before.
    assert batch.tokens.prefix_ids.tolist() == [1]
    assert batch.tokens.input_ids.tolist() == [[2, 3], [5, 8]]
    assert batch.labels.tolist() == [[IGNORED_LABEL, 7], [8, 9]]


def test_every_item_comes_once_per_epoch_and_in_another_order_in_the_next():
    sampler = LengthGroupedSampler(list(range(103)), batch_size=8, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(103))
    assert first != second
    assert list(LengthGroupedSampler(list(range(103)), batch_size=8, seed=1)) == first
    assert list(LengthGroupedSampler(list(range(103)), batch_size=8, seed=2)) != first


def test_a_batch_holds_items_of_nearly_one_length():
    lengths = [(7 * index) % 128 for index in range(128)]
    order = list(LengthGroupedSampler(lengths, batch_size=8, seed=0, batches_per_pool=16))
    for start in range(0, len(order), 8):
        batch = [lengths[index] for index in order[start : start + 8]]
        assert max(batch) - min(batch) == 7


def test_loader_gives_the_same_batches_for_the_same_seed():
    examples = [TokenizedExample([1, *range(index % 7 + 1)], [index % 3]) for index in range(20)]
    first, second = (
        [batch.labels.tolist() for batch in answer_loader(examples, batch_size=4, seed=3)] for _ in range(2)
    )
    assert first == second
    assert sum(map(len, first)) == 20
