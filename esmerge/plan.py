"""What will be merged, found out and checked before the work begins.

From headers and configs, and of some tensors a few rows or a hash: those of specialists that store whole tensors are
compared with the base's.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from esmerge.backbone import weight_modules
from esmerge.checkpoint import Checkpoint
from esmerge.checks import (
    check_count,
    check_distances,
    check_encoders,
    check_factors,
    check_frozen,
    check_origin,
    check_patterns,
    check_probe,
)
from esmerge.configs import quantisation
from esmerge.deltas import Delta
from esmerge.devices import usable_device
from esmerge.errors import InputError
from esmerge.hub import NotHereError, PartialCopies, split_reference
from esmerge.modalities import TextModality
from esmerge.names import is_expert
from esmerge.recipe import Recipe, SignalsRecipe
from esmerge.remote_code import check_remote_code
from esmerge.scores import row_blocks
from esmerge.sources import Source, is_on_hub, pinned, pinned_file, resolve, resolve_file
from esmerge.specialists import FullSpecialist, LoraSpecialist, Specialist, open_specialist
from esmerge.specialists.full import own_tensors
from esmerge.specialists.lora import AS_FULL_CHECKPOINT
from esmerge.targets import Target, join_targets, match_targets
from esmerge.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


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
        return self.recipe.needs_probe and probe is not None and probe.data is not None

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
                raise InputError(
                    f"space factors merges pairs of LoRA factors, but {specialist.name} also has "
                    f"{specialist.beside_factors[0]}; use space: weights, which merges it as well."
                )
            found.append(specialist)
        return found


# Of transformers' models, those whose linear layers are Conv1D.
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
# Those of whose routers, which are no linear layers, PEFT takes factors.
_ROUTERS_WITH_FACTORS = ("mixtral",)


def make_plan(recipe: Recipe, trust_remote_code: bool = False) -> Plan:
    """Open and check everything that a recipe names.

    What is on the Hub is pinned first, then checked by its headers and configs, and downloaded only if all fits.

    Args:
        trust_remote_code: whether the base's own code may run.

    Raises:
        InputError: if an input is missing, or the inputs do not fit each other.
    """
    usable_device(recipe.device)
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
    return recipe.with_references(lambda reference, field: pinned(reference, recipe.folder, field), pinned_file)


def _open_all(recipe: Recipe, trust_remote_code: bool, copies: PartialCopies | None) -> Plan:
    find = partial(resolve, relative_to=recipe.folder, copies=copies)
    base = find(recipe.base, field="base", with_code=trust_remote_code)
    check_remote_code(base.config(), trust_remote_code, f"the base {recipe.base}")
    _refuse_quantised(recipe, base, ())
    checkpoint = Checkpoint.open(base.folder)
    _refuse_quantised(recipe, base, checkpoint)
    sources, specialists = [], []
    for name, entry in recipe.specialists.items():
        sources.append(find(entry.model, field=f"specialists.{name}.model"))
        encoder = find(entry.encoder, field=f"specialists.{name}.encoder").folder if entry.encoder else None
        specialists.append(_open(recipe, name, sources[-1].folder, encoder))
        check_remote_code(specialists[-1].config, trust_remote_code, f"the specialist {name}")
    check_origin(base, specialists)
    _refuse_transposed(base, specialists)
    stored, left_out = own_tensors(base.config(), checkpoint, list(checkpoint), f"the base {recipe.base}")
    targets, untied = match_targets(base, checkpoint, stored, specialists)
    targets, vocabulary = join_targets(base, targets, specialists)
    plan = Plan(
        recipe, base, checkpoint, sources, specialists, targets, vocabulary, untied, left_out, trust_remote_code
    )
    check_encoders(plan)
    check_frozen(plan)
    check_distances(plan)
    if recipe.space == "factors":
        check_factors(plan)
    if recipe.output.format == "adapter":
        plan = _fit_adapter(plan)
    return with_recipe(plan, recipe)


def _refuse_quantised(recipe: Recipe, base: Source, tensors: Iterable[str]) -> None:
    if (method := quantisation(base.config(), tensors)) is not None:
        raise InputError(f"the base {recipe.base} is quantised ({method}); use it in bfloat16, float16 or float32.")


def _refuse_transposed(base: Source, specialists: Iterable[Specialist]) -> None:
    """Factors of Conv1D layers are those of the transposed weight, whether or not an adapter's config says so."""
    if (kind := base.config().get("model_type")) not in _TRANSPOSED:
        return
    for specialist in specialists:
        if isinstance(specialist, LoraSpecialist) and any(name.startswith("layers.") for name in specialist.modules):
            raise InputError(
                f"specialist {specialist.name}: {specialist.folder} has factors of Conv1D layers, as the linear layers "
                f"of a {kind} are, which cannot be merged: {AS_FULL_CHECKPOINT}."
            )


def with_recipe(plan: Plan, recipe: Recipe) -> Plan:
    """The same inputs, merged as a recipe says that differs in method and coefficients alone.

    Raises:
        InputError: if these do not fit the inputs.
    """
    plan = replace(plan, recipe=recipe)
    check_count(recipe)
    if recipe.needs_probe:
        check_probe(plan)
    if not isinstance(recipe.coefficients, SignalsRecipe):
        check_patterns(plan, recipe.coefficients)
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
    if (kind := plan.base.config().get("model_type")) in _TRANSPOSED and full is not None:
        raise InputError(
            f"the weights of a {kind} are stored transposed, unlike factors of deltas: no adapter is made of full "
            "checkpoints; use output.format: full."
        )
    known = weight_modules(plan.base.folder, plan.trust_remote_code) if full is not None else {}
    targets = []
    for target in plan.targets:
        modules = known.get(target.name, {}).values()
        is_linear = all(isinstance(module, nn.Linear) for module in modules) or kind in _ROUTERS_WITH_FACTORS
        is_matrix = len(target.shape) == 2 and target.layer is not None and target.name.endswith(".weight")
        if not (is_matrix and is_linear):
            for specialist, name in zip(plan.specialists, target.changed, strict=True):
                if name and not _unchanged(plan, target, specialist, name):
                    raise InputError(
                        f"specialist {specialist.name} changes {specialist.stored_as(name)}, which a LoRA adapter "
                        "cannot hold; use output.format: full."
                    )
            target = replace(target, changed=(None,) * len(plan.specialists))
        targets.append(target)
    if not any(target.merged for target in targets):
        raise InputError("the specialists change no weight that a LoRA adapter can hold: there is nothing to merge.")
    plan = replace(plan, targets=targets)
    _check_rank(plan)
    _check_experts(plan, known)
    return _with_modules(plan, known)


def _check_rank(plan: Plan) -> None:
    """Raise `InputError` if the rank is to be found out of deltas that are not of low rank."""
    if plan.recipe.output.rank is not None:
        return
    for target in plan.merged:
        for specialist, name in zip(plan.specialists, target.changed, strict=True):
            if name and isinstance(specialist, LoraSpecialist) and not specialist.is_pair(name):
                raise InputError(
                    f"output.rank is missing: {specialist.name} changes {specialist.stored_as(name)}, which is no pair "
                    "of factors, by a delta of any rank; set the adapter's, or use output.format: full."
                )


def _check_experts(plan: Plan, known: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Raise `InputError` if PEFT would take factors of other linear layers for those of experts that run as one."""
    names = [target.name for target in plan.targets] if known else []
    leaves = {_leaf(name): name for name in names if is_expert(name) and name not in known}
    for target in plan.merged:
        if target.name in known and (expert := leaves.get(_leaf(target.name))) is not None:
            raise InputError(
                f"PEFT takes factors of {target.stored} for those of experts, as {expert} is called like it: an "
                "adapter of this base cannot hold what full checkpoints change; use output.format: full."
            )


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _with_modules(plan: Plan, known: Mapping[str, Mapping[str, nn.Module]]) -> Plan:
    """What is merged under the names of the base's modules, where PEFT looks for them.

    The base's checkpoint can have others, and so can adapters of a model that held the base when they were trained.

    Args:
        known: the base's `weight_modules`; empty if they have not been looked for.
    """
    told = {t.name: {s.modules[t.name] for s in plan.specialists if t.name in s.modules} for t in plan.merged}
    stored = {target.name: target.stored.removesuffix(".weight") for target in plan.merged}
    usual = {target.name: f"model.{target.name.removesuffix('.weight')}" for target in plan.merged}
    # Where both agree there is nothing to find out, which would take longer than a small merge.
    agreed = all((told[name] or {usual[name]}) == {stored[name]} for name in told)
    known = {} if agreed else known or weight_modules(plan.base.folder, plan.trust_remote_code)
    targets = []
    for target in plan.targets:
        if target.merged:
            likely = [*sorted(told[target.name]), stored[target.name]]
            found = list(known.get(target.name, ()))
            module = likely[0] if len(told[target.name]) == 1 else stored[target.name]
            if found:
                module = next((name for name in likely if name in found), found[0])
            target = replace(target, written=f"{module}.weight")
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
