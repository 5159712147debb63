"""What a model's config says: whether two models compute alike, tie their embeddings, or are quantised."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

# What decides how a decoder computes with its weights, under the names that architectures have for it. Sizes that its
# tensors show are among them, as a config is the better witness.
_COMPUTATION = (
    ("hidden_size", "n_embd", "d_model"),
    ("num_hidden_layers", "n_layer", "n_layers"),
    ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size"),
    ("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    ("partial_rotary_factor", "rotary_pct", "rotary_dim", "rotary_emb_base", "use_parallel_residual"),
    ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "norm_topk_prob"),
    ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"),
)
_FIELDS = tuple(field for group in _COMPUTATION for field in group)
_ROTARY = ("rope_theta", "rope_scaling", "rope_parameters")

# Endings of the tensors that quantisation puts beside, or in place of, a weight.
_QUANTISED_TENSORS = {
    "bitsandbytes": (".SCB", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".weight_format"),
    "GPTQ or AWQ": (".qweight", ".qzeros", ".g_idx"),
    "compressed-tensors": (".weight_packed", ".weight_scale", ".weight_zero_point"),
    "fp8": (".weight_scale_inv", ".input_scale"),
    "HQQ": (".W_q",),
    "AQLM": (".codebooks",),
    "MXFP4": ("_proj_blocks", "_proj_scales"),
}
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def kind_of(config: Mapping[str, Any]) -> str:
    """What people call the architecture, e.g. `Llama`."""
    architectures = config.get("architectures") or [str(config.get("model_type"))]
    return str(architectures[0]).removesuffix("ForCausalLM")


def difference(own: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which two configs of one model type compute differently, with both values.

    Fields that one of them leaves out are at their defaults, which differ between architectures and, for rotary
    embeddings, have had other names.
    """
    found = _differing(_decoder(own), _decoder(base))
    if found is None:
        return None
    complete = [_complete(config) for config in (own, base)]
    if None not in complete:
        return _differing(*(config for config in complete if config is not None))
    # An architecture that transformers does not know: what one of them leaves out cannot be compared.
    shared = _decoder(own).keys() & _decoder(base).keys()
    return _differing(*({field: _decoder(config)[field] for field in shared} for config in (own, base)))


def _decoder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else config


def _differing(own: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for field in (*_FIELDS, *_ROTARY):
        first, second = own.get(field), base.get(field)
        if first == second:
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            for key in sorted(first.keys() | second.keys()):
                if first.get(key) != second.get(key):
                    return f"{field}.{key}", first.get(key), second.get(key)
        return field, first, second
    return None


def _complete(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A config with its defaults, as transformers has it; None if it does not know the architecture."""
    # Imported only here, as it takes longer than a small merge and most pairs of configs agree as they are.
    from transformers import AutoConfig

    fields = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    try:
        complete = AutoConfig.for_model(str(config.get("model_type")), **fields)
        return _decoder(complete.get_text_config().to_dict())
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def ties_embeddings(config: Mapping[str, Any]) -> bool:
    """Whether the output embeddings of a model are its input embeddings, by its config."""
    stated = _decoder(config).get("tie_word_embeddings")
    if stated is None:
        stated = (_complete(config) or {}).get("tie_word_embeddings")
    return bool(stated)


def quantisation(config: Mapping[str, Any], tensors: Iterable[str]) -> str | None:
    """The method by which a checkpoint is quantised, from its config or the names of its tensors; None for none."""
    for key in ("quantization_config", "compression_config"):
        for stated in (config.get(key), _decoder(config).get(key)):
            if stated:
                return str(stated.get("quant_method", "unknown method") if isinstance(stated, dict) else stated)
    names = list(tensors)
    for method, endings in _QUANTISED_TENSORS.items():
        if any(name.endswith(endings) for name in names):
            return method
    return None
