"""Embedding signals: how far each specialist moves the embeddings, and which parameters do it.

One pass over the decoder, layer by layer: the layer's weights are read once, the base and every specialist
push their own hidden states through it, and the gradient of a specialist's distance never leaves the layer.
Memory is one layer, the specialists' deltas of that layer and the probe's hidden states. What linear layers read, if it
is kept, and scores of weights go to a scratch file.

Source: arXiv 2603.14405, sections on layer-wise and element-wise coefficients. S specialists, M modalities
(specialist i's own modality has its name), L layers, K probe inputs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from esmerge.attach import attached, uncalled_linears
from esmerge.backbone import Backbone, LayerArguments, run_layer
from esmerge.deltas import Delta, LoraDelta, SumDelta, ValueDelta
from esmerge.distances import principal_plane, random_directions, sliced_wasserstein, standardize_together
from esmerge.errors import InputError
from esmerge.gradients import make_gradients
from esmerge.layer_inputs import Inputs, ReadAt, Reading, read_positions
from esmerge.methods.matching import Positions
from esmerge.probe import Probe, ProbeBatch
from esmerge.scores import Score, Scratch, Spooled

Distance = Literal["mse", "frobenius"]
# Of float16, far from its smallest numbers and from its largest.
_LARGEST_GRADIENT = 2.0**-4


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
    merge: Callable[[int, Inputs], dict[str, Delta]]


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
        merged: by the key of a layer-wise merge, and by name of the tensor, factors B [out, r] and A [r, in] of what it
            made on the way, where that has low rank; what these layers read is then not kept.
    """

    distances: Tensor
    planes: Tensor
    scores: dict[str, list[Score]] = field(default_factory=dict)
    responses: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inputs: dict[str, Inputs] = field(default_factory=dict)
    merged: dict[str, dict[str, tuple[Spooled, Spooled]]] = field(default_factory=dict)


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
    if len(probes) not in ((1,) if settings.distances else (1, len(specialists))):
        raise ValueError("there must be one probe for all specialists or, without distances, one for each")
    walk = _Pass(backbone, specialists, probes, settings, scratch, merges)
    del probes  # with the first hidden states
    with tqdm(total=walk.steps, desc="embedding signals", unit="layer", disable=not progress) as bar:
        for number, layer in enumerate(backbone.iterate_layers()):
            walk.visit(number, layer, bar)
    return walk.signals


@dataclass(frozen=True)
class _Batch:
    """A probe batch on its way through the layers.

    Layers' arguments, masks of the modalities [M, B, T], and where to take down what layers read.
    """

    arguments: list[LayerArguments]
    masks: Tensor
    reads: dict[Positions, ReadAt]


# All batches, and the hidden states [B, T, H] that the first layer takes.
_Way = tuple[list[_Batch], list[Tensor]]


@dataclass(frozen=True)
class _Visit:
    """A layer while it has its weights.

    Attributes:
        number, layer: of the base.
        deltas: of each specialist, by parameter name inside the layer.
        touched: names of the parameters that any specialist changes.
        uncalled: names of weights of linear layers that the layer reads without calling them.
        norm: what hidden states go through before distances are taken; after the last layer the final norm.
        last: whether it is that one.
    """

    number: int
    layer: nn.Module
    deltas: list[dict[str, Delta]]
    touched: list[str]
    uncalled: frozenset[str]
    norm: nn.Module
    last: bool


class _Pass:
    """The hidden states of base, specialists and merges on their way through the layers, and what they tell.

    Attributes:
        signals: found so far.
        steps: how often a layer is passed in all.
    """

    def __init__(
        self,
        backbone: Backbone,
        specialists: Sequence[ProbedSpecialist],
        probes: Sequence[Probe],
        settings: SignalSettings,
        scratch: Scratch,
        merges: Sequence[LayerMerge],
    ) -> None:
        self._backbone, self._settings, self._scratch = backbone, settings, scratch
        self._specialists, self._merges = specialists, merges
        count, self._modalities = len(specialists), probes[0].modalities
        # Of each specialist: its probe, and its modality's place there.
        self._probe_of = [0 if len(probes) == 1 else i for i in range(count)]
        self._owns = [probes[n].modalities.index(s.name) for n, s in zip(self._probe_of, specialists, strict=True)]
        # Each probe's way, and that of its probe for each specialist. First hidden states are not kept.
        ways, own_ways = _prepare(backbone, probes, self._probe_of, self._owns, settings, merges)
        self._batches = [batches for batches, _ in ways]
        self._batches_of = [batches for batches, _ in own_ways]
        self._base_states = list(ways[0][1]) if settings.distances else []
        self._directions: Tensor | None = None
        if settings.distances:
            # Hidden states can be wider than embeddings.
            directions = random_directions(settings.projections, self._base_states[0].shape[-1], settings.seed)
            self._directions = directions.to(backbone.device)
        # Of layers of one structure alike.
        self._uncalled: dict[str, frozenset[str]] = {}
        self._states = [list(states) for _, states in own_ways]
        self._merged_states = [[list(states) for _, states in ways] for _ in merges]
        # Where only merged layers hand on what is read, the specialists' own hidden states are nobody's.
        self._alone = range(count) if settings.distances or settings.inputs else range(0)
        self.steps = backbone.num_layers * (settings.distances + len(self._alone) + len(merges))
        self.signals = EmbeddingSignals(
            torch.full((count, len(self._modalities), backbone.num_layers), torch.nan, dtype=torch.float64),
            torch.full((len(self._modalities), 1 + count, backbone.num_layers, probes[0].size, 2), torch.nan),
        )

    def visit(self, number: int, layer: nn.Module, bar: tqdm) -> None:
        """Have everything pass a layer that has its weights."""
        last = number == self._backbone.num_layers - 1
        norm = self._backbone.final_norm()[1] if last else nn.Identity()
        pooled: list[Tensor] = []
        targets: list[Tensor] = []
        if self._settings.distances:
            with torch.no_grad():
                _push(layer, number, self._batches[0], self._base_states)
                targets = [norm(state) for state in self._base_states]
            pooled.append(_pool(self._base_states, self._batches[0]))
            bar.update()
        deltas = [specialist.layer_deltas(number) for specialist in self._specialists]
        here = _Visit(number, layer, deltas, sorted(set().union(*deltas)), self._uncalled_in(number, layer), norm, last)
        for i in self._alone:
            self._advance(here, i, targets)
            if self._settings.distances:
                pooled.append(_pool(self._states[i], self._batches[0]))
            if not _is_finite(self._states[i], self._batches_of[i], self._owns[i], self._settings.inputs):
                raise InputError(_blame(number, layer, self._backbone, self._specialists[i]))
            bar.update()
        if pooled:
            self._enter_distances(here, torch.stack(pooled, dim=1))
        for merge, states in zip(self._merges, self._merged_states, strict=True):
            self._merge(here, merge, states)
            bar.update()

    def _uncalled_in(self, number: int, layer: nn.Module) -> frozenset[str]:
        """Names of weights of linear layers that a layer reads without calling them."""
        structure = repr(layer)
        if structure not in self._uncalled:
            arguments = self._batches_of[0][0].arguments[number]
            run = partial(run_layer, layer, self._states[0][0], arguments)
            self._uncalled[structure] = uncalled_linears(layer, run)
        return self._uncalled[structure]

    def _advance(self, here: _Visit, i: int, targets: Sequence[Tensor]) -> None:
        """Push a specialist's hidden states through its version of a layer; take down what that tells.

        Args:
            targets: the base's hidden states after the layer and `here.norm`, if distances are wanted.
        """
        settings, own, states = self._settings, self._owns[i], self._states[i]
        measured = [own] if settings.tokens == "primary" else list(range(len(self._modalities)))
        wanted = settings.scores if settings.distances else None
        gradients = make_gradients(wanted, here.deltas[i], here.touched, here.layer, here.uncalled)
        reading = Reading(here.layer, here.touched, own, settings.inputs)
        norm_deltas = self._specialists[i].norm_deltas() if here.last else {}
        with (
            attached(here.norm, norm_deltas),
            reading,
            attached(here.layer, gradients.deltas, gradients.observers, gradients.leaves, here.uncalled),
        ):
            gradients.start(here.layer)
            for index, batch in enumerate(self._batches_of[i]):
                reading.at = batch.reads
                with torch.set_grad_enabled(gradients.wanted):
                    state = run_layer(here.layer, states[index], batch.arguments[here.number])
                    if gradients.wanted:
                        masks = batch.masks[measured]
                        measured_from = (targets[index], masks, here.norm, settings.distance)
                        gradients.collect(_distance(state, *measured_from), _gradient_scale(state, *measured_from))
                states[index] = state.detach()
        for positions, found in reading.spooled(self._scratch).items():
            _enter_read(self.signals.inputs.setdefault(positions, {}), here.number, found)
        for name, score in gradients.scores(self._scratch).items():
            self.signals.scores.setdefault(f"layers.{here.number}.{name}", []).append(score)

    def _enter_distances(self, here: _Visit, responses: Tensor) -> None:
        """Enter what the responses [M, 1 + S, K, H] of a layer say about the distance of each specialist."""
        finite = responses.isfinite().all(dim=-1).all(dim=-1).all(dim=0).tolist()
        if not all(finite):
            blamed = [None, *self._specialists][finite.index(False)]
            raise InputError(_blame(here.number, here.layer, self._backbone, blamed))
        assert self._directions is not None
        count, size = responses.shape[1] - 1, responses.shape[2]
        for t, modality in enumerate(self._modalities):
            for i in range(count):
                pair = standardize_together(responses[t, 0].double(), responses[t, 1 + i].double())
                distance = sliced_wasserstein(*pair, self._directions, self._settings.p)
                self.signals.distances[i, t, here.number] = distance
            plane = principal_plane(responses[t].flatten(0, 1).float())
            self.signals.planes[t, :, here.number] = plane.view(1 + count, size, 2)
            if self._settings.keep_responses:
                self.signals.responses[modality, here.number] = responses[t].cpu()

    def _merge(self, here: _Visit, merge: LayerMerge, states: list[list[Tensor]]) -> None:
        """Have each specialist's layer read what merged layers hand on, merge it, and push that through the result."""
        inputs: Inputs = {}
        before = self._scratch.mark()
        for i, specialist in enumerate(self._specialists):
            reading = Reading(here.layer, here.touched, self._owns[i], [merge.positions])
            outputs = []
            with attached(here.layer, here.deltas[i], uncalled=here.uncalled), reading, torch.no_grad():
                for state, batch in zip(states[self._probe_of[i]], self._batches_of[i], strict=True):
                    reading.at = batch.reads
                    as_far = state[:, : batch.masks.shape[-1]]
                    outputs.append(run_layer(here.layer, as_far, batch.arguments[here.number]))
            if not _is_finite(outputs, self._batches_of[i], self._owns[i], [merge.positions]):
                raise InputError(_blame(here.number, here.layer, self._backbone, specialist))
            _enter_read(inputs, here.number, reading.spooled(self._scratch).get(merge.positions, {}))
        kept = self.signals.inputs.setdefault(merge.key, {})
        if here.last:
            kept.update(inputs)
            return
        dtype = self._backbone.dtype
        overflow = InputError(
            f"the embeddings of the merged model overflow at layer {here.number} in {_short(dtype)}; lower "
            f"method.lambda{_or_wider(dtype)}."
        )
        try:
            deltas = merge.merge(here.number, inputs)
        except (ValueError, torch.linalg.LinAlgError) as error:
            raise overflow from error  # no solution for inputs that are so large
        known = {f"layers.{here.number}.{n}": own for n, own in deltas.items() if isinstance(own, LoraDelta)}
        kept.update({name: own for name, own in inputs.items() if name not in known})
        if inputs.keys() <= known.keys():
            self._scratch.rewind(before)
        factors = self.signals.merged.setdefault(merge.key, {})
        for name, delta in known.items():
            factors[name] = self._scratch.put(delta.folded_b), self._scratch.put(delta.a)
        with attached(here.layer, deltas, uncalled=here.uncalled), torch.no_grad():
            for own_batches, own_states in zip(self._batches, states, strict=True):
                _push(here.layer, here.number, own_batches, own_states)
        if not all(bool(state.isfinite().all()) for own_states in states for state in own_states):
            raise overflow


def _prepare(
    backbone: Backbone,
    probes: Sequence[Probe],
    probe_of: Sequence[int],
    owns: Sequence[int],
    settings: SignalSettings,
    merges: Sequence[LayerMerge],
) -> tuple[list[_Way], list[_Way]]:
    """Each probe's way for base and merged layers, if these run, and that of its probe for each specialist."""
    shapes = [batch.attention_mask.shape for probe in probes for batch in probe.batches]
    backbone.use_fast_attention(max(rows for rows, _ in shapes), max(length for _, length in shapes))
    read = {*settings.inputs, *(merge.positions for merge in merges)}
    pairs = [list(zip(probe.batches, read_positions(probe, read), strict=True)) for probe in probes]
    whole = settings.distances or read != {"own"} or backbone.length_matters
    whole_ways = [_on_device(own if whole or merges else [], backbone) for own in pairs]
    if whole:
        return whole_ways, [whole_ways[number] for number in probe_of]
    cut = [[_until_last(*pair, own) for pair in pairs[number]] for number, own in zip(probe_of, owns, strict=True)]
    return whole_ways, [_on_device(own, backbone) for own in cut]


def _on_device(pairs: Sequence[tuple[ProbeBatch, Mapping[Positions, ReadAt]]], backbone: Backbone) -> _Way:
    way: _Way = ([], [])
    for batch, reads in pairs:
        first, arguments = backbone.layer_arguments(batch.inputs_embeds, batch.attention_mask)
        masks = {positions: replace(read, mask=read.mask.to(backbone.device)) for positions, read in reads.items()}
        way[0].append(_Batch(arguments, batch.masks.to(backbone.device), masks))
        way[1].append(first)
    return way


def _until_last(
    batch: ProbeBatch, reads: Mapping[Positions, ReadAt], own: int
) -> tuple[ProbeBatch, dict[Positions, ReadAt]]:
    """A batch up to the last position of a modality, which no later one can reach in a causal model."""
    stop = int(batch.masks[own].any(dim=0).nonzero().max()) + 1
    cut = ProbeBatch(batch.inputs_embeds[:, :stop], batch.attention_mask[:, :stop], batch.masks[..., :stop])
    return cut, {positions: replace(read, mask=read.mask[..., :stop]) for positions, read in reads.items()}


def _push(layer: nn.Module, number: int, batches: Sequence[_Batch], states: list[Tensor]) -> None:
    """Push hidden states through a layer as it is."""
    for index, batch in enumerate(batches):
        states[index] = run_layer(layer, states[index], batch.arguments[number])


def _pool(states: Sequence[Tensor], batches: Sequence[_Batch]) -> Tensor:
    """Mean over each modality's positions, float32 [M, K, H]."""
    pooled = []
    for state, batch in zip(states, batches, strict=True):
        weights = batch.masks.to(torch.float32)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        pooled.append(torch.einsum("mbt,bth->mbh", weights, state.float()))
    return torch.cat(pooled, dim=1)


def _distance(
    state: Tensor, target: Tensor, masks: Tensor, norm: Callable[[Tensor], Tensor], distance: Distance
) -> Tensor:
    """Distance of hidden states [B, T, H], after `norm`, from the base's, summed over the modalities of `masks`."""
    total = state.new_zeros((), dtype=torch.float32)
    for mask in masks:
        gap = norm(state[mask]).float() - target[mask].float()
        total = total + (gap.square().mean() if distance == "mse" else gap.norm())
    return total


@torch.no_grad()
def _gradient_scale(
    state: Tensor, target: Tensor, masks: Tensor, norm: Callable[[Tensor], Tensor], distance: Distance
) -> float:
    """What to multiply a distance by so that its gradients are no numbers too small for float16; a power of two."""
    if state.dtype != torch.float16:
        return 1.0
    largest = 0.0
    for mask in masks:
        gap = norm(state[mask]).float() - target[mask].float()
        slope = gap.abs().max() * 2 / gap.numel() if distance == "mse" else gap.abs().max() / gap.norm()
        largest = max(largest, float(slope))
    return 2.0 ** round(math.log2(_LARGEST_GRADIENT / largest)) if 0 < largest < math.inf else 1.0


def _enter_read(inputs: Inputs, number: int, found: Mapping[str, Spooled]) -> None:
    """Enter what the linear layers of a specialist's layer read, by name inside the layer."""
    for name, spooled in found.items():
        inputs.setdefault(f"layers.{number}.{name}", []).append(spooled)


def _is_finite(states: Sequence[Tensor], batches: Sequence[_Batch], own: int, positions: Sequence[Positions]) -> bool:
    """Whether all hidden states are, at the positions of a modality and wherever something is read."""
    for state, batch in zip(states, batches, strict=True):
        mask = batch.masks[own]
        for where in positions:
            mask = mask | batch.reads[where].mask[own]
        if not state[mask].isfinite().all():
            return False
    return True


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
    remedy = _or_wider(backbone.dtype).removeprefix(", or ") or "its weights are too large: train or save it again"
    return f"the embeddings of {model} overflow at layer {number} in {_short(backbone.dtype)}; {remedy}."


def _or_wider(dtype: torch.dtype) -> str:
    """What else can be done about an overflow; nothing where no dtype has larger numbers."""
    return ", or set probe.dtype to float32 or bfloat16" if dtype == torch.float16 else ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
