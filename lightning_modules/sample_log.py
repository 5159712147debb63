"""What a model did with each sample, as lines of JSON: written as it happens, read again to go on or to compare."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from esmerge.errors import InputError
from esmerge.results import write_whole
from lightning_modules.unfinished import UnfinishedFolder, damaged

Record = dict[str, Any]
_FAILURE = "failure.txt"
_FIELDS = {"id", "answer", "prediction"}


def log_file(results: Path, task: str) -> Path:
    """The log of a finished evaluation: a line per sample, in the order of the samples."""
    return results / f"{task}.jsonl"


def write_log(file: Path, records: Sequence[Record]) -> None:
    """Write a finished log, all of it or nothing."""
    write_whole(file, "".join(_line(record) for record in records))


def read_log(file: Path, torn: bool = False) -> list[Record]:
    """The records in a log.

    Args:
        file: to read.
        torn: whether its writer may have been killed: what follows the last line's end is then left out.

    Raises:
        InputError: if the file is missing or a line is no record.
    """
    try:
        content = file.read_bytes()
        if torn:
            # A writer that was killed may have stopped in the middle of a character.
            content = content[: content.rfind(b"\n") + 1]
        lines = content.decode().removesuffix("\n").split("\n") if content else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is missing or cannot be read as text: evaluate again, without --resume.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or _FIELDS - record.keys():
            raise InputError(
                f"{file}, line {number} is no record of a sample: the file is damaged; evaluate again, without "
                "--resume."
            )
        records.append(record)
    return records


class UnfinishedRun(UnfinishedFolder):
    """The log of an evaluation that is not finished: a folder with a file per process.

    Args:
        results: the folder of the finished logs.
        task: name of the task.
    """

    def __init__(self, results: Path, task: str) -> None:
        super().__init__(results / f".{task}.unfinished", f"the evaluation of {task}")
        self.task = task
        self._stream: IO[str] | None = None

    def begin(self, run: Mapping[str, Any], resume: bool) -> bool:
        """As of any unfinished work; `InputError` for a damaged log too."""
        goes_on = super().begin(run, resume)
        if goes_on:
            (self.folder / _FAILURE).unlink(missing_ok=True)
            self._gather()
        return goes_on

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
            write_whole(file, json.dumps(value))
        if not file.exists():
            return None
        try:
            return int(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(file) from error

    def fail(self, message: str) -> None:
        """Tell the other processes why this one cannot go on."""
        write_whole(self.folder / _FAILURE, message)

    def failure(self) -> str | None:
        """What a process said that could not go on."""
        file = self.folder / _FAILURE
        return file.read_text(encoding="utf-8") if file.exists() else None

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


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
