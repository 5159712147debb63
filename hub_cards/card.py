"""`esmerge card` on one page: a merged model in, its README.md, figures and `.eval_results/` out."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from esmerge import __version__
from esmerge.errors import InputError, first_line
from esmerge.figures import FIGURES_FOLDER, draw_figures
from esmerge.results import write_whole
from hub_cards.edits import digest, join_sections, keep_edits, split_sections
from hub_cards.licences import Licence, check_licence, inherit, read_licence
from hub_cards.merged_model import MergedModel
from hub_cards.parents import Parent, parents_of, read_front_matter, why_unknown
from hub_cards.portable import portable_record
from hub_cards.scores import (
    EVAL_RESULTS_FOLDER,
    EVAL_RESULTS_MARK,
    TaskResults,
    eval_results,
    eval_results_files,
    read_results,
)
from hub_cards.templating import OWN_TEMPLATE, Template
from hub_cards.usage import example_code, packages

CARD_FILE = "README.md"
_STATE = re.compile(r"\s*<!-- esmerge card (\{.*?\}) -->\s*", re.DOTALL)
_LICENCE_FIELDS = ("license", "license_name", "license_link")


class _Recipes(yaml.SafeDumper):
    """Writes texts of several lines as people do."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Recipes.add_representer(str, _represent_text)


@dataclass(frozen=True)
class Choices:
    """What a person decided; the card remembers it.

    Attributes:
        licence: identifier of the licence, where the parents' differ or the base's is not known.
        base_model: `user/base` or `user/base@revision`, where the base was a local folder.
        repo_id: what the model is called on the Hub.
    """

    licence: str | None = None
    base_model: str | None = None
    repo_id: str | None = None


@dataclass(frozen=True)
class Card:
    """A card and what belongs to it.

    Attributes:
        files: content by path in the model's folder.
        stale: files of earlier cards that are to go.
        notes: what the card could not say, a sentence each.
        base: what the model was merged on.
        has_licence: whether it states one.
    """

    files: Mapping[str, bytes]
    stale: Sequence[str]
    notes: Sequence[str]
    base: Parent
    has_licence: bool

    @property
    def text(self) -> str:
        """README.md."""
        return self.files[CARD_FILE].decode()


def make_card(model: MergedModel, choices: Choices, template: Path | None = None) -> Card:
    """The card of a merged model, with what a person edited in the one that is there, if any.

    Args:
        model: whose card it is.
        choices: those that are None are as they were before.
        template: a Jinja template for the text, instead of esmerge's.

    Raises:
        InputError: if the model's results are not valid, the parents' licences differ and none is chosen, or the
            template is not valid.
    """
    folder = model.folder
    before = _read_card(folder / CARD_FILE)
    body = Template(template)
    if before.state.get("template") not in (None, body.digest) and template is None:
        raise InputError(
            f"{folder / CARD_FILE} was made with a template of your own: give it again with --template, or "
            f"--template {OWN_TEMPLATE} for esmerge's."
        )
    chosen = before.choices(choices)
    parents = parents_of(model, chosen.base_model)
    stated = [(parent.name, parent.licence) for parent in parents]
    licence = before.edited_licence() if choices.licence is None else None
    licence = licence or inherit(stated, chosen.licence)
    results = read_results(model)
    figures = _figures(model)
    name = (chosen.repo_id or str(folder.resolve())).rpartition("/")[2]
    metadata = _metadata(model, parents, licence, results, name)
    context = {
        "name": name,
        "model": model,
        "parents": parents,
        "base": parents[0],
        "specialists": [parent for parent in parents[1:] if not parent.is_encoder],
        "licence": licence,
        "results": results,
        "figures": [path for path in figures if "coefficients" not in path],
        "coefficient_figure": next((path for path in figures if "coefficients" in path), None),
        "coefficients": _coefficient_rows(model),
        "packages": packages(model),
        "example": example_code(model, chosen.repo_id or name),
        "recipe": yaml.dump(
            portable_record(model.record)["recipe"], Dumper=_Recipes, sort_keys=False, allow_unicode=True, width=100
        ).strip(),
        "record": model.record,
        "version": __version__,
    }
    sections = split_sections(body.render(context))
    fields, recorded = before.metadata, before.state.get("metadata", {})
    if choices.licence:  # in place of whatever is there
        fields, recorded = (_without_licence(own) for own in (fields, recorded))
    kept_fields, field_digests = keep_edits(metadata, fields, recorded)
    kept_sections, section_digests = keep_edits(sections, before.sections, before.state.get("sections", {}))
    state = {
        "choices": {key: value for key, value in asdict(chosen).items() if value is not None},
        **({"template": body.digest} if body.is_own else {}),
        "metadata": field_digests,
        "sections": section_digests,
    }
    text = _assemble(kept_fields, kept_sections, state, folder / CARD_FILE)
    entries = eval_results_files(results)
    files = {CARD_FILE: text.encode(), **{path: entry.encode() for path, entry in entries.items()}, **figures}
    notes = _notes(parents, licence, results)
    return Card(files, _stale_entries(folder, entries), notes, parents[0], bool(kept_fields.get("license")))


def write_card(folder: Path, card: Card) -> None:
    """Write a card's files into the model's folder."""
    for path in card.stale:
        (folder / path).unlink()
    for path, content in card.files.items():
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_bytes() != content:
            write_whole(file, content)


def lost_edits(there: str, here: str) -> list[str]:
    """What a person changed in a card elsewhere, after it was written, that another card has not.

    Args:
        there: the card that may have been edited.
        here: the card that is to take its place.

    Returns:
        Names of fields of the metadata and headings of sections.
    """
    there = there.removeprefix("\ufeff").replace("\r\n", "\n")
    theirs, ours = _parse_card(there), _parse_card(here)
    if theirs.state.get("text") == digest(_STATE.sub("\n", there)):
        return []
    lost = []
    for parts, others, kind in (
        (theirs.metadata, ours.metadata, "metadata"),
        (theirs.sections, ours.sections, "sections"),
    ):
        written = theirs.state.get(kind, {})
        lost += [
            name
            for name, part in parts.items()
            if digest(part) != written.get(name) and (name not in others or digest(part) != digest(others[name]))
        ]
        lost += [name for name in written if name not in parts and name in others]
    return [name or "the beginning" for name in lost]


@dataclass(frozen=True)
class _Before:
    """The card that is there already; empty if there is none."""

    metadata: Mapping[str, Any]
    sections: Mapping[str, str]
    state: Mapping[str, Any]

    def choices(self, given: Choices) -> Choices:
        remembered = self.state.get("choices", {})
        fields = {key: value for key, value in asdict(given).items() if value is not None}
        known = {key: remembered[key] for key in asdict(given) if isinstance(remembered.get(key), str)}
        chosen = replace(given, **{**known, **fields})
        return replace(chosen, licence=check_licence(chosen.licence)) if chosen.licence else chosen

    def edited_licence(self) -> Licence | None:
        """The licence that a person wrote into the card."""
        stated = self.metadata.get("license")
        recorded = self.state.get("metadata", {}).get("license")
        return None if stated is None or digest(stated) == recorded else read_licence(self.metadata)


def _without_licence(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in _LICENCE_FIELDS}


def _read_card(file: Path) -> _Before:
    if not file.exists():
        return _Before({}, {}, {})
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text in UTF-8: save it as such, or move it away.") from error
    before = _parse_card(text)
    if text.lstrip().startswith("---") and not before.metadata:
        raise InputError(f"the metadata at the top of {file} are no YAML mapping: correct or remove them.")
    return before


def _parse_card(text: str) -> _Before:
    state: Any = {}
    if found := list(_STATE.finditer(text)):
        try:
            state = json.loads(found[-1][1])
        except ValueError:
            state = {}
    metadata, body = read_front_matter(text)
    return _Before(metadata, split_sections(_STATE.sub("\n", body)), state if isinstance(state, dict) else {})


def _assemble(metadata: Mapping[str, Any], sections: Mapping[str, str], state: Mapping[str, Any], file: Path) -> str:
    front = yaml_dump(dict(metadata), sort_keys=False).strip()
    text = f"---\n{front}\n---\n\n{join_sections(sections)}"
    # A comment ends at the first "-->".
    remembered = json.dumps({**state, "text": digest(text)}, ensure_ascii=False).replace(">", "\\u003e")
    text += f"\n<!-- esmerge card {remembered} -->\n"
    try:
        ModelCard(text)
    except (ValueError, TypeError) as error:
        raise InputError(f"the metadata at the top of {file} are not valid: {first_line(error)}.") from error
    return text


def _metadata(
    model: MergedModel, parents: Sequence[Parent], licence: Licence | None, results: Sequence[TaskResults], name: str
) -> dict[str, Any]:
    # The model tree has what it was merged from, of which an encoder is no one.
    merged = [parent for parent in (parents[:1] if model.is_adapter else parents) if not parent.is_encoder]
    ids = [parent.repo_id for parent in merged if parent.repo_id]
    scores = eval_results(results)
    library = "peft" if model.is_adapter else "transformers"
    tags = [*(["lora"] if model.is_adapter else []), "merge", "esmerge"]
    if model.is_multimodal:
        # Only esmerge loads all of it; the snippet that the Hub shows for other libraries would lose the encoders.
        library, tags = "esmerge", [library, *tags, "multimodal"]
    specialists = parents[1:]
    data = ModelCardData(
        base_model=None if not ids else ids[0] if len(ids) == 1 else _unique(ids),
        base_model_relation=("adapter" if model.is_adapter else "merge") if ids else None,
        library_name=library,
        pipeline_tag="text-generation",
        language=_unique([code for parent in parents for code in parent.languages]) or None,
        license=licence.id if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        datasets=_unique([dataset for parent in specialists for dataset in parent.datasets]) or None,
        metrics=_unique([score.metric_type for score in scores]) or None,
        tags=tags,
        model_name=name if scores else None,
        eval_results=scores or None,
    )
    metadata: dict[str, Any] = data.to_dict()
    return metadata


def _unique(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _figures(model: MergedModel) -> dict[str, bytes]:
    """The figures by path: those that are there, else drawn now."""
    folder = model.folder / FIGURES_FOLDER
    existing = sorted(folder.glob("*.png"))
    if existing:
        return {f"{FIGURES_FOLDER}/{file.name}": file.read_bytes() for file in existing}
    if "alpha" not in model.coefficients.tensors:
        return {}
    with TemporaryDirectory() as temporary:
        drawn = draw_figures(model.coefficients, Path(temporary))
        return {f"{FIGURES_FOLDER}/{file.name}": file.read_bytes() for file in drawn}


def _coefficient_rows(model: MergedModel) -> list[tuple[str, list[float]]]:
    """Rows of the table of layer-wise coefficients: one per layer, or a single one if all are equal."""
    alpha = model.coefficients.tensors.get("alpha")
    if alpha is None:
        return []
    rows = [[round(value, 4) for value in row] for row in alpha.T.tolist()]
    if all(row == rows[0] for row in rows):
        return [("all", rows[0])]
    mean = [round(value, 4) for value in alpha.mean(dim=1).tolist()]
    return [*((str(number), row) for number, row in enumerate(rows)), ("mean", mean)]


def _stale_entries(folder: Path, entries: Mapping[str, str]) -> list[str]:
    stale = []
    for file in sorted((folder / EVAL_RESULTS_FOLDER).glob("*.yaml")):
        path = f"{EVAL_RESULTS_FOLDER}/{file.name}"
        if path not in entries and file.read_text(encoding="utf-8", errors="replace").startswith(EVAL_RESULTS_MARK):
            stale.append(path)
    return stale


def _notes(parents: Sequence[Parent], licence: Licence | None, results: Sequence[TaskResults]) -> list[str]:
    notes = []
    if licence is None:
        notes.append(f"{why_unknown(parents[0])}, so the card states none: choose one with --license.")
    else:
        notes += [
            f"{why_unknown(parent)}: check that {licence.label} is allowed."
            for parent in parents
            if parent.licence is None
        ]
    if not results:
        notes.append("there are no results, so the card says that the model was not evaluated (esmerge evaluate).")
    return notes
