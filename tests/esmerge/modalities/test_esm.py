"""The protein encoder agrees with Prot2Text-V2's layout, written out with plain transformers."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EsmConfig, EsmModel, EsmTokenizer

from esmerge.errors import InputError
from esmerge.modalities import load_encoder, modality_from_settings, open_modality, save_encoder
from esmerge.modalities.esm import ALPHABET

PROTEINS = ["MKTAYIAKQR", "GSHM", "mlxbuzow", "ACDEFGHIKLMNPQRSTVWY"]


class Reference(nn.Module):
    """EsmModel and the projector as Prot2Text-V2 publishes it, one item at a time."""

    def __init__(self, settings, hidden_size):
        super().__init__()
        width = settings["intermediate_size"]
        self.encoder = EsmModel(EsmConfig(**settings["encoder"]), add_pooling_layer=False)
        self.projector = nn.Module()
        self.projector.fc1 = nn.Linear(settings["encoder"]["hidden_size"], width)
        self.projector.fc2 = nn.Linear(width, hidden_size)
        self.projector.ln1, self.projector.ln2 = nn.LayerNorm(width), nn.LayerNorm(hidden_size)
        self.activation = nn.GELU()

    def forward(self, input_ids):
        states = self.encoder(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))[0]
        states = self.activation(self.projector.fc2(self.activation(self.projector.fc1(states))))
        return nn.functional.normalize(states, p=2, dim=-1)


@pytest.fixture
def tokenizer(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(ALPHABET))
    return EsmTokenizer(str(file))


@pytest.fixture
def reference(esm_settings):
    torch.manual_seed(3)
    model = Reference(esm_settings, hidden_size=16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def saved(reference, tmp_path):
    """The reference's weights as it saves them."""
    folder = tmp_path / "reference"
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}, folder / "model.safetensors"
    )
    return folder


def rewrite(folder, change):
    """Change the tensors in a folder's model.safetensors."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_ids_are_those_of_the_tokenizer(esm_settings, make, tokenizer):
    modality, _ = make(esm_settings)
    assert len(ALPHABET) == 33
    for protein in [*PROTEINS, "LAGVSERTIDPKQNFYMHWCXBUZO"]:
        assert modality.features(protein)["input_ids"].tolist() == tokenizer(protein.upper())["input_ids"]
    # Ids of the tokens that no sequence has, by the order in which ESM-2 lists them.
    assert [ALPHABET.index(token) for token in ("<cls>", "<pad>", "<eos>", "<unk>", "<mask>")] == [0, 1, 2, 3, 32]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (1, 32)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_parity_with_transformers(esm_settings, reference, saved, tokenizer, run, batch):
    modality = modality_from_settings(esm_settings, "settings")
    encoder = load_encoder(modality, saved, hidden_size=16)
    found = [
        tokens for start in range(0, 4, batch) for tokens in run(modality, encoder, PROTEINS[start : start + batch])
    ]
    for protein, tokens in zip(PROTEINS, found, strict=True):
        with torch.no_grad():
            expected = reference(tokenizer(protein.upper(), return_tensors="pt")["input_ids"])[0]
        assert tokens.shape == (len(protein) + 2, 16)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
@pytest.mark.parametrize("before", [True, False])
def test_neither_padding_nor_neighbours_matter(esm_settings, make, run, positions, before):
    esm_settings["encoder"] |= {"position_embedding_type": positions, "emb_layer_norm_before": before}
    modality, encoder = make(esm_settings)
    together = run(modality, encoder, [*PROTEINS, "ACDEFG" * 20])
    for protein, tokens in zip(PROTEINS, together, strict=False):
        torch.testing.assert_close(run(modality, encoder, [protein])[0], tokens, rtol=0, atol=1e-5)


def test_long_sequences_are_cut_off(esm_settings, make, run):
    modality, encoder = make({**esm_settings, "max_residues": 6})
    long, short = run(modality, encoder, ["MKTAYIAKQR", "MKTAYI"])
    assert long.shape == (8, 16)
    torch.testing.assert_close(long, short)
    default = modality_from_settings(esm_settings, "settings")
    assert default.soft_tokens(default.features("M" * 3000)) == 1024


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("MKJA", ["'MKJA'", "'J'", "position 3"]),
        ("MK-A", ["'-'"]),
        ("MK A", ["' '"]),
        ("M" * 80 + "1", ["MMM...'", "81 characters", "'1'"]),
        (" \n", ["empty"]),
    ],
)
def test_what_is_no_protein(esm_settings, make, item, words):
    modality, _ = make(esm_settings)
    with pytest.raises(InputError) as error:
        modality.features(item)
    assert all(word in str(error.value) for word in words)
    assert "M" * 50 not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pad_token_id": 0}, "encoder: pad_token_id is 0, expected 1"),
        ({"vocab_size": 30}, "vocab_size is 30"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"position_embedding_type": "absolute", "max_position_embeddings": 100}, "96 residues"),
    ],
)
def test_settings_that_cannot_be(esm_settings, make, change, words):
    esm_settings["encoder"] |= change
    with pytest.raises(InputError, match=words):
        make(esm_settings)


def test_saved_and_loaded(esm_settings, make, run, tmp_path):
    modality, encoder = make(esm_settings)
    save_encoder(modality, encoder, tmp_path / "protein")
    assert not [name for name in load_file(tmp_path / "protein" / "model.safetensors") if "inv_freq" in name]
    again = open_modality(tmp_path / "protein")
    loaded = load_encoder(again, tmp_path / "protein", hidden_size=16)
    for before, after in zip(run(modality, encoder, PROTEINS), run(again, loaded, PROTEINS), strict=True):
        assert torch.equal(before, after)
    assert not loaded.training


def test_checkpoints_of_older_versions(esm_settings, saved, run):
    """Position embeddings that are not used, and one set of frequencies for each layer."""
    modality = modality_from_settings(esm_settings, "settings")
    expected = run(modality, load_encoder(modality, saved, 16), PROTEINS)

    def change(weights):
        frequencies = weights.pop("encoder.rotary_embeddings.inv_freq", 10000.0 ** -(torch.arange(0, 8, 2) / 8))
        for layer in range(2):
            name = f"encoder.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"
            weights[name] = frequencies.clone()
        weights["encoder.embeddings.position_embeddings.weight"] = torch.randn(1026, 32)

    rewrite(saved, change)
    found = run(modality, load_encoder(modality, saved, 16), PROTEINS)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_frequencies_that_were_rounded_are_kept(esm_settings, saved, reference, tokenizer, run, tmp_path):
    """Published checkpoints were trained with them."""
    modality = modality_from_settings(esm_settings, "settings")
    rounded = reference.encoder.rotary_embeddings.inv_freq.bfloat16()
    reference.encoder.rotary_embeddings.inv_freq.copy_(rounded)
    rewrite(saved, lambda weights: weights.update({"encoder.rotary_embeddings.inv_freq": rounded}))
    protein = "ACDEFGHIKL" * 30
    with torch.no_grad():
        expected = reference(tokenizer(protein, return_tensors="pt")["input_ids"])[0]
    encoder = load_encoder(modality, saved, 16)
    torch.testing.assert_close(run(modality, encoder, [protein])[0], expected, rtol=0, atol=1e-5)
    save_encoder(modality, encoder, tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again" / "model.safetensors") if "inv_freq" in name]
    modality = open_modality(tmp_path / "again")
    assert modality.frequencies == "bfloat16"
    again = load_encoder(modality, tmp_path / "again", 16)
    torch.testing.assert_close(run(modality, again, [protein])[0], expected, rtol=0, atol=1e-5)


def test_half_precision_keeps_the_frequencies(esm_settings, saved):
    modality = modality_from_settings(esm_settings, "settings")
    exact = load_encoder(modality, saved, 16)
    half = load_encoder(modality, saved, 16, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    buffers = dict(half.named_buffers())
    for name, buffer in exact.named_buffers():
        assert torch.equal(buffers[name], buffer), name


def test_gradients_reach_the_projector(esm_settings, saved):
    modality = modality_from_settings(esm_settings, "settings")
    encoder = load_encoder(modality, saved, 16).train()
    encoder(**modality.collate([modality.features(item) for item in PROTEINS]))[:, 0].sum().backward()
    assert encoder.projector.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "hidden_size", "words"),
    [
        (lambda weights: None, 24, ["projector.fc2", "[16]", "[24]", "hidden size 24"]),
        (lambda weights: weights.pop("projector.fc1.bias"), 16, ["lacks projector.fc1.bias"]),
        (lambda weights: weights.update(extra=torch.zeros(2)), 16, ["has unexpected extra"]),
        (
            lambda weights: weights.update({"encoder.rotary_embeddings.inv_freq": torch.ones(7)}),
            16,
            ["encoder.rotary_embeddings.inv_freq", "[7]", "[4]"],
        ),
    ],
)
def test_weights_that_do_not_fit(esm_settings, saved, change, hidden_size, words):
    rewrite(saved, change)
    with pytest.raises(InputError) as error:
        load_encoder(modality_from_settings(esm_settings, "settings"), saved, hidden_size)
    assert all(word in str(error.value) for word in words), error.value


def test_weights_by_name(esm_settings, saved, run):
    modality = modality_from_settings(esm_settings, "settings")
    weights = load_file(saved / "model.safetensors")
    names = set(weights)
    encoder = load_encoder(modality, weights, 16, source="a specialist")
    assert set(weights) == names
    expected = run(modality, load_encoder(modality, saved, 16), PROTEINS)
    assert all(torch.equal(one, other) for one, other in zip(run(modality, encoder, PROTEINS), expected, strict=True))
    del weights["projector.fc2.weight"]
    with pytest.raises(InputError, match=r"a specialist lacks projector\.fc2\.weight"):
        load_encoder(modality, weights, 16, source="a specialist")


def test_weights_that_are_missing_or_pickled(esm_settings, tmp_path):
    modality = modality_from_settings(esm_settings, "settings")
    with pytest.raises(InputError, match="no folder"):
        load_encoder(modality, tmp_path / "nowhere", 16)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        load_encoder(modality, tmp_path, 16)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}])
def test_known_shapes_are_those_of_the_encoder(esm_settings, changes):
    modality = modality_from_settings({**esm_settings, "encoder": {**esm_settings["encoder"], **changes}}, "the test")
    built = modality.build(hidden_size=20).state_dict()
    assert modality.known_shapes(20) == {name: tuple(tensor.shape) for name, tensor in built.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "absolute"},
        {"emb_layer_norm_before": True},
        {"num_attention_heads": 5},
        {"hidden_act": "nonsense"},
        {"hidden_dropout_prob": "much"},
    ],
)
def test_shapes_of_other_models_than_esm2_are_not_known(esm_settings, changes):
    modality = modality_from_settings({**esm_settings, "encoder": {**esm_settings["encoder"], **changes}}, "the test")
    assert modality.known_shapes(20) is None
