"""The text of cards, from Jinja templates."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from esmerge.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"
# What a user calls the template of esmerge.
OWN_TEMPLATE = "default"
_NAME = "card.md.jinja"


class Template:
    """A template for the text of a card.

    A template of one's own can start with `{% extends "card.md.jinja" %}` and replace some of its blocks.

    Args:
        file: of the user's; None or `default` for esmerge's.

    Attributes:
        is_own: whether it is a user's.
        digest: tells it from others.
    """

    def __init__(self, file: Path | None) -> None:
        self.is_own = file is not None and str(file) != OWN_TEMPLATE
        self._file = file if file is not None and self.is_own else TEMPLATES / _NAME
        self._what = f"the template {self._file}"
        try:
            self._source = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self._what} cannot be read as text: check --template.") from error
        self.digest = hashlib.sha256(self._source.encode()).hexdigest()[:16]

    def render(self, context: Mapping[str, Any]) -> str:
        """The text; `InputError` if the template is not valid or uses a variable that there is not."""
        environment = SandboxedEnvironment(
            loader=FileSystemLoader([TEMPLATES, self._file.parent]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["commas"] = _commas
        try:
            return environment.from_string(self._source).render(**context)
        except TemplateSyntaxError as error:
            raise InputError(f"{self._what}, line {error.lineno}: {error.message}.") from error
        except (TemplateError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self._what}: {error}.") from error


def _commas(values: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(values[:-1]), values[-1]])) if values else ""
