"""Configuration of an LLM with encoders for other modalities."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from esmerge.modalities import Modality, modality_from_settings
from esmerge.modalities.modality import check_name


class MllmConfig(PreTrainedConfig):
    """An LLM and its modalities.

    Attributes:
        text_config: of the LLM.
        modalities: by name, the settings of each (`kind`, `placeholder`, ...) with `token_id`, the placeholder's id
            in the tokenizer. It need not be one of the LLM's embeddings. Text modalities have none.
    """

    model_type = "esmerge_mllm"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    text_config: Any = None
    modalities: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            fields = dict(self.text_config)
            self.text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        self.modalities = self.modalities or {}
        for name in self.modalities:
            check_name(name, "modalities in config.json")
        super().__post_init__(**kwargs)
        if self.text_config is not None:
            # Where `generate` and others look for them.
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if getattr(self, token, None) is None:
                    setattr(self, token, getattr(self.text_config, token, None))

    @property
    def hidden_size(self) -> int:
        """Width of the LLM."""
        return int(self.get_text_config().hidden_size)

    def modality(self, name: str) -> Modality:
        """A modality from its settings."""
        settings = {key: value for key, value in self.modalities[name].items() if key != "token_id"}
        return modality_from_settings(settings, f"the modality {name} in config.json")

    def placeholder_id(self, name: str) -> int | None:
        """Token id of a modality's placeholder; None for text."""
        token_id = self.modalities[name].get("token_id")
        return None if token_id is None else int(token_id)
