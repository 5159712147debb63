"""A device that is no CPU, on machines that have none but that.

    echo '["merge", "recipe.yaml", "-o", "merged"]' | python -P tests/other_device.py

runs the command line for each list of arguments that it reads, on this device where a recipe has `device: other` or the
arguments `--accelerator other`. What is on it is in the CPU's memory, but cannot be mixed with what is on the CPU, nor
be read by numpy, as if it were on a GPU.
"""

import json
import sys
from functools import partial
from typing import Any, Self

import torch
from pytorch_lightning.accelerators import Accelerator, AcceleratorRegistry
from pytorch_lightning.strategies import SingleDeviceStrategy
from pytorch_lightning.trainer.connectors import accelerator_connector
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from esmerge.cli import main

NAME = "other"
_DEVICE = f"{NAME}:0"
_MIXING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
# They would make a tensor without elements and resize it, which only its memory would know of.
_RESIZING = ("arange", "arange.start", "arange.start_step", "linspace", "randperm", "eye", "eye.m")
# A GPU takes indices from the CPU.
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}


class OtherTensor(Tensor):
    """A tensor on the device."""

    # No attribute: accelerate gives those of a parameter to its class.
    __slots__ = ("held",)
    operators = 0  # that ran on it
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False, **_: Any) -> Any:
        if held.is_meta:  # accelerate makes a parameter of a parameter's class
            return torch.nn.Parameter(held, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_DEVICE,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """Torch refuses this to subclasses; a GPU's tensors have it."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """A wrapper has no memory of its own."""
        return self.held.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        """As torch has it for a GPU's tensors."""
        raise TypeError(f"can't convert {_DEVICE} device type tensor to numpy")

    def __deepcopy__(self, known: dict[int, Any]) -> Self:
        """A wrapper has no memory of its own to copy."""
        return type(self)(self.held.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is loaded comes to the CPU first."""
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator on what is held, if all of it is on this device."""
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled():  # where torch does not take apart what consists of other operators
            results = function.decompose(*args, **kwargs)
            if results is not NotImplemented:
                return results
        cls.operators += 1
        given = [own for own in tree_leaves((args, kwargs)) if isinstance(own, Tensor)]
        _check_devices(function, given)
        asked = kwargs.get("device")
        stays = asked is None or torch.device(asked).type == NAME
        if asked is not None and stays:
            kwargs["device"] = torch.device("cpu")
        held_args, held_kwargs = tree_map_only(cls, lambda own: own.held, (args, kwargs))
        results = function(*held_args, **held_kwargs)
        if function is torch.ops.aten.copy_.default:
            return args[0]
        # Of operators in place; a wrapper cannot follow a change of shape.
        known = {id(own.held): own for own in given if isinstance(own, cls) and own.shape == own.held.shape}
        return tree_map_only(Tensor, lambda own: known.get(id(own), cls(own)), results) if stays else results


def _check_devices(function: Any, given: list[Tensor]) -> None:
    """Raise what torch raises where a GPU's tensors meet the CPU's; numbers may."""
    alike = all(isinstance(own, OtherTensor) for own in given if own.dim())
    indexed = function in _INDEXING and isinstance(given[0], OtherTensor)
    if not alike and not indexed and function not in _MIXING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {function} got some of the CPU")


class _OtherGenerator(torch.Generator):
    """Torch has no generators for devices that Python registers."""

    def __new__(cls, device: torch.device | str = "cpu") -> Self:
        made = super().__new__(cls)
        made.on = torch.device(device)
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:
        return self.on


def _made(make: Any, *arguments: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return OtherTensor(make(*arguments, dtype=dtype, device="cpu"))


def _operator_of(name: str) -> Any:
    """The ATen operator of a name and an overload."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _copy_from(source: Tensor, destination: Tensor, non_blocking: bool = False) -> Tensor:
    to, own = (tensor.held if isinstance(tensor, OtherTensor) else tensor for tensor in (destination, source))
    to.copy_(own)
    return destination


def register() -> torch.library.Library:
    """Give torch the device, as long as what is returned lives."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided", *_RESIZING):
        library.impl(name, partial(_made, _operator_of(name)), "PrivateUse1")
    # How torch itself moves tensors, of lists of indices for example.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.Generator = _OtherGenerator
    return library


class OtherAccelerator(Accelerator):
    """The device as Lightning sees it."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing to do."""

    def teardown(self) -> None:
        """Nothing to do."""

    def get_device_stats(self, device: torch.device | str) -> dict[str, Any]:
        """There are none."""
        return {}

    @staticmethod
    def parse_devices(devices: int | str) -> int:
        """There is one."""
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """There is one."""
        return [torch.device(NAME, number) for number in range(devices)]

    @staticmethod
    def auto_device_count() -> int:
        """There is one."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Always."""
        return True

    @staticmethod
    def name() -> str:
        """As in `--accelerator`."""
        return NAME


class OtherDeviceStrategy(SingleDeviceStrategy):
    """Lightning's own takes the CPU for any accelerator that it does not bring itself."""

    def __init__(self, device: torch.device | str, **options: Any) -> None:
        super().__init__(NAME, **options)


def _run(arguments: list[str]) -> int:
    sys.argv = ["esmerge", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    registered = register()
    AcceleratorRegistry.register(NAME, OtherAccelerator)
    accelerator_connector.SingleDeviceStrategy = OtherDeviceStrategy
    for line in sys.stdin:
        if code := _run(json.loads(line)):
            sys.exit(code)
    sys.stdout.write(f"{OtherTensor.operators}\n")
