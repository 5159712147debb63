import torch

from lightning_modules.shared_prefix import common_beginning, last_logits, share_prefix

SEQUENCES = [[1, 2, 3, 4], [1, 2, 3, 9, 9, 9], [1, 2, 5]]


def test_common_beginning():
    assert common_beginning(SEQUENCES) == 2
    assert common_beginning([[1, 2], [1, 2], [1, 2, 3]]) == 2
    assert common_beginning([[1], [2]]) == 0


def test_rests_are_padded_on_the_left():
    batch = share_prefix(SEQUENCES)
    assert batch.prefix_ids.tolist() == [1, 2]
    assert batch.input_ids.tolist() == [[0, 0, 3, 4], [3, 9, 9, 9], [0, 0, 0, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1]]
    assert batch.position_ids()[:, -1].tolist() == [3, 5, 2]


def test_every_row_keeps_some_tokens_of_its_own():
    assert share_prefix(SEQUENCES, shortest_rest=2).prefix_ids.tolist() == [1]
    assert share_prefix([[1, 2, 3]]).input_ids.tolist() == [[3]]
    assert share_prefix([[1, 2], [1, 2]], shortest_rest=5).prefix_ids.tolist() == []


def test_without_sharing_the_sequences_are_whole_again():
    batch = share_prefix(SEQUENCES).without_sharing()
    assert batch.prefix_ids.tolist() == []
    assert batch.input_ids.tolist() == [[0, 0, 1, 2, 3, 4], [1, 2, 3, 9, 9, 9], [0, 0, 0, 1, 2, 5]]
    assert batch.attention_mask.sum(dim=1).tolist() == [4, 6, 3]


def test_sharing_changes_neither_logits_nor_gradients(tiny_llama):
    batch = share_prefix(SEQUENCES)
    results = []
    for form in (batch, batch.without_sharing()):
        tiny_llama.zero_grad()
        logits = last_logits(tiny_llama, form, last=1)
        logits.logsumexp(dim=-1).sum().backward()
        results.append((logits, tiny_llama.model.layers[0].self_attn.k_proj.weight.grad.clone()))
    for shared, whole in zip(*results, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
