"""Embedding signals: how far each specialist moves the embeddings, and which parameters do it.

One pass over the decoder, layer by layer: the layer's weights are read once, the base and every specialist
push their own hidden states through it, and the gradient of a specialist's distance never leaves the layer.
Memory is one layer, the specialists' deltas of that layer and the probe's hidden states. What linear layers read, if it
is kept, and scores of weights go to a scratch file.

Source: arXiv 2603.14405, sections on layer-wise and element-wise coefficients. S specialists, M modalities
(specialist i's own modality has its name), L layers, K probe inputs.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

from esmerge.attach import Observer, attached, is_linear
from esmerge.backbone import Backbone, LayerArguments, run_layer
from esmerge.deltas import Delta, LoraDelta, SumDelta, ValueDelta
from esmerge.distances import principal_plane, random_directions, sliced_wasserstein, standardize_together
from esmerge.errors import InputError
from esmerge.methods.matching import Positions
from esmerge.probe import Probe, ProbeBatch
from esmerge.scores import Score, Scratch, Spooled, dense_score, pair_score

Distance = Literal["mse", "frobenius"]
# By canonical name of a linear layer's weight, what it reads in each specialist, [n, in].
Inputs = dict[str, list[Spooled]]
# Of so many positions of all probe inputs together, evenly spread, is kept what a specialist's linear layers read; each
# of them stands for as many as there are. More hardly change what is fitted to them, and time, memory and scratch file
# grow with them.
READ_POSITIONS = 2048


@dataclass(frozen=True)
class ProbedSpecialist:
    """A specialist as the probe sees it.

    Attributes:
        name: its own, which is its modality's.
        layer_deltas: deltas of a decoder layer, by parameter name inside the layer.
        norm_deltas: deltas of the norm after the last layer, by parameter name inside it.
    """

    name: str
    layer_deltas: Callable[[int], dict[str, Delta]]
    norm_deltas: Callable[[], dict[str, Delta]] = dict


@dataclass(frozen=True)
class LayerMerge:
    """A merge that is done layer by layer while the probe passes, so that layers can read what merged layers hand on.

    As RegMean++ has it (Nguyen et al. 2025, arXiv 2508.03121, section 3): a specialist's layer gets the hidden states
    that come out of the merged layers before it.

    Attributes:
        key: under which what linear layers read is kept.
        positions: where.
        merge: from the number of a layer and what its linear layers read in each specialist, by canonical name of their
            weight, its merged deltas, by parameter name inside the layer.
    """

    key: str
    positions: Positions
    merge: Callable[[int, "Inputs"], dict[str, Delta]]


@dataclass(frozen=True)
class SignalSettings:
    """How embedding signals are measured.

    Attributes:
        scores: which parameters get gradient scores: those of the `factors` A and B, the `weights` that
            they change, or None.
        projections: number of random directions of the sliced Wasserstein distance.
        p: its order.
        distance: between hidden states, for the gradient: mean squared error (released code) or the
            Frobenius norm (paper).
        tokens: whose positions it takes: the specialist's `primary` modality (released code) or `all` (paper).
        seed: of the directions.
        distances: measure distances, and gradient scores. Without them the base does not run, and a specialist only as
            far into each probe input as something is read.
        inputs: at which positions to keep the inputs of the linear layers that some specialist changes.
        keep_responses: keep the pooled embeddings, [K, H] for each model, modality and layer.
    """

    scores: Literal["factors", "weights"] | None = "weights"
    projections: int = 1024
    p: float = 2.0
    distance: Distance = "mse"
    tokens: Literal["primary", "all"] = "primary"
    seed: int = 42
    distances: bool = True
    inputs: Sequence[Positions] = ()
    keep_responses: bool = False


@dataclass
class EmbeddingSignals:
    """What one pass over the probe found.

    Attributes:
        distances: float64 [S, M, L], sliced Wasserstein distance between specialist and base; NaN if not wanted.
        planes: float32 [M, 1 + S, L, K, 2], pooled embeddings of the base and the specialists on their first
            two principal axes, per modality and layer; NaN if not wanted.
        scores: by tensor name, one score per specialist. Tensor names are canonical (`layers.N.<module>.weight`);
            `layers.N.<module>.lora_a.weight` and `.lora_b.weight` for scores of factors.
        responses: by (modality, layer), [1 + S, K, H], if they were to be kept.
        inputs: by positions or by the key of a layer-wise merge, what linear layers read, if it was to be kept.
    """

    distances: Tensor
    planes: Tensor
    scores: dict[str, list[Score]] = field(default_factory=dict)
    responses: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)


def embedding_signals(
    backbone: Backbone,
    specialists: Sequence[ProbedSpecialist],
    probes: Sequence[Probe],
    settings: SignalSettings,
    scratch: Scratch,
    progress: bool = True,
    merges: Sequence[LayerMerge] = (),
) -> EmbeddingSignals:
    """Measure the embedding signals of all specialists in one pass over the decoder's layers.

    Args:
        probes: one for all specialists; or one for each, of its own modality alone, if no distances are wanted.
        scratch: takes the scores of weights, which together are as large as the model.
        merges: to do on the way.

    Raises:
        InputError: if an embedding is not finite, with the layer and the tensor that is to blame.
    """
    count, modalities = len(specialists), probes[0].modalities
    if len(probes) not in ((1,) if settings.distances else (1, count)):
        raise ValueError("there must be one probe for all specialists or, without distances, one for each")
    # Of each specialist: its probe, and its modality's place there.
    probe_of = [0 if len(probes) == 1 else i for i in range(count)]
    owns = [probes[number].modalities.index(s.name) for number, s in zip(probe_of, specialists, strict=True)]
    directions = random_directions(settings.projections, backbone.hidden_size, settings.seed).to(backbone.device)
    whole_ways, ways = _prepare(backbone, probes, probe_of, owns, settings, merges)
    batches = [own for own, _ in whole_ways]
    batches_of = [own for own, _ in ways]
    base_states = list(whole_ways[0][1]) if settings.distances else []
    # Where only merged layers hand on what is read, the specialists' own hidden states are nobody's.
    alone = specialists if settings.distances or settings.inputs else []
    states = [list(own_firsts) for _, own_firsts in ways]
    merged_states = [[list(firsts) for _, firsts in whole_ways] for _ in merges]
    del whole_ways, ways  # hidden states that only the first layer takes
    signals = EmbeddingSignals(
        torch.full((count, len(modalities), backbone.num_layers), torch.nan, dtype=torch.float64),
        torch.full((len(modalities), 1 + count, backbone.num_layers, probes[0].size, 2), torch.nan),
    )
    steps = backbone.num_layers * (settings.distances + len(alone) + len(merges))
    with tqdm(total=steps, desc="embedding signals", unit="layer", disable=not progress) as bar:
        for number, layer in enumerate(backbone.iterate_layers()):
            last = number == backbone.num_layers - 1
            norm = backbone.final_norm()[1] if last else nn.Identity()
            far = partial(_distance, norm=norm, distance=settings.distance)
            pooled, targets = [], []
            if settings.distances:
                with torch.no_grad():
                    _push(layer, number, batches[0], base_states)
                    targets = [norm(state) for state in base_states]
                pooled.append(_pool(base_states, batches[0]))
                bar.update()
            deltas = [specialist.layer_deltas(number) for specialist in specialists]
            touched = sorted(set().union(*deltas))
            for i, specialist in enumerate(alone):
                own = owns[i]
                measured = [own] if settings.tokens == "primary" else list(range(len(modalities)))
                gradients = _make_gradients(settings.scores if settings.distances else None, deltas[i], touched, layer)
                reading = _Reading(layer, touched, own, settings.inputs)
                with attached(norm, specialist.norm_deltas() if last else {}), reading:
                    _advance(layer, number, batches_of[i], states[i], gradients, targets, far, measured, reading)
                for positions, found in reading.spooled(scratch).items():
                    _enter_read(signals.inputs.setdefault(positions, {}), number, found)
                for name, score in gradients.scores(scratch).items():
                    signals.scores.setdefault(f"layers.{number}.{name}", []).append(score)
                if settings.distances:
                    pooled.append(_pool(states[i], batches[0]))
                if not _is_finite(states[i], batches_of[i], own, settings.inputs):
                    raise InputError(_blame(number, layer, backbone, specialist))
                bar.update()
            if settings.distances:
                responses = torch.stack(pooled, dim=1)
                if not responses.isfinite().all():
                    bad = (~responses.isfinite()).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist()[0]
                    raise InputError(_blame(number, layer, backbone, specialists[bad - 1] if bad else None))
                _enter_distances(signals, responses, number, directions, modalities, settings)
            for merge, own_states in zip(merges, merged_states, strict=True):
                inputs: Inputs = {}
                for i, specialist in enumerate(specialists):
                    reading = _Reading(layer, touched, owns[i], [merge.positions])
                    with attached(layer, deltas[i]), reading, torch.no_grad():
                        outputs = _read(layer, number, batches_of[i], own_states[probe_of[i]], reading)
                    if not _is_finite(outputs, batches_of[i], owns[i], [merge.positions]):
                        raise InputError(_blame(number, layer, backbone, specialist))
                    _enter_read(inputs, number, reading.spooled(scratch)[merge.positions])
                signals.inputs.setdefault(merge.key, {}).update(inputs)
                if not last:
                    _push_merged(layer, number, batches, own_states, merge, inputs, backbone)
                bar.update()
    return signals


def _prepare(
    backbone: Backbone,
    probes: Sequence[Probe],
    probe_of: Sequence[int],
    owns: Sequence[int],
    settings: SignalSettings,
    merges: Sequence[LayerMerge],
) -> tuple[list["_Way"], list["_Way"]]:
    """Each probe's way for base and merged layers, if these run, and that of its probe for each specialist."""
    shapes = [batch.attention_mask.shape for probe in probes for batch in probe.batches]
    backbone.use_fast_attention(max(rows for rows, _ in shapes), max(length for _, length in shapes))
    read = {*settings.inputs, *(merge.positions for merge in merges)}
    pairs = [list(zip(probe.batches, _read_positions(probe, read), strict=True)) for probe in probes]
    whole = settings.distances or read != {"own"} or backbone.length_matters
    whole_ways = [_on_device(own if whole or merges else [], backbone) for own in pairs]
    if whole:
        return whole_ways, [whole_ways[number] for number in probe_of]
    cut = [[_until_last(*pair, own) for pair in pairs[number]] for number, own in zip(probe_of, owns, strict=True)]
    return whole_ways, [_on_device(own, backbone) for own in cut]


def _on_device(pairs: Sequence[tuple[ProbeBatch, Mapping[Positions, "_Read"]]], backbone: Backbone) -> "_Way":
    way: _Way = ([], [])
    for batch, reads in pairs:
        first, arguments = backbone.layer_arguments(batch.inputs_embeds, batch.attention_mask)
        masks = {positions: replace(read, mask=read.mask.to(backbone.device)) for positions, read in reads.items()}
        way[0].append(_Batch(arguments, batch.masks.to(backbone.device), masks))
        way[1].append(first)
    return way


def _until_last(
    batch: ProbeBatch, reads: Mapping[Positions, "_Read"], own: int
) -> tuple[ProbeBatch, dict[Positions, "_Read"]]:
    """A batch up to the last position of a modality, which no later one can reach in a causal model."""
    stop = int(batch.masks[own].any(dim=0).nonzero().max()) + 1
    cut = ProbeBatch(batch.inputs_embeds[:, :stop], batch.attention_mask[:, :stop], batch.masks[..., :stop])
    return cut, {positions: replace(read, mask=read.mask[..., :stop]) for positions, read in reads.items()}


def _is_finite(states: Sequence[Tensor], batches: Sequence["_Batch"], own: int, positions: Sequence[Positions]) -> bool:
    """Whether all hidden states are, at the positions of a modality and wherever something is read."""
    for state, batch in zip(states, batches, strict=True):
        mask = batch.masks[own]
        for where in positions:
            mask = mask | batch.reads[where].mask[own]
        if not state[mask].isfinite().all():
            return False
    return True


def _push(layer: nn.Module, number: int, batches: Sequence["_Batch"], states: list[Tensor]) -> None:
    """Push hidden states through a layer as it is."""
    for index, batch in enumerate(batches):
        states[index] = run_layer(layer, states[index], batch.arguments[number])


def _push_merged(
    layer: nn.Module,
    number: int,
    batches: Sequence[Sequence["_Batch"]],
    states: Sequence[list[Tensor]],
    merge: LayerMerge,
    inputs: Inputs,
    backbone: Backbone,
) -> None:
    """Merge a layer and push hidden states through it."""
    try:
        with attached(layer, merge.merge(number, inputs)), torch.no_grad():
            for own_batches, own_states in zip(batches, states, strict=True):
                _push(layer, number, own_batches, own_states)
        finite = all(bool(state.isfinite().all()) for own_states in states for state in own_states)
    except (ValueError, torch.linalg.LinAlgError):
        finite = False  # no solution for inputs that are none
    if not finite:
        raise InputError(
            f"the embeddings of the merged model overflow at layer {number} in "
            f"{str(backbone.dtype).removeprefix('torch.')}; lower method.lambda, or set probe.dtype to float32."
        )


@dataclass(frozen=True)
class _Read:
    """Where what linear layers read is taken down.

    Attributes:
        mask: bool [M, B, T], for the specialist of each modality.
        stands_for: by modality, for how many positions each of those stands.
    """

    mask: Tensor
    stands_for: tuple[float, ...]

    def of(self, rows: Tensor, own: int) -> Tensor:
        """Rows [n, in] that were read, of a size that makes their products those of all that they stand for."""
        weight = self.stands_for[own]
        return rows if weight == 1 else rows.float() * weight**0.5


def _read_positions(probe: Probe, wanted: Collection[Positions]) -> list[dict[Positions, _Read]]:
    """By batch, the positions at which to take down what linear layers read."""
    attended = [batch.attention_mask.bool() for batch in probe.batches]
    # Of each input, whatever stands in the same batch.
    items = [batch.masks.any(dim=0) for batch in probe.batches]
    before_end = [mask.flip(-1).cumsum(-1).flip(-1) > 0 for mask in items]
    all_of_it = [mask & part for mask, part in zip(attended, before_end, strict=True)]
    after = [mask & ~part for mask, part in zip(attended, before_end, strict=True)]
    found: list[dict[Positions, _Read]] = [{} for _ in probe.batches]
    modalities = range(len(probe.modalities))
    owns = [[batch.masks[index] for batch in probe.batches] for index in modalities]
    longer = [[mask | part for mask, part in zip(own, after, strict=True)] for own in owns]
    places: dict[Positions, list[list[Tensor]]] = {
        "own": owns,
        "own_and_after": longer,
        "all": [all_of_it for _ in modalities],
        "whole": [attended for _ in modalities],
    }
    for positions in wanted:
        thinned = [_thinned(masks) for masks in places[positions]]
        weights = tuple(weight for _, weight in thinned)
        for number, own in enumerate(found):
            own[positions] = _Read(torch.stack([masks[number] for masks, _ in thinned]), weights)
    return found


def _thinned(masks: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """At most `READ_POSITIONS` of the positions in masks [B, T], evenly spread, and for how many each stands."""
    flat = torch.cat([mask.flatten() for mask in masks])
    total = int(flat.sum())
    if total <= READ_POSITIONS:
        return list(masks), 1.0
    rank = flat.cumsum(0)
    flat = flat & (rank * READ_POSITIONS // total != (rank - 1) * READ_POSITIONS // total)
    parts = flat.split([mask.numel() for mask in masks])
    return [part.view_as(mask) for part, mask in zip(parts, masks, strict=True)], total / READ_POSITIONS


def _read(
    layer: nn.Module, number: int, batches: Sequence["_Batch"], states: Sequence[Tensor], reading: "_Reading"
) -> list[Tensor]:
    """Have a layer read hidden states as far as batches go; returns what it makes of them."""
    outputs = []
    for state, batch in zip(states, batches, strict=True):
        reading.batch = batch
        outputs.append(run_layer(layer, state[:, : batch.masks.shape[-1]], batch.arguments[number]))
    return outputs


def _advance(
    layer: nn.Module,
    number: int,
    batches: Sequence["_Batch"],
    states: list[Tensor],
    gradients: "_NoGradients",
    targets: Sequence[Tensor],
    distance: Callable[..., Tensor],
    measured: Sequence[int],
    reading: "_Reading",
) -> None:
    """Push a specialist's hidden states through its version of a layer, and collect gradients inside it."""
    with attached(layer, gradients.deltas, gradients.observers, gradients.leaves):
        gradients.start(layer)
        for index, batch in enumerate(batches):
            reading.batch = batch
            with torch.set_grad_enabled(gradients.wanted):
                state = run_layer(layer, states[index], batch.arguments[number])
                if gradients.wanted:
                    gradients.collect(distance(state, targets[index], masks=batch.masks[measured]))
            states[index] = state.detach()


def _enter_distances(
    signals: EmbeddingSignals,
    responses: Tensor,
    number: int,
    directions: Tensor,
    modalities: Sequence[str],
    settings: SignalSettings,
) -> None:
    """Enter what the responses [M, 1 + S, K, H] of a layer say about the distance of each specialist."""
    count, size = responses.shape[1] - 1, responses.shape[2]
    for t, modality in enumerate(modalities):
        for i in range(count):
            pair = standardize_together(responses[t, 0].double(), responses[t, 1 + i].double())
            signals.distances[i, t, number] = sliced_wasserstein(*pair, directions, settings.p)
        plane = principal_plane(responses[t].flatten(0, 1).float())
        signals.planes[t, :, number] = plane.view(1 + count, size, 2)
        if settings.keep_responses:
            signals.responses[modality, number] = responses[t].cpu()


def _enter_read(inputs: Inputs, number: int, found: Mapping[str, Spooled]) -> None:
    """Enter what the linear layers of a specialist's layer read, by name inside the layer."""
    for name, spooled in found.items():
        inputs.setdefault(f"layers.{number}.{name}", []).append(spooled)


@dataclass(frozen=True)
class _Batch:
    """A probe batch on its way through the layers.

    Layers' arguments, masks of the modalities [M, B, T], and where to take down what layers read.
    """

    arguments: list[LayerArguments]
    masks: Tensor
    reads: dict[Positions, "_Read"]


# All batches, and the hidden states [B, T, H] that the first layer takes.
_Way = tuple[list[_Batch], list[Tensor]]


def _pool(states: Sequence[Tensor], batches: Sequence[_Batch]) -> Tensor:
    """Mean over each modality's positions, float32 [M, K, H]."""
    pooled = []
    for state, batch in zip(states, batches, strict=True):
        weights = batch.masks.to(torch.float32)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        pooled.append(torch.einsum("mbt,bth->mbh", weights, state.float()))
    return torch.cat(pooled, dim=1)


def _distance(
    state: Tensor, target: Tensor, *, masks: Tensor, norm: Callable[[Tensor], Tensor], distance: Distance
) -> Tensor:
    """Distance of hidden states [B, T, H], after `norm`, from the base's, summed over the modalities of `masks`."""
    total = state.new_zeros((), dtype=torch.float32)
    for mask in masks:
        gap = norm(state[mask]).float() - target[mask].float()
        total = total + (gap.square().mean() if distance == "mse" else gap.norm())
    return total


class _Reading:
    """Takes down what linear layers read in a specialist, while it is entered.

    Args:
        layer: a decoder layer.
        names: of its parameters; those that are no linear layer's weight are left out.
        own: index of the specialist's modality.
        positions: where.

    Attributes:
        batch: that goes through the layer.
    """

    batch: _Batch

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

    def __enter__(self) -> "_Reading":
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
            masks = {where: self.batch.reads[where].mask[self._own] for where in self._positions}
            count = self.batch.masks[0].numel()
            rows = x.flatten(0, -2)  # some layers read the positions of all inputs in one go
            if len(rows) != count:
                raise InputError(
                    f"{name} reads {len(rows)} of {count} positions, as experts do: methods that match "
                    "inputs cannot merge it; use another method."
                )
            self._latest = x, {where: rows[mask.flatten()] for where, mask in masks.items()}
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
                    known[key] = scratch.put(self.batch.reads[where].of(torch.cat(own), self._own))
                found.setdefault(where, {})[name] = known[key]
        return found


class _NoGradients:
    """Runs a specialist without gradients; the base of the two that take them.

    Attributes:
        wanted: whether there are parameters whose gradients are to be collected.
    """

    wanted = False

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self.deltas = dict(deltas)
        self.observers: dict[str, Observer] = {}
        self.leaves: list[str] = []

    def start(self, layer: nn.Module) -> None:
        """Called once the deltas are attached to the layer."""

    def collect(self, distance: Tensor) -> None:
        """Called with each batch's distance."""

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        """The scores over all batches, by tensor name inside the layer."""
        return {}


class _FactorGradients(_NoGradients):
    """Gradient scores of the LoRA factors A and B as they are stored, without their scaling."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__(deltas)
        self.wanted = bool(deltas)
        self.observers = dict.fromkeys(deltas, self._observe)
        self._totals: dict[str, tuple[Tensor, Tensor]] = {}
        for name, delta in deltas.items():
            assert isinstance(delta, LoraDelta)
            self._totals[name] = torch.zeros_like(delta.a), torch.zeros_like(delta.b)

    def _observe(self, name: str, x: Tensor, g: Tensor) -> None:
        delta = self.deltas[name]
        assert isinstance(delta, LoraDelta)
        delta = delta.cast(x.dtype)
        a, b = self._totals[name]
        a += ((g @ delta.b * delta.scaling).T @ x).abs()
        b += (g.T @ (x @ delta.a.T * delta.scaling)).abs()

    def collect(self, distance: Tensor) -> None:
        distance.backward()

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        found: dict[str, Score] = {}
        for name, pair in self._totals.items():
            for letter, total in zip("ab", pair, strict=True):
                found[f"{name.removesuffix('.weight')}.lora_{letter}.weight"] = dense_score(total)
        return found


class _WeightGradients(_NoGradients):
    """Gradient scores of all parameters that any specialist changes.

    For linear layers from their inputs and the gradients of their outputs; whichever is smaller is kept, those or the
    matrices they multiply to. For other parameters from autograd.
    """

    def __init__(self, deltas: Mapping[str, Delta], touched: Sequence[str], layer: nn.Module) -> None:
        super().__init__(deltas)
        self.wanted = bool(touched)
        linear = [name for name in touched if is_linear(layer, name)]
        self.observers = dict.fromkeys(linear, self._observe)
        self.leaves = [name for name in touched if name not in self.observers]
        self._parameters: dict[str, nn.Parameter] = {}
        self._pairs: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in linear}
        self._totals = {name: torch.zeros_like(layer.get_parameter(name), dtype=torch.float32) for name in self.leaves}

    def start(self, layer: nn.Module) -> None:
        self._parameters = {name: layer.get_parameter(name) for name in self.leaves}

    def _observe(self, name: str, x: Tensor, g: Tensor) -> None:
        if name in self._totals:
            self._totals[name] += (g.T @ x).abs_()
            return
        self._pairs[name].append((x, g))
        pair_bytes = sum(x.nbytes + g.nbytes for x, g in self._pairs[name])
        if pair_bytes >= x.shape[1] * g.shape[1] * torch.float32.itemsize:
            self._totals[name] = torch.zeros(g.shape[1], x.shape[1], device=x.device)
            for pair in self._pairs.pop(name):
                self._observe(name, *pair)

    def collect(self, distance: Tensor) -> None:
        distance.backward()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._totals[name] += parameter.grad.float().abs()
                parameter.grad = None

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        # One after the other, so that each tensor is gone when its score is made.
        found: dict[str, Score] = {}
        while self._totals:
            name, total = self._totals.popitem()
            found[name] = dense_score(total, scratch)
        while self._pairs:
            name, pairs = self._pairs.popitem()
            found[name] = pair_score([x for x, _ in pairs], [g for _, g in pairs], scratch)
        return found


def _make_gradients(
    scores: Literal["factors", "weights"] | None, deltas: Mapping[str, Delta], touched: Sequence[str], layer: nn.Module
) -> _NoGradients:
    if scores == "factors":
        return _FactorGradients(deltas)
    if scores == "weights":
        return _WeightGradients(deltas, touched, layer)
    return _NoGradients(deltas)


def _blame(number: int, layer: nn.Module, backbone: Backbone, specialist: ProbedSpecialist | None) -> str:
    """The sentence that names what made embeddings of layer `number` infinite or NaN, in a specialist or the base."""
    for name, parameter in layer.named_parameters():
        if not parameter.isfinite().all():
            return (
                f"{backbone.folder}: tensor {backbone.layers_name}.{number}.{name} has NaN or infinite values; "
                "download or save the base again."
            )
    for delta in specialist.layer_deltas(number).values() if specialist else ():
        stored = delta.first if isinstance(delta, SumDelta) else delta
        if (
            isinstance(stored, ValueDelta)
            and not stored.values(0, stored.shape[0] if stored.shape else 1).isfinite().all()
        ):
            file = stored.checkpoint.info(stored.name).file
            return f"{file}: tensor {stored.name} has NaN or infinite values; download or save it again."
    model = f"specialist {specialist.name}" if specialist else "the base"
    return (
        f"the embeddings of {model} overflow at layer {number} in {str(backbone.dtype).removeprefix('torch.')}; "
        "set probe.dtype to float32 or bfloat16."
    )
