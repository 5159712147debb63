"""What will be merged, found out and checked before the work begins.

From headers and configs alone, except that an adapter made of specialists that store whole tensors needs these compared
with the base's.
"""

import fnmatch
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint
from esmerge.configs import difference, kind_of, quantisation
from esmerge.deltas import Delta
from esmerge.errors import InputError
from esmerge.hub import NotHereError, PartialCopies, split_reference
from esmerge.methods import METHODS
from esmerge.modalities import Modality, TextModality
from esmerge.modalities.modality import MissingPackageError, check_name, with_encoder
from esmerge.modalities.registry import check_shapes, empty_encoder
from esmerge.names import canonical_names, natural_order
from esmerge.probe import check_items, check_modalities, check_template, numbered_items
from esmerge.recipe import FixedRecipe, Recipe, SignalsRecipe
from esmerge.remote_code import check_remote_code, needs_remote_code
from esmerge.scores import row_blocks
from esmerge.sources import Source, is_on_hub, pinned, pinned_file, resolve, resolve_file
from esmerge.specialists import FullSpecialist, LoraSpecialist, Specialist, SpecialistEncoder, open_specialist
from esmerge.specialists.full import DOUBLED_EMBEDDINGS, INPUT_EMBEDDINGS, doubled_embeddings
from esmerge.targets import Target, join_targets, match_targets
from esmerge.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """The opened inputs of a merge, in the recipe's order of specialists.

    Attributes:
        targets: all tensors of the result, in the order of the layers.
        vocabulary: of the result.
        untied: whether the result has output embeddings of its own though the base ties them to the input's.
        left_out: how many of the base's tensors the result does without, by what they are.
        trust_remote_code: whether the base's own code may run.
    """

    recipe: Recipe
    base: Source
    checkpoint: Checkpoint
    sources: list[Source]
    specialists: list[Specialist]
    targets: list[Target]
    vocabulary: Vocabulary
    untied: bool
    left_out: dict[str, int]
    trust_remote_code: bool = False

    @property
    def is_multimodal(self) -> bool:
        """Whether anything but text goes into the merged model, so that it is more than an LLM."""
        encoders = [specialist.encoder for specialist in self.specialists if specialist.encoder is not None]
        return any(not isinstance(encoder.modality, TextModality) for encoder in encoders)

    @property
    def merged(self) -> list[Target]:
        """The tensors that any specialist changes."""
        return [target for target in self.targets if target.merged]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, as the base's tensors show it."""
        return 1 + max((target.layer for target in self.targets if target.layer is not None), default=-1)

    @property
    def encodes(self) -> bool:
        """Whether items go through encoders, for the probe."""
        probe = self.recipe.probe
        return isinstance(self.recipe.coefficients, SignalsRecipe) and probe is not None and probe.data is not None

    def coefficient_names(self, target: Target) -> list[str]:
        """The names that coefficients know a target by: its own, or those of the factors it is merged as."""
        if self.recipe.space == "weights":
            return [target.name]
        module = target.name.removesuffix(".weight")
        return [f"{module}.lora_b.weight", f"{module}.lora_a.weight"]

    def path(self, reference: str) -> Path:
        """The path of a file that the recipe names, relative to its folder or on the Hub."""
        return resolve_file(reference, self.recipe.folder, "the recipe")

    def deltas(self, target: Target) -> list[Delta | None]:
        """What each specialist adds to a tensor; None for nothing."""
        return [
            specialist.delta(name, target.shape) if name else None
            for specialist, name in zip(self.specialists, target.changed, strict=True)
        ]

    def lora_specialists(self) -> list[LoraSpecialist]:
        """The specialists, all of them plain pairs of factors; `InputError` names what is not."""
        found: list[LoraSpecialist] = []
        for specialist in self.specialists:
            if not isinstance(specialist, LoraSpecialist):
                raise InputError(
                    f"space factors needs LoRA adapters, but {specialist.name} is a full checkpoint; "
                    "use space: weights."
                )
            if not specialist.low_rank:
                other = next(name for name in specialist.names if not _plain(specialist, name))
                raise InputError(
                    f"space factors merges pairs of LoRA factors, but {specialist.name} also has "
                    f"{specialist.stored_as(other)}; use space: weights, which merges it as well."
                )
            found.append(specialist)
        return found


def _plain(specialist: LoraSpecialist, name: str) -> bool:
    return name in specialist.modules and "lora_A" in specialist.stored_as(name)


def make_plan(recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """Open and check everything that a recipe names.

    What is on the Hub is pinned first, then checked by its headers and configs, and downloaded only if all fits.

    Args:
        trust_remote_code: whether the base's own code may run.

    Raises:
        InputError: if an input is missing, or the inputs do not fit each other.
    """
    recipe = pin_recipe(recipe)
    with PartialCopies() as copies:
        for field, reference in _models(recipe):
            if is_on_hub(reference, recipe.folder):
                copies.add(*split_reference(reference), field, trust_remote_code and field == "base")
        if copies.folders:
            _check_copies(recipe, trust_remote_code, copies)
    return _open_all(recipe, trust_remote_code, None)


def _check_copies(recipe: Recipe, trust_remote_code: bool, copies: PartialCopies) -> None:
    """Find out what does not fit before any weights are downloaded, as far as some rows of them can tell."""
    log = logging.getLogger("esmerge")
    level = log.level
    log.setLevel(logging.CRITICAL)  # the second look says it all
    try:
        _open_all(recipe, trust_remote_code, copies)
    except InputError as error:
        raise InputError(copies.named(str(error))) from error
    except NotHereError:
        pass
    finally:
        log.setLevel(level)


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """All models that a recipe names, with their fields."""
    yield "base", recipe.base
    for name, entry in recipe.specialists.items():
        yield f"specialists.{name}.model", entry.model
        if entry.encoder is not None:
            yield f"specialists.{name}.encoder", entry.encoder


def pin_recipe(recipe: Recipe) -> Recipe:
    """The recipe with commits as the revisions of all that it names on the Hub.

    Raises:
        InputError: if there is no such thing there, or no access to it.
    """
    models = {field: pinned(reference, recipe.folder, field) for field, reference in _models(recipe)}
    fields: dict[str, Any] = {"base": models["base"]}
    fields["specialists"] = {}
    for name, entry in recipe.specialists.items():
        where = f"specialists.{name}"
        found = {field: models[f"{where}.{field}"] for field in ("model", "encoder") if f"{where}.{field}" in models}
        if entry.features is not None:
            found["features"] = pinned_file(entry.features, f"{where}.features")
        fields["specialists"][name] = entry.model_copy(update=found)
    if (probe := recipe.probe) is not None:
        files: dict[str, Any] = {}
        if probe.data is not None:
            files["data"] = {name: pinned_file(file, f"probe.data.{name}") for name, file in probe.data.items()}
        for field in ("tensors", "chat_template"):
            if (reference := getattr(probe, field)) is not None:
                files[field] = pinned_file(reference, f"probe.{field}")
        fields["probe"] = probe.model_copy(update=files)
    return recipe.model_copy(update=fields)


def _open_all(recipe: Recipe, trust_remote_code: bool, copies: PartialCopies | None) -> Plan:
    find = partial(resolve, relative_to=recipe.folder, copies=copies)
    base = find(recipe.base, field="base", with_code=trust_remote_code)
    check_remote_code(base.config(), trust_remote_code, f"the base {recipe.base}")
    checkpoint = Checkpoint.open(base.folder)
    if (method := quantisation(base.config(), checkpoint)) is not None:
        raise InputError(f"the base {recipe.base} is quantised ({method}); use it in bfloat16, float16 or float32.")
    sources, specialists = [], []
    for name, entry in recipe.specialists.items():
        sources.append(find(entry.model, field=f"specialists.{name}.model"))
        encoder = find(entry.encoder, field=f"specialists.{name}.encoder").folder if entry.encoder else None
        specialists.append(_open(recipe, name, sources[-1].folder, encoder))
        check_remote_code(specialists[-1].config, trust_remote_code, f"the specialist {name}")
    _check_origin(base, specialists)
    stored = canonical_names(
        [name for name in checkpoint if not name.endswith("rotary_emb.inv_freq")], f"the base {recipe.base}"
    )
    left_out = {}
    if doubled := doubled_embeddings(base.config(), checkpoint, stored):
        del stored[doubled]
        left_out[DOUBLED_EMBEDDINGS] = 1
    targets, untied = match_targets(base, checkpoint, stored, specialists)
    targets, vocabulary = join_targets(base, targets, specialists)
    plan = Plan(
        recipe, base, checkpoint, sources, specialists, targets, vocabulary, untied, left_out, trust_remote_code
    )
    _check_modalities(plan)
    _check_frozen(plan)
    _check_distances(plan)
    if recipe.space == "factors":
        _check_factors(plan)
    if recipe.output.format == "adapter":
        plan = _fit_adapter(plan)
    return with_recipe(plan, recipe)


def with_recipe(plan: Plan, recipe: Recipe) -> Plan:
    """The same inputs, merged as a recipe says that differs in method and coefficients alone.

    Raises:
        InputError: if these do not fit the inputs.
    """
    plan = replace(plan, recipe=recipe)
    _check_count(recipe)
    if isinstance(recipe.coefficients, SignalsRecipe):
        _check_probe(plan)
    else:
        _check_patterns(plan, recipe.coefficients)
    return plan


def _open(recipe: Recipe, name: str, folder: Path, encoder: Path | None) -> Specialist:
    given = recipe.specialists[name].features
    features = resolve_file(given, recipe.folder, f"specialists.{name}.features") if given else None
    if features is not None and not features.is_file():
        raise InputError(f"specialists.{name}.features: the file {features} does not exist.")
    specialist = open_specialist(name, folder, encoder, features)
    for what, count in specialist.left_out.items():
        logger.info("%s: %d tensors are left out: %s", name, count, what)
    return specialist


def _check_count(recipe: Recipe) -> None:
    wanted = METHODS[recipe.method.name].specialists
    if wanted is not None and len(recipe.specialists) != wanted:
        raise InputError(
            f"method {recipe.method.name} merges {wanted} specialists, the recipe has {len(recipe.specialists)}."
        )


def _check_patterns(plan: Plan, coefficients: FixedRecipe) -> None:
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


def _check_origin(base: Source, specialists: Sequence[Specialist]) -> None:
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
    named = {
        str(specialist.config.get("base_model_name_or_path"))
        for specialist in specialists
        if isinstance(specialist, LoraSpecialist) and specialist.config.get("base_model_name_or_path")
    }
    if len(named) > 1:
        logger.warning(
            "the adapters say that they were trained from different bases (%s); their shapes fit",
            ", ".join(sorted(named)),
        )


def _check_modalities(plan: Plan) -> None:
    """Encoders must have a placeholder each, be complete, and make soft tokens as wide as the base's embeddings."""
    if plan.is_multimodal and plan.recipe.output.format == "full" and needs_remote_code(plan.base.config()):
        raise InputError(
            f"the base {plan.base.reference} needs code of its own, which a multimodal checkpoint cannot hold: use "
            "output.format: adapter."
        )
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


def _check_encoder(plan: Plan, name: str, encoder: SpecialistEncoder, hidden_size: int) -> None:
    if isinstance(encoder.modality, TextModality):
        return
    tensor, width = encoder.projection or ("", hidden_size)
    if width != hidden_size:
        raise InputError(
            f"{encoder.checkpoint.info(tensor).file}: {tensor} makes soft tokens of size {width}, the base "
            f"{plan.base.reference} has hidden_size {hidden_size}: {name} was trained with another base."
        )
    try:
        built = empty_encoder(encoder.modality, hidden_size)
    except MissingPackageError:
        if plan.encodes:
            raise
        return
    shapes = {key: shape for key, (_, shape) in encoder.layout.items()}
    check_shapes(encoder.modality, built, hidden_size, shapes, f"the encoder of {name} in {encoder.place}")


def _check_frozen(plan: Plan) -> None:
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


def _check_distances(plan: Plan) -> None:
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


def _check_factors(plan: Plan) -> None:
    first, *others = plan.lora_specialists()
    for other in others:
        only = [sorted(a.modules.keys() - b.modules.keys()) for a, b in ((first, other), (other, first))]
        if any(only):
            listed = "; ".join(
                f"only in {specialist.name}: {_listed([name.removesuffix('.weight') for name in names])}"
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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _fit_adapter(plan: Plan) -> Plan:
    """An adapter holds low-rank deltas of matrices inside the layers, and nothing else.

    Full checkpoints have all tensors, so those that an adapter cannot hold are compared with the base's.
    """
    full = next((s for s in plan.specialists if isinstance(s, FullSpecialist)), None)
    if full is not None and plan.recipe.output.rank is None:
        raise InputError(
            f"output.rank is missing: the full checkpoint {full.name} has deltas of any rank; set the adapter's, "
            "or use output.format: full."
        )
    targets = []
    for target in plan.targets:
        if len(target.shape) != 2 or target.layer is None or not target.name.endswith(".weight"):
            for specialist, name in zip(plan.specialists, target.changed, strict=True):
                if name and not _unchanged(plan, target, specialist, name):
                    raise InputError(
                        f"specialist {specialist.name} changes {specialist.stored_as(name)}, which a LoRA adapter "
                        "cannot hold; use output.format: full."
                    )
            target = replace(target, changed=(None,) * len(plan.specialists))
        targets.append(target)
    return replace(plan, targets=targets)


def _unchanged(plan: Plan, target: Target, specialist: Specialist, name: str) -> bool:
    """Whether a specialist that stores a tensor left it as it was; PEFT and full checkpoints store many such."""
    if specialist.shape(name) not in ((), target.shape):
        return False
    delta = specialist.delta(name, target.shape)
    for start, stop in row_blocks(target.shape):
        base = plan.checkpoint.read_range(target.stored, start, stop).float()
        if delta.rows(start, stop, base).any():
            return False
    return True


def _check_probe(plan: Plan) -> None:
    probe, names = plan.recipe.probe, list(plan.recipe.specialists)
    assert probe is not None
    if probe.tensors is not None:
        if not plan.path(probe.tensors).is_file():
            raise InputError(f"probe.tensors: the file {plan.path(probe.tensors)} does not exist.")
        return
    if probe.chat_template and "{" not in probe.chat_template and not plan.path(probe.chat_template).is_file():
        raise InputError(
            f"probe.chat_template: the file {plan.path(probe.chat_template)} does not exist; give a Jinja template "
            "or a file that holds one."
        )
    assert probe.data is not None and probe.template is not None
    check_modalities(list(probe.data), names, "probe.data")
    check_template(probe.template, names)
    for name, reference in probe.data.items():
        if not plan.path(reference).is_file():
            raise InputError(f"probe.data.{name}: the file {plan.path(reference)} does not exist.")
    _check_items(plan)


def _check_items(plan: Plan) -> None:
    """Every item must be one of its modality, before anything that takes long begins."""
    probe = plan.recipe.probe
    assert probe is not None and probe.data is not None and probe.samples is not None and probe.template is not None
    modalities = {
        s.name: s.encoder.modality if s.encoder else TextModality(placeholder=f"{{{s.name}}}") for s in plan.specialists
    }
    tokens = {modality.placeholder: name for name, modality in with_encoder(modalities).items()}
    for token, name in tokens.items():
        if token in probe.template:
            raise InputError(f"probe.template has {token} in it, which stands for items of {name}: write {{{name}}}.")

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


def common_scaling(specialists: Sequence[LoraSpecialist]) -> bool:
    """Whether all specialists scale every module alike, so that their B factors compare as they are."""
    first = specialists[0]
    return all(other.scaling(name) == first.scaling(name) for other in specialists[1:] for name in first.modules)


def agreed(specialists: Sequence[Specialist], field: str) -> str | None:
    """What all specialists' configs say in a field, or None if they differ or are silent."""
    values = {specialist.config.get(field) for specialist in specialists}
    return values.pop() if len(values) == 1 else None
