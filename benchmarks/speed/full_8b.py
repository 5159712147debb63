"""Merges three rank-8 adapters into the full weights of a model of Llama 3.1 8B's shape, and copies it with `cp`.

Uniform coefficients, so that reading, adding and writing is all there is. The copy reads and writes as many bytes; it
is flushed to the disk before it counts as done, as the merge is.

    python -m benchmarks.speed.full_8b FOLDER

Needs 33 GB in FOLDER, which is empty again at the end.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.speed.measure import machine, markdown_table
from benchmarks.speed.merge_8b import LLAMA_3_1_8B
from benchmarks.speed.random_models import write_adapter, write_llama
from benchmarks.speed.side_by_side import (
    SPECIALISTS,
    Run,
    command_line,
    esmerge,
    median,
    rounds,
    run,
    weight_bytes,
    write_recipe,
    write_runs,
)

MOST_MEMORY = 3e9
LEAST_SPEED = 0.7


def copy(base: Path, target: Path) -> Run:
    """`cp` of the weights, then `sync` of the copies."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    script = 'cp "$1"/*.safetensors "$2" && sync "$2"/*.safetensors'
    return run(["sh", "-c", script, "sh", base, target])


def merge(recipe: Path, output: Path) -> Run:
    """The merge, into the place where the copy was or will be."""
    done = esmerge(recipe, output)
    shutil.rmtree(output)
    return done


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--base", type=Path, help="a checkpoint to use instead of a random one")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="full-8b-", dir=options.folder.resolve()))
    try:
        base = options.base.resolve() if options.base else folder / "base"
        if not options.base:
            write_llama(base, 0, **LLAMA_3_1_8B)
        for seed, name in enumerate(SPECIALISTS):
            write_adapter(folder / name, base, seed)
        sources = {name: folder / name for name in SPECIALISTS}
        recipe = write_recipe(folder / "recipe.yaml", base, sources)
        moved = weight_bytes(base)

        def copied() -> Run:
            done = copy(base, folder / "copy")
            shutil.rmtree(folder / "copy")
            return done

        tasks: dict[str, Callable[[], Run]] = {"cp": copied, "esmerge": partial(merge, recipe, folder / "merged")}
        runs = rounds(tasks, options.rounds)
    finally:
        shutil.rmtree(folder)
    merged, plain = median(runs["esmerge"]), median(runs["cp"])
    share = plain.seconds / merged.seconds
    rows = [
        [
            name,
            f"{one.seconds:.1f} s ({one.cpu:.1f})",
            f"{moved / 1e9 / one.seconds:.2f} GB/s",
            f"{one.peak_rss / 1e9:.2f} GB ({one.peak_anonymous / 1e9:.2f})",
        ]
        for name, one in (("cp and sync", plain), ("esmerge", merged))
    ]
    print(f"\n{machine()}, medians of {options.rounds}, {moved / 1e9:.1f} GB\n")
    print(markdown_table(["", "time", "speed", "peak memory"], rows))
    met = [merged.peak_rss < MOST_MEMORY, share >= LEAST_SPEED]
    print("\nIn parentheses: seconds of CPU, and anonymous memory.")
    print(f"{share:.0%} of the copy's speed (aim: at least {LEAST_SPEED:.0%}: {'yes' if met[1] else 'no'}), ", end="")
    print(f"under {MOST_MEMORY / 1e9:.0f} GB: {'yes' if met[0] else 'no'}")
    if options.json:
        write_runs(options.json, runs, bytes=moved)


if __name__ == "__main__":
    main()
