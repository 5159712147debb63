"""Text and records without anything of the machine that they were made on."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from esmerge.hub import is_commit, split_reference
from hub_cards.parents import folder_name

_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[\\/]")


def portable(value: Any) -> Any:
    """The value with only the last name left of each path in it."""
    if isinstance(value, Mapping):
        return {portable(key): portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    if isinstance(value, str) and _PATH.match(value) and "\n" not in value:
        return folder_name(value)
    return value


def portable_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A merge's record whose paths start from where it lies, with only the last name left of each.

    Where two places have the same one, what they are comes before it.
    """
    names: dict[str, dict[str, str]] = {}

    def collect(role: str, path: str) -> str:
        names.setdefault(folder_name(path), {}).setdefault(path, role)
        return path

    def short(role: str, path: str) -> str:
        name = folder_name(path)
        return f"./{name}" if len(names.get(name, ())) < 2 else f"./{names[name].get(path, role)}/{name}"

    _replaced(record["recipe"], collect)
    inputs = dict(record["inputs"])
    inputs["base"] = _source("base", inputs["base"], short)
    inputs["specialists"] = {name: _source(name, pin, short) for name, pin in inputs["specialists"].items()}
    if isinstance(inputs.get("probe"), Mapping):
        inputs["probe"] = {_file("probe", file, short): pin for file, pin in inputs["probe"].items()}
    others = {key: portable(value) for key, value in record.items() if key not in ("recipe", "inputs")}
    return {"recipe": _replaced(record["recipe"], short), "inputs": inputs, **others}


def portable_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe with only the last name left of each path in it."""
    return _replaced(recipe, lambda _, path: f"./{folder_name(path)}")


# From what a path stands for, and the path, to another.
_Place = Callable[[str, str], str]


def _replaced(recipe: Mapping[str, Any], place: _Place) -> dict[str, Any]:
    """A recorded recipe with other paths."""
    found = dict(recipe)
    if "base" in recipe:
        found["base"] = _model("base", recipe["base"], place)
    if isinstance(specialists := recipe.get("specialists"), Mapping):
        found["specialists"] = {name: _specialist(name, entry, place) for name, entry in specialists.items()}
    if isinstance(probe := recipe.get("probe"), Mapping):
        files = {field: _file("probe", probe[field], place) for field in ("tensors", "chat_template") if field in probe}
        if isinstance(data := probe.get("data"), Mapping):
            files["data"] = {name: _file(f"probe/{name}", file, place) for name, file in data.items()}
        found["probe"] = {**probe, **files}
    return found


def _specialist(name: str, entry: Any, place: _Place) -> Any:
    if not isinstance(entry, Mapping):
        return _model(name, entry, place)
    found = dict(entry)
    for field, role, replace in (
        ("model", name, _model),
        ("encoder", f"{name}/encoder", _model),
        ("features", f"{name}/features", _file),
    ):
        if field in entry:
            found[field] = replace(role, entry[field], place)
    return found


def _source(role: str, pin: Mapping[str, Any], place: _Place) -> dict[str, Any]:
    return {**pin, "source": pin["source"] if pin.get("commit") else place(role, pin["source"])}


def _model(role: str, reference: Any, place: _Place) -> Any:
    # What a merge took from the Hub, it recorded with the commit; elsewhere all else would be looked for there, too.
    is_path = isinstance(reference, str) and not is_commit(split_reference(reference)[1])
    return place(role, reference) if is_path else reference


def _file(role: str, reference: Any, place: _Place) -> Any:
    # A chat template may stand there itself.
    is_path = isinstance(reference, str) and not reference.startswith("hf://") and not re.search(r"[\n{]", reference)
    return place(role, reference) if is_path else reference
