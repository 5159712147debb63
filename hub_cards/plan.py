"""What publishing a model would change on the Hub, and how that is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from huggingface_hub import RepoFile

from esmerge.errors import some_of
from esmerge.results import RECORD_FILE
from hub_cards.contents import Upload, is_of_a_model


@dataclass(frozen=True)
class Destination:
    """Where a model goes, and how.

    Attributes:
        repo_id: `user/name`.
        private: create it for one's own eyes only.
        pull_request: propose the files instead of pushing them.
        revision: a branch, which is created if there is none, or `refs/pr/N`; None for main.
        tag: of the commit.
        message: of the commit.
    """

    repo_id: str
    private: bool = False
    pull_request: bool = False
    revision: str | None = None
    tag: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository as it is.

    Attributes:
        exists: whether it does; private: whether it is, or will be.
        commit: that the new one follows; None in a new repository.
        revision: the branch or pull request that it is on; None for main, or if a pull request is to be opened.
        branch_exists: whether that does.
        files: at the commit, by path.
        tags: commits by name.
    """

    exists: bool
    private: bool = False
    branch_exists: bool = True
    commit: str | None = None
    revision: str | None = None
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What publishing would change.

    Attributes:
        added, changed: files to send.
        removed: paths in the repository of files that the model has no more.
        unchanged: how many files are there already.
        left_out: files in the folder that are not sent.
        notes: what the card could not say, and who cannot load the model.
        destination: with the message.
        repository: as it is.
    """

    destination: Destination
    repository: Repository
    added: Sequence[Upload] = ()
    changed: Sequence[Upload] = ()
    removed: Sequence[str] = ()
    unchanged: int = 0
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether everything is there already, on the branch too."""
        return self.repository.branch_exists and not (self.added or self.changed or self.removed)

    @property
    def warning(self) -> str | None:
        """What somebody may not have meant: that a model goes that esmerge did not make."""
        if RECORD_FILE in self.repository.files:
            return None
        lost = [path for path in (*(upload.path for upload in self.changed), *self.removed) if is_of_a_model(path)]
        if not lost:
            return None
        return f"{self.destination.repo_id} holds another model, whose files this replaces: {some_of(lost, 1)}"

    def __str__(self) -> str:
        """For people: a line per file, then what it is all about."""
        to = self.destination
        lines = [f"  {mark} {upload.path}  {_bytes(upload.size)}" for mark, upload in self._sent()]
        lines += [f"  - {path}" for path in self.removed]
        lines += [f"  not sent: {path}" for path in self.left_out]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {self.warning}."] if self.warning else []
        size = sum(upload.size for _, upload in self._sent())
        kind = f"{'private' if self.repository.private else 'public'} repository"
        where = "a pull request to " if to.pull_request else ""
        at = f" at {to.revision}" if to.revision else ""
        what = f"{len(self.added) + len(self.changed)} files, {_bytes(size)}"
        if self.unchanged:
            what += f" ({self.unchanged} more are there already)"
        state = "" if self.repository.exists else "new "
        return "\n".join([f"{what}, for {where}the {state}{kind} {to.repo_id}{at}: {to.message}", *lines])

    def _sent(self) -> list[tuple[str, Upload]]:
        return [*(("+", upload) for upload in self.added), *(("~", upload) for upload in self.changed)]


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
