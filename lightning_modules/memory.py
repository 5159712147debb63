"""How many prompts fit into memory at a time."""

import gc
from typing import Any

import torch

from esmerge.memory import available_memory

# Beyond these, larger batches do not compute faster, but fill up more with padding.
MOST_ROWS = {"cpu": 32}
MOST_ROWS_ELSEWHERE = 256
# For what the estimate leaves out, and for others on the machine.
_USABLE_SHARE = 0.6


def release_memory() -> None:
    """Give back what a computation that failed has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: torch.device, processes: int) -> int:
    """Bytes that one of the `processes` on this machine may use on its device."""
    free = available_memory(device)
    return free if device.type == "cuda" else free // processes


def bytes_per_row(config: Any, itemsize: int, length: int, logits: int) -> int:
    """An estimate, rather too high, of what a forward of one more row takes.

    Args:
        config: of the LLM.
        itemsize: bytes of a number in the model's dtype.
        length: tokens of the row.
        logits: positions whose logits are computed.
    """
    heads = getattr(config, "num_attention_heads", 0)  # none where all layers are recurrent
    kept = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    cache = 2 * config.num_hidden_layers * kept * head_size * itemsize
    # One layer's activations at a time, and its attention weights with the mask.
    layer = (
        8 * config.hidden_size + 3 * (getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    ) * itemsize
    attention = 2 * heads * length * max(4, itemsize)
    # As the model gives them, in float32, and as log-probabilities.
    vocabulary = config.vocab_size * (itemsize + 8) * logits
    return length * (cache + layer + attention) + vocabulary


def first_batch_size(device: torch.device, processes: int, row_bytes: int, samples: int) -> int:
    """The batch size to try first."""
    most = MOST_ROWS.get(device.type, MOST_ROWS_ELSEWHERE)
    fitting = int(free_memory(device, processes) * _USABLE_SHARE) // max(1, row_bytes)
    return max(1, min(most, samples, fitting))
