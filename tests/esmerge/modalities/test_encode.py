"""Items -> soft tokens: each once, in batches, kept on disk."""

import torch

from esmerge.modalities import encode_items


def counting(encoder):
    """The encoder, and the sizes of the batches that it sees."""
    sizes = []
    forward = encoder.forward
    encoder.forward = lambda **features: sizes.append(len(next(iter(features.values())))) or forward(**features)
    return sizes


def test_each_item_once_and_in_order(make, run, esm_settings):
    modality, encoder = make(esm_settings)
    items = ["MKT", "MKTAYIAKQR", "MKT", "G", "ACDEF"]
    expected = [run(modality, encoder, [item])[0] for item in items]
    sizes = counting(encoder)
    found = encode_items(modality, encoder, items, 2, None, "", progress=False)
    assert sum(sizes) == 4
    assert max(sizes) == 2
    for tokens, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tokens, wanted, rtol=0, atol=1e-5)


def test_kept_by_content(make, esm_settings, tmp_path):
    modality, encoder = make(esm_settings)
    first = encode_items(modality, encoder, ["MKT", "GG"], 8, tmp_path, "weights", progress=False)
    sizes = counting(encoder)
    again = encode_items(modality, encoder, ["GG", "MKT", "AA"], 8, tmp_path, "weights", progress=False)
    assert sizes == [1]
    assert torch.equal(again[0], first[1])
    assert torch.equal(again[1], first[0])
    encode_items(modality, encoder, ["MKT"], 8, tmp_path, "other weights", progress=False)
    changed = modality.model_copy(update={"max_residues": 2})
    encode_items(changed, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    assert sizes == [1, 1, 1]


def test_a_damaged_file_is_made_anew(make, esm_settings, tmp_path):
    modality, encoder = make(esm_settings)
    [first] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    [file] = tmp_path.rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    [again] = encode_items(modality, encoder, ["MKT"], 8, tmp_path, "weights", progress=False)
    assert torch.equal(again, first)
