"""esmerge: merge specialist multimodal LLMs with coefficients from embedding signals."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esmerge.errors import InputError
    from esmerge.mllm.loading import load_model
    from esmerge.pipeline import merge
    from esmerge.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = ["InputError", "Recipe", "__version__", "load_model", "load_recipe", "merge"]

_HOME = {
    "InputError": "esmerge.errors",
    "Recipe": "esmerge.recipe",
    "load_model": "esmerge.mllm.loading",
    "load_recipe": "esmerge.recipe",
    "merge": "esmerge.pipeline",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: torch and transformers take seconds, `import esmerge` should not.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'esmerge' has no attribute {name!r}")
