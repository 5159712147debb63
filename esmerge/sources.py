"""A Hub id or a folder -> a local folder, pinned to a commit or a content hash."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint
from esmerge.errors import InputError

# What a merge can need; pickles are never fetched.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Source:
    """Where an input comes from.

    Attributes:
        reference: as the recipe gives it, without a revision.
        folder: where its files lie.
        commit: of a Hub repository; None for a folder.
    """

    reference: str
    folder: Path
    commit: str | None = None

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """One of its JSON files; `InputError` if it is missing or no JSON object."""
        return read_json(self.folder / name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; `InputError` names the file if it is missing or none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} is missing or cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{file} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object.")
    return content


def resolve(reference: str, relative_to: Path, field: str, with_code: bool = False) -> Source:
    """Find a folder, or download a Hub repository (`user/repo` or `user/repo@revision`) and pin its commit.

    Args:
        relative_to: the folder that relative paths start from.
        field: the recipe's field, for messages.
        with_code: whether the user trusts the code in a Hub repository, so that it is downloaded too.
    """
    folder = relative_to / Path(reference).expanduser()
    if folder.is_dir():
        return Source(reference, folder)
    if folder.is_file():
        raise InputError(f"{field}: {folder} is a file; give the folder that holds the checkpoint.")
    repository, _, revision = reference.partition("@")
    if reference.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise InputError(f"{field}: the folder {folder} does not exist.")
    return _download(repository, revision or None, field, [*PATTERNS, "*.py"] if with_code else PATTERNS)


def _download(repository: str, revision: str | None, field: str, patterns: list[str]) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise InputError(f"{field}: {repository} is neither a folder nor a valid Hub id.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{field}: {repository} is no folder here and could not be had from the Hub: {reason}"
        ) from error
    return Source(repository, folder, commit=folder.name)


def content_hash(path: Path, weights: Checkpoint | None = None) -> str:
    """`xxh3:<hex>` of a file, or of the files in a folder that a merge can need: names and bytes, in order.

    It tells whether two inputs are the same, not whether somebody tampered with one.

    Args:
        weights: the checkpoint in the folder, whose tensors are hashed as they are read.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    patterns = [pattern for pattern in PATTERNS if pattern != "*.safetensors"]
    files = [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
    if weights is not None:
        digest.update(weights.content_hash().encode())
    return f"xxh3:{digest.hexdigest()}"
