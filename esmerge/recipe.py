"""What a user asks for: a recipe, from YAML and to YAML, with errors that name the field."""

import copy
import fnmatch
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from esmerge.errors import InputError
from esmerge.tokenizer import NO_TEMPLATE
from esmerge.yaml_files import NestedError, first_error, nearest, parse_yaml, read_mapping

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Dtype = Literal["float32", "float16", "bfloat16"]

# What mergekit calls them.
_SYNONYMS = {"base_model": "base", "models": "specialists", "merge_method": "method"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class SpecialistRecipe(_Strict):
    """One specialist: a PEFT LoRA adapter, a full checkpoint, Prot2Text-V2 or Mol-LLaMA.

    Attributes:
        model: folder or Hub id (`user/repo` or `user/repo@revision`). Beside an adapter or a full checkpoint, its
            `modalities/<name>` may hold the encoder of the modality; the other two have theirs in their own layout.
        encoder: folder or Hub id of the encoder, where it is not in `model`: a modality's folder (config.json with
            `kind`, model.safetensors); for an adapter of Prot2Text-V2 also the full checkpoint or the EsmModel.
        features: for Mol-LLaMA, a safetensors file of features that its encoder gave, relative to the recipe; they
            replace the encoder, which only runs in its own environment.
    """

    model: str
    encoder: str | None = None
    features: str | None = None


class ProbeRecipe(_Strict):
    """The probe: text items put into a template, or ready tensors.

    Attributes:
        samples: number of probe inputs.
        template: one user turn, with a `{modality}` placeholder each. For methods that match what the specialists read
            also one for each specialist, or several that take turns, with its own placeholder alone: each then reads
            prompts like those that it was trained on.
        data: per modality a text file with one item per line, relative to the recipe.
        chat_template: a Jinja chat template or a file that holds one, instead of the tokenizer's own; or `none`, for
            prompts as they are.
        tensors: a safetensors file with `inputs_embeds` [K, T, H], `attention_mask` [K, T] and
            `mask.<modality>` [K, T].
        batch_size: probe inputs per batch; 2 in the paper's code. Gradient scores depend on it.
        dtype: in which the layers run; by default that of the base's weights (on a CPU, float32 instead of float16).
    """

    samples: Count | None = None
    template: str | dict[str, str | list[str]] | None = None
    data: dict[str, str] | None = None
    chat_template: str | None = None
    tensors: str | None = None
    batch_size: Count = 2
    dtype: Dtype | None = None

    @field_validator("template", mode="before")
    @classmethod
    def _template(cls, value: Any) -> Any:
        given = value if isinstance(value, dict) else {"": value}
        for name, own in given.items():
            texts = own if isinstance(own, list) and value is given else [own]
            if value is not None and not all(isinstance(text, str) for text in (name, *texts)):
                raise ValueError(
                    f"{own!r} is no template; give one text in quotes, or one or several by each specialist's name"
                )
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        text = {"samples": self.samples, "template": self.template, "data": self.data}
        if self.tensors is not None:
            given = [name for name, value in {**text, "chat_template": self.chat_template}.items() if value is not None]
            if given:
                raise ValueError(f"tensors and {given[0]} exclude each other: ready tensors need no text")
        else:
            missing = [name for name, value in text.items() if value is None]
            if missing:
                raise ValueError(f"{missing[0]} is missing; give samples, template and data, or tensors")
        return self

    @property
    def chat_template_file(self) -> str | None:
        """The file that holds the chat template, where it is not a template itself."""
        given = self.chat_template
        return given if given and given != NO_TEMPLATE and "{" not in given else None

    @property
    def is_shared(self) -> bool:
        """Whether all specialists read the same probe inputs."""
        return not isinstance(self.template, dict)

    def templates(self, specialist: str) -> list[str]:
        """Those of a specialist's probe inputs, which take turns."""
        own = self.template[specialist] if isinstance(self.template, dict) else self.template
        return [own] if isinstance(own, str) else list(own or ())


class SignalsRecipe(_Strict):
    """Coefficients from embedding signals (arXiv 2603.14405).

    Attributes:
        granularity: layer-wise coefficients, element-wise ones, or both combined.
        alpha: weight of the other modalities in a specialist's layer score.
        temperature: of the softmax of layer scores.
        tau: temperature of the softmax of element scores.
        projections: random directions of the sliced Wasserstein distance.
        p: its order.
        distance: between hidden states, for the gradients: `mse` (released code), `frobenius` (paper).
        tokens: whose positions count for the gradients: `primary` (released code), `all` (paper).
        outside: coefficients of tensors outside the decoder layers (embeddings, final norm, head): the `mean` of the
            layer-wise ones over the layers, `uniform`, or a number per specialist.
    """

    from_: Literal["embedding_signals"] = Field(alias="from")
    granularity: Literal["both", "layer", "element"] = "both"
    alpha: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    temperature: Positive = 0.5
    tau: Positive = 0.1
    projections: Count = 1024
    p: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    distance: Literal["mse", "frobenius"] = "mse"
    tokens: Literal["primary", "all"] = "primary"
    outside: Literal["mean", "uniform"] | dict[str, Finite] = "mean"

    def outside_numbers(self, specialists: Sequence[str]) -> "Tensor":
        """The coefficients outside the layers where they are given, float64 [S]."""
        source: Any = self.outside
        return FixedRecipe.model_validate({"from": source}).numbers("", specialists)


class FixedRecipe(_Strict):
    """The same coefficient everywhere: `uniform`, or a number per specialist.

    Instead of a number, patterns of tensor names (`layers.0.*`, `*.mlp.*`, `*`) each with a number: the first that
    matches a tensor's canonical name counts.
    """

    from_: Literal["uniform"] | dict[str, Finite | dict[str, Finite]] = Field(alias="from")

    def numbers(self, tensor: str, specialists: Sequence[str]) -> "Tensor":
        """The coefficients of a tensor, float64 [S]; `InputError` if no pattern matches it."""
        import torch

        if self.from_ == "uniform":
            return torch.full((len(specialists),), 1 / len(specialists), dtype=torch.float64)
        assert isinstance(self.from_, dict)
        values = [_number(self.from_[name], tensor, name) for name in specialists]
        return torch.tensor(values, dtype=torch.float64)


def _number(value: float | dict[str, float], tensor: str, specialist: str) -> float:
    if not isinstance(value, dict):
        return value
    for pattern, number in value.items():
        if fnmatch.fnmatchcase(tensor, pattern):
            return number
    raise InputError(f"coefficients.{specialist}: no pattern matches {tensor}; end with the pattern '*'.")


class MethodRecipe(BaseModel):
    """How the weighted deltas are combined: a name, and the parameters of `esmerge.methods.<name>`.

    Their defaults are mergekit's: `linear`, `ties` and `della` divide by the weights, the others do not.
    """

    model_config = ConfigDict(extra="allow")

    name: str = "linear"

    @model_validator(mode="after")
    def _known(self) -> Self:
        from esmerge.methods import METHODS
        from esmerge.methods.registry import accepted

        if self.name not in METHODS:
            raise ValueError(f"name is {self.name!r}{nearest(self.name, list(METHODS))} (known: {', '.join(METHODS)})")
        parameters, check = METHODS[self.name].parameters, METHODS[self.name].check
        try:
            values = self.resolved.model_dump()
        except ValidationError as error:
            first = error.errors()[0]
            field = str(first["loc"][0])
            if first["type"] == "extra_forbidden":
                known = [info.alias or name for name, info in parameters.model_fields.items()]
                has = f"known: {', '.join(known)}" if known else "it has none"
                close = nearest(field, known if "name" in self.model_fields_set else [*known, "name"])
                raise ValueError(f"{field} is no parameter of {self.name}{close} ({has})") from error
            raise ValueError(f"{field} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error
        if check is not None:
            check(**accepted(check, values))
        return self

    @property
    def matches(self) -> bool:
        """Whether it needs what linear layers read in each specialist."""
        from esmerge.methods import METHODS

        return METHODS[self.name].match is not None

    @property
    def follows_merged(self) -> bool:
        """Whether what layers read comes from merged layers before them."""
        return self.parameters.get("activations") == "merged"

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's parameters, as the recipe gives them."""
        return dict(self.model_extra or {})

    @property
    def resolved(self) -> BaseModel:
        """All parameters of the method, with their defaults."""
        from esmerge.methods import METHODS

        return METHODS[self.name].parameters.model_validate(self.parameters)


class OutputRecipe(_Strict):
    """What is written.

    Attributes:
        format: a LoRA `adapter`, or a `full` checkpoint with the base's weights in it.
        rank: of an adapter merged in `weights` space; by default the sum of the specialists' ranks, which is
            exact for `linear`, `task_arithmetic` and methods that match inputs, with layer-wise or fixed coefficients.
        dtype: of the merged tensors; by default float32 for an adapter and the base's own for a full checkpoint.
        signals: also write `signals.safetensors`: pooled embeddings, directions, gradient scores and
            element-wise coefficients. As large as the merged deltas, times the number of specialists.
    """

    format: Literal["adapter", "full"] = "adapter"
    rank: Count | None = None
    dtype: Dtype | None = None
    signals: bool = False


@dataclass(frozen=True)
class Pins:
    """What the inputs of a recipe were when a merge recorded it.

    Attributes:
        record: the file with the record.
        inputs: what it says of them, `base`, `specialists` and `probe`, as far as they are the same as then.
    """

    record: Path
    inputs: Mapping[str, Mapping[str, Any]]


class Recipe(_Strict):
    """A merge.

    Attributes:
        base: the model that all specialists were trained from, as folder or Hub id.
        specialists: at least two, each named after its modality.
        probe: needed by coefficients from embedding signals, and by methods that match what the specialists read.
        space: `weights` merges the deltas of the weights; `factors` merges LoRA's A and B separately, as the
            paper does, which adds cross terms.
        seed: of everything random.
        device: where the layers run, as torch names it.
    """

    base: str
    specialists: Annotated[dict[str, SpecialistRecipe], Field(min_length=2)]
    probe: ProbeRecipe | None = None
    coefficients: SignalsRecipe | FixedRecipe
    method: MethodRecipe = MethodRecipe()
    space: Literal["weights", "factors"] = "weights"
    output: OutputRecipe = OutputRecipe()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    device: str = "cpu"

    _folder: Path = PrivateAttr(default_factory=Path)
    _pins: Pins | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """What relative paths start from: the recipe file's folder."""
        return self._folder

    @property
    def pins(self) -> Pins | None:
        """What the inputs have to be, for a recipe that is a merge's record."""
        return self._pins

    def with_references(self, model: Callable[[str, str], str], file: Callable[[str, str], str]) -> Self:
        """The recipe with other references.

        Args:
            model: from each reference to a model or encoder, and the field it stands in, to another.
            file: the same for files.
        """
        fields: dict[str, Any] = {"base": model(self.base, "base"), "specialists": {}}
        for name, entry in self.specialists.items():
            where = f"specialists.{name}"
            found = {"model": model(entry.model, f"{where}.model")}
            if entry.encoder is not None:
                found["encoder"] = model(entry.encoder, f"{where}.encoder")
            if entry.features is not None:
                found["features"] = file(entry.features, f"{where}.features")
            fields["specialists"][name] = entry.model_copy(update=found)
        if (probe := self.probe) is not None:
            files: dict[str, Any] = {}
            if probe.data is not None:
                files["data"] = {name: file(place, f"probe.data.{name}") for name, place in probe.data.items()}
            if probe.tensors is not None:
                files["tensors"] = file(probe.tensors, "probe.tensors")
            if probe.chat_template_file is not None:
                files["chat_template"] = file(probe.chat_template_file, "probe.chat_template")
            fields["probe"] = probe.model_copy(update=files)
        return self.model_copy(update=fields)

    @property
    def needs_probe(self) -> bool:
        """Whether the probe has to go through base and specialists."""
        return isinstance(self.coefficients, SignalsRecipe) or self.method.matches

    @field_validator("specialists", mode="before")
    @classmethod
    def _specialists(cls, value: Any) -> Any:
        if isinstance(value, dict):
            for name in value:
                if name == "base":
                    raise ValueError("a specialist cannot be named base; name it after its modality")
                if not str(name).isidentifier():
                    raise ValueError(f"{name!r} is no valid specialist name: use letters, digits and underscores")
            return {name: {"model": entry} if isinstance(entry, str) else entry for name, entry in value.items()}
        raise ValueError(f"{value!r} has no names; give each specialist one, as in {{molecule: ./mol-lora, ...}}")

    @field_validator("coefficients", mode="before")
    @classmethod
    def _coefficients(cls, value: Any) -> Any:
        # `uniform` and `{molecule: 0.5, ...}` stand for themselves, without `from`.
        if isinstance(value, str) or (isinstance(value, dict) and "from" not in value):
            value = {"from": value}
        source = value["from"] if isinstance(value, dict) else value
        if isinstance(source, dict):
            for name, number in source.items():
                for entry in number.values() if isinstance(number, dict) else [number]:
                    if not isinstance(entry, int | float) or isinstance(entry, bool):
                        raise ValueError(f"{name} is {entry!r}, expected a number (or from: embedding_signals)")
        elif source not in ("embedding_signals", "uniform"):
            raise ValueError(f"from is {source!r}, expected embedding_signals, uniform or a number per specialist")
        kind = SignalsRecipe if source == "embedding_signals" else FixedRecipe
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise NestedError(error, kind) from error

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = list(self.specialists)
        if isinstance(self.coefficients, SignalsRecipe):
            if self.probe is None:
                raise ValueError("probe is missing; coefficients from embedding signals need one")
            if isinstance(self.coefficients.outside, dict):
                _check_keys("coefficients.outside", self.coefficients.outside, names)
                _check_signs("coefficients.outside", self.coefficients.outside)
        elif isinstance(self.coefficients.from_, dict):
            _check_keys("coefficients", self.coefficients.from_, names)
            _check_weights(self.coefficients.from_)
        if isinstance(self.coefficients, SignalsRecipe) and self.probe is not None and not self.probe.is_shared:
            raise ValueError(
                "probe.template: coefficients from embedding signals compare what all make of the same prompt; "
                "give one template with all placeholders"
            )
        if self.method.matches:
            if self.probe is None:
                raise ValueError(f"probe is missing; method {self.method.name} needs what the specialists read in one")
            if self.space == "factors":
                raise ValueError(f"space: method {self.method.name} merges weights; leave space out")
            if isinstance(self.coefficients, SignalsRecipe) and self.coefficients.granularity != "layer":
                raise ValueError(
                    f"coefficients.granularity: method {self.method.name} takes one number per specialist; use layer"
                )
            if isinstance(self.coefficients, SignalsRecipe) and self.method.follows_merged:
                raise ValueError(
                    "method.activations: merged layers are needed before signals are known; use specialist, or numbers "
                    "as coefficients"
                )
        if self.space == "factors" and self.output.rank is not None:
            raise ValueError(
                "output.rank: merged factors keep the specialists' rank; leave it out, or use space: weights"
            )
        if self.output.format == "full" and self.output.rank is not None:
            logger.warning("output.rank has no effect on a full checkpoint")
        return self


def _check_keys(field: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in given:
        if name not in names:
            raise ValueError(f"{field}.{name}: no specialist has that name{nearest(name, names)}")
    for name in names:
        if name not in given:
            raise ValueError(f"{field}.{name} is missing; give a number for each specialist")


def _check_weights(given: Mapping[str, float | dict[str, float]]) -> None:
    numbers = _check_signs("coefficients", given)
    if not any(numbers):
        raise ValueError("coefficients are all 0, which gives the base back; at least one must be positive")


def _check_signs(field: str, given: Mapping[str, float | dict[str, float]]) -> list[float]:
    numbers = [(n, x) for n, value in given.items() for x in (value.values() if isinstance(value, dict) else [value])]
    for name, number in numbers:
        if number < 0:
            raise ValueError(f"{field}.{name} is {number}; negative coefficients undo a specialist, use 0 or more")
    return [number for _, number in numbers]


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        file: YAML; or the esmerge.yaml of a result, whose recipe has the commits of all that is from the Hub, absolute
            paths, and hashes that what lies there has to have (`Recipe.pins`), unless its section `inputs` is removed.
        overrides: `field=value` with dots for nested fields, values in YAML, e.g. `coefficients.tau=0.2`. Models that
            they replace need no longer be what they were.

    Raises:
        InputError: one sentence that names the field and what was expected.
    """
    content = read_mapping(file, "recipe", list(Recipe.model_fields))
    inputs: Any = None
    if isinstance(content.get("recipe"), dict):
        content, inputs = content["recipe"], content.get("inputs")
    recorded = copy.deepcopy(content)
    for override in overrides:
        _override(content, override)
    source = f"{file} with --set {', '.join(overrides)}" if overrides else str(file)
    recipe = parse_recipe(content, file.parent, source)
    if inputs is not None:
        recipe._pins = Pins(file, _kept_inputs(inputs, recorded, content, file))
    return recipe


def _kept_inputs(inputs: Any, recorded: dict[str, Any], content: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a record says of the inputs that its recipe still has after overrides."""
    try:
        # Files are told apart by their references.
        kept = {"specialists": {}, "probe": dict(inputs.get("probe", {}))}
        if content.get("base") == recorded.get("base"):
            kept["base"] = dict(inputs.get("base", {}))
        for name, pin in inputs.get("specialists", {}).items():
            if content["specialists"].get(name) == recorded["specialists"].get(name):
                kept["specialists"][name] = dict(pin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: its section inputs is not as a merge wrote it: restore or remove it.") from error
    return kept


def parse_recipe(content: dict[str, Any], folder: Path, source: str = "the recipe") -> Recipe:
    """A recipe from a mapping; relative paths in it start from `folder`."""
    if (given := content.get("parameters")) and isinstance(given, dict):
        raise InputError(
            f"{source}: parameters are those of a method here: write method: {{name: {_method_name(content)}, "
            f"{', '.join(map(str, given))}: ...}}."
        )
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{source}: {first_error(error, Recipe, _SYNONYMS)}") from error
    recipe._folder = folder
    return recipe


def _method_name(content: Mapping[str, Any]) -> str:
    method = content.get("method", content.get("merge_method"))
    return str(method.get("name") if isinstance(method, dict) else method or "linear")


def override_recipe(recipe: Recipe, fields: Mapping[str, Any], source: str) -> Recipe:
    """A recipe with some top-level fields replaced; `source` is what messages call it."""
    content = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    found = parse_recipe({**content, **fields}, recipe.folder, source)
    found._pins = recipe._pins
    return found


def read_variants(methods: Sequence[str], coefficients: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All combinations of methods and coefficients, given in YAML, as fields of a recipe by a short name."""
    choices = {"method": methods, "coefficients": coefficients}
    variants: dict[str, dict[str, Any]] = {"": {}}
    for field, texts in choices.items():
        parsed = [(_short(text), _yaml(text, f"--{field} {text}")) for text in texts]
        shorts = [short for short, _ in parsed]
        if len(set(shorts)) < len(shorts):
            twice = next(short for short in shorts if shorts.count(short) > 1)
            raise InputError(f"--{field}: two of them would be written to one folder, {twice}; give each once.")
        if parsed:
            variants = {
                "-".join(filter(None, (name, short))): {**fields, field: value}
                for name, fields in variants.items()
                for short, value in parsed
            }
    if len(variants) < 2:
        raise InputError("there is nothing to compare: give --method or --coefficients at least twice.")
    return variants


def _short(text: str) -> str:
    words = re.findall(r"-?[\w.]+", text)
    return "_".join(word for word in words if word not in ("name", "from"))


def _yaml(text: str, source: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: the value is no valid YAML; quote it if it is text.") from error


def _override(content: dict[str, Any], override: str) -> None:
    path, separator, value = override.partition("=")
    if not separator:
        raise InputError(f"--set {override}: expected FIELD=VALUE, e.g. --set seed=7.")
    *parents, leaf = path.split(".")
    for parent in parents:
        entry = content.setdefault(parent, {})
        if not isinstance(entry, dict):
            raise InputError(f"--set {override}: {parent} is {entry!r} in the recipe and has no fields.")
        content = entry
    content[leaf] = _yaml(value, f"--set {override}")
