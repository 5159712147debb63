"""The models that a merged model was made from: what they are called, and what their own cards say."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from esmerge.errors import InputError, first_line
from esmerge.hub import is_commit, is_repo_id, split_reference
from esmerge.sources import checkpoint_hash
from hub_cards.licences import Licence, read_licence
from hub_cards.merged_model import MergedModel

logger = logging.getLogger(__name__)

_SNAPSHOT = re.compile(r"models--(?P<user>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?$")
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_BIBTEX = re.compile(r"^```[\w ]*\r?\n(@\w+\s*\{.*?\})\s*\r?\n```", re.DOTALL | re.MULTILINE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")


@dataclass(frozen=True)
class Parent:
    """A base, a specialist, or where a specialist's encoder is from, if that is apart.

    Attributes:
        role: `base`, the specialist's name, or `encoder of` it.
        is_encoder: whether it gave an encoder alone.
        name: its repository on the Hub, or the last name of its folder.
        repo_id: of the Hub; None for a folder.
        commit: of the repository, or another revision; None if it is not known.
        hash: of a folder's content.
        is_readable: whether its card could be read, if it has one.
        licence: that its card states.
        languages, datasets: that its card names.
        citations: BibTeX entries in its card.
    """

    role: str
    name: str
    repo_id: str | None = None
    commit: str | None = None
    hash: str | None = None
    is_readable: bool = True
    licence: Licence | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    citations: tuple[str, ...] = ()
    source: str = field(default="", repr=False)
    is_encoder: bool = False

    @property
    def link(self) -> str | None:
        """Its page on the Hub, at the commit if that is known."""
        if self.repo_id is None:
            return None
        return f"https://huggingface.co/{self.repo_id}" + (f"/tree/{self.commit}" if self.commit else "")


def parents_of(model: MergedModel, base_model: str | None = None) -> list[Parent]:
    """The base, the specialists and their encoders of a merged model, in this order, with what their cards say.

    Args:
        base_model: `user/base` or `user/base@revision`, what the base is called on the Hub.

    Raises:
        InputError: if `base_model` is no Hub id.
    """
    inputs = model.record["inputs"]
    base = _identify("base", inputs["base"])
    named = str(model.config.get("base_model_name_or_path") or "") if model.is_adapter else ""
    if base_model is not None:
        repo_id, _, revision = base_model.partition("@")
        if not is_repo_id(repo_id):
            raise InputError(f"--base-model {base_model} is no Hub id: write user/base or user/base@revision.")
        base = replace(base, name=repo_id, repo_id=repo_id, commit=revision or None)
    elif base.repo_id is None and named != base.source and is_repo_id(named) and not Path(named).exists():
        # The specialists know the local base by its name on the Hub.
        base = replace(base, name=named, repo_id=named, commit=model.config.get("revision"))
    specialists = [_identify(role, pin) for role, pin in inputs["specialists"].items()]
    return [_with_card(parent, model.folder) for parent in (base, *specialists, *_encoders(model))]


def _encoders(model: MergedModel) -> list[Parent]:
    """Where encoders are from that a recipe names apart from their specialists."""
    found = []
    for name, entry in model.recipe["specialists"].items():
        if reference := entry.get("encoder"):
            source, commit = split_reference(reference)
            pin = {"source": source, "commit": commit} if is_commit(commit) else {"source": reference}
            found.append(replace(_identify(f"encoder of {name}", pin), is_encoder=True))
    return found


def _identify(role: str, pin: Mapping[str, Any]) -> Parent:
    source, commit = pin["source"], pin.get("commit")
    if commit is not None:
        return Parent(role, source, source, commit, source=source)
    if cached := _SNAPSHOT.search(source):
        repo_id = f"{cached['user']}/{cached['name']}"
        return Parent(role, repo_id, repo_id, cached["commit"], pin.get("hash"), source=source)
    return Parent(role, folder_name(source), hash=pin.get("hash"), source=source)


def why_unknown(parent: Parent) -> str:
    """That a parent's licence is not known, and why."""
    why = "no card of it states one" if parent.is_readable else "its card cannot be read"
    return f"the licence of {parent.name} is not known, as {why}"


def folder_name(path: str) -> str:
    """The last name of a path, which tells nothing of the machine."""
    names = [name for name in re.split(r"[/\\]", path) if name not in ("", ".", "..", "~")]
    return names[-1] if names else "a local folder"


def _with_card(parent: Parent, folder: Path) -> Parent:
    text = _hub_card(parent) if parent.repo_id else _local_card(parent, folder)
    if text is None:
        return replace(parent, is_readable=False)
    metadata = read_front_matter(text)[0]
    return replace(
        parent,
        licence=_with_whole_link(read_licence(metadata), parent),
        languages=tuple(code for code in _strings(metadata.get("language")) if _LANGUAGE.fullmatch(code)),
        datasets=tuple(name for name in _strings(metadata.get("datasets")) if _is_dataset(name)),
        citations=tuple(entry.strip() for entry in _BIBTEX.findall(text)),
    )


def _with_whole_link(licence: Licence | None, parent: Parent) -> Licence | None:
    """A licence whose text is found from elsewhere, too: a card may name a file beside itself."""
    if licence is None or licence.link is None or re.match(r"https?://", licence.link):
        return licence
    page = f"https://huggingface.co/{parent.repo_id}/blob/{parent.commit or 'main'}/{licence.link}"
    return replace(licence, link=None if parent.repo_id is None else page)


def _is_dataset(name: str) -> bool:
    return bool(re.fullmatch(r"(?:[\w][\w.-]*/)?[\w][\w.-]*", name))


def _strings(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]


def read_front_matter(card: str) -> tuple[dict[str, Any], str]:
    """The metadata that a card starts with ({} if there is none, or no readable one), and its text."""
    found = _FRONT_MATTER.match(card)
    if found is None:
        return {}, card
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError:
        metadata = None
    return metadata if isinstance(metadata, dict) else {}, card[found.end() :]


def _hub_card(parent: Parent) -> str | None:
    """The card in a parent's repository, empty if it has none; None if it cannot be read."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    assert parent.repo_id is not None
    try:
        return Path(hf_hub_download(parent.repo_id, "README.md", revision=parent.commit)).read_text(encoding="utf-8")
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):
            return ""
        reason: Exception = error
    except Exception as error:  # whatever the network, the Hub or the file has: a card is no reason to stop
        reason = error
    logger.warning("the card of %s cannot be read, so its licence is not known: %s", parent.name, first_line(reason))
    return None


def _local_card(parent: Parent, folder: Path) -> str:
    """The card in a parent's folder, if that is still there with the same content; empty otherwise."""
    for place in (Path(), folder.parent):
        card = (place / Path(parent.source).expanduser() / "README.md").absolute()
        if not card.is_file():
            continue
        text = card.read_text(encoding="utf-8", errors="replace")
        # The content is only hashed, which takes as long as reading the weights, where there is something to inherit.
        if read_front_matter(text)[0] and _has_hash(card.parent, parent.hash):
            return text
    return ""


def _has_hash(folder: Path, expected: str | None) -> bool:
    try:
        return checkpoint_hash(folder) == expected
    except InputError:
        return False
