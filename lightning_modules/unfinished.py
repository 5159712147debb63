"""A folder for work that may be interrupted: it says what the work is, and one run at a time is at it."""

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from esmerge.errors import GOES_ON, InputError, Interrupted
from esmerge.results import write_whole

RUN_FILE = "run.json"
_LOCK_FILE = ".lock"


def damaged(file: Path) -> InputError:
    """What is said of a file that interrupted work left and that cannot be read."""
    return InputError(f"{file} is damaged: start again without --resume.")


class UnfinishedFolder:
    """What an interrupted run leaves, to go on from; a context that lets other runs at it when it ends.

    Args:
        folder: hidden, beside the place of the result.
        what: the work, for messages.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self.folder = folder
        self.what = what
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        begun = self._lock is not None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if begun and isinstance(error, KeyboardInterrupt):
            raise Interrupted(GOES_ON) from error
        if begun and isinstance(error, OSError):
            error.add_note(GOES_ON)

    def begin(self, run: Mapping[str, Any], resume: bool) -> bool:
        """Make the folder, or keep what is in it; whether there was something to go on from.

        Args:
            run: all that determines the result, as JSON has it.
            resume: whether to go on.

        Raises:
            InputError: if the folder cannot be written, holds other work or damaged one, or another run is at it.
        """
        self._take_lock()
        file = self.folder / RUN_FILE
        if resume and file.exists():
            self._check(file, json.loads(json.dumps(dict(run))))
            return True
        for entry in self.folder.iterdir():
            if entry.name != _LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        # A folder without it is not gone on from.
        write_whole(file, json.dumps(dict(run), indent=2))
        return False

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / _LOCK_FILE).open("w")
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}): choose another output.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is at {self.what} in {self.folder.parent}: wait for it, or choose another output."
            ) from error

    def _check(self, file: Path, run: Mapping[str, Any]) -> None:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(file) from error
        if not isinstance(found, dict):
            raise damaged(file)
        if different := sorted(key for key in {*found, *run} if found.get(key) != run.get(key)):
            raise InputError(
                f"what is left of {self.what} in {self.folder} differs in {', '.join(different)}: start again without "
                "--resume, or as it was begun."
            )

    def remove(self) -> None:
        """The work is finished."""
        shutil.rmtree(self.folder)
