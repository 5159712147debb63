"""LoRA adapters as PEFT saves them, with all that PEFT may put beside the factors."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import Delta, DoraDelta, LoraDelta, RowDelta, ShiftDelta, SumDelta, ValueDelta, is_finite
from esmerge.errors import InputError
from esmerge.names import base_module, canonical_name, natural_order, peft_module
from esmerge.sources import read_json
from esmerge.specialists.encoder import SpecialistEncoder
from esmerge.specialists.full import INPUT_EMBEDDINGS, OUTPUT_EMBEDDINGS

# What PEFT appends to a module's name, with or without the adapter's name; factors of embeddings are transposed.
_PARTS = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?$"
)
_TOKENS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?$")
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.|(?:\.token_adapter)?\.base_layer\.")

# What `left_out` calls the modules that PEFT keeps beside those it trains.
ORIGINAL_MODULES = "modules as they were before training"

# Fields of PEFT's LoraConfig that change what an adapter computes in a way that its tensors do not show.
_UNSUPPORTED = {
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "target_parameters": "LoRA on parameters that are no linear layers",
    "use_qalora": "QA-LoRA pooling",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA singular values",
    "monteclora_config": "MonteCLoRA sampling",
    "velora_config": "VeLoRA compression",
}
# Switches and settings of variants that are known; any other that is set belongs to a variant that is not.
_KNOWN_VARIANTS = {"use_rslora", "use_dora"} | {
    f"{kind}_config" for kind in ("loftq", "eva", "corda", "lora_ga", "runtime", "megatron")
}
# Initialisations that leave the base as it is, and those that take what they put into the factors out of its weights.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "mica")
_MOVING_INITIALISATIONS = {
    "pissa": "PiSSA",
    "corda": "CorDA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
AS_FULL_CHECKPOINT = "merge the adapter into the base that it was trained on and give the full checkpoint"


class LoraSpecialist:
    """A PEFT LoRA adapter: its deltas by tensor, read when they are asked for.

    DoRA magnitudes, biases, modules_to_save, LoRA on embeddings and trained tokens are deltas of their tensors; a
    tensor that is none of these is refused by name.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: of the adapter.
        config: its adapter_config.json.
        modules: canonical name of each weight with plain low-rank factors -> the module's name in the base, as PEFT
            has it.
        ties_embeddings: whether what it does to the input embeddings holds for the output embeddings too, where the
            base ties them.
        encoder: of its modality, if it brings one.
        left_out: how many of its tensors the result does without, by what they are.
        frozen: canonical name of each of the base's tensors that is stored beside the adapter -> the tensor stored.
        tied: canonical name of the input embeddings that the base's output embeddings are; None where it has both, or
            that is not known yet.

    Args:
        config: as PEFT has it, where there is no adapter_config.json.
        config_file: where `config` is from.
        checkpoint: where it is open already.
        tensors: those of the adapter, where the checkpoint holds more.

    Raises:
        InputError: if it is no LoRA, or holds anything that cannot be expressed as deltas.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        config: Mapping[str, Any] | None = None,
        config_file: Path | None = None,
        checkpoint: Checkpoint | None = None,
        tensors: Iterable[str] | None = None,
        encoder: SpecialistEncoder | None = None,
        left_out: Mapping[str, int] | None = None,
        frozen: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.encoder = encoder
        self.left_out = dict(left_out or {})
        self.frozen = dict(frozen or {})
        self.tied: str | None = None
        self._config_file = config_file or folder / "adapter_config.json"
        self.config: Mapping[str, Any] = read_json(self._config_file) if config is None else config
        _check_type(self.config, self._config_file)
        self.checkpoint = checkpoint or Checkpoint.open(folder, "adapter_model")
        self.modules: dict[str, str] = {}
        # By canonical name of the weight: part (`lora_A.weight`, ...) -> the adapter's tensor.
        self._parts: dict[str, dict[str, str]] = {}
        self._values: dict[str, str] = {}
        self._tokens: dict[str, str] = {}
        own = list(self.checkpoint if tensors is None else tensors)
        for tensor in own:
            self._classify(tensor)
        if not own:
            raise InputError(f"{folder}: the adapter holds no tensors.")
        _check_variant(self.config, self._config_file)
        for weight in self._parts:
            self._check_factors(weight)
        # PEFT's trained tokens follow the base's tying unless the output embeddings have their own.
        others = {*self._parts, *self._values} & {*INPUT_EMBEDDINGS, *OUTPUT_EMBEDDINGS}
        tokens = not others and not self._tokens.keys() & set(OUTPUT_EMBEDDINGS) and bool(self._tokens)
        self.ties_embeddings = bool(self.config.get("ensure_weight_tying")) or tokens

    def _classify(self, tensor: str) -> None:
        if match := _PARTS.match(tensor):
            weight = canonical_name(f"{match['module']}.weight")
            self._add(self._parts.setdefault(weight, {}), match["part"] + (match["leaf"] or ""), tensor)
            if match["part"] == "lora_A":
                self.modules[weight] = base_module(match["module"])
        elif match := _TOKENS.match(tensor):
            self._add(self._tokens, canonical_name(f"{match['module']}.weight"), tensor)
        elif ".original_module." in tensor:
            self.left_out[ORIGINAL_MODULES] = self.left_out.get(ORIGINAL_MODULES, 0) + 1
        else:
            self._add(self._values, canonical_name(_SAVED.sub(".", tensor)), tensor)

    def _add(self, found: dict[str, str], key: str, tensor: str) -> None:
        if key in found:
            raise InputError(
                f"{self.folder} has one tensor in two places ({found[key]} and {tensor}); "
                "only adapters of one list of decoder layers can be merged."
            )
        found[key] = tensor

    def _check_factors(self, weight: str) -> None:
        """Find out whether the factors of a weight fit each other and the config."""
        parts = self._parts[weight]
        letters = ("lora_embedding_A", "lora_embedding_B") if "lora_embedding_A" in parts else _FACTORS
        if letters is not _FACTORS:
            for part, tensor in parts.items():
                if part not in letters:
                    raise InputError(
                        f"{self.folder}: {tensor} cannot be merged, as DoRA of embeddings scales whole columns: "
                        f"{AS_FULL_CHECKPOINT}."
                    )
        for part in letters:
            if part not in parts:
                raise InputError(f"{self.folder}: {next(iter(parts.values()))} has no {part} beside it.")
        magnitude = any(part.startswith("lora_magnitude_vector") for part in parts)
        if letters is _FACTORS and magnitude != bool(self.config.get("use_dora")):
            stated, found = ("is not", "a") if magnitude else ("is", "no")
            raise InputError(
                f"{self._config_file}: use_dora {stated} set, but {parts[letters[0]]} has {found} "
                "lora_magnitude_vector beside it: one of them belongs to another adapter."
            )
        a, b = (self.checkpoint.info(parts[part]) for part in letters)
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{a.file}: {parts[letters[0]]} has shape {list(a.shape)} and {parts[letters[1]]} {list(b.shape)}; "
                "expected [r, in] and [out, r]."
            )
        stated = _from_pattern(self.config.get("rank_pattern"), self._module(weight), self.config["r"])
        if stated != a.shape[0]:
            raise InputError(
                f"{a.file}: {parts[letters[0]]} has rank {a.shape[0]}, {self._config_file.name} says {stated} "
                "(r and rank_pattern): one of them belongs to another adapter."
            )

    def _module(self, weight: str) -> str:
        part = next(iter(self._parts[weight].values()))
        match = _PARTS.match(part)
        assert match is not None
        return peft_module(match["module"])

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors that it changes."""
        biases = [_bias_of(weight) for weight, parts in self._parts.items() if "lora_B.bias" in parts]
        return sorted({*self._parts, *biases, *self._values, *self._tokens}, key=natural_order)

    @property
    def tensors(self) -> Mapping[str, str]:
        """What tells its tensors apart, whatever they are called -> the adapter's tensor."""
        factors = {f"{weight} {part}": t for weight, parts in self._parts.items() for part, t in parts.items()}
        return factors | self._values | {f"{name} tokens": tensor for name, tensor in self._tokens.items()}

    def is_scaled_as(self, other: object) -> bool:
        """Whether equal tensors mean equal deltas."""
        return (
            isinstance(other, LoraSpecialist)
            and self._parts.keys() == other._parts.keys()
            and all(self.scaling(weight) == other.scaling(weight) for weight in self._parts)
            and self.config.get("trainable_token_indices") == other.config.get("trainable_token_indices")
        )

    @property
    def low_rank(self) -> bool:
        """Whether it consists of pairs of factors alone."""
        return not self.beside_factors

    @property
    def beside_factors(self) -> list[str]:
        """Its tensors that are none of a pair of factors of a linear layer."""
        others = [tensor for parts in self._parts.values() for part, tensor in parts.items() if part not in _FACTORS]
        return sorted([*self._values.values(), *self._tokens.values(), *others])

    def is_pair(self, name: str) -> bool:
        """Whether the delta of a tensor is that of a pair of factors and nothing else."""
        return name not in self._values and set(self._parts.get(name, ())) == set(_FACTORS)

    def stored_as(self, name: str) -> str:
        """The adapter's tensor behind a canonical name, for messages."""
        if name in self._parts:
            parts = self._parts[name]
            return next((parts[part] for part in parts if part not in _FACTORS), next(iter(parts.values())))
        if name in self._values or name in self._tokens:
            return self._values.get(name) or self._tokens[name]
        return self._parts[name.removesuffix("bias") + "weight"]["lora_B.bias"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor that the canonical name stands for, as the specialist has it."""
        if name in self._values:
            return self.checkpoint.info(self._values[name]).shape
        parts = self._parts.get(name)
        if parts is None:
            tensor = self._tokens.get(name)
            # The bias of a LoRA branch; trained tokens fit any number of rows.
            return () if tensor else self.checkpoint.info(self.stored_as(name)).shape
        if "lora_embedding_A" in parts:
            a, b = (self.checkpoint.info(parts[part]).shape for part in ("lora_embedding_A", "lora_embedding_B"))
            return a[1], b[0]
        a, b = (self.checkpoint.info(parts[part]).shape for part in _FACTORS)
        return b[0], a[1]

    def rank(self, weight: str) -> int:
        """Rank of a weight's delta."""
        parts = self._parts[weight]
        return self.checkpoint.info(parts.get("lora_A.weight") or parts["lora_embedding_A"]).shape[0]

    def scaling(self, weight: str) -> float:
        """alpha/r, or alpha/sqrt(r) with use_rslora; with rank_pattern and alpha_pattern applied."""
        module = self._module(weight)
        alpha = _from_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        rank = self.rank(weight)
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def delta(self, name: str, shape: tuple[int, ...]) -> Delta:
        """The delta of one tensor.

        Args:
            name: canonical.
            shape: of the base's tensor.

        Raises:
            InputError: if it has NaN or infinite values.
        """
        if name in self._values:
            stored = ValueDelta(self.checkpoint, self._values[name])
            # PEFT saves embeddings whole beside their factors, and a layer's bias beside that of its B.
            if name in self._parts:
                return SumDelta(stored, self._factor_delta(name))
            if name in self._tokens:
                return self._token_delta(name, shape, stored)
            branch = self._branch_bias(name)
            return SumDelta(stored, branch) if branch else stored
        if name in self._tokens:
            return self._token_delta(name, shape)
        if name not in self._parts:
            branch = self._branch_bias(name)
            assert branch is not None
            return branch
        factors = self._factor_delta(name)
        # PEFT puts tokens trained in tied embeddings under the factors of the output embeddings, too.
        if name in OUTPUT_EMBEDDINGS and self.tied in self._tokens:
            return SumDelta(self._token_delta(self.tied, shape), factors)
        return factors

    def _token_delta(self, name: str, shape: tuple[int, ...], others: Delta | None = None) -> RowDelta:
        values = self._read(self._tokens[name])
        return RowDelta(self._token_indices(name, len(values)), values, others.shape if others else shape, others)

    def _branch_bias(self, name: str) -> ShiftDelta | None:
        weight = name.removesuffix("bias") + "weight"
        tensor = self._parts.get(weight, {}).get("lora_B.bias")
        return ShiftDelta(self._read(tensor) * self.scaling(weight)) if tensor else None

    def _factor_delta(self, name: str) -> Delta:
        parts = self._parts[name]
        if "lora_embedding_A" in parts:
            a, b = self._read(parts["lora_embedding_B"]).T, self._read(parts["lora_embedding_A"]).T
            return LoraDelta(a.contiguous(), b.contiguous(), self.scaling(name))
        lora = self.lora_delta(name)
        magnitude = next((parts[part] for part in parts if part.startswith("lora_magnitude_vector")), None)
        return DoraDelta(lora, self._read(magnitude)) if magnitude else lora

    def lora_delta(self, weight: str) -> LoraDelta:
        """The low-rank delta of a weight in `modules`."""
        parts = self._parts[weight]
        return LoraDelta(self._read(parts["lora_A.weight"]), self._read(parts["lora_B.weight"]), self.scaling(weight))

    def _token_indices(self, name: str, count: int) -> Tensor:
        stated = self.config.get("trainable_token_indices")
        if isinstance(stated, dict):
            by_module = {key.rpartition(".")[2]: ids for key, ids in stated.items()}
            # PEFT saves tokens of tied embeddings at both ends.
            ends = [name, *(INPUT_EMBEDDINGS if name in OUTPUT_EMBEDDINGS else ())]
            modules = [end.removesuffix(".weight").rpartition(".")[2] for end in ends]
            stated = next((by_module[module] for module in modules if module in by_module), None)
        if not isinstance(stated, list) or len(stated) != count or not all(type(token) is int for token in stated):
            raise InputError(
                f"{self.folder}: {self._tokens[name]} holds {count} trained tokens, which adapter_config.json "
                f"(trainable_token_indices) does not name."
            )
        return torch.tensor(stated)

    def _read(self, tensor: str) -> Tensor:
        values = self.checkpoint.read(tensor).float()
        if not is_finite(values):
            raise InputError(
                f"{self.checkpoint.info(tensor).file}: tensor {tensor} has NaN or infinite values; "
                "save or download the adapter again."
            )
        return values


_FACTORS = ("lora_A.weight", "lora_B.weight")


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _check_type(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{file}: peft_type is {config.get('peft_type')}; only LORA adapters can be merged: {AS_FULL_CHECKPOINT}."
        )
    for field in ("r", "lora_alpha"):
        if not _is_number(config.get(field)) or config[field] <= 0:
            raise InputError(f"{file}: {field} is {config.get(field)!r}, expected a positive number.")
    for field in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config.get(field) or {}, f"{file}: {field}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_pattern(pattern: Any, where: str) -> None:
    """Find out whether a rank_pattern or alpha_pattern can be read as PEFT reads it."""
    if not isinstance(pattern, dict):
        raise InputError(f"{where} is {pattern!r}, expected a mapping from names of modules to numbers.")
    for key, value in pattern.items():
        try:
            re.compile(_key_pattern(key))
        except re.error as error:
            raise InputError(
                f"{where} has {key!r}, which is no regular expression ({error.msg}): write .* for any text, as in "
                "'.*q_proj'."
            ) from error
        if not _is_number(value):
            raise InputError(f"{where} is {value!r} for {key!r}, expected a number.")


def _check_variant(config: Mapping[str, Any], file: Path) -> None:
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise InputError(
                f"{file}: {field} is set; {meaning} cannot be expressed as deltas of tensors: {AS_FULL_CHECKPOINT}, "
                "or train without it."
            )
    if config.get("fan_in_fan_out"):
        raise InputError(
            f"{file}: fan_in_fan_out is set; adapters of Conv1D layers cannot be merged: {AS_FULL_CHECKPOINT}."
        )
    for field, value in config.items():
        if value and field not in _KNOWN_VARIANTS and (field.startswith("use_") or field.endswith("_config")):
            raise InputError(f"{file}: {field} is set, a variant of LoRA that is not known here: {AS_FULL_CHECKPOINT}.")
    initialisation = config.get("init_lora_weights")
    if not isinstance(initialisation, str) or initialisation.lower() in _INITIALISATIONS:
        return
    for prefix, name in _MOVING_INITIALISATIONS.items():
        if initialisation.lower().startswith(prefix):
            raise InputError(
                f"{file}: init_lora_weights is {initialisation!r}; {name} changes the base's weights before training, "
                f"so that the factors are no delta of the base: {AS_FULL_CHECKPOINT}, or save it with PEFT's "
                "path_initial_model_for_weight_conversion."
            )
    raise InputError(
        f"{file}: init_lora_weights is {initialisation!r}, which is not known here: if it leaves the base's weights as "
        f"they are, set it to true; otherwise {AS_FULL_CHECKPOINT}."
    )


def _from_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that a rank_pattern or alpha_pattern gives a module, by PEFT's own matching rule."""
    for key, value in (pattern or {}).items():
        if re.match(_key_pattern(key), module):
            return value
    return default


def _key_pattern(key: str) -> str:
    return rf"(.*\.)?({key})$"
