"""From a plan to embedding signals: builds the probe and sends it through base and specialists."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from esmerge.backbone import Backbone
from esmerge.cache import user_cache
from esmerge.deltas import Delta, LoraDelta
from esmerge.encoders import encoders_of, weights_hash, weights_of
from esmerge.errors import InputError
from esmerge.methods.matching import Positions
from esmerge.modalities import Modality, TextModality, encode_items, load_encoder
from esmerge.modalities.modality import add_placeholders
from esmerge.names import inner_name, natural_order
from esmerge.plan import Plan
from esmerge.probe import Probe, read_items, read_tensors, text_probe
from esmerge.recipe import SignalsRecipe
from esmerge.scores import Scratch
from esmerge.signals import EmbeddingSignals, LayerMerge, ProbedSpecialist, SignalSettings, embedding_signals
from esmerge.specialists import SpecialistEncoder
from esmerge.targets import Target
from esmerge.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

# Items that an encoder takes at a time. On a CPU one: batches are hardly faster there, and an item's soft tokens, which
# are kept for other merges, must not depend on what else one of them encodes, not even in the last bit.
ENCODER_BATCH_SIZE = 8


def measure_signals(
    plan: Plan,
    scratch: Scratch,
    progress: bool,
    inputs: Sequence[Positions] = (),
    merges: Sequence[LayerMerge] = (),
    keep_end: bool = False,
) -> EmbeddingSignals:
    """Measure the embedding signals that a plan's recipe asks for.

    Args:
        inputs: at which positions to keep what linear layers read.
        merges: to do on the way.
        keep_end: keep what follows a probe input's last item.
    """
    recipe = plan.recipe
    assert recipe.probe is not None
    settings, signals_wanted = recipe.coefficients, True
    if not isinstance(settings, SignalsRecipe):
        signals_wanted = False
        settings = SignalsRecipe.model_validate({"from": "embedding_signals", "granularity": "layer"})
    dtype = getattr(torch, recipe.probe.dtype) if recipe.probe.dtype else None
    backbone = Backbone(plan.base.folder, dtype, recipe.device, plan.checkpoint, plan.trust_remote_code)
    if plan.num_layers > backbone.num_layers:
        raise InputError(
            f"{plan.base.folder} stores {plan.num_layers} layers, a {type(backbone.model).__name__} of its config.json "
            f"runs {backbone.num_layers}: what it does not run cannot be probed; use coefficients and a method that "
            "need no probe, or leave those layers out."
        )
    if signals_wanted and not backbone.final_norm()[0]:
        logger.warning(
            "%s has no norm after its last layer that is known: what the last layer hands on is taken as it is.",
            type(backbone.model).__name__,
        )
    return embedding_signals(
        backbone,
        [_probed(plan, index, backbone) for index in range(len(plan.specialists))],
        make_probes(plan, backbone, progress, keep_end),
        SignalSettings(
            scores=None if settings.granularity == "layer" else recipe.space,
            projections=settings.projections,
            p=settings.p,
            distance=settings.distance,
            tokens=settings.tokens,
            seed=recipe.seed,
            distances=signals_wanted,
            inputs=inputs,
            keep_responses=recipe.output.signals,
        ),
        scratch,
        progress,
        merges,
    )


def _probed(plan: Plan, index: int, backbone: Backbone) -> ProbedSpecialist:
    specialist = plan.specialists[index]
    norm_name = backbone.final_norm()[0]

    def delta(target: Target) -> Delta:
        found = specialist.delta(target.changed[index] or "", target.shape)
        return found.to(backbone.device) if isinstance(found, LoraDelta) else found

    def layer_deltas(number: int) -> dict[str, Delta]:
        chosen = [target for target in plan.merged if target.layer == number and target.changed[index]]
        return {
            inner_name(target.name): delta(target) for target in sorted(chosen, key=lambda t: natural_order(t.name))
        }

    def norm_deltas() -> dict[str, Delta]:
        chosen = [t for t in plan.merged if t.changed[index] and t.name.rpartition(".")[0] == norm_name]
        return {target.name.rpartition(".")[2]: delta(target) for target in chosen}

    return ProbedSpecialist(specialist.name, layer_deltas, norm_deltas)


def make_probes(plan: Plan, backbone: Backbone, progress: bool = False, keep_end: bool = False) -> list[Probe]:
    """The recipe's probe, from ready tensors or from items: one for all specialists, or one for each.

    Args:
        keep_end: keep what follows the last item.
    """
    recipe, names = plan.recipe.probe, list(plan.recipe.specialists)
    assert recipe is not None
    if recipe.tensors is not None:
        return [read_tensors(plan.path(recipe.tensors), names, recipe.batch_size, backbone.hidden_size, keep_end)]
    assert recipe.data is not None and recipe.samples is not None and recipe.template is not None
    items = {name: read_items(plan.path(recipe.data[name]), recipe.samples, name) for name in names}
    chat_template = recipe.chat_template
    if recipe.chat_template_file is not None:
        chat_template = plan.path(recipe.chat_template_file).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(plan.base.folder, plan.trust_remote_code, plan.base.reference)
    encoders = encoders_of(plan)
    modalities = {name: encoder.modality for name, encoder in encoders.items()}
    add_placeholders(tokenizer, modalities)
    soft_tokens = {}
    for name, modality in modalities.items():
        if isinstance(modality, TextModality):
            items[name] = [modality.render(item) for item in items[name]]
        else:
            soft_tokens[name] = _soft_tokens(modality, encoders[name], items[name], backbone, progress)
            items[name] = [modality.placeholder * len(tokens) for tokens in soft_tokens[name]]
    return [
        text_probe(
            tokenizer,
            recipe.templates(group[0]),
            {name: items[name] for name in group},
            backbone.embed,
            recipe.batch_size,
            chat_template,
            {name: soft_tokens[name] for name in group if name in soft_tokens},
            keep_end,
        )
        for group in ([names] if recipe.is_shared else [[name] for name in names])
    ]


def _soft_tokens(
    modality: Modality, encoder: SpecialistEncoder, items: Sequence[str], backbone: Backbone, progress: bool
) -> list[Tensor]:
    """The soft tokens [n, H] of a modality's items, from its own specialist's encoder."""
    source = f"the encoder of {modality.placeholder}"
    return encode_items(
        modality,
        load_encoder(modality, weights_of(encoder), backbone.hidden_size, source=source),
        items,
        1 if backbone.device.type == "cpu" else ENCODER_BATCH_SIZE,
        user_cache("ESMERGE_ENCODER_CACHE", "soft_tokens"),
        weights_hash(encoder),
        backbone.device,
        backbone.dtype,
        progress,
    )
