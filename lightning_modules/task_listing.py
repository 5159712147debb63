"""Tasks in the terminal: a table of all, or all about one with its first question."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.tasks.task import Task
from lightning_modules.samples import Item, Part, load_samples
from lightning_modules.task_data import missing_data

_LONGEST_ITEM = 80
_WIDTH_WITHOUT_TERMINAL = 160


def print_tasks(tasks: Sequence[Task]) -> None:
    """Print a table with one task per row."""
    console = _console()
    table = Table(title="Tasks", caption="esmerge tasks NAME shows one with its first question")
    for column in ("task", "source", "rows", "metrics", "to be fetched"):
        table.add_column(column, overflow="fold", no_wrap=column in ("task", "source") and not console.is_terminal)
    for task in tasks:
        needed = missing_data(task) or "nothing"
        table.add_row(task.name, _source(task), _rows(task), ", ".join(task.metrics), needed)
    console.print(table)


def print_task(task: Task) -> None:
    """Print what a task says, then its first question as a conversation, with its in-context examples.

    Raises:
        InputError: if the data for the question cannot be had; all the rest has been printed then.
    """
    facts = {
        "task": f"{task.name}, version {task.version}",
        "about": ": ".join(filter(None, (task.title, task.description))),
        "source": _source(task),
        "rows": _rows(task),
        "to be fetched": missing_data(task) or "nothing",
        "to get it": task.source.obtain,
        "evaluated": f"{task.split.evaluated} (training: {task.split.training})",
        "choices": ", ".join(task.choices),
        "metrics": ", ".join(task.metrics),
        "citation": task.citation,
        "licence": task.licence,
        "data set": task.dataset,
        "benchmark": task.benchmark,
        "published": "; ".join(f"{b.model} {b.metric} {b.value} ({b.source})" for b in task.baselines),
    }
    table = Table(show_header=False, box=None)
    for name, fact in facts.items():
        if fact:
            table.add_row(f"{name}:", fact)
    console = _console()
    console.print(table)
    sample = load_samples(task, limit=1)[0]
    for turn in sample.turns:
        console.print(f"\n--- {turn.role} ---", markup=False, highlight=False)
        console.print("".join(_shown(part) for part in turn.parts), markup=False, highlight=False, soft_wrap=True)
    answer = task.answer_prefix + task.choices[sample.answer]
    console.print(f"\n--- expected ---\n{answer}", markup=False, highlight=False)


def _console() -> Console:
    console = Console()
    # Nobody's window: a table squeezed into 80 columns is no good to read in a file.
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def _rows(task: Task) -> str:
    return ", ".join(f"{split} {count}" for split, count in task.source.rows.items()) or "not known yet"


def _source(task: Task) -> str:
    source = task.source
    if source.testbed is not None:
        return f"testbed: {', '.join(source.packages)}"
    files = [*filter(None, [source.path]), *(source.files or {}).values()]
    return ", ".join(files) if source.hub is None else f"Hub: {source.hub}"


def _shown(part: Part) -> str:
    if not isinstance(part, Item):
        return part
    value = part.value
    if len(value) > _LONGEST_ITEM:
        value = f"{value[:_LONGEST_ITEM]}... ({len(value)} characters)"
    return f"[{part.modality} {value}]"
