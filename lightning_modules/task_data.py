"""The rows of a task: from files, folders, the Hub or the testbed, checked, and split."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.task import Task, canonical_label
from esmerge.errors import InputError
from esmerge.yaml_files import nearest

_FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_NUMBERS_SHOWN = 5


@dataclass(frozen=True)
class Row:
    """One row of the data.

    Attributes:
        id: unique within its split.
        values: placeholder -> value, constants among them.
        answer: index into the task's choices.
        group: of the row, if the task has a column for it.
    """

    id: str
    values: dict[str, str]
    answer: int
    group: str | None


@dataclass(frozen=True)
class Table:
    """Columns of equal length, and where they came from, for messages."""

    columns: Mapping[str, Sequence[Any]]
    source: str

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def take(self, numbers: Sequence[int]) -> "Table":
        """The rows with these numbers, from 0."""
        return Table({name: [values[n] for n in numbers] for name, values in self.columns.items()}, self.source)


def load_rows(task: Task, split: str) -> list[Row]:
    """The rows of one split, in the order of the data.

    Raises:
        InputError: if the data cannot be had, has no such split, lacks a column, or has empty values, labels outside
            the task's or an identifier twice; it names the task, the source and the rows.
    """
    tables = _load_tables(task)
    if split not in tables:
        raise InputError(
            f"the task {task.name}: {_any_source(tables)} has no split {split}{nearest(split, list(tables))} "
            f"(it has {', '.join(tables)})."
        )
    return _check(task, tables[split], split)


def data_folder() -> Path:
    """Where files of tasks are looked for: `$ESMERGE_DATA`, or `data` in the current folder."""
    return Path(os.environ.get("ESMERGE_DATA") or "data")


def _any_source(tables: Mapping[str, Table]) -> str:
    return next(iter(tables.values())).source


def _needed_columns(task: Task) -> list[str]:
    optional = [name for name in (task.id, task.group) if name is not None]
    return list(dict.fromkeys([*task.columns.values(), task.answer, *optional]))


def _load_tables(task: Task) -> dict[str, Table]:
    if task.source.testbed is not None:
        tables = _from_testbed(task)
    elif task.source.path is not None or task.source.files is not None:
        tables = _from_files(task)
    else:
        raise NotImplementedError
    return tables


def _from_testbed(task: Task) -> dict[str, Table]:
    assert task.source.testbed is not None
    try:
        from benchmarks.testbed.tables import LOADERS, load_table
    except ImportError as error:
        raise InputError(f"the task {task.name} needs {error.name}: pip install 'esmerge[testbed]'.") from error
    name = task.source.testbed
    if name not in LOADERS:
        raise InputError(
            f"the task {task.name}: source.testbed is {name!r}{nearest(name, list(LOADERS))} (known: "
            f"{', '.join(LOADERS)})."
        )
    return {
        split: Table({column: [row[column] for row in rows] for column in rows[0]}, f"the testbed's {name}")
        for split, rows in load_table(name).items()
    }


def _from_files(task: Task) -> dict[str, Table]:
    source = task.source
    files = source.files or {"train": source.path or ""}
    return {split: _read_file(task, _find(task, name)) for split, name in files.items()}


def _find(task: Task, name: str) -> Path:
    folders = [*([task.folder] if task.folder is not None else []), data_folder()]
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    columns = ", ".join(_needed_columns(task))
    obtain = f"; {task.source.obtain}" if task.source.obtain else ""
    raise InputError(
        f"the task {task.name} needs {folders[0] / name} with the columns {columns}, which is not there{obtain}."
    )


def _read_file(task: Task, file: Path) -> Table:
    from datasets import load_dataset

    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise InputError(
            f"the task {task.name}: {file} is none of the formats that can be read ({', '.join(_FORMATS)})."
        )
    options: dict[str, Any] = {}
    if kind == "csv":
        # As text: a peptide may be NA, and labels must not change with what else is in their column.
        options = {"sep": "\t" if file.suffix.lower() == ".tsv" else ",", "keep_default_na": False}
        options["converters"] = dict.fromkeys(_needed_columns(task), str)
    with _quiet(), _one_sentence(f"the task {task.name}: {file} cannot be read"):
        loaded = load_dataset(kind, data_files=str(file), split="train", **options)
    return _table(task, loaded, str(file))


def _table(task: Task, loaded: Any, source: str) -> Table:
    missing = [name for name in _needed_columns(task) if name not in loaded.column_names]
    if missing:
        known = list(loaded.column_names)
        raise InputError(
            f"the task {task.name}: {source} has no column {missing[0]}{nearest(missing[0], known)} "
            f"(it has {', '.join(known)})."
        )
    return Table({name: loaded[name][:] for name in _needed_columns(task)}, source)


@contextmanager
def _quiet() -> Iterator[None]:
    """Reading a small file needs no three progress bars."""
    import datasets

    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _one_sentence(subject: str) -> Iterator[None]:
    """`datasets` raises errors of many libraries, the cause of which is the last in a chain."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__ or cause
        reason = " ".join(str(cause).split()).rstrip(".")
        raise InputError(f"{subject}: {reason or type(cause).__name__}.") from error


def _check(task: Task, table: Table, split: str) -> list[Row]:
    subject = f"the task {task.name}: {table.source}"
    if not len(table):
        raise InputError(f"{subject} has no rows in the split {split}.")
    values = {name: [_text(value) for value in table.columns[column]] for name, column in task.columns.items()}
    for name, texts in values.items():
        if empty := [number for number, text in enumerate(texts, start=1) if not text]:
            raise InputError(f"{subject} has no value for {task.columns[name]} in {_rows(empty)}.")
    labels = [canonical_label(label) for label in table.columns[task.answer]]
    if unknown := [number for number, label in enumerate(labels, start=1) if label not in task.choice_of_label]:
        known = ", ".join(task.choice_of_label)
        raise InputError(
            f"{subject} has {labels[unknown[0] - 1]!r} for {task.answer} in {_rows(unknown)}, which is none of the "
            f"labels ({known})."
        )
    ids = [f"{split}-{number}" for number in range(1, len(table) + 1)]
    if task.id is not None:
        ids = [_text(value) for value in table.columns[task.id]]
        counts = Counter(ids)
        if repeated := [number for number, name in enumerate(ids, start=1) if counts[name] > 1]:
            first = ids[repeated[0] - 1]
            same = [number for number in repeated if ids[number - 1] == first]
            raise InputError(f"{subject} has the {task.id} {first} more than once, in {_rows(same)}.")
    groups = [_text(value) for value in table.columns[task.group]] if task.group is not None else [None] * len(table)
    return [
        Row(
            id=ids[number],
            values={**task.constants, **{name: texts[number] for name, texts in values.items()}},
            answer=task.choice_of_label[labels[number]],
            group=groups[number],
        )
        for number in range(len(table))
    ]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):  # gene lists in JSON and Parquet
        return ", ".join(_text(part) for part in value)
    return str(value).strip()


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_NUMBERS_SHOWN]))
    more = f" and {len(numbers) - _NUMBERS_SHOWN} more" if len(numbers) > _NUMBERS_SHOWN else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
