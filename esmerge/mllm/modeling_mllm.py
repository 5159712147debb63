"""An LLM with any number of encoders, whose soft tokens take the places of placeholders in the prompt."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from esmerge.errors import InputError
from esmerge.mllm.configuration_mllm import MllmConfig
from esmerge.modalities.modality import Encoder, Features, feature_name, split_features
from esmerge.modalities.registry import empty_encoder

_GETTER = re.compile(r"get_(\w+)_features$")
# Name of a feature that takes the place of all others: soft tokens made before, [sum of n_i, hidden].
SOFT_TOKENS = "soft_tokens"
_IGNORED_LABEL = -100  # what torch's cross_entropy leaves out by default


class MllmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """An LLM with modality encoders.

    Beside the LLM's own, it takes as inputs `<modality>_<feature>` for each feature that the modality's encoder needs
    (a processor makes them), or `<modality>_soft_tokens` [sum of n_i, hidden]. The items of a modality come in the
    order of their placeholders, row after row of the batch. `get_<modality>_features(**features)` gives soft tokens.

    Args:
        llm_class: of the LLM; by default that which transformers has for its configuration.
    """

    config_class = MllmConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]

    config: MllmConfig

    def __init__(self, config: MllmConfig, llm_class: type[PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        make = AutoModelForCausalLM.from_config if llm_class is None else llm_class._from_config
        self.language_model: Any = make(config.text_config)
        names = [name for name in config.modalities if config.placeholder_id(name) is not None]
        self.encoders = nn.ModuleDict({name: config.modality(name).build(config.hidden_size) for name in names})
        self._no_split_modules = [*(self.language_model._no_split_modules or ()), *self._encoder_classes()]
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As that of any model of transformers."""
        loaded: Any = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, encoder in model.encoders.items():
            _restore_buffers(encoder, empty_encoder(model.config.modality(name), model.config.hidden_size))
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As that of any model of transformers; `InputError` where an adapter is inside, which it could not load."""
        if hasattr(self.language_model, "merge_and_unload"):
            raise InputError("the LLM has an adapter of PEFT inside: call the model's merge_and_unload() first.")
        return super().save_pretrained(save_directory, *args, **kwargs)

    def merge_and_unload(self) -> "MllmForConditionalGeneration":
        """Merge the adapter in the LLM, if there is one, into its weights; returns the model itself."""
        if hasattr(self.language_model, "merge_and_unload"):
            self.language_model = self.language_model.merge_and_unload()
        return self

    def _encoder_classes(self) -> list[str]:
        return sorted({type(encoder).__name__ for encoder in self.encoders.values()})

    def __getattr__(self, name: str) -> Any:
        encoders = self.__dict__.get("_modules", {}).get("encoders", ())
        if (match := _GETTER.match(name)) and match[1] in encoders:
            return partial(self.get_modality_features, match[1])
        return super().__getattr__(name)

    def get_input_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the LLM's."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The LLM's."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the LLM's."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_modality_features(self, modality: str, **features: Tensor) -> Tensor:
        """Soft tokens [sum of n_i, hidden] of the items of one modality, from its encoder.

        Args:
            modality: its name.
            features: what its encoder takes, by the encoder's names.
        """
        if SOFT_TOKENS in features:
            return features[SOFT_TOKENS]
        encoder = self.encoders[modality]
        assert isinstance(encoder, Encoder)
        # An encoder without parameters hands on soft tokens that were made for the LLM.
        dtype = next((p.dtype for p in encoder.parameters()), self.dtype)
        found: Tensor = encoder(**{n: f.to(dtype) if f.is_floating_point() else f for n, f in features.items()})
        return found

    def get_placeholder_mask(self, modality: str, input_ids: Tensor, soft_tokens: int) -> Tensor:
        """Where a modality's placeholders are, bool [B, T].

        Raises:
            InputError: if they are not as many as there are soft tokens.
        """
        token_id = self.config.placeholder_id(modality)
        assert token_id is not None
        mask = input_ids.eq(token_id)
        if (count := int(mask.sum())) != soft_tokens:
            raise InputError(
                f"the prompts have {count} positions for {modality}, its items make {soft_tokens} soft tokens: "
                "give each placeholder its item, and let the processor make the inputs."
            )
        return mask

    def embed_inputs(self, input_ids: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
        """Input embeddings [B, T, H] with the soft tokens in their places.

        Args:
            input_ids: [B, T].
            features: of the items of each modality, in the order of their placeholders.
        """
        features = features or {}
        soft_tokens = {name: self.get_modality_features(name, **own) for name, own in features.items()}
        masks = {
            name: self.get_placeholder_mask(name, input_ids, len(soft_tokens[name]) if name in soft_tokens else 0)
            for name in self.encoders
        }
        # A placeholder's own embedding is never used, and need not exist.
        ids = input_ids
        for mask in masks.values():
            ids = ids.masked_fill(mask, 0)
        embeds = self.get_input_embeddings()(ids)
        for name, tokens in soft_tokens.items():
            places = masks[name].unsqueeze(-1).to(embeds.device)
            embeds = embeds.masked_scatter(places, tokens.to(embeds.device, embeds.dtype))
        return embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The LLM's output for prompts with items in them; the loss too if there are labels."""
        features, others = self._split(kwargs)
        started = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            # What the model itself writes has no items, even if it should write a placeholder.
            written = started and not features
            inputs_embeds = (
                self.get_input_embeddings()(input_ids) if written else self.embed_inputs(input_ids, features)
            )
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # As `generate` counts them: from each row's first token, whatever padding stands before it.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -inputs_embeds.shape[1] :]
        if labels is not None:
            # Items are given, never predicted.
            for name in self.encoders:
                token_id = self.config.placeholder_id(name)
                assert token_id is not None
                labels = labels.masked_fill(labels.eq(token_id), _IGNORED_LABEL)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **others,
        )

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As `generate` of any LLM; the items are encoded once, before the first token.

        Returns:
            The prompts' ids, placeholders included, followed by the new ones.
        """
        features, others = self._split(kwargs)
        if input_ids is not None and "inputs_embeds" not in others:
            others["inputs_embeds"] = self.embed_inputs(input_ids, features)
        generate: Callable[..., Any] = super().generate
        return generate(input_ids, **others)

    def _split(self, kwargs: Mapping[str, Any]) -> tuple[dict[str, Features], dict[str, Any]]:
        """Features by modality, and what is left."""
        features = split_features(list(self.encoders), kwargs)
        taken = {feature_name(name, feature) for name, own in features.items() for feature in own}
        return features, {key: value for key, value in kwargs.items() if key not in taken}


def _restore_buffers(encoder: nn.Module, built: nn.Module) -> None:
    """Give an encoder the buffers that no checkpoint has, as it was built with: transformers loads into empty ones."""
    for name, module in encoder.named_modules():
        for leaf in module._non_persistent_buffers_set:
            value, empty = built.get_submodule(name)._buffers[leaf], module._buffers[leaf]
            if value is not None and empty is not None:
                module._buffers[leaf] = value.to(empty.device)
