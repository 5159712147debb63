"""What a specialist adds to a weight of the base, under one canonical name, and how a layer runs with it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esmerge.errors import InputError

# The decoder layers' list as it is called by Llama and its like, by GPT-2 and by MPT.
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


def canonical_name(name: str) -> str | None:
    """`layers.N.<rest>` for a tensor or module inside decoder layer N, whatever stands before it.

    >>> canonical_name("base_model.model.model.layers.3.mlp.up_proj")
    'layers.3.mlp.up_proj'
    """
    match = _LAYER.search(name)
    return f"layers.{match[1]}.{match[2]}" if match else None


def canonical_tensors(names: Iterable[str], source: str) -> dict[str, str]:
    """The tensors inside decoder layers: canonical name -> the name they are stored under.

    Raises:
        InputError: if two tensors have one canonical name, as where a vision tower has layers too.
    """
    found: dict[str, str] = {}
    for name in names:
        canonical = canonical_name(name)
        if canonical is None:
            continue
        if canonical in found:
            raise InputError(
                f"{source} has layers in two places ({found[canonical]} and {name}); "
                "only models with one list of decoder layers can be merged."
            )
        found[canonical] = name
    return found


def layer_of(canonical: str) -> tuple[int, str]:
    """Layer number and the module's name inside the layer, of a canonical name."""
    _, number, inner = canonical.split(".", 2)
    return int(number), inner


@dataclass(frozen=True)
class LoraDelta:
    """The delta `scaling * B @ A` of one linear layer's weight.

    Attributes:
        a: [r, in].
        b: [out, r].
        scaling: alpha/r, or alpha/sqrt(r) for rank-stabilised LoRA.
    """

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def folded_b(self) -> Tensor:
        """B with the scaling in it, [out, r]."""
        return self.b * self.scaling

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the dense delta, [stop - start, in]."""
        return (self.b[start:stop] * self.scaling) @ self.a

    def to(self, device: torch.device) -> "LoraDelta":
        return LoraDelta(self.a.to(device), self.b.to(device), self.scaling)


Observer = Callable[[str, Tensor, Tensor], None]


@contextmanager
def attached(
    layer: nn.Module, deltas: Mapping[str, LoraDelta], observe: Mapping[str, Observer] | None = None
) -> Iterator[None]:
    """Run `layer` with LoRA deltas added to its linear modules, for the duration of the context.

    No weight is copied or changed: a forward hook adds `scaling * (x A^T) B^T` to the module's output. A and B
    are used as they are, so that they collect gradients if they are leaves that require them.

    Args:
        layer: a decoder layer.
        deltas: by module name inside the layer.
        observe: by module name inside the layer, called in the backward pass with the name, the module's
            input [.., in] and the gradient of its output [.., out]. The pair gives the gradient of the
            weight, whether or not the module has a delta, without autograd ever forming it.
    """
    observe = observe or {}
    handles = []
    for name in deltas.keys() | observe.keys():
        hook = _forward_hook(name, deltas.get(name), observe.get(name))
        handles.append(layer.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
