"""Licences as the Hub names them: what a merged model inherits from its parents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esmerge.errors import InputError
from esmerge.yaml_files import nearest

# Those that https://huggingface.co/docs/hub/repositories-licenses lists; a card with another is refused.
_LICENCES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
LICENCES = tuple(_LICENCES.split())


@dataclass(frozen=True)
class Licence:
    """A licence as a card states it.

    Attributes:
        id: the Hub's identifier.
        name, link: needed where the identifier is `other`.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name or self.id if self.id == "other" else self.id


def read_licence(metadata: Mapping[str, Any]) -> Licence | None:
    """The licence in a card's metadata; None if it states none, or several."""
    stated = metadata.get("license")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not isinstance(stated, str) or stated.lower() not in LICENCES or stated == "unknown":
        return None
    name, link = (metadata.get(field) for field in ("license_name", "license_link"))
    return Licence(stated.lower(), _text(name), _text(link))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def check_licence(chosen: str) -> str:
    """The identifier that a user gives; `InputError` if the Hub has none like it."""
    if chosen.lower() not in LICENCES:
        raise InputError(
            f"--license {chosen} is no licence that the Hub knows{nearest(chosen.lower(), LICENCES)}; "
            "https://huggingface.co/docs/hub/repositories-licenses lists them (other, for one that is not there)."
        )
    return chosen.lower()


def inherit(stated: Sequence[tuple[str, Licence | None]], chosen: str | None) -> Licence | None:
    """The licence of what is made from parents.

    Args:
        stated: the name of each parent, the base's first, and its licence as far as it is known.
        chosen: by the user, as `check_licence` gives it.

    Returns:
        The chosen one, or the one that all parents with a known licence have; None if the base's is not known, whose
        weights are in all of it.

    Raises:
        InputError: if their licences differ and none was chosen; it lists them.
    """
    known = [(name, licence) for name, licence in stated if licence is not None]
    if chosen is not None:
        return next((licence for _, licence in known if licence.id == chosen), Licence(chosen))
    if len({(licence.id, licence.label) for _, licence in known}) > 1:
        listed = ", ".join(f"{licence.label} ({name})" for name, licence in known)
        raise InputError(
            f"the licences of the parents differ: {listed}; check what they allow, and choose one with --license."
        )
    return stated[0][1]
