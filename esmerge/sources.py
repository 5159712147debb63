"""A Hub id or a folder -> a local folder, pinned to a commit or a content hash."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esmerge.checkpoint import Checkpoint, weights_stem
from esmerge.errors import InputError
from esmerge.hub import SMALL_FILES, HubFile, PartialCopies, fetch_file, fetch_model, is_commit, pin, split_reference


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

    @property
    def pinned(self) -> str:
        """What `resolve` finds it by again, from anywhere: the repository at its commit, or the folder's whole path."""
        return str(self.folder.resolve()) if self.commit is None else f"{self.reference}@{self.commit}"

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


def resolve(
    reference: str,
    relative_to: Path,
    field: str,
    with_code: bool = False,
    copies: PartialCopies | None = None,
) -> Source:
    """Find a folder, or download a Hub repository (`user/repo` or `user/repo@revision`) and pin its commit.

    Args:
        relative_to: the folder that relative paths start from.
        field: the recipe's field, for messages.
        with_code: whether the user trusts the code in a Hub repository, so that it is downloaded too.
        copies: where weights that are not here yet are opened without downloading them.

    Raises:
        InputError: if there is no such folder or repository, or it cannot be had.
    """
    folder = _local(reference, relative_to, field)
    if folder is not None:
        return Source(reference, folder)
    repo_id, revision = split_reference(reference)
    if copies is not None and (repo_id, revision) in copies.folders:
        return Source(repo_id, copies.folders[repo_id, revision], revision)
    snapshot = fetch_model(repo_id, revision, field, with_code)
    return Source(repo_id, snapshot, commit=snapshot.name)


def _local(reference: str, relative_to: Path, field: str) -> Path | None:
    """The folder that a reference names; None if it names a Hub repository."""
    folder = relative_to / Path(reference).expanduser()
    if reference.startswith("hf://"):
        return None
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(f"{field}: {folder} is a file; give the folder that holds the checkpoint.")
    if reference.startswith((".", "/", "~")) or split_reference(reference)[0].count("/") > 1:
        raise InputError(f"{field}: the folder {folder} does not exist.")
    return None


def is_on_hub(reference: str, relative_to: Path) -> bool:
    """Whether a reference names a Hub repository, as there is no such folder."""
    return reference.startswith("hf://") or not (relative_to / Path(reference).expanduser()).is_dir()


def absolute(path: Path) -> Path:
    """A path from the root on. Its last name may be a link's, as of a file in the Hub's cache, where it tells more."""
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def located(reference: str, relative_to: Path) -> str:
    """A reference to a folder or file here with its path from the root on; one to the Hub as it is."""
    path = relative_to / Path(reference).expanduser()
    return str(absolute(path)) if not reference.startswith("hf://") and path.exists() else reference


def pinned(reference: str, relative_to: Path, field: str) -> str:
    """A reference to a Hub repository with its commit as the revision; one to a folder as it is."""
    if _local(reference, relative_to, field) is not None:
        return reference
    repo_id, revision = split_reference(reference)
    return f"{repo_id}@{pin(repo_id, revision, field)}"


def pinned_file(reference: str, field: str) -> str:
    """A reference to a file on the Hub with its commit as the revision; one to a local file as it is."""
    if not reference.startswith("hf://"):
        return reference
    file = HubFile.parse(reference, field)
    return reference if is_commit(file.revision) else file.at(fetch_file(file, field)[1])


def resolve_file(reference: str, relative_to: Path, field: str) -> Path:
    """The path of a file, which need not exist, or of a downloaded one (`hf://datasets/user/repo@revision/file.txt`).

    Raises:
        InputError: if it cannot be had from the Hub.
    """
    if reference.startswith("hf://"):
        return fetch_file(HubFile.parse(reference, field), field)[0]
    return relative_to / Path(reference).expanduser()


def content_hash(path: Path, weights: Checkpoint | None = None) -> str:
    """`xxh3:<hex>` of a file, or of the files in a folder that a merge can need: names and bytes, in order.

    It tells whether two inputs are the same, not whether somebody tampered with one.

    Args:
        weights: the checkpoint in the folder, whose tensors are hashed as they are read.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    small = sorted(file for suffix in SMALL_FILES for file in path.glob(f"*{suffix}"))
    # A licence that is put beside a model makes it no other one.
    files = [path] if path.is_file() else [f for f in small if not f.name.lower().startswith(("licen", "notice"))]
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
    if weights is not None:
        digest.update(weights.content_hash().encode())
    return f"xxh3:{digest.hexdigest()}"


def checkpoint_hash(folder: Path, stem: str | None = None) -> str:
    """The `content_hash` of a folder with the weights in it.

    Args:
        stem: what the names of the files with weights begin with, if not as in a model's folder.
    """
    with Checkpoint.open(folder, stem or weights_stem(folder)) as checkpoint:
        return content_hash(folder, checkpoint)
