"""Whether what a recipe names fits together: checks that need headers, configs and a few rows of weights."""

import fnmatch
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from esmerge.configs import difference, kind_of
from esmerge.errors import InputError, some_of
from esmerge.hub import is_repo_id
from esmerge.methods import METHODS
from esmerge.modalities import Modality, TextModality
from esmerge.modalities.modality import MissingPackageError, check_name, with_encoder
from esmerge.modalities.registry import check_shapes, empty_encoder
from esmerge.names import natural_order
from esmerge.probe import check_items, check_modalities, check_template, numbered_items
from esmerge.recipe import FixedRecipe, ProbeRecipe, Recipe
from esmerge.remote_code import needs_remote_code
from esmerge.sources import Source
from esmerge.specialists import FullSpecialist, LoraSpecialist, Specialist, SpecialistEncoder
from esmerge.specialists.full import INPUT_EMBEDDINGS
from esmerge.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from esmerge.plan import Plan

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 64


def check_origin(base: Source, specialists: Sequence[Specialist]) -> None:
    """Find specialists of another model from their configs, before their tensors are compared."""
    ours = base.config()
    for specialist in specialists:
        if not isinstance(specialist, FullSpecialist):
            continue
        if specialist.config.get("model_type") != ours.get("model_type"):
            raise InputError(
                f"{specialist.name} is {kind_of(specialist.config)}, the base is {kind_of(ours)}: specialists must be "
                "trained from the base."
            )
        if (found := difference(specialist.config, ours)) is not None:
            field, own, expected = found
            raise InputError(
                f"{specialist.name} has {field} {own}, the base {expected}: specialists must be trained from the base."
            )
    _check_named_bases(base, specialists)


def _check_named_bases(base: Source, specialists: Sequence[Specialist]) -> None:
    """Warn of what adapters say of their base, where it is not what the recipe or the others say."""
    named = {
        specialist.name: str(specialist.config["base_model_name_or_path"])
        for specialist in specialists
        if isinstance(specialist, LoraSpecialist) and specialist.config.get("base_model_name_or_path")
    }
    # Repositories are found whatever the case of their names.
    other = {n: own for n, own in named.items() if is_repo_id(own) and own.lower() != base.reference.lower()}
    if base.commit and other:
        logger.warning(
            "the base is %s, but some adapters say that they were trained from another (%s); their shapes fit",
            base.reference,
            ", ".join(f"{name}: {own}" for name, own in other.items()),
        )
    elif len(set(named.values())) > 1:
        logger.warning(
            "the adapters say that they were trained from different bases (%s); their shapes fit: check "
            "that these are the same weights",
            ", ".join(f"{name}: {own}" for name, own in named.items()),
        )


def check_count(recipe: Recipe) -> None:
    """Some methods merge a certain number of specialists."""
    wanted = METHODS[recipe.method.name].specialists
    if wanted is not None and len(recipe.specialists) != wanted:
        raise InputError(
            f"method {recipe.method.name} merges {wanted} specialists, the recipe has {len(recipe.specialists)}."
        )


def check_patterns(plan: "Plan", coefficients: FixedRecipe) -> None:
    """Patterns must match a tensor each, and every tensor that is merged a pattern."""
    if not isinstance(coefficients.from_, dict):
        return
    factors = plan.recipe.space == "factors"
    known = [name for t in plan.targets if t.merged or not factors for name in plan.coefficient_names(t)]
    for specialist, patterns in coefficients.from_.items():
        for pattern in patterns if isinstance(patterns, dict) else ():
            if not fnmatch.filter(known, pattern):
                raise InputError(
                    f"coefficients.{specialist}: the pattern {pattern!r} matches no tensor; "
                    f"the names of tensors are like {known[0] if known else 'layers.0.mlp.up_proj.weight'}."
                )
    for target in plan.merged:
        for name in plan.coefficient_names(target):
            coefficients.numbers(name, list(plan.recipe.specialists))


def check_frozen(plan: "Plan") -> None:
    """Frozen weights that lie beside an adapter must be the base's; some rows of one matrix are compared."""
    targets = {target.name: target for target in plan.targets}
    for specialist in plan.specialists:
        frozen = specialist.frozen if isinstance(specialist, LoraSpecialist) else {}
        for name, tensor in frozen.items():
            info = specialist.checkpoint.info(tensor)
            if name not in targets:
                raise InputError(
                    f"{info.file}: {tensor} is neither part of the adapter nor a tensor of the base "
                    f"{plan.base.reference}: it was trained from another base, or save it without that."
                )
            if info.shape != targets[name].shape:
                raise InputError(
                    f"{info.file}: {tensor} has shape {list(info.shape)}, in the base {plan.base.reference} it has "
                    f"shape {list(targets[name].shape)}: it was trained from another base."
                )
        matrices = [name for name in sorted(frozen, key=natural_order) if len(targets[name].shape) == 2]
        if not matrices:
            continue
        middle = targets[matrices[len(matrices) // 2]]
        rows = min(_SAMPLED_ROWS, middle.shape[0])
        base = plan.checkpoint.read_range(middle.stored, 0, rows).float()
        own = specialist.checkpoint.read_range(frozen[middle.name], 0, rows).float()
        # Rounding to half precision moves them by less.
        if (own - base).norm() > 0.01 * base.norm():
            logger.warning(
                "%s: %s, which the adapter was trained on, is not the base's (relative distance %.2f): "
                "was it trained from %s?",
                specialist.name,
                frozen[middle.name],
                float((own - base).norm() / base.norm()),
                plan.recipe.base,
            )


def check_distances(plan: "Plan") -> None:
    """Warn of full checkpoints that are as far from the base as independently trained models are from each other."""
    matrices = [
        target
        for target in plan.targets
        if target.layer is not None and len(shape := plan.checkpoint.info(target.stored).shape) == 2 and min(shape) > 1
    ]
    for specialist in plan.specialists:
        shared = [t for t in matrices if t.name in specialist.names] if isinstance(specialist, FullSpecialist) else []
        if not shared:
            continue
        # Some rows of one matrix tell: sqrt(2) for unrelated models of one size, a few hundredths after fine-tuning.
        middle = shared[len(shared) // 2]
        rows = min(_SAMPLED_ROWS, plan.checkpoint.info(middle.stored).shape[0])
        base = plan.checkpoint.read_range(middle.stored, 0, rows).float()
        own = specialist.checkpoint.read_range(specialist.stored_as(middle.name), 0, rows).float()
        if base.shape == own.shape and (own - base).norm() > base.norm():
            logger.warning(
                "%s is as far from the base as an unrelated model is (relative distance %.1f in %s): "
                "was it trained from %s?",
                specialist.name,
                float((own - base).norm() / base.norm()),
                middle.name,
                plan.recipe.base,
            )


def check_encoders(plan: "Plan") -> None:
    """Encoders must have a placeholder each, be complete, and make soft tokens as wide as the base's embeddings."""
    if plan.is_multimodal and plan.recipe.output.format == "full":
        if needs_remote_code(plan.base.config()):
            raise InputError(
                f"the base {plan.base.reference} needs code of its own, which a multimodal checkpoint cannot hold: use "
                "output.format: adapter."
            )
        # The result's processor holds it; better no merge than one that ends without.
        load_tokenizer(plan.base.folder, plan.trust_remote_code, plan.base.reference)
    owners: dict[str, str] = {}
    embeddings = next((target for target in plan.targets if target.name in INPUT_EMBEDDINGS), None)
    for specialist in plan.specialists:
        encoder = specialist.encoder
        if encoder is None:
            continue
        check_name(specialist.name, f"specialists.{specialist.name}")
        if other := owners.get(encoder.placeholder):
            raise InputError(
                f"{other} and {specialist.name} have the same placeholder, {encoder.placeholder}, so that no prompt "
                "could tell them apart: give one of them another in the settings of its modality."
            )
        owners[encoder.placeholder] = specialist.name
        if embeddings is not None:
            _check_encoder(plan, specialist.name, encoder, embeddings.shape[1])


def _check_encoder(plan: "Plan", name: str, encoder: SpecialistEncoder, hidden_size: int) -> None:
    if isinstance(encoder.modality, TextModality):
        return
    tensor, width = encoder.projection or ("", hidden_size)
    if width != hidden_size:
        raise InputError(
            f"{encoder.checkpoint.info(tensor).file}: {tensor} makes soft tokens of size {width}, the base "
            f"{plan.base.reference} has hidden_size {hidden_size}: {name} was trained with another base."
        )
    shapes = {key: shape for key, (_, shape) in encoder.layout.items()}
    if shapes == encoder.modality.known_shapes(hidden_size):
        return
    try:
        built = empty_encoder(encoder.modality, hidden_size)
    except MissingPackageError:
        if plan.encodes:
            raise
        return
    check_shapes(encoder.modality, built, hidden_size, shapes, f"the encoder of {name} in {encoder.place}")


def check_factors(plan: "Plan") -> None:
    """Merging factors needs adapters of the same modules with equal ranks."""
    first, *others = plan.lora_specialists()
    for other in others:
        only = [sorted(a.modules.keys() - b.modules.keys()) for a, b in ((first, other), (other, first))]
        if any(only):
            listed = "; ".join(
                f"only in {specialist.name}: {some_of([name.removesuffix('.weight') for name in names])}"
                for specialist, names in zip((first, other), only, strict=True)
                if names
            )
            raise InputError(
                f"space factors needs adapters of the same modules ({listed}); use space: weights, which takes any mix."
            )
        for name in first.modules:
            if first.rank(name) != other.rank(name):
                raise InputError(
                    f"space factors needs equal ranks, but {first.name} has rank {first.rank(name)} and {other.name} "
                    f"rank {other.rank(name)} at {name.removesuffix('.weight')}; use space: weights, which takes any "
                    "mix of ranks."
                )


def check_probe(plan: "Plan") -> None:
    """The files of a probe must be there, with an item of every modality in each of its inputs."""
    probe, names = plan.recipe.probe, list(plan.recipe.specialists)
    assert probe is not None
    if probe.tensors is not None:
        if not plan.path(probe.tensors).is_file():
            raise InputError(f"probe.tensors: the file {plan.path(probe.tensors)} does not exist.")
        return
    if (template := probe.chat_template_file) and not plan.path(template).is_file():
        raise InputError(
            f"probe.chat_template: the file {plan.path(template)} does not exist; give a Jinja template, "
            "a file that holds one, or none."
        )
    assert probe.data is not None and probe.template is not None
    check_modalities(list(probe.data), names, "probe.data")
    if isinstance(probe.template, str):
        check_template(probe.template, names, "probe.template", "but no specialist has that name")
    else:
        _check_own_templates(probe, names)
    for name, reference in probe.data.items():
        if not plan.path(reference).is_file():
            raise InputError(f"probe.data.{name}: the file {plan.path(reference)} does not exist.")
    _check_items(plan)


def _check_own_templates(probe: ProbeRecipe, names: Sequence[str]) -> None:
    assert isinstance(probe.template, dict) and probe.samples is not None
    check_modalities(list(probe.template), names, "probe.template")
    for name in names:
        templates = probe.templates(name)
        field = f"probe.template.{name}"
        if not templates:
            raise InputError(f"{field} is empty; give at least one template with {{{name}}} in it.")
        if len(templates) > probe.samples:
            raise InputError(
                f"{field} has {len(templates)} templates, but probe.samples is {probe.samples}: ask for as many "
                "samples at least, or give fewer templates."
            )
        for template in templates:
            check_template(template, [name], field, f"but {name} reads prompts of its own: leave only {{{name}}}")


def _check_items(plan: "Plan") -> None:
    """Every item must be one of its modality, before anything that takes long begins."""
    probe = plan.recipe.probe
    assert probe is not None and probe.data is not None and probe.samples is not None and probe.template is not None
    modalities = {
        s.name: s.encoder.modality if s.encoder else TextModality(placeholder=f"{{{s.name}}}") for s in plan.specialists
    }
    tokens = {modality.placeholder: name for name, modality in with_encoder(modalities).items()}
    for reader in modalities:
        field = "probe.template" if probe.is_shared else f"probe.template.{reader}"
        for token, name in tokens.items():
            if any(token in template for template in probe.templates(reader)):
                remedy = f"write {{{name}}}" if probe.is_shared or name == reader else "leave it out"
                raise InputError(f"{field} has {token} in it, which stands for items of {name}: {remedy}.")

    def check(modality: Modality, item: str) -> None:
        if not isinstance(modality, TextModality):
            modality.soft_tokens(modality.features(item))
            return
        text = modality.render(item)
        if token := next((token for token in tokens if token in text), None):
            raise InputError(f"{item[:60]!r} has {token} in it, which stands for items of {tokens[token]}.")

    for name, modality in modalities.items():
        file = plan.path(probe.data[name])
        check_items(numbered_items(file, probe.samples, name), partial(check, modality), f"probe.data.{name}: {file}")
