"""Finding and reading tasks: those that come with esmerge by name, a user's own by path."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

import benchmarks.tasks
from benchmarks.tasks.task import Task
from esmerge.errors import InputError
from esmerge.yaml_files import first_error, nearest, read_mapping

_FOLDER = Path(benchmarks.tasks.__file__).parent


def task_names() -> list[str]:
    """The tasks that come with esmerge, in alphabetical order."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """A task that comes with esmerge, by its name, or one's own, by the path of its YAML file.

    Raises:
        InputError: one sentence that names the file and the field, and the nearest known name.
    """
    names = task_names()
    if name_or_path in names:
        return _read(_FOLDER / f"{name_or_path}.yaml", own=False)
    file = Path(name_or_path)
    if file.suffix in (".yaml", ".yml"):
        return _read(file, own=True)
    raise InputError(
        f"there is no task {name_or_path}{nearest(name_or_path, names)} (known: {', '.join(names)}; a task of your own "
        "is given as the path of its .yaml file)."
    )


def check_names(tasks: Sequence[Task], field: str) -> None:
    """Raise `InputError` if two tasks, given in a recipe's or the command line's `field`, have the same name."""
    for name, times in Counter(task.name for task in tasks).items():
        if times > 1:
            raise InputError(f"{field}: {times} tasks have the same name, {name}; give each once, or rename one.")


def _read(file: Path, own: bool) -> Task:
    content = read_mapping(file, "task", list(Task.model_fields))
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise InputError(f"the task {file}: {first_error(error, Task)}") from error
    if own:
        task._folder = file.parent
    elif task.name != file.stem:
        raise InputError(f"the task {file}: name is {task.name!r}, expected the file's own, {file.stem}.")
    return task
