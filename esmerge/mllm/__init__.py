"""A multimodal LLM in transformers' conventions. Importing it makes the Auto classes know it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from esmerge.mllm.configuration_mllm import MllmConfig
from esmerge.mllm.modeling_mllm import MllmForConditionalGeneration
from esmerge.mllm.processing_mllm import MllmProcessor

__all__ = ["MllmConfig", "MllmForConditionalGeneration", "MllmProcessor"]

AutoConfig.register(MllmConfig.model_type, MllmConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto.register(MllmConfig, MllmForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MllmConfig, MllmProcessor, exist_ok=True)
