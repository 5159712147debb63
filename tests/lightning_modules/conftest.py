import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Larger than usual, so that a random model's answers differ in likelihood by more than rounding.
    "initializer_range": 0.3,
}


@pytest.fixture
def tiny_settings():
    """Settings that every decoder's configuration class knows."""
    return TINY


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()
