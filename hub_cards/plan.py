"""What publishing a model would change on the Hub, and how that is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

from hub_cards.contents import Upload


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
class Plan:
    """What publishing would change.

    Attributes:
        added, changed: files to send.
        removed: paths in the repository of files that the model has no more.
        unchanged: how many files are there already.
        left_out: files in the folder that are not sent.
        notes: what the card could not say.
        destination: with the message.
        exists: whether the repository does; private: whether it is, or will be.
        parent: the commit that this one follows; None in a new repository.
        revision: the branch or pull request that it is on; None for main, or if a pull request is to be opened.
    """

    destination: Destination
    exists: bool
    private: bool
    parent: str | None
    revision: str | None
    added: Sequence[Upload] = ()
    changed: Sequence[Upload] = ()
    removed: Sequence[str] = ()
    unchanged: int = 0
    left_out: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether everything is there already."""
        return not (self.added or self.changed or self.removed)

    def __str__(self) -> str:
        """For people: a line per file, then what it is all about."""
        to = self.destination
        lines = [f"  {mark} {upload.path}  {_bytes(upload.size)}" for mark, upload in self._sent()]
        lines += [f"  - {path}" for path in self.removed]
        lines += [f"  not sent: {path}" for path in self.left_out]
        lines += [f"  note: {note}" for note in self.notes]
        size = sum(upload.size for _, upload in self._sent())
        kind = f"{'private' if self.private else 'public'} repository"
        where = "a pull request to " if to.pull_request else ""
        at = f" at {to.revision}" if to.revision else ""
        what = f"{len(self.added) + len(self.changed)} files, {_bytes(size)}"
        if self.unchanged:
            what += f" ({self.unchanged} more are there already)"
        state = "" if self.exists else "new "
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
