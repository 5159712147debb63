"""What a person changed in a generated file stays as it is when the file is generated again."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

_HEADING = re.compile(r"##\s+(.+?)\s*#*\s*$")
_FENCE = re.compile(r"\s{0,3}(```+|~~~+)")


def digest(value: Any) -> str:
    """Tells a generated part from an edited one; blanks at its ends and its kind of line breaks do not count."""
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").strip()
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keep_edits(
    generated: Mapping[str, Any], existing: Mapping[str, Any], recorded: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Generated parts, but those that a person changed or added as they are, and without those that one took out.

    Args:
        generated: parts by name, in order.
        existing: what is there now.
        recorded: the digests of the parts that were generated the last time.

    Returns:
        The parts in the existing order, new ones behind those that they are generated behind; and the digests to record
        for the next time.
    """
    kept: dict[str, Any] = {}
    edited = {name for name, part in existing.items() if recorded.get(name) != digest(part)}
    for name, part in existing.items():
        if name in edited or name in generated:
            kept[name] = part if name in edited else generated[name]
    order, previous = list(kept), None
    for name in generated:
        if name not in existing and name not in recorded:
            kept[name] = generated[name]
            order.insert(order.index(previous) + 1 if previous is not None else 0, name)
        if name in kept:
            previous = name
    digests = {name: digest(part) for name, part in generated.items() if name not in edited}
    return {name: kept[name] for name in order}, digests


def split_sections(text: str) -> dict[str, str]:
    """The sections of a Markdown text by their headings of level two, each with its heading; "" is what comes first."""
    sections: dict[str, list[str]] = {"": []}
    name, fence = "", ""
    for line in text.splitlines():
        if found := _FENCE.match(line):
            if not fence:
                fence = found[1]
            elif found[1].startswith(fence):
                fence = ""
        elif not fence and (heading := _HEADING.match(line)):
            name = _unused(heading[1], sections)
            sections[name] = []
        sections[name].append(line)
    return {name: "\n".join(lines).strip() for name, lines in sections.items() if name or "".join(lines).strip()}


def _unused(name: str, sections: Mapping[str, Any]) -> str:
    count = 2
    candidate = name
    while candidate in sections:
        candidate, count = f"{name} ({count})", count + 1
    return candidate


def join_sections(sections: Mapping[str, str]) -> str:
    """The text of sections."""
    return "\n\n".join(section.strip() for section in sections.values()) + "\n"
