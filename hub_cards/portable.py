"""Text and records without anything of the machine that they were made on."""

import re
from collections.abc import Mapping
from typing import Any

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
