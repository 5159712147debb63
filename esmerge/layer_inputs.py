"""What linear layers read in each specialist, taken down at chosen positions while the probe passes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esmerge.attach import is_linear
from esmerge.errors import InputError
from esmerge.methods.matching import Positions
from esmerge.probe import Probe
from esmerge.scores import Scratch, Spooled

# By canonical name of a linear layer's weight, what it reads in each specialist, [n, in].
Inputs = dict[str, list[Spooled]]
# Of so many positions of all probe inputs together, evenly spread, is kept what a specialist's linear layers read; they
# stand for the others. More hardly change what is fitted to them, and time, memory and scratch file grow with them.
READ_POSITIONS = 2048


@dataclass(frozen=True)
class ReadAt:
    """Where what linear layers read is taken down.

    Attributes:
        mask: bool [M, B, T], for the specialist of each modality.
        stands_for: by modality, for how many positions each of those of all batches stands, float64 [n]; None where
            each is read.
    """

    mask: Tensor
    stands_for: tuple[Tensor | None, ...]

    def scales(self, own: int) -> Tensor | None:
        """Of the rows of all batches, float32 [n]: these make their products those of all that they stand for."""
        number = self.stands_for[own]
        return None if number is None else number.sqrt().float()


def read_positions(probe: Probe, wanted: Collection[Positions]) -> list[dict[Positions, ReadAt]]:
    """By batch, the positions at which to take down what linear layers read."""
    attended = [batch.attention_mask.bool() for batch in probe.batches]
    # Of each input, whatever stands in the same batch.
    items = [batch.masks.any(dim=0) for batch in probe.batches]
    before_end = [mask.flip(-1).cumsum(-1).flip(-1) > 0 for mask in items]
    all_of_it = [mask & part for mask, part in zip(attended, before_end, strict=True)]
    after = [mask & ~part for mask, part in zip(attended, before_end, strict=True)]
    found: list[dict[Positions, ReadAt]] = [{} for _ in probe.batches]
    modalities = range(len(probe.modalities))
    owns = [[batch.masks[index] for batch in probe.batches] for index in modalities]
    # Item and what follows it are thinned each by itself: the few positions where an answer begins tell other things.
    places: dict[Positions, list[list[list[Tensor]]]] = {
        "own": [[own] for own in owns],
        "own_and_after": [[own, after] for own in owns],
        "all": [[all_of_it] for _ in modalities],
        "whole": [[attended] for _ in modalities],
    }
    for positions in wanted:
        thinned = [_thinned(parts) for parts in places[positions]]
        stands_for = tuple(weight for _, weight in thinned)
        for number, own in enumerate(found):
            own[positions] = ReadAt(torch.stack([masks[number] for masks, _ in thinned]), stands_for)
    return found


def _thinned(parts: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], Tensor | None]:
    """At most `READ_POSITIONS` of positions, and for how many each of them stands, float64 [n]; None for all of them.

    Args:
        parts: of the positions; by part and batch, a mask [B, T].
    """
    shapes = [mask.shape for mask in parts[0]]
    flat = [torch.cat([mask.flatten() for mask in masks]) for masks in parts]
    totals = [int(mask.sum()) for mask in flat]
    stands_for = torch.zeros(flat[0].shape, dtype=torch.float64, device=flat[0].device)
    for masks, own, total, room in zip(parts, flat, totals, _rooms(totals), strict=True):
        if total > room:
            room = _out_of_step(room, masks)
            rank = own.cumsum(0)
            own = own & (rank * room // total != (rank - 1) * room // total)
        stands_for[own] = total / max(1, room)
    kept = stands_for > 0
    split = kept.split([math.prod(shape) for shape in shapes])
    masks = [part.view(shape) for part, shape in zip(split, shapes, strict=True)]
    return masks, stands_for[kept] if sum(totals) > READ_POSITIONS else None


def _rooms(totals: Sequence[int]) -> list[int]:
    """How many of each part's positions are read: an equal share at least, and what others leave."""
    share = READ_POSITIONS // len(totals)
    spare = sum(max(0, share - total) for total in totals)
    return [min(total, share + spare) for total in totals]


def _out_of_step(room: int, masks: Sequence[Tensor]) -> int:
    """So many positions, or a few less, that inputs of one length are not all read at the same places."""
    lengths = torch.cat([mask.sum(dim=-1) for mask in masks])
    lengths = lengths[lengths > 0]
    if len(lengths.unique()) == 1:
        while math.gcd(room, len(lengths)) > 1:
            room -= 1
    return room


class Reading:
    """Takes down what linear layers read in a specialist, while it is entered.

    Args:
        layer: a decoder layer.
        names: of its parameters; those that are no linear layer's weight are left out.
        own: index of the specialist's modality.
        positions: where.

    Attributes:
        at: those positions in the batch that goes through the layer.
    """

    at: Mapping[Positions, ReadAt]

    def __init__(self, layer: nn.Module, names: Sequence[str], own: int, positions: Sequence[Positions]) -> None:
        self._owners = {
            name: layer.get_submodule(name.rpartition(".")[0]) for name in names if positions and is_linear(layer, name)
        }
        self._own, self._positions = own, positions
        self._parts: dict[Positions, dict[str, list[Tensor]]] = {
            where: {name: [] for name in self._owners} for where in positions
        }
        # Several layers read the same tensor: it is taken down once.
        self._latest: tuple[Tensor, dict[Positions, Tensor]] | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Reading":
        for name, owner in self._owners.items():
            self._handles.append(owner.register_forward_pre_hook(partial(self._note, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._latest = None

    def _note(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        if self._latest is None or self._latest[0].data_ptr() != x.data_ptr() or self._latest[0].shape != x.shape:
            masks = {where: self.at[where].mask[self._own].flatten() for where in self._positions}
            count = len(next(iter(masks.values())))
            rows = x.flatten(0, -2)  # some layers read the positions of all inputs in one go
            if len(rows) != count:
                raise InputError(
                    f"{name} reads {len(rows)} of {count} positions, as experts do: methods that match "
                    "inputs cannot merge it; use another method."
                )
            self._latest = x, {where: rows[mask] for where, mask in masks.items()}
        for where, part in self._latest[1].items():
            self._parts[where][name].append(part)

    def spooled(self, scratch: Scratch) -> dict[Positions, dict[str, Spooled]]:
        """What was read, [n, in] over all batches, by positions and name."""
        found: dict[Positions, dict[str, Spooled]] = {}
        known: dict[tuple[int, ...], Spooled] = {}
        for where, parts in self._parts.items():
            for name, own in parts.items():
                if not own:
                    continue  # never called: its weight is used in another way
                key = tuple(map(id, own))
                if key not in known:
                    known[key] = scratch.put(torch.cat(own), self.at[where].scales(self._own))
                found.setdefault(where, {})[name] = known[key]
        return found
