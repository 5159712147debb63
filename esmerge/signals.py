"""Embedding signals: how far each specialist moves the embeddings, and which parameters do it.

One pass over the decoder, layer by layer: the layer's weights are read once, the base and every specialist
push their own hidden states through it, and the gradient of a specialist's distance never leaves the layer.
Memory is one layer, the specialists' deltas of that layer and the probe's hidden states.

Source: arXiv 2603.14405, sections on layer-wise and element-wise coefficients. S specialists, M modalities
(specialist i's own modality has its name), L layers, K probe inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from esmerge.attach import Observer, attached, is_linear
from esmerge.backbone import Backbone, LayerArguments, run_layer
from esmerge.deltas import Delta, LoraDelta
from esmerge.distances import principal_plane, random_directions, sliced_wasserstein, standardize_together
from esmerge.errors import InputError
from esmerge.probe import Probe
from esmerge.scores import Score, Scratch, dense_score, pair_score

Distance = Literal["mse", "frobenius"]


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
        keep_responses: keep the pooled embeddings, [K, H] for each model, modality and layer.
    """

    scores: Literal["factors", "weights"] | None = "weights"
    projections: int = 1024
    p: float = 2.0
    distance: Distance = "mse"
    tokens: Literal["primary", "all"] = "primary"
    seed: int = 42
    keep_responses: bool = False


@dataclass
class EmbeddingSignals:
    """What one pass over the probe found.

    Attributes:
        distances: float64 [S, M, L], sliced Wasserstein distance between specialist and base.
        planes: float32 [M, 1 + S, L, K, 2], pooled embeddings of the base and the specialists on their first
            two principal axes, per modality and layer.
        scores: by tensor name, one score per specialist. Tensor names are canonical (`layers.N.<module>.weight`);
            `layers.N.<module>.lora_a.weight` and `.lora_b.weight` for scores of factors.
        responses: by (modality, layer), [1 + S, K, H], if they were to be kept.
    """

    distances: Tensor
    planes: Tensor
    scores: dict[str, list[Score]] = field(default_factory=dict)
    responses: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def embedding_signals(
    backbone: Backbone,
    specialists: Sequence[ProbedSpecialist],
    probe: Probe,
    settings: SignalSettings,
    scratch: Scratch,
    progress: bool = True,
) -> EmbeddingSignals:
    """Measure the embedding signals of all specialists in one pass over the decoder's layers.

    Args:
        scratch: takes the scores of weights, which together are as large as the model.

    Raises:
        InputError: if an embedding is not finite, with the layer and the tensor that is to blame.
    """
    count, modalities, device = len(specialists), probe.modalities, backbone.device
    directions = random_directions(settings.projections, backbone.hidden_size, settings.seed).to(device)
    batches = [
        _Batch(*backbone.layer_arguments(batch.inputs_embeds, batch.attention_mask), batch.masks.to(device))
        for batch in probe.batches
    ]
    base_states = [batch.first for batch in batches]
    states = [list(base_states) for _ in specialists]
    signals = EmbeddingSignals(
        torch.zeros(count, len(modalities), backbone.num_layers, dtype=torch.float64),
        torch.zeros(len(modalities), 1 + count, backbone.num_layers, probe.size, 2),
    )
    steps = backbone.num_layers * (1 + count)
    with tqdm(total=steps, desc="embedding signals", unit="layer", disable=not progress) as bar:
        for number, layer in enumerate(backbone.iterate_layers()):
            last = number == backbone.num_layers - 1
            norm = backbone.final_norm()[1] if last else nn.Identity()
            with torch.no_grad():
                for index, batch in enumerate(batches):
                    base_states[index] = run_layer(layer, base_states[index], batch.arguments[number])
                targets = [norm(state) for state in base_states]
            pooled = [_pool(base_states, batches)]
            bar.update()
            deltas = [specialist.layer_deltas(number) for specialist in specialists]
            touched = sorted(set().union(*deltas))
            for i, specialist in enumerate(specialists):
                own = modalities.index(specialist.name)
                measured = [own] if settings.tokens == "primary" else list(range(len(modalities)))
                gradients = _make_gradients(settings.scores, deltas[i], touched, layer, batches, measured)
                with attached(norm, specialist.norm_deltas() if last else {}):
                    _advance(layer, number, batches, states[i], gradients, targets, norm, measured, settings.distance)
                for name, score in gradients.scores(scratch).items():
                    signals.scores.setdefault(f"layers.{number}.{name}", []).append(score)
                pooled.append(_pool(states[i], batches))
                bar.update()
            responses = torch.stack(pooled, dim=1)
            if not responses.isfinite().all():
                raise InputError(_blame(responses, number, layer, backbone, specialists))
            _enter_distances(signals, responses, number, directions, modalities, settings)
    return signals


def _advance(
    layer: nn.Module,
    number: int,
    batches: Sequence["_Batch"],
    states: list[Tensor],
    gradients: "_NoGradients",
    targets: Sequence[Tensor],
    norm: Callable[[Tensor], Tensor],
    measured: Sequence[int],
    distance: Distance,
) -> None:
    """Push a specialist's hidden states through its version of a layer, and collect gradients inside it."""
    with attached(layer, gradients.deltas, gradients.observers, gradients.leaves):
        gradients.start(layer)
        for index, batch in enumerate(batches):
            gradients.begin(batch)
            with torch.set_grad_enabled(gradients.wanted):
                state = run_layer(layer, states[index], batch.arguments[number])
                if gradients.wanted:
                    gradients.collect(_distance(state, targets[index], norm, batch.masks[measured], distance))
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


@dataclass(frozen=True)
class _Batch:
    """A probe batch on its way through the layers: first hidden states, layers' arguments, masks [M, B, T]."""

    first: Tensor
    arguments: list[LayerArguments]
    masks: Tensor

    def reach(self, measured: Sequence[int]) -> Tensor:
        """Positions [B, T] whose gradient can differ from zero: none after the last measured one."""
        mask = self.masks[list(measured)].any(dim=0)
        return mask.flip(1).cumsum(1).flip(1) > 0


def _pool(states: Sequence[Tensor], batches: Sequence[_Batch]) -> Tensor:
    """Mean over each modality's positions, float32 [M, K, H]."""
    pooled = []
    for state, batch in zip(states, batches, strict=True):
        weights = batch.masks.to(torch.float32)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        pooled.append(torch.einsum("mbt,bth->mbh", weights, state.float()))
    return torch.cat(pooled, dim=1)


def _distance(
    state: Tensor, target: Tensor, norm: Callable[[Tensor], Tensor], masks: Tensor, distance: Distance
) -> Tensor:
    """Distance of hidden states [B, T, H], after `norm`, from the base's, summed over the modalities of `masks`."""
    total = state.new_zeros((), dtype=torch.float32)
    for mask in masks:
        gap = norm(state[mask]).float() - target[mask].float()
        total = total + (gap.square().mean() if distance == "mse" else gap.norm())
    return total


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

    def begin(self, batch: _Batch) -> None:
        """Called before each batch."""

    def collect(self, distance: Tensor) -> None:
        """Called with each batch's distance."""

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        """The scores over all batches, by tensor name inside the layer."""
        return {}


class _FactorGradients(_NoGradients):
    """Gradient scores of the LoRA factors A and B as they are stored, without their scaling."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__(deltas)
        leaves: dict[str, Tensor] = {}
        for name, delta in deltas.items():
            assert isinstance(delta, LoraDelta)
            module = name.removesuffix(".weight")
            leaves |= {
                f"{module}.lora_a.weight": delta.a.requires_grad_(),
                f"{module}.lora_b.weight": delta.b.requires_grad_(),
            }
        self._factors = leaves
        self.wanted = bool(leaves)
        self._totals = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}

    def collect(self, distance: Tensor) -> None:
        gradients = torch.autograd.grad(distance, list(self._factors.values()), allow_unused=True)
        for total, gradient in zip(self._totals.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient.abs()

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        return {name: dense_score(total) for name, total in self._totals.items()}


class _WeightGradients(_NoGradients):
    """Gradient scores of all parameters that any specialist changes.

    For linear layers from their inputs and the gradients of their outputs; whichever is smaller is kept, those or the
    matrices they multiply to. For other parameters from autograd.
    """

    def __init__(
        self,
        deltas: Mapping[str, Delta],
        touched: Sequence[str],
        layer: nn.Module,
        batches: Sequence[_Batch],
        measured: Sequence[int],
    ) -> None:
        super().__init__(deltas)
        self.wanted = bool(touched)
        linear = [name for name in touched if is_linear(layer, name)]
        self.observers = dict.fromkeys(linear, self._observe)
        self.leaves = [name for name in touched if name not in self.observers]
        self._parameters: dict[str, nn.Parameter] = {}
        self._measured = measured
        self._inputs: dict[str, list[Tensor]] = {name: [] for name in linear}
        self._gradients: dict[str, list[Tensor]] = {name: [] for name in linear}
        self._totals: dict[str, Tensor] = {}
        tokens = sum(int(batch.reach(measured).sum()) for batch in batches)
        for name in touched:
            weight = layer.get_parameter(name)
            pair_bytes = tokens * sum(weight.shape) * weight.dtype.itemsize
            if name in self.leaves or pair_bytes >= weight.numel() * torch.float32.itemsize:
                self._totals[name] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    def start(self, layer: nn.Module) -> None:
        self._parameters = {name: layer.get_parameter(name) for name in self.leaves}

    def begin(self, batch: _Batch) -> None:
        self._reach = batch.reach(self._measured)

    def _observe(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        x, g = inputs[self._reach], gradient[self._reach]
        if name in self._totals:
            self._totals[name] += (g.T @ x).float().abs_()
        else:
            self._inputs[name].append(x)
            self._gradients[name].append(g)

    def collect(self, distance: Tensor) -> None:
        distance.backward()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._totals[name] += parameter.grad.float().abs()
                parameter.grad = None

    def scores(self, scratch: Scratch) -> dict[str, Score]:
        found: dict[str, Score] = {name: dense_score(total, scratch) for name, total in self._totals.items()}
        for name in self._inputs.keys() - self._totals.keys():
            found[name] = pair_score(self._inputs[name], self._gradients[name], scratch)
        return found


def _make_gradients(
    scores: Literal["factors", "weights"] | None,
    deltas: Mapping[str, Delta],
    touched: Sequence[str],
    layer: nn.Module,
    batches: Sequence[_Batch],
    measured: Sequence[int],
) -> _NoGradients:
    if scores == "factors":
        return _FactorGradients(deltas)
    if scores == "weights":
        return _WeightGradients(deltas, touched, layer, batches, measured)
    return _NoGradients(deltas)


def _blame(
    responses: Tensor, number: int, layer: nn.Module, backbone: Backbone, specialists: Sequence[ProbedSpecialist]
) -> str:
    """The sentence that names what made embeddings [M, 1 + S, K, H] of layer `number` infinite or NaN."""
    for name, parameter in layer.named_parameters():
        if not parameter.isfinite().all():
            return (
                f"{backbone.folder}: tensor {backbone.layers_name}.{number}.{name} has NaN or infinite values; "
                "download or save the base again."
            )
    bad = (~responses.isfinite()).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten().tolist()[0]
    model = "the base" if bad == 0 else f"specialist {specialists[bad - 1].name}"
    return (
        f"the embeddings of {model} overflow at layer {number} in {str(backbone.dtype).removeprefix('torch.')}; "
        "set probe.dtype to float32 or bfloat16."
    )
