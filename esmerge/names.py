"""One canonical name for a tensor, whatever wraps the model that it was saved from."""

import re
from collections.abc import Iterable

from esmerge.errors import InputError

# The decoder layers' list as it is called by Llama and its like, by GPT-2 and by MPT.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MASK = re.compile(r"\.(?:attn|attention)\.(?:attention\.)?(?:bias|masked_bias)$")
# What wraps the model that PEFT was given, alone or as Mol-LLaMA's `.llm`.
_PEFT = re.compile(r"^(?:llm\.)?base_model\.model\.")
_WRAPPERS = re.compile(
    r"^(?:(?:base_model|model|llm|llama_decoder|language_model|transformer|decoder|gpt_neox|backbone|biogpt|rwkv)\.)+"
)


def canonical_name(name: str) -> str:
    """A tensor's or module's name without what wraps the decoder.

    >>> canonical_name("base_model.model.model.layers.3.mlp.up_proj.weight")
    'layers.3.mlp.up_proj.weight'
    >>> canonical_name("model.embed_tokens.weight")
    'embed_tokens.weight'
    """
    match = _LAYER.search(name)
    return f"layers.{match[1]}.{match[2]}" if match else _WRAPPERS.sub("", name)


def canonical_names(names: Iterable[str], source: str) -> dict[str, str]:
    """Canonical name -> the name a tensor is stored under.

    Raises:
        InputError: if two tensors have one canonical name, as where a vision tower has layers too.
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical in found:
            raise InputError(
                f"{source} has one tensor in two places ({found[canonical]} and {name}); "
                "only models with one list of decoder layers can be merged."
            )
        found[canonical] = name
    return found


def peft_module(name: str) -> str:
    """A module's name as the patterns of a PEFT config see it.

    >>> peft_module("base_model.model.llama_decoder.model.layers.3.mlp.up_proj")
    'llama_decoder.model.layers.3.mlp.up_proj'
    """
    return _PEFT.sub("", name)


def base_module(name: str) -> str:
    """A module's name in the base, from that in an adapter of the base or of a model that holds the base.

    >>> base_module("base_model.model.llama_decoder.model.layers.3.mlp.up_proj")
    'model.layers.3.mlp.up_proj'
    """
    return peft_module(name).removeprefix("llama_decoder.")


def is_expert(name: str) -> bool:
    """Whether a tensor is one of those that each expert of a mixture has for itself."""
    return _EXPERT.search(name) is not None


def is_rotary(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which old checkpoints carry though the config determines them."""
    return name.endswith("rotary_emb.inv_freq")


def is_mask(name: str) -> bool:
    """Whether a tensor holds a causal mask of GPT-2, GPT-NeoX or their like, which old checkpoints carry."""
    return _MASK.search(name) is not None


def layer_of(canonical: str) -> int | None:
    """Number of the decoder layer that a tensor belongs to; None outside the layers."""
    parts = canonical.split(".", 2)
    return int(parts[1]) if parts[0] == "layers" and len(parts) > 2 and parts[1].isdigit() else None


def inner_name(canonical: str) -> str:
    """The rest of a canonical name inside its layer: `mlp.up_proj.weight` of `layers.3.mlp.up_proj.weight`."""
    return canonical.split(".", 2)[2]


def natural_order(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
