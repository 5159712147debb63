"""Tiny encoders with random weights."""

import pytest
import torch

from esmerge.modalities import modality_from_settings

ESM = {
    "model_type": "esm",
    "vocab_size": 33,
    "pad_token_id": 1,
    "mask_token_id": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 1026,
    "layer_norm_eps": 1e-5,
    "position_embedding_type": "rotary",
    "emb_layer_norm_before": False,
    "token_dropout": True,
}


@pytest.fixture
def esm_settings():
    return {"kind": "esm", "placeholder": "<protein>", "encoder": dict(ESM), "intermediate_size": 24}


@pytest.fixture
def make():
    """A function that makes a modality and an encoder with random weights from settings."""

    def make(settings, hidden_size=16, folder=None, seed=0):
        modality = modality_from_settings(settings, "settings", folder)
        torch.manual_seed(seed)
        encoder = modality.build(hidden_size)
        with torch.no_grad():
            for parameter in encoder.parameters():
                # Norms and biases start as ones and zeros, which would hide whether they are applied.
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return modality, encoder.eval()

    return make


@pytest.fixture
def run():
    """A function that gives the soft tokens of each of some items, encoded in one batch."""

    @torch.no_grad()
    def run(modality, encoder, items):
        features = [modality.features(item) for item in items]
        sizes = [modality.soft_tokens(item) for item in features]
        return encoder(**modality.collate(features)).split(sizes)

    return run
