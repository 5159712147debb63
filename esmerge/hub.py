"""Repositories of the Hub: pinned to a commit, the files that are needed downloaded, refusals in one sentence.

Before weights are downloaded, `PartialCopies` offers them as files that hold their headers and fetch the rest where it
is read, so that what does not fit is found out first.
"""

import json
import logging
import os
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import unquote

from esmerge import __version__
from esmerge.checkpoint import PARTIAL_FILES, PICKLE_SUFFIXES
from esmerge.errors import InputError, some_of

logger = logging.getLogger(__name__)

# Files beside the weights that a model can need, in the folder of the repository itself.
SMALL_FILES = (".json", ".jinja", ".model", ".txt")
_RECORD_FILE = "esmerge.yaml"
CHAT_TEMPLATES_FOLDER = "additional_chat_templates"
# Folders that belong to a model, whole; all others hold the same weights in other formats, or logs.
_FOLDERS = ("modalities", CHAT_TEMPLATES_FOLDER)
_MARKERS = ("config.json", "adapter_config.json", "tokenizer_config.json")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILE = re.compile(
    r"hf://(?:(?P<kind>datasets|models)/)?(?P<repo>(?!datasets/|models/|spaces/)[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/pr/\d+|refs/convert/[\w.-]+|[^/]+))?/(?P<path>.+)"
)
# What requests to the Hub say that they are of.
LIBRARY: dict[str, Any] = {"library_name": "esmerge", "library_version": __version__}
_TIMEOUT = 30.0
# What is in a commit never changes.
_LISTINGS: dict[tuple[str, str, str, str], "Listing"] = {}
_HEADER_BYTES = 1 << 16
# What values may be read of weights that are not here yet; more than some rows of some matrices is not worth it.
_PARTIAL_BYTES = 32 << 20


class NotHereError(Exception):
    """More of a file is needed than is worth fetching before it is downloaded."""


@dataclass(frozen=True)
class Listing:
    """A repository at a commit.

    Attributes:
        kind: `model` or `dataset`.
        files: size in bytes of every file, by path.
    """

    repo_id: str
    kind: str
    commit: str
    files: Mapping[str, int]


@dataclass(frozen=True)
class HubFile:
    """One file in a repository, as `hf://datasets/user/repo@revision/path` names it."""

    repo_id: str
    kind: str
    revision: str | None
    path: str

    @classmethod
    def parse(cls, reference: str, field: str) -> Self:
        """Read a reference; `InputError` if it names no file."""
        found = _FILE.fullmatch(reference)
        if found is None:
            raise InputError(
                f"{field}: {reference} names no file on the Hub; write hf://datasets/user/repo@revision/file.txt, "
                "or hf://user/repo@revision/file.txt for a file in a model's repository."
            )
        kind = "dataset" if found["kind"] == "datasets" else "model"
        return cls(found["repo"], kind, found["revision"] and unquote(found["revision"]), found["path"])

    def at(self, commit: str) -> str:
        """The reference with a commit as its revision."""
        return f"hf://{'datasets/' if self.kind == 'dataset' else ''}{self.repo_id}@{commit}/{self.path}"


def split_reference(reference: str) -> tuple[str, str | None]:
    """`user/repo@revision` -> the repository, and the revision if there is one."""
    repo_id, _, revision = reference.removeprefix("hf://").removeprefix("models/").partition("@")
    return repo_id, revision or None


def is_repo_id(name: str) -> bool:
    """Whether a name can be that of a repository, `user/repo`; that of a folder can look the same."""
    return bool(_REPO_ID.fullmatch(name))


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit hash, which never moves."""
    return bool(revision and _COMMIT.fullmatch(revision))


def pin(repo_id: str, revision: str | None, field: str) -> str:
    """The commit of a revision, on the Hub or, if that cannot be reached, in the cache.

    Raises:
        InputError: if there is no such repository or revision, or no access to it.
    """
    if is_commit(revision):
        assert revision is not None
        return revision
    listing = _list(repo_id, revision, "model", field)
    if listing is None:
        return _cached_snapshot(repo_id, revision, field).name
    from huggingface_hub import hf_hub_download

    marker = next((name for name in _MARKERS if name in listing.files), None)
    if marker is not None:
        with _refusals(field, repo_id, revision):
            # By its revision, which the cache then knows the commit of when the Hub cannot be reached.
            return Path(hf_hub_download(repo_id, marker, revision=revision)).parent.name
    return listing.commit


def fetch_model(repo_id: str, revision: str | None, field: str, with_code: bool = False) -> Path:
    """The folder in the cache with the files of a model that are needed, downloaded where they are missing.

    Its name is the commit. If the Hub cannot be reached, the cache has to do.

    Args:
        field: of the recipe, for messages.
        with_code: whether its *.py files are needed too.

    Raises:
        InputError: if there is no such repository or revision, no access to it, or no room on the disk; if its weights
            are pickles; if the connection breaks off.
    """
    listing = _list(repo_id, revision, "model", field)
    if listing is None:
        return _cached_snapshot(repo_id, revision, field)
    names = _needed(listing, field, with_code)
    _check_room(listing, _not_cached(listing, names), field)
    return _download(listing, names, revision, field)


def fetch_file(file: HubFile, field: str) -> tuple[Path, str]:
    """One file of a repository in the cache, downloaded if it is missing, and its commit.

    Raises:
        InputError: as `fetch_model`, and if there is no such file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    place: dict[str, Any] = {
        "repo_id": file.repo_id,
        "filename": file.path,
        "repo_type": file.kind,
        "revision": file.revision,
    }
    with _refusals(field, file.repo_id, file.revision, file.kind):
        try:
            found = hf_hub_download(**place, **LIBRARY)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            listing = _list(file.repo_id, file.revision, file.kind, field)
            there = sorted(name for name in listing.files if not name.startswith(".")) if listing else []
            raise InputError(
                f"{field}: {file.repo_id} has no file {file.path}{f' (it has {some_of(there, 5)})' if there else ''}."
            ) from error
        except transport_error() as error:
            cached = try_to_load_from_cache(**place)
            if _status(error) is not None or not isinstance(cached, str):
                raise
            logger.warning("%s: the Hub cannot be reached, so %s is taken from the cache", field, file.repo_id)
            found = cached
    # Above the file's own folders is that of the commit.
    return Path(found), Path(found).parents[len(PurePosixPath(file.path).parts) - 1].name


class PartialCopies:
    """Folders that look like downloaded models, but whose weights are fetched where they are read.

    As a context; the folders are gone at its end.

    Attributes:
        folders: by repository and revision.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self.folders: dict[tuple[str, str | None], Path] = {}
        self._files: list[Path] = []
        self._left = _PARTIAL_BYTES
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            del PARTIAL_FILES[file]
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, repo_id: str, revision: str | None, field: str, with_code: bool = False) -> None:
        """Make such a folder, unless all that is needed is in the cache or the Hub cannot be reached."""
        listing = _list(repo_id, revision, "model", field)
        if listing is None or (repo_id, revision) in self.folders:
            return
        names = _needed(listing, field, with_code)
        missing = _not_cached(listing, names)
        absent = [name for name in missing if name.endswith(".safetensors")]
        if not absent:
            return
        _check_room(listing, missing, field)
        snapshot = _download(listing, [name for name in names if name not in absent], revision, field)
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="esmerge-headers-"))
        folder = self._folder / str(len(self.folders)) / repo_id.rpartition("/")[2]
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in absent:
                (folder / name).symlink_to(snapshot / name)
        with _refusals(field, repo_id, revision), ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self._begin(folder / name, listing, name, field), absent))
        self.folders[repo_id, revision] = folder

    def _begin(self, file: Path, listing: Listing, name: str, field: str) -> None:
        """A file that is as long as the one on the Hub and has its header."""
        size = listing.files[name]
        with file.open("wb") as stream:
            stream.truncate(size)
            start = _read_range(listing, name, 0, min(_HEADER_BYTES, size))
            header = 8 + struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
            if len(start) < header <= size:
                start += _read_range(listing, name, len(start), header - len(start))
            stream.write(start)

        def fetch(offset: int, count: int) -> None:
            with self._lock:
                self._left -= count
                if self._left < 0:
                    raise NotHereError(name)
            with _refusals(field, listing.repo_id, listing.commit):
                content = _read_range(listing, name, offset, count)
            with file.open("r+b") as stream:
                os.pwrite(stream.fileno(), content, offset)

        with self._lock:
            PARTIAL_FILES[file] = fetch
            self._files.append(file)

    def named(self, message: str) -> str:
        """A message with the repositories' names instead of those of the folders."""
        for (repo_id, _), folder in self.folders.items():
            message = message.replace(str(folder), repo_id)
        return message


def _read_range(listing: Listing, name: str, offset: int, count: int) -> bytes:
    """Some bytes of a file, by a range request."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    if not count:
        return b""
    url = hf_hub_url(listing.repo_id, name, revision=listing.commit)
    headers = {**build_hf_headers(**LIBRARY), "Range": f"bytes={offset}-{offset + count - 1}"}
    response = http_backoff("GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT)
    hf_raise_for_status(response)
    return response.content[:count] if response.status_code == 206 else response.content[offset : offset + count]


def _list(repo_id: str, revision: str | None, kind: str, field: str) -> Listing | None:
    """What is in a repository; None if the Hub cannot be reached."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    known = (constants.ENDPOINT, kind, repo_id, revision or "")
    if known in _LISTINGS:
        return _LISTINGS[known]
    api = HfApi(**LIBRARY)
    with _refusals(field, repo_id, revision, kind):
        try:
            info: Any = api.repo_info(repo_id, revision=revision, repo_type=kind, files_metadata=True, timeout=_TIMEOUT)
        except transport_error() as error:
            if _status(error) is not None:
                raise
            if _in_cache(repo_id, revision) is None:
                raise
            logger.warning("%s: the Hub cannot be reached, so %s is taken from the cache", field, repo_id)
            return None
    listing = Listing(repo_id, kind, info.sha, {file.rfilename: file.size or 0 for file in info.siblings})
    return _LISTINGS.setdefault((constants.ENDPOINT, kind, repo_id, listing.commit), listing)


def _needed(listing: Listing, field: str, with_code: bool) -> list[str]:
    """The files of a model that are needed: no pickles, no second copy of the weights."""
    suffixes = (*SMALL_FILES, *((".py",) if with_code else ()))
    files = list(listing.files)
    own = [name for name in files if "/" not in name]
    needed = [n for n in own if n == _RECORD_FILE or (n.endswith(suffixes) and not n.endswith(".index.json"))]
    needed += [n for n in files if n.startswith(_FOLDERS) and "/" in n and n.endswith((*SMALL_FILES, ".safetensors"))]
    stem = "adapter_model" if "adapter_config.json" in own else "model"
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    if single in own:
        return [*needed, single]
    if index in own:
        return [*needed, index, *_shards(listing, index, field)]
    if pickles := [name for name in own if name.endswith(PICKLE_SUFFIXES)]:
        raise InputError(
            f"{field}: {listing.repo_id} has its weights as pickles only ({pickles[0]}), which can run code when "
            f"opened: name a revision with {single}, such as refs/pr/N of a conversion proposed there, or "
            "convert them (save_pretrained writes it)."
        )
    return needed


def _shards(listing: Listing, index: str, field: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    with _refusals(field, listing.repo_id, listing.commit):
        file = Path(hf_hub_download(listing.repo_id, index, revision=listing.commit, **LIBRARY))
    try:
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        return []  # opening the checkpoint says what is wrong with its index
    if missing := [shard for shard in shards if shard not in listing.files]:
        raise InputError(f"{field}: {listing.repo_id} lacks {missing[0]}, which its {index} names.")
    return shards


def _not_cached(listing: Listing, names: list[str]) -> list[str]:
    from huggingface_hub import try_to_load_from_cache

    cached = {name: try_to_load_from_cache(listing.repo_id, name, revision=listing.commit) for name in names}
    return [name for name in names if not isinstance(cached[name], str)]


def _check_room(listing: Listing, missing: list[str], field: str) -> None:
    from huggingface_hub import constants

    needed = sum(listing.files[name] for name in missing)
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    place = next(parent for parent in (cache, *cache.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{field}: {listing.repo_id} needs {needed / 1e9:.1f} GB in {cache}, which has {free / 1e9:.1f} GB free: "
            "free some space, or set HF_HOME to a folder on a larger disk."
        )


def _download(listing: Listing, names: list[str], revision: str | None, field: str) -> Path:
    from huggingface_hub import snapshot_download

    # Names are patterns there.
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    with _refusals(field, listing.repo_id, revision):
        # By its revision, which the cache then knows the commit of when the Hub cannot be reached.
        return Path(snapshot_download(listing.repo_id, revision=revision, allow_patterns=patterns, **LIBRARY))


def _in_cache(repo_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(repo_id, name, revision=revision) for name in _MARKERS]
    except HFValidationError:
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def _cached_snapshot(repo_id: str, revision: str | None, field: str) -> Path:
    found = _in_cache(repo_id, revision)
    if found is None:
        at = f" --revision {revision}" if revision else ""
        raise InputError(
            f"{field}: {repo_id} is no folder here and not in the cache{' at ' + revision if revision else ''}, and "
            f"HF_HUB_OFFLINE forbids to ask the Hub: unset it, or run `hf download {repo_id}{at}` where there is a "
            "connection and copy the cache."
        )
    return found


def transport_error() -> type[Exception]:
    """What the HTTP library calls all its errors, under whichever name huggingface_hub has that library."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _refusals(field: str, repo_id: str, revision: str | None, kind: str = "model") -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence with a remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{field}: {repo_id} is neither a folder nor a valid Hub id (user/repo).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, transport_error(), OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # the disk's
        raise InputError(f"{field}: {_reason(error, repo_id, revision, kind)}") from error


def _reason(error: Exception, repo_id: str, revision: str | None, kind: str) -> str:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        return (
            f"{repo_id} is not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it, or download it "
            "where there is a connection."
        )
    causes = [error, error.__cause__, error.__context__]
    address = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        if get_token() is None:
            return f"{repo_id} is gated: accept its licence at {address} and log in with `hf auth login`."
        return f"{repo_id} is gated, and your token has no access to it: accept its licence at {address}."
    status = next(filter(None, map(_status, causes)), None)
    if status == 401 and get_token() is not None:
        return "the Hub does not accept your token: log in again with `hf auth login`, or correct HF_TOKEN."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        remedy = (
            "for a private one, log in with `hf auth login`"
            if get_token() is None
            else "for a private one, log in with an account that has access (`hf auth login`)"
        )
        return f"{repo_id} is no folder here, and the Hub has no such {kind}: check the spelling; {remedy}."
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{repo_id} has no revision {revision}{_known_revisions(repo_id, kind)}."
    if status is not None:
        remedy = "your token may not read it" if status == 403 else "try again later; what is complete is kept"
        return f"the Hub answered {status} for {repo_id}: {remedy}."
    here, instead = f"{repo_id} is no folder here; if it is on the Hub: ", " Or name a folder that has it."
    if kind == "dataset":
        here = instead = ""
    return (
        f"{here}the connection to {constants.ENDPOINT} failed while {repo_id} was asked for: check it and run the same "
        f"command again; what is complete is kept.{instead}"
    )


def _known_revisions(repo_id: str, kind: str) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi(**LIBRARY).list_repo_refs(repo_id, repo_type=kind)
    except (transport_error(), OSError):
        return ""
    return f"; it has {some_of([ref.name for ref in (*refs.branches, *refs.tags)], 5)}"
