"""The testbed's data as tables, one row per question, for tasks that name a loader of the testbed."""

from collections.abc import Callable

from benchmarks.testbed.data import Modality, load_task

Rows = list[dict[str, str]]


def load_table(name: str) -> dict[str, Rows]:
    """Split -> rows, each a dictionary from column to value; packages are fetched where the cache lacks them."""
    return LOADERS[name]()


def _of_one_modality(modality: Modality) -> Callable[[], dict[str, Rows]]:
    def load() -> dict[str, Rows]:
        return {
            split: [{"id": e.id, "item": e.item, "answer": e.answer, "group": e.group} for e in examples]
            for split, examples in load_task(modality).examples.items()
        }

    return load


LOADERS: dict[str, Callable[[], dict[str, Rows]]] = {
    "b3db": _of_one_modality("molecule"),
    "antimicrobial": _of_one_modality("protein"),
    "tissue": _of_one_modality("cell"),
}
