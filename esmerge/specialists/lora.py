"""LoRA adapters as PEFT saves them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint
from esmerge.deltas import LoraDelta, canonical_name, layer_of
from esmerge.errors import InputError
from esmerge.sources import read_json

_FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.default)?\.weight$")

# Fields of PEFT's LoraConfig that change what an adapter computes in a way that two factors and a scaling
# do not express. Each must be absent or falsy.
_UNSUPPORTED = {
    "use_dora": "DoRA magnitudes",
    "lora_bias": "biases of the LoRA layers",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "LoRA on parameters that are no linear layers",
    "use_qalora": "QA-LoRA pooling",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA singular values",
    "monteclora_config": "MonteCLoRA sampling",
    "velora_config": "VeLoRA compression",
}


class LoraSpecialist:
    """A PEFT LoRA adapter: its deltas by module, read when they are asked for.

    Attributes:
        name: the specialist's name, which is its modality's.
        folder: of the adapter.
        config: its adapter_config.json.
        modules: canonical name (`layers.N.<module>`) of each module it changes -> the module's name in the
            base, as PEFT has it.
        scalings: by canonical name: alpha/r, or alpha/sqrt(r) where use_rslora is set, with rank_pattern and
            alpha_pattern applied.

    Raises:
        InputError: if it is no LoRA, or holds anything that two factors per layer do not express.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.config = read_json(folder / "adapter_config.json")
        _check_type(self.config, folder / "adapter_config.json")
        self.checkpoint = Checkpoint.open(folder, "adapter_model")
        self.modules: dict[str, str] = {}
        self.scalings: dict[str, float] = {}
        self._tensors: dict[str, dict[str, str]] = {}
        for tensor in self.checkpoint:
            match = _FACTOR.match(tensor)
            canonical = canonical_name(match[1]) if match else None
            if match is None or canonical is None:
                raise InputError(
                    f"{self.checkpoint.info(tensor).file}: tensor {tensor} is no LoRA factor of a linear layer inside "
                    "the decoder; such tensors cannot be merged and are never dropped: save the adapter without it."
                )
            factors = self._tensors.setdefault(canonical, {})
            if match[2] in factors:
                raise InputError(
                    f"{folder} has layers in two places ({factors[match[2]]} and {tensor}); "
                    "only adapters of one list of decoder layers can be merged."
                )
            factors[match[2]] = tensor
            self.modules[canonical] = match[1].removeprefix("base_model.model.")
        if not self._tensors:
            raise InputError(f"{folder}: the adapter holds no tensors.")
        _check_variant(self.config, folder / "adapter_config.json")
        for canonical, factors in self._tensors.items():
            self.scalings[canonical] = self._check_factors(canonical, factors)

    def _check_factors(self, canonical: str, factors: Mapping[str, str]) -> float:
        """The module's scaling, after its two factors were found to fit each other and the config."""
        for letter in "AB":
            if letter not in factors:
                raise InputError(f"{self.folder}: {self.modules[canonical]} has no lora_{letter}.")
        a, b = (self.checkpoint.info(factors[letter]) for letter in "AB")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{a.file}: {factors['A']} has shape {list(a.shape)} and {factors['B']} {list(b.shape)}; "
                "expected [r, in] and [out, r]."
            )
        rank = a.shape[0]
        module = self.modules[canonical]
        stated = _from_pattern(self.config.get("rank_pattern"), module, self.config["r"])
        if stated != rank:
            raise InputError(
                f"{a.file}: {factors['A']} has rank {rank}, adapter_config.json says {stated} "
                "(r and rank_pattern): one of them belongs to another adapter."
            )
        alpha = _from_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def delta_shape(self, canonical: str) -> tuple[int, int]:
        """[out, in] of a module's delta."""
        factors = self._tensors[canonical]
        return self.checkpoint.info(factors["B"]).shape[0], self.checkpoint.info(factors["A"]).shape[1]

    def rank(self, canonical: str) -> int:
        """Rank of a module's delta."""
        return self.checkpoint.info(self._tensors[canonical]["A"]).shape[0]

    def delta(self, canonical: str) -> LoraDelta:
        """The delta of one module, in float32; `InputError` if it has NaN or infinite values."""
        factors = {}
        for letter, tensor in self._tensors[canonical].items():
            factors[letter] = self.checkpoint.read(tensor).float()
            if not factors[letter].isfinite().all():
                raise InputError(
                    f"{self.checkpoint.info(tensor).file}: tensor {tensor} has NaN or infinite values; "
                    "save or download the adapter again."
                )
        return LoraDelta(factors["A"], factors["B"], self.scalings[canonical])

    def layer_deltas(self, layer: int) -> dict[str, LoraDelta]:
        """Deltas of decoder layer `layer`, by module name inside the layer."""
        return {layer_of(name)[1]: self.delta(name) for name in self.modules if layer_of(name)[0] == layer}


def _check_type(config: Mapping[str, Any], file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file}: peft_type is {config.get('peft_type')}; only LORA adapters can be merged.")
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), int | float) or config[field] <= 0:
            raise InputError(f"{file}: {field} is {config.get(field)!r}, expected a positive number.")


def _check_variant(config: Mapping[str, Any], file: Path) -> None:
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise InputError(
                f"{file}: {field} is set; {meaning} cannot be merged as low-rank factors: "
                "merge the adapter into its base and save it as LoRA, or train without it."
            )
    if config.get("fan_in_fan_out"):
        raise InputError(f"{file}: fan_in_fan_out is set; adapters of Conv1D layers cannot be merged.")


def _from_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that a rank_pattern or alpha_pattern gives a module, by PEFT's own matching rule."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
