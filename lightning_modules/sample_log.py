"""What a model did with each sample, as lines of JSON: written as it happens, read again to go on or to compare."""

import fcntl
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from esmerge.errors import InputError

Record = dict[str, Any]
_FIELDS = {"id", "answer", "prediction"}
RUN_FILE = "run.json"


def log_file(results: Path, task: str) -> Path:
    """The log of a finished evaluation: a line per sample, in the order of the samples."""
    return results / f"{task}.jsonl"


def write_log(file: Path, records: Sequence[Record]) -> None:
    """Write a finished log, all of it or nothing."""
    part = file.with_name(f".{file.name}.part")
    part.write_text("".join(_line(record) for record in records), encoding="utf-8")
    part.replace(file)


def read_log(file: Path, torn: bool = False) -> list[Record]:
    """The records in a log.

    Args:
        file: to read.
        torn: whether its writer may have been killed: what follows the last line's end is then left out.

    Raises:
        InputError: if the file is missing or a line is no record.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is missing or cannot be read as text: evaluate again without --resume.") from error
    lines = text.split("\n")
    if torn or not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or _FIELDS - record.keys():
            raise InputError(
                f"{file}, line {number} is no record of a sample: the file is damaged; evaluate again without --resume."
            )
        records.append(record)
    return records


class UnfinishedRun:
    """The log of an evaluation that is not finished: a folder with a file per process, and with what is evaluated.

    Its folder disappears when the finished log is written.
    """

    def __init__(self, results: Path, task: str) -> None:
        self.task = task
        self.folder = results / f".{task}.unfinished"
        self._lock: IO[str] | None = None
        self._stream: IO[str] | None = None

    def begin(self, run: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or keep what an interrupted run of the same evaluation left there.

        Args:
            run: all that determines the records.

        Raises:
            InputError: if what is left there is of another evaluation or damaged, or is being written.
        """
        file = self.folder / RUN_FILE
        if resume and file.exists():
            self._take_lock()
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{file} is damaged: evaluate again without --resume.") from error
            if different := sorted(key for key in {*found, *run} if found.get(key) != run.get(key)):
                raise InputError(
                    f"the interrupted evaluation in {self.folder} differs in {', '.join(different)}: evaluate again "
                    "without --resume, or as it was begun."
                )
            self._gather()
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            for old in self.folder.glob("*.json*"):
                old.unlink()
            # Renamed when it is complete: what has no run.json is not gone on with.
            part = self.folder / f".{RUN_FILE}"
            part.write_text(json.dumps(dict(run), indent=2), encoding="utf-8")
            part.replace(file)

    def _take_lock(self) -> None:
        self._lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is evaluating {self.task} into {self.folder.parent}: wait for it, or choose another "
                "--output."
            ) from error

    def _gather(self) -> None:
        """Put all records into one file, so that any number of processes can go on."""
        done = self.records()
        write_log(self.folder / "done.jsonl", list(done.values()))
        for file in self.folder.glob("rank*.jsonl"):
            file.unlink()

    def records(self) -> dict[str, Record]:
        """All records that are there, by the samples' ids; a sample computed twice came out the same."""
        files = sorted(self.folder.glob("*.jsonl"))
        return {record["id"]: record for file in files for record in read_log(file, torn=True)}

    def note(self, name: str, value: int | None = None) -> int | None:
        """Keep a number that was found on the way, or give one that was kept."""
        file = self.folder / f"{name}.json"
        if value is not None:
            file.write_text(json.dumps(value), encoding="utf-8")
        return int(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None

    def append(self, records: Sequence[Record], rank: int) -> None:
        """Write records of one process; they survive its being killed."""
        if self._stream is None:
            self._stream = (self.folder / f"rank{rank}.jsonl").open("a", encoding="utf-8")
        self._stream.write("".join(_line(record) for record in records))
        self._stream.flush()

    def close(self) -> None:
        """No more records from this process."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def finish(self, results: Path, order: Sequence[str]) -> list[Record]:
        """Turn the folder into the finished log, in the order of the samples' ids; return its records."""
        self.close()
        found = self.records()
        if missing := [sample for sample in order if sample not in found]:
            raise RuntimeError(f"{len(missing)} samples of {self.task} were not evaluated, {missing[0]!r} among them")
        records = [found[sample] for sample in order]
        write_log(log_file(results, self.task), records)
        return records

    def remove(self) -> None:
        """The evaluation is complete."""
        shutil.rmtree(self.folder)
        if self._lock is not None:
            self._lock.close()


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
