"""In-context examples: the rows of the training split that are most like the one asked about, never that one itself."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.tasks.task import Task
from lightning_modules.similarity import SimilarityIndex, canonical
from lightning_modules.task_data import Row

_ROWS_AT_ONCE = 256


def choose_examples(task: Task, rows: Sequence[Row], pool: Sequence[Row]) -> list[list[Row]]:
    """For each row, examples from the pool as `task.examples` says; the first is the most alike.

    A row of the pool with the same items as the one asked about is never chosen: molecules in any spelling, items of
    one modality in any order. Rows that are equally alike are taken in the order of the pool.
    """
    selection = task.examples
    assert selection is not None, "only tasks with examples ask for some"
    subject = f"the task {task.name}"
    # Whatever names the same molecule, protein or cell is one, among rows and pool alike.
    own = _identities(task, rows)
    same = defaultdict(list)
    for place, identity in enumerate(_identities(task, pool)):
        same[identity].append(place)

    ranking = [_index(task, name, pool, subject) for name in selection.rank_by]
    first = selection.same_first
    if first is not None:
        filling = _index(task, first, pool, subject)
        with_value = defaultdict(list)
        for place, value in enumerate(canonical(task.modality(first), _values(pool, first), subject)):
            with_value[value].append(place)
        wanted = canonical(task.modality(first), _values(rows, first), subject)

    chosen = []
    for start in tqdm(range(0, len(rows), _ROWS_AT_ONCE), desc="in-context examples", delay=3):
        batch = rows[start : start + _ROWS_AT_ONCE]
        alike = sum(index(_values(batch, name)) for index, name in zip(ranking, selection.rank_by, strict=True))
        assert isinstance(alike, np.ndarray)
        close = filling(_values(batch, first)) if first is not None else None
        for offset in range(len(batch)):
            allowed = np.ones(len(pool), dtype=bool)
            allowed[same.get(own[start + offset], [])] = False
            if first is None or close is None:
                places = _best(alike[offset], allowed, selection.count)
            else:
                partners = np.array(with_value.get(wanted[start + offset], []), dtype=np.intp)
                partners = partners[allowed[partners]]
                if len(partners) > selection.count:
                    places = partners[_best(alike[offset][partners], allowed[partners], selection.count)]
                else:
                    allowed[partners] = False
                    others = _best(close[offset], allowed, selection.count - len(partners))
                    places = np.concatenate([partners, others])
            chosen.append([pool[place] for place in places])
    return chosen


def _best(scores: NDArray[np.float32], allowed: NDArray[np.bool_], count: int) -> NDArray[np.intp]:
    """The places of the highest scores among the allowed ones, the highest first; equal ones in order."""
    places = np.flatnonzero(allowed)
    if count < len(places):
        # Sorting all of them would take most of the time.
        threshold = np.partition(scores[places], len(places) - count)[len(places) - count] if count else np.inf
        places = places[scores[places] >= threshold]
    best: NDArray[np.intp] = places[np.argsort(-scores[places], kind="stable")][:count]
    return best


def _index(task: Task, name: str, pool: Sequence[Row], subject: str) -> SimilarityIndex:
    modality = task.modality(name)
    assert modality is not None, "the schema allows only placeholders of modalities"
    return SimilarityIndex(modality, _values(pool, name), subject)


def _values(rows: Sequence[Row], name: str) -> list[str]:
    return [row.values[name] for row in rows]


def _identities(task: Task, rows: Sequence[Row]) -> list[tuple[tuple[str | None, str], ...]]:
    """What makes a row's question: its items, sorted; its texts where there are none."""
    items = [name for name in task.columns if task.modality(name) is not None]
    names = items or list(task.columns)
    columns = []
    for name in names:
        modality = task.modality(name)
        values = canonical(modality, _values(rows, name), f"the task {task.name}")
        columns.append([(modality or name, value) for value in values])
    return [tuple(sorted(parts, key=str)) for parts in zip(*columns, strict=True)]
