"""Merges one tensor: coefficients and a method on a stream of blocks of rows."""

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from esmerge.checkpoint import Checkpoint
from esmerge.coefficients import combine, element_coefficients
from esmerge.deltas import Delta, LoraDelta, ShiftDelta, ValueDelta, is_finite
from esmerge.errors import InputError
from esmerge.low_rank import balanced_factors, kept_energy, refactor, truncated_svd
from esmerge.methods import Method
from esmerge.methods.registry import Matcher, accepted
from esmerge.scores import Score, Spooled, row_blocks

# Deltas of a tensor up to this size are kept between the passes over it; those of a larger one are made again.
_KEPT_BYTES = 64 << 20
# To match a block takes all inputs of the layer, whatever its height: so many are matched together.
_MATCHED_TOGETHER = 16

# What methods on whole tensors take for an element of each delta, all that they make of it included.
_WHOLE_BYTES = 24

Rows = Callable[[int, int], Tensor]


@dataclass
class Statistics:
    """What the coefficients of one tensor were: mean and population std over its elements, float64 [S]."""

    mean: Tensor
    std: Tensor


class Coefficients(Protocol):
    """The coefficients of every specialist for every tensor."""

    def scalars(self, name: str, layer: int | None) -> Tensor | None:
        """Coefficients [S] of a whole tensor; None where its elements have their own."""
        ...

    def rows(self, name: str, layer: int | None) -> Rows:
        """What gives the coefficients of rows start to stop, [S, rows, ...]."""
        ...


@dataclass(frozen=True)
class FixedCoefficients:
    """Numbers given beforehand.

    Attributes:
        numbers: canonical name of a tensor -> float64 [S].
    """

    numbers: Callable[[str], Tensor]

    def scalars(self, name: str, layer: int | None) -> Tensor | None:
        return self.numbers(name)

    def rows(self, name: str, layer: int | None) -> Rows:
        raise NotImplementedError


@dataclass(frozen=True)
class SignalCoefficients:
    """Coefficients from embedding signals.

    Attributes:
        outside: float64 [S], for tensors outside the decoder layers.
        layer: float64 [S, L]; None where only elements count.
        scores: by tensor name, a score per specialist; None where only layers count.
        tau: temperature of element-wise coefficients.
    """

    outside: Tensor
    layer: Tensor | None
    scores: Mapping[str, Sequence[Score]] | None = None
    tau: float = 0.1

    def scalars(self, name: str, layer: int | None) -> Tensor | None:
        if layer is None:
            return self.outside
        if self.scores is not None:
            return None
        assert self.layer is not None
        return self.layer[:, layer]

    def rows(self, name: str, layer: int | None) -> Rows:
        assert self.scores is not None and layer is not None
        scores = self.scores[name]
        means = torch.tensor([score.mean for score in scores])
        stds = torch.tensor([score.std for score in scores])
        readers = [score.reader() for score in scores]

        def coefficient_rows(start: int, stop: int) -> Tensor:
            stacked = torch.stack([read(start, stop) for read in readers])
            element = element_coefficients(stacked, means, stds, self.tau)
            return element if self.layer is None else combine(self.layer[:, layer], element)

        return coefficient_rows


@dataclass
class Merger:
    """One way to merge: coefficients, a method, its parameters.

    Attributes:
        inputs: by name of a linear layer's weight, what it reads in each specialist, [n_i, in]; for methods that match.
        known: by name of such a weight, factors B [out, r] and A [r, in] of its merged delta, if it was made before.
        statistics: of the coefficients of each tensor merged so far.
        kept_energy: of each tensor truncated so far, the share of the squared norm that was kept.
    """

    coefficients: Coefficients
    method: Method
    parameters: Mapping[str, Any]
    seed: int
    inputs: Mapping[str, Sequence[Spooled]] = field(default_factory=dict)
    known: Mapping[str, tuple[Spooled, Spooled]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    kept_energy: dict[str, float] = field(default_factory=dict)
    _shared: threading.local = field(default_factory=threading.local, repr=False)

    @property
    def is_weighted_sum(self) -> bool:
        """Whether the result is a sum of the deltas, each times a number, wherever coefficients are scalars."""
        return self.method.name in ("linear", "task_arithmetic")

    def generator(self, name: str, index: int, device: torch.device) -> torch.Generator | None:
        """What a random method draws from for one tensor of one specialist, whatever else is merged and when."""
        if not self.method.random:
            return None
        digest = hashlib.blake2b(f"{self.seed} {index} {name}".encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)

    def sum_weights(self, name: str, layer: int | None) -> Tensor | None:
        """The number [S] that each delta is multiplied by in a weighted sum; None if there is none."""
        scalars = self.coefficients.scalars(name, layer) if self.is_weighted_sum else None
        if scalars is None:
            return None
        self._note_scalars(name, scalars)
        ones = torch.eye(len(scalars), dtype=scalars.dtype)
        return self.method.function(list(ones), scalars[:, None], **self.parameters)

    def matcher(self, name: str, layer: int | None, device: torch.device) -> Matcher | None:
        """What merges a linear layer's weight from its inputs; None for other tensors and other methods."""
        if self.method.match is None or name not in self.inputs:
            return None
        numbers = self._note_numbers(name, layer)
        matchers: dict[Any, Matcher] = getattr(self._shared, "matchers", {})
        key = self.same_inputs(name), *numbers
        if key not in matchers:
            inputs = [own.rows(0, own.shape[0]).to(device) for own in self.inputs[name]]
            matchers[key] = self.method.match(inputs, numbers, **accepted(self.method.match, dict(self.parameters)))
        return matchers[key]

    def same_inputs(self, name: str) -> tuple[int, ...] | None:
        """What a linear layer has in common with those that can share its matcher; None for what needs none."""
        if self.method.match is None or name not in self.inputs or name in self.known:
            return None
        return tuple(own.offset for own in self.inputs[name])

    def sharing_groups(self, names: Iterable[str]) -> list[list[str]]:
        """Tensors that can share a matcher, such as a layer's queries, keys and values, together; others alone."""
        groups: dict[tuple[int, ...] | str, list[str]] = {}
        for name in names:
            groups.setdefault(self.same_inputs(name) or name, []).append(name)
        return list(groups.values())

    @contextmanager
    def sharing_matchers(self) -> Iterator[None]:
        """In this thread, matchers are made once for all tensors that read the same, and kept meanwhile."""
        self._shared.matchers = {}
        try:
            yield
        finally:
            del self._shared.matchers

    def known_factors(self, name: str, layer: int | None, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """B and A of a merged delta that was made before."""
        if name not in self.known:
            return None
        self._note_numbers(name, layer)
        b, a = (own.rows(0, own.shape[0]).to(device) for own in self.known[name])
        return b, a

    def _note_numbers(self, name: str, layer: int | None) -> list[float]:
        scalars = self.coefficients.scalars(name, layer)
        assert scalars is not None, "a recipe lets nothing but one number per specialist go with such a method"
        self._note_scalars(name, scalars)
        return scalars.tolist()

    def matcher_memory(self, name: str) -> int:
        """About how many bytes a tensor's matcher takes; 0 for none."""
        if self.method.match is None or name not in self.inputs or name in self.known:
            return 0
        count, width = sum(own.shape[0] for own in self.inputs[name]), self.inputs[name][0].shape[1]
        return 4 * count * width + 16 * min(count, width) ** 2

    def memory(self, name: str, stream: "TensorStream") -> int:
        """About how many bytes it takes to merge a tensor, beyond some blocks of rows."""
        if matcher := self.matcher_memory(name):
            return matcher
        if self.method.combine is None and not stream.is_unchanged:
            return _WHOLE_BYTES * len(stream.deltas) * stream.count
        return 0

    def _note_scalars(self, name: str, scalars: Tensor) -> None:
        self.statistics[name] = Statistics(scalars, torch.zeros_like(scalars))


class TensorStream:
    """A tensor of the base and what the specialists add to it, in blocks of rows, as often as needed.

    Args:
        checkpoint, stored: where the base's values are; None for no base.
        shape: of the base's tensor.
        deltas: None for a specialist that leaves it as it is.
        device: on which blocks are handed out.
        several: whether several results are made from it.
        changing: gets the indices of the specialists that change anything here.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        stored: str,
        shape: tuple[int, ...],
        deltas: Sequence[Delta | None],
        device: torch.device,
        several: bool = False,
        changing: set[int] | None = None,
    ) -> None:
        self.several = several
        self._changing = set() if changing is None else changing
        self.shape = shape
        self.deltas = deltas
        self.device = device
        self._checkpoint, self._stored = checkpoint, stored
        self.count = math.prod(shape)
        self._keep = len(deltas) * self.count * 4 <= _KEPT_BYTES
        self._kept: dict[tuple[int, int], list[Tensor]] = {}

    @cached_property
    def is_unchanged(self) -> bool:
        """Whether all deltas are zero everywhere; read as far as it takes to tell."""
        return not any(delta.any() for start, stop in self.spans for delta in self.block(start, stop))

    @property
    def spans(self) -> Iterator[tuple[int, int]]:
        """First row and last row + 1 of each block."""
        return row_blocks(self.shape)

    def base(self, start: int, stop: int) -> Tensor:
        """Rows of the base, float32; zeros without one."""
        if self._checkpoint is None:
            return torch.zeros((stop - start, *self.shape[1:]), device=self.device)
        return self._checkpoint.read_range(self._stored, start, stop).to(self.device, torch.float32)

    def block(self, start: int, stop: int, base: Tensor | None = None) -> list[Tensor]:
        """Rows of all deltas, float32; zeros for those that are none."""
        if base is None and any(delta is not None and delta.needs_base for delta in self.deltas):
            base = self.base(start, stop)
        blocks = [self.delta_rows(delta, start, stop, base) for delta in self.deltas]
        for index, block in enumerate(blocks):
            # One look at the first block that differs from zero is all that it takes.
            if index not in self._changing and block.any():
                self._changing.add(index)
        return blocks

    def note_factors(self) -> None:
        """Find out which specialists change anything where only their factors are looked at."""
        for index, delta in enumerate(self.deltas):
            if index not in self._changing and isinstance(delta, LoraDelta) and delta.a.any() and delta.b.any():
                self._changing.add(index)

    def note_values(self, base: Tensor, values: Sequence[tuple[int, Tensor]]) -> None:
        """Find out which of some specialists change anything where their values are looked at, not their deltas."""
        self._changing |= {i for i, own in values if i not in self._changing and bool((own.float() != base).any())}

    def delta_rows(self, delta: Delta | None, start: int, stop: int, base: Tensor | None) -> Tensor:
        """Rows of a delta, float32; `base` is needed for a delta that needs it."""
        if delta is None:
            return torch.zeros((stop - start, *self.shape[1:]) if self.shape else (), device=self.device)
        # A specialist whose vocabulary is not padded as the base's has fewer rows; it leaves the others as they are.
        end = max(start, min(stop, delta.shape[0])) if self.shape else stop
        missing = stop - end
        if delta.needs_base:
            assert base is not None
            rows = delta.rows(start, end, (base[: end - start] if missing else base).cpu())
        else:
            rows = delta.rows(start, end)
        if missing:
            rows = torch.cat([rows, rows.new_zeros(missing, *self.shape[1:])])
        return rows.to(self.device)

    def kept_block(self, start: int, stop: int) -> list[Tensor]:
        """As `block`, for methods that make several passes: made once where the tensor is small enough."""
        if not self._keep:
            return self.block(start, stop)
        if (start, stop) not in self._kept:
            self._kept[start, stop] = self.block(start, stop)
        return self._kept[start, stop]

    def keeps(self, start: int, stop: int) -> bool:
        """Whether an earlier pass left that block."""
        return (start, stop) in self._kept

    def one(self, index: int, start: int, stop: int) -> Tensor:
        """Rows of one specialist's delta, for a pass that needs no other."""
        if self._keep:
            return self.kept_block(start, stop)[index]
        delta = self.deltas[index]
        base = self.base(start, stop) if delta is not None and delta.needs_base else None
        return self.delta_rows(delta, start, stop, base)

    def whole(self) -> list[Tensor]:
        """All deltas, whole."""
        read = self.kept_block if self.several else self.block
        deltas = [torch.empty(self.shape, device=self.device) for _ in self.deltas]
        for start, stop in self.spans:
            for delta, block in zip(deltas, read(start, stop), strict=True):
                if self.shape:
                    delta[start:stop] = block
                else:
                    delta.copy_(block)
        return deltas


def merged_blocks(
    merger: Merger, name: str, layer: int | None, stream: TensorStream
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """The merged delta of a tensor, block by block.

    Yields:
        First row, last row + 1, rows of the merged delta in float32, and the base's rows if they were read.
    """
    method, parameters = merger.method, dict(merger.parameters)
    base: Tensor | None
    if method.match is not None and (pairs := _factors_of_sum(merger, name, layer, stream)) is not None:
        b, a = torch.cat(pairs[0], dim=1), torch.cat(pairs[1])
        for start, stop in stream.spans:
            yield start, stop, b[start:stop] @ a, None
        return
    if (matcher := merger.matcher(name, layer, stream.device)) is not None:
        for start, stop in row_blocks(stream.shape, _MATCHED_TOGETHER):
            base = stream.base(start, stop)
            block = stream.kept_block(start, stop) if stream.several else stream.block(start, stop, base)
            _check_finite(block)
            yield start, stop, matcher.merge(block).mul_(parameters["lambda_"]), base
        return
    scalars = merger.coefficients.scalars(name, layer)
    weights = _WeightRows(merger, name, layer, scalars, stream)
    if method.combine is None and stream.is_unchanged:
        # What methods on whole tensors take for a large one, such as an embedding that nobody trained, is much.
        for start, stop in stream.spans:
            weights(start, stop)
            base = stream.base(start, stop)
            yield start, stop, torch.zeros_like(base), base
        weights.finish()
        return
    if method.combine is None:
        if method.needs_base:
            parts = [stream.base(start, stop) for start, stop in stream.spans]
            parameters["base"] = torch.cat(parts) if stream.shape else parts[0]
        deltas = stream.whole()
        _check_finite(deltas)
        merged = method.function(deltas, weights(0, stream.shape[0] if stream.shape else 1), **parameters)
        weights.finish()
        yield 0, stream.shape[0] if stream.shape else 1, merged, parameters.get("base")
        return
    combined = accepted(method.combine, parameters)
    if method.sparsify is None:
        for start, stop in stream.spans:
            base = stream.base(start, stop)
            block = stream.kept_block(start, stop) if stream.several else stream.block(start, stop, base)
            yield start, stop, method.combine(block, weights(start, stop), **combined), base
    else:
        sparsifiers = [_sparsifier(merger, name, stream, index) for index in range(len(stream.deltas))]
        for start, stop in stream.spans:
            kept = stream.several or stream.keeps(start, stop)
            base = None if kept else stream.base(start, stop)
            block = stream.kept_block(start, stop) if kept else stream.block(start, stop, base)
            if not method.random:  # a random mask is multiplied by, which keeps NaN
                _check_finite(block)
            sparse = [sparsify(delta) for sparsify, delta in zip(sparsifiers, block, strict=True)]
            yield start, stop, method.combine(sparse, weights(start, stop), **combined), base
    weights.finish()


def _check_finite(deltas: Sequence[Tensor]) -> None:
    """Raise `ValueError` for values that a method could drop, clip or sort away as if they were small ones."""
    if not all(is_finite(delta) for delta in deltas):
        raise ValueError("a delta has NaN or infinite values")


def summed_blocks(
    merger: Merger, name: str, layer: int | None, stream: TensorStream
) -> Iterator[tuple[int, int, Tensor]] | None:
    """The base plus a weighted sum of deltas, in float32 and block by block, without making any of the deltas.

    With w_i for whole tensors X_i and v_j for factors, W + sum w_i (X_i - W) + sum v_j B_j A_j is
    (1 - sum w_i) W + sum w_i X_i + [v_1 B_1, ...] [A_1; ...].

    Returns:
        First row, last row + 1 and the rows of each block; None for any other method, coefficients or deltas.
    """
    if not all(delta is None or _is_plain(delta, stream.shape) for delta in stream.deltas):
        return None
    weights = merger.sum_weights(name, layer)
    return None if weights is None else _summed_blocks(weights.tolist(), stream)


def _is_plain(delta: Delta, shape: tuple[int, ...]) -> bool:
    return isinstance(delta, LoraDelta | ValueDelta) and delta.shape == shape


def _summed_blocks(weights: Sequence[float], stream: TensorStream) -> Iterator[tuple[int, int, Tensor]]:
    wholes = [
        (i, w, d) for i, (w, d) in enumerate(zip(weights, stream.deltas, strict=True)) if isinstance(d, ValueDelta)
    ]
    share = 1 - sum(weight for _, weight, _ in wholes)
    factors = _weighted_factors(weights, stream)
    b, a = (torch.cat(factors[0], dim=1), torch.cat(factors[1])) if factors[0] else (None, None)
    for start, stop in stream.spans:
        rows = stream.base(start, stop)
        values = [(index, weight, delta.values(start, stop).to(stream.device)) for index, weight, delta in wholes]
        stream.note_values(rows, [(index, own) for index, _, own in values])
        if values:
            rows *= share
        for _, weight, own in values:
            rows.add_(own, alpha=weight)
        if b is not None and a is not None:
            rows.addmm_(b[start:stop], a)
        yield start, stop, rows


def _weighted_factors(weights: Sequence[float], stream: TensorStream) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices B_i, each times its weight, and A_i, whose products add up to the weighted sum of low-rank deltas."""
    stream.note_factors()
    pairs = [(w, d) for w, d in zip(weights, stream.deltas, strict=True) if isinstance(d, LoraDelta)]
    bs = [(delta.folded_b * weight).to(stream.device) for weight, delta in pairs]
    return bs, [delta.a.to(stream.device) for _, delta in pairs]


def _sparsifier(merger: Merger, name: str, stream: TensorStream, index: int) -> Callable[[Tensor], Tensor]:
    sparsify = merger.method.sparsify
    assert sparsify is not None
    given = {**merger.parameters, "generator": merger.generator(name, index, stream.device)}

    def blocks() -> Iterator[Tensor]:
        return (stream.one(index, start, stop) for start, stop in stream.spans)

    return sparsify(blocks, stream.count, **accepted(sparsify, given))


class _WeightRows:
    """Coefficients of blocks of rows, shaped to broadcast against the stack of deltas; counts what they were."""

    def __init__(
        self, merger: Merger, name: str, layer: int | None, scalars: Tensor | None, stream: TensorStream
    ) -> None:
        self._merger, self._name, self._stream = merger, name, stream
        self._rows = None if scalars is not None else merger.coefficients.rows(name, layer)
        if scalars is not None:
            self._scalars = scalars.to(stream.device, torch.float32).view((-1,) + (1,) * max(1, len(stream.shape)))
            if not stream.shape:
                self._scalars = self._scalars.view(-1)
            merger._note_scalars(name, scalars)
        self._total = self._squares = torch.zeros(len(stream.deltas), dtype=torch.float64)

    def __call__(self, start: int, stop: int) -> Tensor:
        if self._rows is None:
            return self._scalars
        weights = self._rows(start, stop)
        doubles = weights.flatten(1).double()
        self._total = self._total + doubles.sum(dim=1)
        self._squares = self._squares + doubles.square().sum(dim=1)
        if not self._total.isfinite().all():
            raise InputError(f"no numbers come of coefficients.tau for {self._name}: tau must be larger.")
        return weights.to(self._stream.device)

    def finish(self) -> None:
        """Note mean and standard deviation."""
        if self._rows is not None:
            mean = self._total / self._stream.count
            variance = (self._squares / self._stream.count - mean.square()).clamp_min(0)
            self._merger.statistics[self._name] = Statistics(mean, variance.sqrt())


def merge_dense(merger: Merger, name: str, layer: int | None, stream: TensorStream) -> Tensor:
    """The merged delta of a tensor, whole, float32."""
    blocks = [merged for _, _, merged, _ in merged_blocks(merger, name, layer, stream)]
    return torch.cat(blocks) if len(blocks) > 1 else blocks[0]


def merge_to_delta(merger: Merger, name: str, layer: int | None, stream: TensorStream) -> Delta:
    """The merged delta of a tensor as one that a layer can be run with; low-rank where that takes no truncation."""
    if (pairs := _factors_of_sum(merger, name, layer, stream)) is not None:
        return LoraDelta(torch.cat(pairs[1]), torch.cat(pairs[0], dim=1), 1.0)
    return ShiftDelta(merge_dense(merger, name, layer, stream).cpu())


def merge_low_rank(
    merger: Merger, name: str, layer: int | None, stream: TensorStream, rank: int
) -> tuple[Tensor, Tensor]:
    """The merged delta of a weight as factors B [out, rank] and A [rank, in].

    Exactly re-factored from the stacked factors where it is a sum of low-rank deltas, each times a number or, for
    methods that match inputs, a matrix; otherwise the leading singular triplets of the dense merged delta.
    """
    if (pairs := _factors_of_sum(merger, name, layer, stream)) is not None:
        b, a, merger.kept_energy[name] = refactor(*pairs, rank)
        return b, a
    merged = merge_dense(merger, name, layer, stream)
    u, s, vt = truncated_svd(merged, min(rank, *merged.shape))
    merger.kept_energy[name] = kept_energy(s, merged.square().sum(), rank)
    return balanced_factors(u, s, vt, rank)


def _factors_of_sum(
    merger: Merger, name: str, layer: int | None, stream: TensorStream
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Matrices B_i and A_i whose products add up to the merged delta; None for deltas or methods without any."""
    if not all(delta is None or isinstance(delta, LoraDelta) for delta in stream.deltas):
        return None
    if (known := merger.known_factors(name, layer, stream.device)) is not None:
        stream.note_factors()
        return [known[0]], [known[1]]
    matcher = merger.matcher(name, layer, stream.device)
    if matcher is None:
        weights = merger.sum_weights(name, layer)
        return None if weights is None else _weighted_factors(weights.tolist(), stream)
    # Inputs act on a delta's columns alone: B_i stays, A_i becomes what a row of the delta would.
    bs, factors_a = _weighted_factors([merger.parameters["lambda_"]] * len(stream.deltas), stream)
    indices = [index for index, delta in enumerate(stream.deltas) if delta is not None]
    products = [matcher.product(index, a) for index, a in zip(indices, factors_a, strict=True)]
    solved = matcher.solve(torch.cat(products)).float().split([len(a) for a in factors_a])
    return bs, list(solved)


def merge_factors(
    merger: Merger, module: str, layer: int | None, deltas: Sequence[LoraDelta], folded: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The paper's merge: A and B separately, each with its own coefficients.

    Args:
        module: canonical name.
        deltas: of equal ranks.
        folded: put each specialist's scaling into its B; the merged pair then has scaling 1.

    Returns:
        B [out, r] and A [r, in].
    """
    bs = [delta.folded_b if folded else delta.b for delta in deltas]
    pair = []
    for letter, tensors in (("b", bs), ("a", [delta.a for delta in deltas])):
        name = f"{module}.lora_{letter}.weight"
        stream = _FactorStream([tensor.to(device) for tensor in tensors], device)
        pair.append(merge_dense(merger, name, layer, stream))
    return pair[0], pair[1]


class _FactorStream(TensorStream):
    """Factors that are in memory, as a stream; methods that need the base have none here."""

    def __init__(self, factors: Sequence[Tensor], device: torch.device) -> None:
        super().__init__(None, "", tuple(factors[0].shape), [None] * len(factors), device)
        self._factors = factors
        self._keep = False

    def block(self, start: int, stop: int, base: Tensor | None = None) -> list[Tensor]:
        return [factor[start:stop].clone() for factor in self._factors]

    def one(self, index: int, start: int, stop: int) -> Tensor:
        return self._factors[index][start:stop].clone()
