"""A folder that `esmerge merge` wrote, as cards and the publisher read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from esmerge.errors import InputError
from esmerge.modalities.registry import MODALITIES_FOLDER, SETTINGS_FILE
from esmerge.results import COEFFICIENTS_FILE, RECORD_FILE, StoredCoefficients, read_coefficients
from esmerge.sources import read_json

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class MergedModel:
    """A result of a merge.

    Attributes:
        folder: where it is.
        record: esmerge.yaml: `recipe`, `inputs`, `versions`, `tensors`.
        config: config.json of a full checkpoint, adapter_config.json of an adapter.
        is_adapter: whether it is a LoRA adapter rather than a full checkpoint.
        modalities: settings (`kind`, `placeholder`, ...) of those that the model itself knows, by name.
        coefficients: the stored ones.
    """

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    is_adapter: bool
    modalities: Mapping[str, Mapping[str, Any]]
    coefficients: StoredCoefficients

    @property
    def is_multimodal(self) -> bool:
        """Whether an encoder belongs to it, so that only esmerge loads all of it."""
        return any(settings.get("kind") != "text" for settings in self.modalities.values())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe."""
        found: Mapping[str, Any] = self.record["recipe"]
        return found


def open_merged_model(folder: Path) -> MergedModel:
    """Read all but the weights.

    Raises:
        InputError: if the folder is no result of a merge.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: give one that esmerge merge wrote.")
    record = _read_record(folder)
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if not is_adapter and not (folder / "config.json").exists():
        raise InputError(f"{folder} has neither {ADAPTER_CONFIG} nor config.json: it holds no model; merge again.")
    config = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"))
    return MergedModel(folder, record, config, is_adapter, _modalities(folder, config), read_coefficients(folder))


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD_FILE
    if not file.exists():
        found = f" (it has a {COEFFICIENTS_FILE})" if (folder / COEFFICIENTS_FILE).exists() else ""
        raise InputError(f"{folder} is no esmerge result: it has no {RECORD_FILE}{found}; give one that merge wrote.")
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        sources = [record["inputs"]["base"], *record["inputs"]["specialists"].values()]
        if not all(isinstance(source["source"], str) for source in sources) or not isinstance(record["recipe"], dict):
            raise TypeError
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no record of a merge: restore it, or merge again.") from error
    checked: dict[str, Any] = record
    return checked


def _modalities(folder: Path, config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    files = sorted((folder / MODALITIES_FOLDER).glob(f"*/{SETTINGS_FILE}"))
    return dict(config.get("modalities") or {}) | {file.parent.name: read_json(file) for file in files}
