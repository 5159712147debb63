"""Runs a layer of the base as a specialist's, for the duration of a context."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esmerge.deltas import Delta, LoraDelta

Observer = Callable[[str, Tensor, Tensor], None]


@contextmanager
def attached(
    module: nn.Module,
    deltas: Mapping[str, Delta],
    observe: Mapping[str, Observer] | None = None,
    leaves: Collection[str] = (),
) -> Iterator[None]:
    """Run `module`, a decoder layer, with deltas added to its parameters.

    LoRA deltas of linear layers copy nothing: a forward hook adds `scaling * (x A^T) B^T` to the output. A and B are
    used as they are, so that they collect gradients if they are leaves that require them. Other deltas replace their
    parameter.

    Args:
        deltas: by name of the parameter inside the module.
        observe: by name of a linear layer's weight, called in the backward pass with that name, the layer's input
            [.., in] and the gradient of its output [.., out]. The pair gives the gradient of the weight, without
            autograd ever forming it.
        leaves: names of parameters that collect gradients.
    """
    observe = observe or {}
    handles, replaced = [], {}
    hooked = {name: delta for name, delta in deltas.items() if isinstance(delta, LoraDelta) and is_linear(module, name)}
    try:
        for name, delta in deltas.items():
            if name not in hooked:
                replaced[name] = _replace(module, name, delta)
        for name in hooked.keys() | observe.keys():
            hook = _forward_hook(name, hooked.get(name), observe.get(name))
            handles.append(_owner(module, name).register_forward_hook(hook))
        for name in leaves:
            module.get_parameter(name).requires_grad_(True)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name in leaves:
            module.get_parameter(name).requires_grad_(False).grad = None
        for name, parameter in replaced.items():
            _owner(module, name).register_parameter(name.rpartition(".")[2], parameter)


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is the weight of a linear layer of `module`."""
    return name.endswith(".weight") and isinstance(_owner(module, name), nn.Linear)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _replace(module: nn.Module, name: str, delta: Delta) -> nn.Parameter:
    parameter = module.get_parameter(name)
    base = parameter.detach().cpu().float()
    tensor = (base + delta.rows(0, base.shape[0], base)).to(parameter)
    _owner(module, name).register_parameter(name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return parameter


def _forward_hook(name: str, delta: LoraDelta | None, observer: Observer | None) -> Callable[..., Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if delta is not None:
            down = F.linear(x, delta.a.to(x.dtype)) * delta.scaling
            output = output + F.linear(down, delta.b.to(x.dtype))
        if observer is not None and torch.is_grad_enabled():
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda gradient: observer(name, x.detach(), gradient))
        return output

    return hook
