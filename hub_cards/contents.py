"""What of a merged model's folder goes to the Hub, checked: nothing stray, nothing of this machine, nothing broken."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from esmerge.checkpoint import PICKLE_SUFFIXES
from esmerge.errors import InputError
from esmerge.figures import FIGURES_FOLDER
from esmerge.hub import CHAT_TEMPLATES_FOLDER, is_repo_id
from esmerge.modalities.registry import MODALITIES_FOLDER
from esmerge.remote_code import code_files
from esmerge.results import COEFFICIENTS_FILE, RECORD_FILE, TOKENIZER_FILES, record_text
from esmerge.sources import read_json
from hub_cards.card import CARD_FILE, Card
from hub_cards.loading_check import check_loads
from hub_cards.merged_model import ADAPTER_CONFIG, MergedModel
from hub_cards.parents import Parent
from hub_cards.portable import portable, portable_record
from hub_cards.scores import EVAL_RESULTS_FOLDER, RESULTS_FOLDER

# https://huggingface.co/docs/hub/storage-limits
FILE_BYTES = 500 * 1000**3
README_BYTES = 1000**2

# Files of a merged model. What an earlier one left of these in a repository goes when a new one comes.
_MODEL = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model-*.safetensors",
    "adapter_model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    ADAPTER_CONFIG,
    COEFFICIENTS_FILE,
    RECORD_FILE,
    f"{MODALITIES_FOLDER}/*",
    f"{FIGURES_FOLDER}/*.png",
    f"{RESULTS_FOLDER}/*.json",
)
_TOKENIZER = (
    *TOKENIZER_FILES,
    "*.model",
    f"{CHAT_TEMPLATES_FOLDER}/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
)
# What a person may add, for the card or beside it.
_ADDED = (
    CARD_FILE,
    f"{EVAL_RESULTS_FOLDER}/*.yaml",
    *("LICEN[CS]E*", "NOTICE*", "*.md", "*.png", "*.jpg", "*.svg", "*.gif"),
)
_NEVER = (*PICKLE_SUFFIXES, ".pickle", ".part", ".tmp", "~")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model")

# Of the Hub, GitHub, Amazon and others, and private keys.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16}|sk-[\w-]{20,})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_ADDRESS = re.compile(r"https?://[^\s\"'<>]+")
_HOME = re.compile(r"(?:/home/|/Users/|[A-Za-z]:[\\/]+Users[\\/]+)[\w.-]+|/root/[\w.-]+")


@dataclass(frozen=True)
class Upload:
    """A file as it is sent.

    Attributes:
        path: in the repository.
        content: the file, or its bytes where they are not those in the folder.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def operation(self) -> CommitOperationAdd:
        """What puts it into a repository; it is hashed once."""
        return CommitOperationAdd(self.path, self.content)

    def read(self) -> bytes:
        """The bytes."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def collect(model: MergedModel, card: Card, token: str | None) -> tuple[list[Upload], list[str]]:
    """The files to send, and the paths of those in the folder that are not sent.

    Args:
        card: as it is sent.
        token: must be in none of them.

    Raises:
        InputError: if a file is broken, larger than the Hub takes, or holds a path of this machine or a token.
    """
    paths = _paths(model.folder)
    code = [file.name for file in code_files(model.folder)]
    kept = [path for path in paths if _is_sent(path, model, code) and path not in (*card.files, *card.stale)]
    uploads = [_cleaned(path, model, card.base) for path in kept]
    uploads = sorted([*uploads, *(Upload(*file) for file in card.files.items())], key=lambda upload: upload.path)
    for upload in uploads:
        _check_size(upload)
    check_loads(model)
    for upload in uploads:
        _check_leaks(upload, model.folder, token)
    sent = {upload.path for upload in uploads}
    return uploads, [path for path in paths if path not in sent and path not in card.stale]


def is_of_a_model(path: str) -> bool:
    """Whether a file in a repository is one that a merged model replaces as a whole."""
    return any(fnmatchcase(path, pattern) for pattern in (*_MODEL, *_TOKENIZER))


def _paths(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def _is_sent(path: str, model: MergedModel, code: Sequence[str]) -> bool:
    if path.endswith(_NEVER) or path.rpartition("/")[2].startswith("."):
        return False
    other_stem = "model" if model.is_adapter else "adapter_model"
    if "/" not in path and re.match(rf"{other_stem}[-.].*safetensors", path):
        return False
    if path.endswith(".py"):
        return path in code
    # A pattern's * would also match what lies in folders below.
    return any(
        fnmatchcase(path, pattern) and (path.count("/") == pattern.count("/") or pattern.startswith(MODALITIES_FOLDER))
        for pattern in (*_MODEL, *_TOKENIZER, *_ADDED)
    ) and not any(part.startswith(".") and part != EVAL_RESULTS_FOLDER for part in path.split("/"))


def _cleaned(path: str, model: MergedModel, base: Parent) -> Upload:
    """The file without paths of this machine, where it may hold some for good reasons."""
    upload = Upload(path, model.folder / path)
    if path == RECORD_FILE:
        return Upload(path, record_text(portable_record(model.record)).encode())
    if not path.endswith(".json") or any(fnmatchcase(path, pattern) for pattern in _VOCABULARIES):
        return upload
    content = read_json(model.folder / path)
    if path == ADAPTER_CONFIG:
        cleaned: Any = _with_base(content, base)
    elif path.startswith(f"{RESULTS_FOLDER}/"):
        cleaned = portable(content)
    else:
        cleaned = _without_names(content)
    return upload if cleaned == content else Upload(path, (json.dumps(cleaned, indent=2) + "\n").encode())


def _with_base(config: Mapping[str, Any], base: Parent) -> dict[str, Any]:
    if base.repo_id is None:
        raise InputError(
            f"the adapter's base is a folder of this machine ({base.name}), which nobody else could load it on: "
            "say what it is called on the Hub with --base-model user/base (or user/base@revision)."
        )
    return {**config, "base_model_name_or_path": base.repo_id, "revision": base.commit}


def _without_names(value: Any) -> Any:
    """A configuration without the folders that parts of it were once loaded from."""
    if isinstance(value, Mapping):
        return {
            key: _without_names(entry)
            for key, entry in value.items()
            if key not in ("_name_or_path", "name_or_path") or is_repo_id(str(entry))
        }
    return [_without_names(entry) for entry in value] if isinstance(value, list) else value


def _check_size(upload: Upload) -> None:
    if upload.size > FILE_BYTES:
        raise InputError(
            f"{upload.path} has {upload.size / 1000**3:.1f} GB, and the Hub takes files of at most "
            f"{FILE_BYTES // 1000**3} GB: split it or take it out of the folder."
        )
    if upload.path == CARD_FILE and upload.size > README_BYTES:
        raise InputError(f"{CARD_FILE} is larger than {README_BYTES // 1000} kB: shorten it.")


def _check_leaks(upload: Upload, folder: Path, token: str | None) -> None:
    if upload.path.endswith((".safetensors", ".png", ".jpg", ".gif", ".model")):
        return
    try:
        text = upload.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{upload.path} is no text in UTF-8: correct it, or take it out of the folder.") from error
    if (token and token in text) or _TOKEN.search(text):
        raise InputError(f"{upload.path} holds an access token: take it out (and revoke it, if others could see it).")
    if any(fnmatchcase(upload.path, pattern) for pattern in _VOCABULARIES):
        return  # tokens look like anything
    own = [str(place) for place in (folder.resolve(), folder.resolve().parent, Path.home()) if len(place.parts) > 2]
    leak = next((place for place in own if place in text), None) or (
        found[0] if (found := _HOME.search(_ADDRESS.sub("", text))) else None
    )
    if leak is None and upload.path.endswith(".json"):
        leak = _path_in(json.loads(text))
    if leak is not None:
        raise InputError(f"{upload.path} holds a path of this machine, {leak}: write what others can use instead.")


def _path_in(value: Any) -> str | None:
    """A string that is an absolute path, be it of this machine or of the one that the model was made on."""
    if isinstance(value, Mapping):
        return next(filter(None, map(_path_in, value.values())), None)
    if isinstance(value, list):
        return next(filter(None, map(_path_in, value)), None)
    return value if isinstance(value, str) and re.fullmatch(r"(?:/[\w.@+ -]+){2,}/?", value) else None


def stale_files(remote: Sequence[str], sent: Sequence[str]) -> list[str]:
    """Files of an earlier merged model in a repository that the new one has not: shards, encoders, scores."""
    gone = [path for path in remote if path not in sent and is_of_a_model(path)]
    # Scores that were published for a result go with it; a person's own entries stay.
    scores = [path.partition("/")[2] for path in gone if path.startswith(f"{RESULTS_FOLDER}/")]
    entries = [f"{EVAL_RESULTS_FOLDER}/{name.removesuffix('.json')}.yaml" for name in scores]
    return sorted([*gone, *(path for path in entries if path in remote and path not in sent)])
