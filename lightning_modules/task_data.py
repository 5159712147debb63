"""The rows of a task: from files, folders, the Hub or the testbed, checked, and split."""

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.task import Task, canonical_label
from benchmarks.testbed.packages import is_cached
from benchmarks.testbed.splits import stable_fraction
from esmerge.errors import InputError
from esmerge.yaml_files import nearest
from lightning_modules.similarity import canonical, scaffolds

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
    """Columns of equal length, and where they came from, for messages.

    Attributes:
        columns: name -> values.
        source: of the data.
        numbers: of the rows in the source, from 1.
    """

    columns: Mapping[str, Sequence[Any]]
    source: str
    numbers: Sequence[int]

    def take(self, places: Sequence[int]) -> "Table":
        """The rows at these places, from 0."""
        columns = {name: [values[place] for place in places] for name, values in self.columns.items()}
        return Table(columns, self.source, [self.numbers[place] for place in places])


def load_rows(task: Task, *splits: str) -> list[list[Row]]:
    """The rows of each of some splits, in the order of the data, which is read once.

    Raises:
        InputError: if the data cannot be had, has no such split, lacks a column, or has empty values, labels outside
            the task's or an identifier twice; it names the task, the source and the rows.
    """
    tables = _split(task, _load_tables(task))
    for split in splits:
        if split not in tables:
            source = next(iter(tables.values())).source
            message = f"the task {task.name}: {source} has no split {split}{nearest(split, list(tables))} "
            message += f"(it has {', '.join(tables)})."
            if len(tables) == 1 and task.split.by is None:
                only, first = next(iter(tables)), next(iter(task.columns))
                message += f" split: {{by: {first}}} shares it out"
                message += f", split: {{evaluated: {only}}} asks about all." if split == task.split.evaluated else "."
            raise InputError(message)
    return [_check(task, tables[split], split) for split in splits]


def data_folder() -> Path:
    """Where files of tasks are looked for: `$ESMERGE_DATA`, or `data` in the current folder."""
    return Path(os.environ.get("ESMERGE_DATA") or "data")


def missing_data(task: Task) -> str:
    """What is to be fetched before the task can run, for people; empty if all is here."""
    source = task.source
    if source.testbed is not None:
        absent = [name for name in source.packages if not is_cached(name)]
        return f"{', '.join(absent)} from PyPI" if absent else ""
    if source.hub is not None:
        names = [*filter(None, [source.path, source.split_file]), *(source.files or {}).values()]
        cached = bool(names) and all(_cached(source.hub, name) for name in names)
        return "" if cached or _local_copy(source.hub) is not None else "the data set from the Hub"
    names = [source.path] if source.path is not None else list((source.files or {}).values())
    absent = [str(_places(task, name)[0]) for name in names if not any(file.exists() for file in _places(task, name))]
    return f"{' and '.join(absent)}, by hand" if absent else ""


def _needed_columns(task: Task) -> list[str]:
    optional = [name for name in (task.id, task.group) if name is not None]
    return list(dict.fromkeys([*task.columns.values(), task.answer, *optional]))


def _load_tables(task: Task) -> dict[str, Table]:
    source = task.source
    if source.testbed is not None:
        return _from_testbed(task, source.testbed)
    if source.files is not None:
        return {split: _read_file(task, _find(task, name)) for split, name in source.files.items()}
    if source.path is not None:
        found = _find(task, source.path)
        return _read_folder(task, found) if found.is_dir() else {"train": _read_file(task, found)}
    assert source.hub is not None, "the schema wants one of them"
    folder = _local_copy(source.hub)
    return _from_hub(task, source.hub) if folder is None else _read_folder(task, folder)


def _from_testbed(task: Task, name: str) -> dict[str, Table]:
    try:
        from benchmarks.testbed.tables import LOADERS, load_table
    except ImportError as error:
        raise InputError(f"the task {task.name} needs {error.name}: pip install 'esmerge[testbed]'.") from error
    if name not in LOADERS:
        raise InputError(
            f"the task {task.name}: source.testbed is {name!r}{nearest(name, list(LOADERS))} (known: "
            f"{', '.join(LOADERS)})."
        )
    tables = {}
    for split, rows in load_table(name).items():
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        tables[split] = _table(task, columns, f"the testbed's {name}")
    return tables


def _from_hub(task: Task, hub: str) -> dict[str, Table]:
    from datasets import load_dataset

    name, _, revision = hub.partition("@")
    with _quiet(), _one_sentence(_unreachable(task, hub, None)):
        loaded = load_dataset(name, task.source.subset, revision=revision or None)
    return {str(split): _table(task, rows, f"the data set {hub}") for split, rows in loaded.items()}


def _unreachable(task: Task, hub: str, file: str | None) -> str:
    name, _, revision = hub.partition("@")
    place = data_folder() / name if file is None else data_folder() / name / file
    at = f" --revision {revision}" if revision else ""
    return (
        f"the task {task.name} needs {f'{file} of ' if file else ''}the data set {hub} from the Hub, with the columns "
        f"{', '.join(_needed_columns(task))}: fetch it by `hf download --repo-type dataset {name}{at}`, or put it at "
        f"{place}; it could not be had"
    )


def _local_copy(hub: str) -> Path | None:
    folder = data_folder() / hub.partition("@")[0]
    return folder if folder.is_dir() else None


def _cached(hub: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = hub.partition("@")
    return isinstance(try_to_load_from_cache(name, file, revision=revision or None, repo_type="dataset"), str)


def _places(task: Task, name: str) -> list[Path]:
    folders = [*([task.folder] if task.folder is not None else []), data_folder()]
    return [folder / name for folder in folders]


def _find(task: Task, name: str) -> Path:
    """The local path of a file of the task's source, which is downloaded if it is on the Hub."""
    hub = task.source.hub
    if hub is not None:
        folder = _local_copy(hub)
        if folder is None:
            from huggingface_hub import hf_hub_download

            repository, _, revision = hub.partition("@")
            with _one_sentence(_unreachable(task, hub, name)):
                return Path(hf_hub_download(repository, name, revision=revision or None, repo_type="dataset"))
        places = [folder / name]
    else:
        places = _places(task, name)
    for place in places:
        if place.exists():
            return place
    obtain = f"; {task.source.obtain}" if task.source.obtain else ""
    raise InputError(
        f"the task {task.name} needs {places[0]} with the columns {', '.join(_needed_columns(task))}, which is not "
        f"there{obtain}."
    )


def _read_file(task: Task, file: Path) -> Table:
    from datasets import load_dataset

    kind = _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise InputError(
            f"the task {task.name}: {file} is none of the formats that can be read ({', '.join(_FORMATS)})."
        )
    options: dict[str, Any] = {}
    with _quiet(), _one_sentence(f"the task {task.name}: {file} cannot be read"):
        if kind == "csv":
            separator = "\t" if file.suffix.lower() == ".tsv" else ","
            with file.open(newline="", encoding="utf-8-sig") as stream:
                header = next(csv.reader(stream, delimiter=separator), [])
            needed = _needed_columns(task)
            _require(task, needed, header, str(file))
            # As text: a peptide may be NA, and labels must not change with what else is in their column.
            options = {"sep": separator, "usecols": needed, "keep_default_na": False}
            options["converters"] = dict.fromkeys(needed, str)
        try:
            loaded = load_dataset(kind, data_files=str(file.resolve()), split="train", **options)
        except (ValueError, StopIteration) as error:
            # What `datasets` makes of tables without rows, and of empty files.
            if isinstance(error, ValueError) and "corresponds to no data" not in str(error):
                raise
            loaded = {name: [] for name in _needed_columns(task)}
    return _table(task, loaded, str(file))


def _read_folder(task: Task, folder: Path) -> dict[str, Table]:
    from datasets import DatasetDict, load_dataset, load_from_disk

    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    with _quiet(), _one_sentence(f"the task {task.name}: the data set in {folder} cannot be read"):
        loaded = load_from_disk(str(folder)) if saved else load_dataset(str(folder.resolve()), task.source.subset)
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    return {str(split): _table(task, rows, str(folder)) for split, rows in splits.items()}


def _table(task: Task, loaded: Any, source: str) -> Table:
    """From a `datasets.Dataset`, or from columns."""
    needed = _needed_columns(task)
    _require(task, needed, loaded if isinstance(loaded, dict) else loaded.column_names, source)
    columns = {name: list(loaded[name]) for name in needed}
    return Table(columns, source, range(1, len(columns[needed[0]]) + 1))


def _require(task: Task, needed: Sequence[str], known: Iterable[str], source: str) -> None:
    known = list(known)
    for name in needed:
        if name not in known:
            raise InputError(
                f"the task {task.name}: {source} has no column {name}{nearest(name, known)} (it has "
                f"{', '.join(known) or 'none'})."
            )


def _split(task: Task, tables: dict[str, Table]) -> dict[str, Table]:
    if task.source.split_file is not None:
        tables = _by_file(task, _only(task, tables), _find(task, task.source.split_file))
    elif task.split.by is not None:
        tables = _by_groups(task, _only(task, tables), task.split.by)
    if task.split.distinct is not None:
        tables = _distinct(task, tables, task.split.distinct)
    return tables


def _distinct(task: Task, tables: dict[str, Table], name: str) -> dict[str, Table]:
    """What is asked about stays whole; of the others, the training split gives way to all."""
    asked, learnt = task.split.evaluated, task.split.training
    order = sorted(tables, key=lambda split: (split != asked, split == learnt))
    taken: set[str] = set()
    kept = {}
    for split in order:
        texts = [_text(value) for value in tables[split].columns[task.columns[name]]]
        values = canonical(task.modality(name), texts, f"the task {task.name}")
        kept[split] = tables[split].take([place for place, value in enumerate(values) if value not in taken])
        taken.update(values)
    return {split: kept[split] for split in tables}


def _only(task: Task, tables: Mapping[str, Table]) -> Table:
    if len(tables) > 1:
        raise InputError(
            f"the task {task.name}: {next(iter(tables.values())).source} has the splits {', '.join(tables)}; leave "
            "split.by and source.split_file out."
        )
    return next(iter(tables.values()))


def _by_file(task: Task, table: Table, file: Path) -> dict[str, Table]:
    subject = f"the task {task.name}: {file}"
    try:
        splits = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{subject} is no JSON file that can be read ({error}).") from error
    total = len(table.numbers)
    if not isinstance(splits, dict) or not all(isinstance(places, list) for places in splits.values()):
        raise InputError(f"{subject} must hold an object with the row numbers of each split.")
    taken: dict[Any, str] = {}
    for split, places in splits.items():
        for place in places:
            if type(place) is not int or not 0 <= place < total:
                raise InputError(f"{subject} has row {place!r} in {split}; expected numbers from 0 to {total - 1}.")
            if place in taken:
                raise InputError(f"{subject} has row {place} in {taken[place]} and again in {split}.")
            taken[place] = split
    return {split: table.take(places) for split, places in splits.items()}


def _by_groups(task: Task, table: Table, by: str) -> dict[str, Table]:
    values = [_text(value) for value in table.columns[task.columns["molecule" if by == "scaffold" else by]]]
    groups = scaffolds(values, f"the task {task.name}") if by == "scaffold" else values
    members: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for place, group in enumerate(groups):
        fraction = stable_fraction(group)
        if fraction < task.split.test_share:
            members["test"].append(place)
        elif fraction < task.split.test_share + task.split.validation_share:
            members["validation"].append(place)
        else:
            members["train"].append(place)
    return {split: table.take(places) for split, places in members.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Reading a small file needs no three progress bars, and what is wrong with it is said once."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    verbosity = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()


@contextmanager
def _one_sentence(subject: str) -> Iterator[None]:
    """`datasets` raises errors of many libraries, the cause of which is the last in a chain."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__ or cause
        reason = " ".join(str(cause).split()).rstrip(".")
        raise InputError(f"{subject}: {reason or type(cause).__name__}.") from error


def _check(task: Task, table: Table, split: str) -> list[Row]:
    subject = f"the task {task.name}: {table.source}"
    if not table.numbers:
        raise InputError(f"{subject} has no rows in the split {split}.")
    values = {name: [_text(value) for value in table.columns[column]] for name, column in task.columns.items()}
    for name, texts in values.items():
        if empty := [number for number, text in zip(table.numbers, texts, strict=True) if not text]:
            raise InputError(f"{subject} has no value for {task.columns[name]} in {_rows(empty)}.")
    labels = [canonical_label(_text(label)) for label in table.columns[task.answer]]
    if unknown := [place for place, label in enumerate(labels) if label not in task.choice_of_label]:
        raise InputError(
            f"{subject} has {labels[unknown[0]]!r} for {task.answer} in "
            f"{_rows([table.numbers[place] for place in unknown])}, which is none of the labels "
            f"({', '.join(task.choice_of_label)})."
        )
    ids = [f"{split}-{number}" for number in table.numbers]
    if task.id is not None:
        ids = [_text(value) for value in table.columns[task.id]]
        for name, count in Counter(ids).items():
            if count > 1:
                same = [number for number, other in zip(table.numbers, ids, strict=True) if other == name]
                raise InputError(f"{subject} has the {task.id} {name!r} more than once, in {_rows(same)}.")
    groups = [_text(value) for value in table.columns[task.group]] if task.group is not None else [None] * len(ids)
    return [
        Row(
            id=ids[place],
            values={**task.constants, **{name: texts[place] for name, texts in values.items()}},
            answer=task.choice_of_label[labels[place]],
            group=groups[place],
        )
        for place in range(len(ids))
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
