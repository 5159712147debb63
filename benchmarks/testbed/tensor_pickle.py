"""Reads pickled dictionaries of tensors or texts without letting the pickle run anything else."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _load_storage(serialized: bytes) -> Any:
    """Torch's own `_load_from_bytes` unpickles freely; this one accepts tensor storages only."""
    return torch.load(io.BytesIO(serialized), weights_only=True)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}


class _TensorUnpickler(pickle.Unpickler):
    """Knows the three names that a pickled tensor needs; any other name in the pickle is refused."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}, which is not part of a tensor"
            ) from None


def load_tensor_dictionary(pickled: bytes) -> dict[str, Tensor]:
    """A pickled dictionary from names to tensors; raises `pickle.UnpicklingError` for anything else."""
    return _load_dictionary(pickled, Tensor, "tensors")


def load_text_dictionary(pickled: bytes) -> dict[str, str]:
    """A pickled dictionary from names to texts; raises `pickle.UnpicklingError` for anything else."""
    return _load_dictionary(pickled, str, "texts")


def _load_dictionary(pickled: bytes, kind: type[Any], plural: str) -> dict[str, Any]:
    loaded = _TensorUnpickler(io.BytesIO(pickled)).load()
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(value, kind) for name, value in loaded.items()
    ):
        raise pickle.UnpicklingError(f"the pickle holds something other than a dictionary from names to {plural}")
    return loaded
