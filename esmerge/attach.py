"""Runs a layer of the base as a specialist's, for the duration of a context."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esmerge.deltas import Delta, LoraDelta

Observer = Callable[[str, Tensor, Tensor], None]

# The number of positions in a backward pass is a multiple of this: for each size that it ever sees, the library behind
# torch's products on a CPU keeps kernels in memory.
POSITIONS = 64


@contextmanager
def attached(
    module: nn.Module,
    deltas: Mapping[str, Delta],
    observe: Mapping[str, Observer] | None = None,
    leaves: Collection[str] = (),
    uncalled: Collection[str] = (),
) -> Iterator[None]:
    """Run `module`, a decoder layer, with deltas added to its parameters.

    LoRA deltas of linear layers copy nothing: the layer's forward function is replaced by one that adds
    `scaling * (x A^T) B^T`. Other deltas replace their parameter.

    Args:
        deltas: by name of the parameter inside the module.
        observe: by name of a linear layer's weight, called in the backward pass with that name, the layer's input
            [n, in] and the gradient of its output [n, out], at the n positions where that is not zero. The pair gives
            the gradients of the weight and of its factors, without autograd ever forming them.
        leaves: names of parameters that collect gradients.
        uncalled: names of weights of linear layers that `module` reads without calling them (`uncalled_linears`).
    """
    observe = observe or {}
    linears: list[Any] = []
    replaced = {}
    called = {name for name in deltas if is_linear(module, name)}.difference(uncalled)
    lora = {name: delta for name, delta in deltas.items() if isinstance(delta, LoraDelta) and name in called}
    try:
        for name, delta in deltas.items():
            if name not in lora:
                replaced[name] = _replace(module, name, delta)
        for name in lora.keys() | observe.keys():
            linear: Any = _owner(module, name)
            factors = lora[name].cast(linear.weight.dtype) if name in lora else None
            linear.forward = partial(_forward, linear, factors, name, observe.get(name))
            linears.append(linear)
        for name in leaves:
            module.get_parameter(name).requires_grad_(True)
        yield
    finally:
        for linear in linears:
            del linear.forward
        for name in leaves:
            module.get_parameter(name).requires_grad_(False).grad = None
        for name, parameter in replaced.items():
            _owner(module, name).register_parameter(name.rpartition(".")[2], parameter)


def is_linear(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` is the weight of a linear layer of `module`."""
    return name.endswith(".weight") and isinstance(_owner(module, name), nn.Linear)


def uncalled_linears(module: nn.Module, run: Callable[[], object]) -> frozenset[str]:
    """Names of the weights of linear layers that a module does not call while it runs: it may still read these.

    Args:
        run: runs the module.
    """
    called: set[nn.Module] = set()
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    handles = [child.register_forward_pre_hook(lambda own, _: called.add(own)) for child in linears.values()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(f"{name}.weight" for name, child in linears.items() if child not in called)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _replace(module: nn.Module, name: str, delta: Delta) -> nn.Parameter:
    parameter = module.get_parameter(name)
    base = parameter.detach().cpu().float()
    delta = delta.to(base.device) if isinstance(delta, LoraDelta) else delta
    tensor = (base + delta.rows(0, base.shape[0], base)).to(parameter)
    _owner(module, name).register_parameter(name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))
    return parameter


def _forward(linear: nn.Linear, delta: LoraDelta | None, name: str, observer: Observer | None, x: Tensor) -> Tensor:
    if observer is None or not torch.is_grad_enabled():
        return _apply(linear, delta, x)
    # Where no input requires a gradient, the anchor still brings about a backward pass.
    anchor = x.new_empty(0, requires_grad=True)
    return _Observed.apply(anchor, x, linear.bias, linear, delta, partial(observer, name))


def _apply(linear: nn.Linear, delta: LoraDelta | None, x: Tensor) -> Tensor:
    output = F.linear(x, linear.weight, linear.bias)
    if delta is None:
        return output
    return output.add_(F.linear(F.linear(x, delta.a) * delta.scaling, delta.b))


class _Observed(torch.autograd.Function):
    """A linear layer with a delta, whose backward pass leaves out the positions that have no gradient.

    A distance at some positions has none at the others, in everything that comes after the layer's attention.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        bias: Tensor | None,
        linear: nn.Linear,
        delta: LoraDelta | None,
        observer: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.delta, ctx.observer = linear, delta, observer
        return _apply(linear, delta, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        touched = gradient.abs().amax(dim=-1) != 0  # true of NaN too
        count = min(len(touched), -(-int(touched.sum()) // POSITIONS) * POSITIONS)
        positions = touched.logical_not().argsort(stable=True)[:count]
        gradient = gradient[positions]
        ctx.observer(x.flatten(0, -2)[positions], gradient)
        to_x = None
        if ctx.needs_input_grad[1]:
            to_positions = gradient @ ctx.linear.weight
            if ctx.delta is not None:
                to_positions += (gradient @ ctx.delta.b * ctx.delta.scaling) @ ctx.delta.a
            to_x = torch.zeros(x.shape, dtype=x.dtype, device=x.device)  # laid out as `view` needs it
            to_x.view(-1, x.shape[-1])[positions] = to_positions
        return None, to_x, gradient.sum(dim=0) if ctx.needs_input_grad[2] else None, None, None, None
