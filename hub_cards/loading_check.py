"""Checks that a result can be loaded, as far as that can be told without its base and without reading its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esmerge.checkpoint import Checkpoint, weights_stem
from esmerge.errors import InputError, first_line
from esmerge.modalities.registry import MODALITIES_FOLDER, WEIGHTS_STEM
from esmerge.remote_code import needs_remote_code
from esmerge.sources import read_json
from hub_cards.merged_model import ADAPTER_CONFIG, MergedModel


def check_loads(model: MergedModel) -> None:
    """Open weights, configuration, tokenizer and encoders; `InputError` names the file that is at fault."""
    with Checkpoint.open(model.folder, weights_stem(model.folder)) as checkpoint:
        if not list(checkpoint):
            raise InputError(f"{checkpoint.files[0]} holds no tensor: merge again.")
    for place in sorted((model.folder / MODALITIES_FOLDER).glob("*")):
        if any(place.glob(f"{WEIGHTS_STEM}*.safetensors")):
            Checkpoint.open(place, WEIGHTS_STEM).close()
    with _named(str(model.folder / (ADAPTER_CONFIG if model.is_adapter else "config.json"))):
        _load_config(model)
    with _named(f"the tokenizer in {model.folder}"):
        _load_tokenizer(model.folder)


def _load_config(model: MergedModel) -> None:
    if model.is_adapter:
        from peft import PeftConfig

        PeftConfig.from_pretrained(model.folder)
    elif not needs_remote_code(model.config):
        from transformers import AutoConfig

        import esmerge.mllm  # noqa: F401 - makes the multimodal model known

        AutoConfig.from_pretrained(model.folder, trust_remote_code=False)


def _load_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    from esmerge.mllm.processing_mllm import open_modalities

    file = folder / "tokenizer_config.json"
    # Code that came with a tokenizer is not run for a check.
    if file.exists() and not read_json(file).get("auto_map"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    open_modalities(folder)


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever a library makes of a broken file
        raise InputError(f"{what} cannot be loaded ({first_line(error)}): restore it, or merge again.") from error
