"""YAML files of the user's: read strictly, with errors of one sentence that name the field."""

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from esmerge.errors import InputError


def read_mapping(file: Path, kind: str, fields: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        file: to read.
        kind: what errors call it: "recipe".
        fields: that it may have, for errors.

    Raises:
        InputError: if the file cannot be read, is no YAML, no mapping, or gives a key twice.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(f"the {kind} {file} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"the {kind} {file} is no valid YAML{where}: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"the {kind} {file} must be a YAML mapping with the fields {', '.join(fields)}.")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML's own loader would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and isinstance(key_node, yaml.ScalarNode) and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key} stands there twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


def nearest(name: str, known: Sequence[str]) -> str:
    """What to append to a message about an unknown name: the known one that looks most like it, if any does."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def first_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's errors about a model as one sentence, like "split.test is missing"."""
    first = error.errors()[0]
    location = first["loc"]
    field = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{field} is no known field{nearest(str(location[-1]), known)} (known: {', '.join(known)})."
    if first["type"] == "missing":
        return f"{field} is missing."
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{field}: {message}." if field else f"{message}."
    if first["type"] == "literal_error":
        options = _options(first["ctx"]["expected"])
        return f"{field} is {first['input']!r}{nearest(str(first['input']), options)} (known: {', '.join(options)})."
    message = f"{field} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
        message += "; write it in quotes"
    return f"{message}."


def _options(expected: str) -> list[str]:
    """Of pydantic's "'a', 'b' or 'c'"."""
    return [part.strip("' ") for part in expected.replace("' or '", "', '").split("', '")]


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            inner = next(_models(model.model_fields[part].annotation), None)
            model = inner or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models in a type such as `tuple[Baseline, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
