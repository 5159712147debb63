"""How time and memory of a merge grow with the number of specialists and with the size of the model.

Full checkpoints in bfloat16 with random weights, merged by `linear`; 2, 4, 8 and 16 specialists of 0.1B parameters,
then three specialists of 0.1B, 0.5B, 1B and 3B parameters.

    python -m benchmarks.speed.scaling FOLDER

Needs up to 31 GB in FOLDER, which is empty again at the end; what does not fit on the disk is left out.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import machine, markdown_table
from benchmarks.speed.random_models import write_llama, write_specialist
from benchmarks.speed.side_by_side import (
    LLAMA,
    Run,
    command_line,
    esmerge,
    free_bytes,
    interpreter,
    median,
    megabytes,
    rounds,
    weight_bytes,
    write_recipe,
)

# Wider and deeper, as real models grow.
SIZES: dict[str, dict[str, Any]] = {
    "0.1B": {**LLAMA, "num_hidden_layers": 6, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "0.5B": {**LLAMA, "num_hidden_layers": 24},
    "1B": {**LLAMA, "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192},
    "3B": {**LLAMA, "num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24},
}
PARAMETERS = {"0.1B": 0.1e9, "0.5B": 0.5e9, "1B": 1.1e9, "3B": 3.1e9}
CASES = [*(("0.1B", count) for count in (2, 4, 8, 16)), *((size, 3) for size in SIZES)]


@dataclass(frozen=True)
class Case:
    """What one case needed.

    Attributes:
        moved: bytes read and written.
        merge: medians.
        start: of the interpreter and torch, in the same rounds.
    """

    size: str
    specialists: int
    moved: int
    merge: Run
    start: Run


def measure(folder: Path, size: str, count: int, repetitions: int) -> Case | None:
    """Make the inputs of a case, merge them, and remove them; None if the disk has no room."""
    if free_bytes(folder) < 1.1 * 2 * PARAMETERS[size] * (count + 2):
        print(f"{size} with {count} specialists: no room in {folder}", file=sys.stderr)
        return None
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        base = place / "base"
        write_llama(base, 0, **SIZES[size])
        specialists = {f"specialist_{seed}": place / f"specialist_{seed}" for seed in range(1, count + 1)}
        for seed, path in enumerate(specialists.values(), start=1):
            write_specialist(path, base, seed)
        recipe = write_recipe(place / "recipe.yaml", base, specialists)
        merging = partial(esmerge, recipe, place / "merged")
        tasks: dict[str, Callable[[], Run]] = {"start": interpreter, f"{size} x {count}": merging}
        start, merge = rounds(tasks, repetitions).values()
        return Case(size, count, (count + 2) * weight_bytes(base), median(merge), median(start))
    finally:
        shutil.rmtree(place)


def table(cases: list[Case]) -> str:
    """Time, speed and memory of each case."""
    rows = []
    for case in cases:
        net = case.merge.seconds - case.start.seconds
        rows.append(
            [
                f"{case.size}, {case.specialists} specialists",
                f"{case.moved / 1e9:.1f} GB",
                f"{case.merge.seconds:.1f} s ({case.merge.cpu:.1f})",
                f"{case.moved / 1e9 / net:.1f} GB/s ({case.moved / 1e9 / (case.merge.cpu - case.start.cpu):.1f})",
                megabytes(case.merge.peak_rss),
                megabytes(case.merge.peak_anonymous),
            ]
        )
    header = ["case", "read and written", "time", "speed without the start", "peak memory", "of it anonymous"]
    return f"{markdown_table(header, rows)}\n\nIn parentheses: seconds of CPU, and GB per second of CPU."


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(size, count) for size, count in CASES if size in options.sizes]
    cases = [case for one in wanted if (case := measure(folder, *one, options.rounds))]
    print(f"\n{machine()}, medians of {options.rounds}\n\n{table(cases)}")
    if options.json:
        figures = {"machine": machine(), "cases": [asdict(case) for case in cases]}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
