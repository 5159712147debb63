"""YAML files of the user's: read strictly, with errors of one sentence that name the field."""

import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
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
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the {kind} {file} cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"the {kind} {file} is no valid YAML{where}: {getattr(error, 'problem', error)}.") from error
    if not isinstance(content, dict):
        raise InputError(f"the {kind} {file} must be a YAML mapping with the fields {', '.join(fields)}.")
    return content


def parse_yaml(text: str) -> Any:
    """The value that a text in YAML stands for; `yaml.YAMLError` if it is none, or gives a key twice."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Refuses a mapping with the same key twice, of which YAML's own loader would drop the first without a word.

    And reads 1e-4 as a number, as YAML 1.2 and everybody do.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and isinstance(key_node, yaml.ScalarNode) and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"{key} stands there twice", problem_mark=key_node.start_mark)
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep)


_EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


class NestedError(ValueError):
    """Carries the errors of a nested model through a validator, so that they keep their fields' names.

    Attributes:
        error: pydantic's.
        model: that was validated.
    """

    def __init__(self, error: ValidationError, model: type[BaseModel]) -> None:
        super().__init__(str(error))
        self.error = error
        self.model = model


def nearest(name: str, known: Sequence[str], synonyms: Mapping[str, str] | None = None) -> str:
    """What to append to a message about an unknown name: the known one that is meant or looks most like it, if any."""
    alike = [own for own in known if own.lower() == name.lower()] or difflib.get_close_matches(name, known, n=1)
    close = [synonyms[name]] if synonyms and name in synonyms else alike
    return f"; did you mean {close[0]}?" if close else ""


def first_error(error: ValidationError, model: type[BaseModel], synonyms: Mapping[str, str] | None = None) -> str:
    """The first of pydantic's errors about a model as one sentence, like "split.test is missing".

    Args:
        error: pydantic's.
        model: that was validated.
        synonyms: what other tools call fields -> what they are called here.
    """
    return _sentence(error, model, synonyms or {}, ())


def _sentence(
    error: ValidationError, model: type[BaseModel], synonyms: Mapping[str, str], prefix: tuple[int | str, ...]
) -> str:
    first = _most_telling(error.errors())
    kind, location, given, context = first["type"], first["loc"], first["input"], first.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, NestedError):
        return _sentence(cause.error, cause.model, synonyms, (*prefix, *location))
    field = ".".join(str(part) for part in (*prefix, *location))
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"{field} is no known field{nearest(str(location[-1]), known, synonyms)} (known: {', '.join(known)})."
    if kind == "missing":
        return f"{field} is missing."
    if kind == "value_error":
        return f"{field}: {cause}." if field else f"{cause}."
    if kind == "literal_error":
        options = _options(context["expected"])
        return f"{field} is {given!r}{nearest(str(given), options)} (known: {', '.join(options)})."
    if kind == "too_short":
        return f"{field} has {context['actual_length']} of at least {context['min_length']} entries."
    if kind in ("dict_type", "model_type"):
        inside = f" with the fields {', '.join(_fields_at(model, location))}" if kind == "model_type" else ""
        return f"{field} is {given!r}: expected a mapping{inside}."
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{field} is {given!r}: expected a whole number."
    message = f"{field} is {given!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    if kind == "string_type" and isinstance(given, bool | int | float):
        message += "; write it in quotes"
    return f"{message}."


def _most_telling(errors: Sequence[Any]) -> Any:
    """The first; but where that misses a field, an unknown one beside it, which is probably the same misspelt."""
    first = errors[0]
    if first["type"] == "missing":
        for other in errors:
            if other["type"] == "extra_forbidden" and other["loc"][:-1] == first["loc"][:-1]:
                return other
    return first


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
