"""The repositories of the test Hub: blobs, commits, references and pull requests. No HTTP here."""

import fnmatch
import hashlib
import itertools
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from hub_rules import card_errors

MAX_REGULAR_BYTES = 10 << 20
MAX_BINARY_BYTES = 1 << 20
OPEN = ("open", "draft")
# What the Hub puts into a new repository.
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel"),
        *("*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt"),
        *("*.pth", "*.rar", "*.safetensors", "saved_model/**/*", "*.tar.*", "*.tar", "*.tflite", "*.tgz", "*.wasm"),
        *("*.xz", "*.zip", "*.zst", "*tfevents*"),
    )
)


class HubError(Exception):
    """A refusal, with what the Hub answers then."""

    def __init__(self, status, message, code=None, **body):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


def now():
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_hash(content, kind="blob"):
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file: its bytes if it is regular, else its sha256 in the store of large files."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self):
        return git_hash(self.content if self.sha256 is None else self.pointer)

    @property
    def pointer(self):
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def etag(self):
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    files: dict[str, Blob]
    title: str
    message: str
    author: str
    date: str


@dataclass
class Discussion:
    num: int
    title: str
    author: str
    pull_request: bool
    base: str | None = None  # the commit that a pull request started from
    status: str = "open"
    created: str = field(default_factory=now)
    merged: str | None = None
    events: list[dict] = field(default_factory=list)


class Store:
    """Large files by sha256, in a folder; parts of uploads that are not complete yet."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="test-hub-"))
        self.uploads = {}  # upload's number -> (oid, size, {part: bytes' etag})
        self._numbers = itertools.count(1)

    def path(self, oid):
        return self.folder / oid

    def has(self, oid):
        return self.path(oid).is_file()

    def put(self, oid, size, content):
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "The Content-SHA256 you specified did not match what we received.")
        temporary = self.folder / f"{oid}.{next(self._numbers)}"
        temporary.write_bytes(content)
        temporary.replace(self.path(oid))

    def start(self, oid, size):
        number = next(self._numbers)
        self.uploads[number] = (oid, size, {})
        return number

    def put_part(self, upload, part, content):
        if upload not in self.uploads:
            raise HubError(404, "The specified upload does not exist.")
        etag = hashlib.md5(content).hexdigest()
        (self.folder / f"upload-{upload}-{part}").write_bytes(content)
        self.uploads[upload][2][part] = etag
        return etag

    def complete(self, upload, oid, parts):
        expected, size, stored = self.uploads.get(upload, (None, 0, {}))
        if oid != expected or [(part["partNumber"], part["etag"].strip('"')) for part in parts] != sorted(
            stored.items()
        ):
            raise HubError(400, "One or more of the specified parts could not be found.")
        files = [self.folder / f"upload-{upload}-{part}" for part in sorted(stored)]
        digest = hashlib.sha256()
        temporary = self.folder / f"{oid}.{upload}"
        with temporary.open("wb") as whole:
            for file in files:
                content = file.read_bytes()
                digest.update(content)
                whole.write(content)
        if digest.hexdigest() != oid or temporary.stat().st_size != size:
            temporary.unlink()
            raise HubError(400, "The uploaded parts do not make up the announced object.")
        temporary.replace(self.path(oid))
        for file in files:
            file.unlink()
        del self.uploads[upload]

    def add(self, content):
        """Store bytes, or a copy of a local file; returns their sha256."""
        if isinstance(content, bytes):
            oid = hashlib.sha256(content).hexdigest()
            self.path(oid).write_bytes(content)
            return oid
        with content.open("rb") as stream:
            oid = hashlib.file_digest(stream, "sha256").hexdigest()
        if not self.has(oid):
            shutil.copyfile(content, self.path(oid))
        return oid

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)


class Repository:
    """A model or a dataset."""

    def __init__(self, kind, repo_id, store, private=False):
        self.kind, self.id, self.store, self.private = kind, repo_id, store, private
        self.gated = False  # or "auto", "manual"
        self.granted = set()  # users who may read it though it is gated
        self.commits, self.refs, self.discussions = {}, {}, {}
        self.created = now()
        self.lock = threading.RLock()
        content = GITATTRIBUTES.encode()
        self._record("refs/heads/main", {".gitattributes": Blob(len(content), content)}, "initial commit", "", "system")

    @property
    def owner(self):
        return self.id.partition("/")[0]

    def _record(self, ref, files, title, message, author):
        parent, date = self.refs.get(ref), now()
        listing = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        oid = git_hash(f"{listing}{parent}{title}{message}{author}{date}{len(self.commits)}".encode(), "commit")
        self.commits[oid] = Commit(oid, parent, files, title, message, author, date)
        self.refs[ref] = oid
        return self.commits[oid]

    def ref(self, revision):
        """The full name of a branch, tag or pull request, or None."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision):
        """The commit of a branch, tag, pull request, or hash (shortened to 7 digits at most)."""
        ref = self.ref(revision)
        if ref is not None:
            return self.commits[self.refs[ref]]
        if len(revision) >= 7:
            found = [oid for oid in self.commits if oid.startswith(revision)]
            if len(found) == 1:
                return self.commits[found[0]]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision):
        commit = self.commit(revision)
        while True:
            yield commit
            if commit.parent is None:
                return
            commit = self.commits[commit.parent]

    def is_large(self, revision, path, size, sample):
        """Whether a file goes to the store of large files: by .gitattributes, or for its size."""
        attributes = self.commit(revision).files.get(".gitattributes")
        for line in (attributes.content or b"").decode().splitlines() if attributes else ():
            pattern, *rules = line.split() or [""]
            if "filter=lfs" in rules and fnmatch.fnmatch(path if "/" in pattern else path.rpartition("/")[2], pattern):
                return True
        return size > (MAX_BINARY_BYTES if b"\0" in sample else MAX_REGULAR_BYTES)

    def change(self, revision, operations, title, message, author, parent=None, create_pr=False):
        """Apply the operations of a commit, all or none.

        Args:
            operations: of the kinds ("add", path, Blob), ("delete", path) and ("delete folder", path).
            parent: the commit that the author has seen; the branch must not have moved since.
        """
        with self.lock:
            ref = self.ref(revision)
            if ref is None or ref.startswith("refs/tags/"):
                raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            start = self.commit(parent) if parent else self.commits[self.refs[ref]]
            if parent and not create_pr and start.id != self.refs[ref]:
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            if ref.startswith("refs/pr/") and self.discussions[int(ref.rpartition("/")[2])].status not in OPEN:
                raise HubError(400, "This pull request is closed.")
            files = dict(start.files)
            for operation, path, *blob in operations:
                if operation == "add":
                    files[path] = self._checked(revision, path, blob[0])
                elif operation == "delete folder":
                    inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
                    if not inside:
                        raise HubError(404, f'A folder with the name "{path}" does not exist', "EntryNotFound")
                    for name in inside:
                        del files[name]
                elif files.pop(path, None) is None:
                    raise HubError(404, f'A file with the name "{path}" does not exist', "EntryNotFound")
            pull_request = None
            if create_pr:
                pull_request = self.discuss(title, author, message, start.id)
                ref = f"refs/pr/{pull_request.num}"
            commit = self._record(ref, files, title, message, author)
            if ref.startswith("refs/pr/"):
                data = {"subject": title, "oid": commit.id}
                self.add_event(self.discussions[int(ref.rpartition("/")[2])], "commit", author, data)
            return commit, pull_request

    def _checked(self, revision, path, blob):
        rejected = "Your push was rejected because "
        if path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"{rejected}the path {path!r} is invalid.")
        if blob.sha256 is not None:
            if not self.store.has(blob.sha256) or self.store.path(blob.sha256).stat().st_size != blob.size:
                raise HubError(
                    400, f"{rejected}an LFS pointer pointed to a file that does not exist. Offending file: {path}"
                )
        elif blob.size > MAX_REGULAR_BYTES:
            raise HubError(400, f"{rejected}it contains files larger than 10 MiB. Offending files: {path}")
        elif blob.size and self.is_large(revision, path, blob.size, blob.content[:8000]):
            raise HubError(400, f"{rejected}it contains binary files. Please use LFS. Offending files: {path}")
        if path == "README.md" and (errors := card_errors(blob.content.decode())):
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
        return blob

    def discuss(self, title, author, description, base=None):
        """Open a discussion, or a pull request that starts from the commit `base`."""
        with self.lock:
            discussion = Discussion(len(self.discussions) + 1, title, author, base is not None, base)
            self.discussions[discussion.num] = discussion
            if base is not None:
                self.refs[f"refs/pr/{discussion.num}"] = base
            self.comment(discussion, author, description)
            return discussion

    def discussion(self, num):
        if num not in self.discussions:
            raise HubError(404, "Discussion not found")
        return self.discussions[num]

    def comment(self, discussion, author, text):
        latest = {"raw": text, "html": text, "updatedAt": now(), "author": {"name": author}}
        return self.add_event(
            discussion, "comment", author, {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
        )

    def add_event(self, discussion, kind, author, data):
        event = {"id": os.urandom(12).hex(), "type": kind, "createdAt": now(), "author": {"name": author}, "data": data}
        discussion.events.append(event)
        return event

    def set_status(self, discussion, status, author):
        discussion.status = status
        return self.add_event(discussion, "status-change", author, {"status": status})

    def conflicts(self, discussion):
        """Files that both the pull request and main changed since it started."""
        base, own, main = (
            self.commit(revision).files for revision in (discussion.base, f"refs/pr/{discussion.num}", "main")
        )
        return sorted(
            path
            for path in own.keys() | base.keys()
            if own.get(path) != base.get(path) != main.get(path) and own.get(path) != main.get(path)
        )

    def merge(self, discussion, author):
        """Put a pull request's changes on main."""
        with self.lock:
            if not discussion.pull_request or discussion.status != "open":
                raise HubError(400, "Only open pull requests can be merged.")
            if conflicts := self.conflicts(discussion):
                raise HubError(409, f"This pull request has conflicts in {', '.join(conflicts)}.")
            base, own = (self.commit(name).files for name in (discussion.base, f"refs/pr/{discussion.num}"))
            files = dict(self.commit("main").files)
            for path in own.keys() | base.keys():
                if path not in own:
                    files.pop(path, None)
                elif own[path] != base.get(path):
                    files[path] = own[path]
            title = f"{discussion.title} (#{discussion.num})"
            discussion.merged = self._record("refs/heads/main", files, title, "", author).id
            self.set_status(discussion, "merged", author)
