"""What will be merged, found out and checked from headers and configs alone."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import canonical_tensors, layer_of
from esmerge.errors import InputError
from esmerge.probe import check_modalities, check_template
from esmerge.recipe import EmbeddingSignals, Recipe
from esmerge.sources import Source, resolve
from esmerge.specialists import LoraSpecialist, open_specialist

logger = logging.getLogger(__name__)

MERGEABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Module:
    """A linear layer that some specialist changes.

    Attributes:
        name: canonical, `layers.N.<module>`.
        in_base: its name in the base model, as PEFT uses it.
        tensor: the name of its weight in the base's checkpoint.
        shape: of the weight, [out, in].
    """

    name: str
    in_base: str
    tensor: str
    shape: tuple[int, int]

    @property
    def layer(self) -> int:
        """Number of its decoder layer."""
        return layer_of(self.name)[0]


@dataclass(frozen=True)
class Plan:
    """The opened inputs of a merge, in the recipe's order of specialists.

    Attributes:
        modules: all that any specialist changes, in the order of the layers.
    """

    recipe: Recipe
    base: Source
    checkpoint: Checkpoint
    sources: list[Source]
    specialists: list[LoraSpecialist]
    modules: list[Module]

    @property
    def num_layers(self) -> int:
        """Number of decoder layers, as the base's tensors show it."""
        return 1 + max(layer_of(name)[0] for name in canonical_tensors(self.checkpoint, self.base.reference))

    def path(self, reference: str) -> Path:
        """A path that the recipe gives, relative to the recipe's folder."""
        return self.recipe.folder / Path(reference).expanduser()


def make_plan(recipe: Recipe) -> Plan:
    """Open and check everything that a recipe names.

    Raises:
        InputError: if an input is missing, or the inputs do not fit each other.
    """
    base = resolve(recipe.base, recipe.folder, "base")
    base.config()
    checkpoint = Checkpoint.open(base.folder)
    sources, specialists = [], []
    for name, entry in recipe.specialists.items():
        sources.append(resolve(entry.model, recipe.folder, f"specialists.{name}.model"))
        specialists.append(open_specialist(name, sources[-1].folder))
    plan = Plan(recipe, base, checkpoint, sources, specialists, _match_modules(base, checkpoint, specialists))
    if recipe.space == "factors":
        _check_factors(specialists)
    if isinstance(recipe.coefficients, EmbeddingSignals):
        _check_probe(plan)
    return plan


def _match_modules(base: Source, checkpoint: Checkpoint, specialists: list[LoraSpecialist]) -> list[Module]:
    """Find each adapted module's weight in the base; `InputError` if one is missing or has another shape."""
    weights = canonical_tensors(checkpoint, base.reference)
    modules: dict[str, Module] = {}
    for specialist in specialists:
        missing = [name for name in specialist.modules if f"{name}.weight" not in weights]
        if missing:
            raise InputError(
                f"specialist {specialist.name}: {specialist.folder} changes {len(missing)} modules that the base "
                f"{base.reference} does not have, e.g. {specialist.modules[missing[0]]}: "
                "it was trained from another base."
            )
        for name, in_base in specialist.modules.items():
            info = checkpoint.info(weights[f"{name}.weight"])
            if info.shape != specialist.delta_shape(name):
                raise InputError(
                    f"specialist {specialist.name}: {specialist.folder} changes {in_base} with shape "
                    f"{list(specialist.delta_shape(name))}, in the base {base.reference} it has shape "
                    f"{list(info.shape)}: it was trained from another base."
                )
            if info.dtype not in MERGEABLE:
                raise InputError(
                    f"{info.file}: tensor {weights[f'{name}.weight']} is stored as {info.dtype}; quantised weights "
                    "cannot be merged: use the base in bfloat16, float16 or float32."
                )
            modules.setdefault(name, Module(name, in_base, weights[f"{name}.weight"], specialist.delta_shape(name)))
    trained_from = {str(specialist.config.get("base_model_name_or_path")) for specialist in specialists}
    if len(trained_from) > 1:
        logger.warning(
            "the adapters say that they were trained from different bases (%s); their shapes fit",
            ", ".join(sorted(trained_from)),
        )
    return sorted(modules.values(), key=lambda module: _natural(module.name))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", name)]


def _check_factors(specialists: list[LoraSpecialist]) -> None:
    first = specialists[0]
    for other in specialists[1:]:
        only = [sorted(a.modules.keys() - b.modules.keys()) for a, b in ((first, other), (other, first))]
        if any(only):
            listed = "; ".join(
                f"only in {specialist.name}: {_listed(names)}"
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
                    f"rank {other.rank(name)} at {name}; use space: weights, which takes any mix of ranks."
                )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_probe(plan: Plan) -> None:
    probe, names = plan.recipe.probe, list(plan.recipe.specialists)
    assert probe is not None
    if probe.tensors is not None:
        if not plan.path(probe.tensors).is_file():
            raise InputError(f"probe.tensors: the file {plan.path(probe.tensors)} does not exist.")
        return
    assert probe.data is not None and probe.template is not None
    check_modalities(list(probe.data), names, "probe.data")
    check_template(probe.template, names)
    for name, reference in probe.data.items():
        if not plan.path(reference).is_file():
            raise InputError(f"probe.data.{name}: the file {plan.path(reference)} does not exist.")


def common_scaling(specialists: list[LoraSpecialist]) -> bool:
    """Whether all specialists scale every module alike, so that their B factors compare as they are."""
    return all(specialist.scalings == specialists[0].scalings for specialist in specialists)


def agreed(specialists: list[LoraSpecialist], field: str) -> str | None:
    """What all specialists' configs say in a field, or None if they differ or are silent."""
    values = {specialist.config.get(field) for specialist in specialists}
    return values.pop() if len(values) == 1 else None
