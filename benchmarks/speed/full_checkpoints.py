"""Merges full checkpoints of 0.5B parameters, a base and three specialists in bfloat16: esmerge and mergekit.

Both run from the command line, in turns; mergekit in its own virtual environment, with its fastest settings.

    python -m benchmarks.speed.full_checkpoints FOLDER

FOLDER is filled with the inputs (4 GB) and mergekit (2 GB), which a later run uses again.
"""

import os
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.speed.measure import machine, markdown_table
from benchmarks.speed.random_models import write_llama, write_specialist
from benchmarks.speed.side_by_side import (
    LLAMA,
    SPECIALISTS,
    Run,
    command_line,
    cpu_seconds,
    esmerge,
    interpreter,
    median,
    megabytes,
    peer_python,
    rounds,
    run,
    weight_bytes,
    write_recipe,
    write_runs,
)

LAYERS = 24
SHARD_BYTES = 300_000_000
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "dare_ties": {"density": 0.5},
    "ties": {"density": 0.5},
}
# What each row must reach: at most so many floors plus one start, or so many times as fast as mergekit.
FLOORS = {"linear": 1.5, "task_arithmetic": 1.5}
SPEEDUPS = {"dare_ties": 8.0, "ties": 10.0}
MEMORY_SHARE = 1 / 3
# Its math in the dtype of the checkpoints, as its examples have it; no tokenizer, card or progress bar.
MERGEKIT_FLAGS = ("--num-threads", str(os.cpu_count()), "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
TRANSFER_BYTES = 1 << 20


def prepare(folder: Path) -> None:
    """Write the base and the specialists, as far as they are not there."""
    base = folder / "base"
    if not base.exists():
        write_llama(base, 0, SHARD_BYTES, num_hidden_layers=LAYERS, **LLAMA)
    for seed, name in enumerate(SPECIALISTS, start=1):
        if not (folder / name).exists():
            write_specialist(folder / name, base, seed, SHARD_BYTES)


def mergekit_config(folder: Path, method: str) -> Path:
    """The same merge in mergekit's words."""
    parameters = {"weight": 1 / len(SPECIALISTS), **METHODS[method]}
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(folder / name), "parameters": parameters} for name in SPECIALISTS],
        "dtype": "bfloat16",
    }
    if method != "linear":  # needs no base: an average of models is the average of their deltas
        config["base_model"] = str(folder / "base")
    file = folder / f"{method}.mergekit.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def mergekit(python: Path, config: Path, output: Path) -> Run:
    """The command of mergekit; the output is removed first."""
    shutil.rmtree(output, ignore_errors=True)
    return run([python.with_name("mergekit-yaml"), config, output, *MERGEKIT_FLAGS])


def floor(folder: Path) -> Run:
    """Read every input and write as much as the output has, once, in large pieces and without looking at it."""
    files = [file for name in ("base", *SPECIALISTS) for file in sorted((folder / name).glob("*.safetensors"))]
    buffer = memoryview(bytearray(TRANSFER_BYTES))
    output = folder / "floor.bin"
    output.unlink(missing_ok=True)
    start, cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    left = weight_bytes(folder / "base")
    with output.open("wb", buffering=0) as stream:
        while left:
            left -= stream.write(buffer[:left])
    done = Run(time.perf_counter() - start, cpu_seconds(resource.RUSAGE_SELF) - cpu, 0, 0)
    output.unlink()
    return done


def measure(folder: Path, methods: list[str], count: int) -> dict[str, list[Run]]:
    """All runs, by `floor`, `start`, and method with engine."""
    python = peer_python(folder / "peer", ["torch==2.13.0", "mergekit==0.1.5"])
    tasks: dict[str, Callable[[], Run]] = {"floor": partial(floor, folder), "start": interpreter}
    sources = {name: folder / name for name in SPECIALISTS}
    output = folder / "merged"
    for method in methods:
        recipe = folder / f"{method}.yaml"
        write_recipe(recipe, folder / "base", sources, method={"name": method, **METHODS[method]})
        tasks[f"{method} esmerge"] = partial(esmerge, recipe, output)
        tasks[f"{method} mergekit"] = partial(mergekit, python, mergekit_config(folder, method), output)
    runs = rounds(tasks, count)
    shutil.rmtree(output)
    return runs


def table(runs: dict[str, list[Run]], methods: list[str]) -> str:
    """Medians, ratios, and which aims are met."""
    start, least = median(runs["start"]), median(runs["floor"])
    rows = []
    for method in methods:
        ours, theirs = median(runs[f"{method} esmerge"]), median(runs[f"{method} mergekit"])
        speedup, share = theirs.seconds / ours.seconds, ours.peak_rss / theirs.peak_rss
        if method in FLOORS:
            limit = FLOORS[method] * least.seconds + start.seconds
            aim, reached = f"at most {limit:.1f} s", ours.seconds <= limit
        else:
            aim, reached = f"{SPEEDUPS[method]:.0f} x", speedup >= SPEEDUPS[method]
        rows.append(
            [
                method,
                *(f"{one.seconds:.1f} s ({one.cpu:.1f})" for one in (ours, theirs)),
                f"{speedup:.1f} x ({theirs.cpu / ours.cpu:.1f})",
                f"{aim}: {'yes' if reached else 'no'}",
                *(f"{megabytes(one.peak_rss)} ({megabytes(one.peak_anonymous)})" for one in (ours, theirs)),
                f"{share:.2f}: {'yes' if share <= MEMORY_SHARE else 'no'}",
            ]
        )
    header = [
        "method",
        "esmerge",
        "mergekit",
        "faster",
        "aim",
        "memory, esmerge",
        "memory, mergekit",
        "share, at most 1/3",
    ]
    notes = (
        f"Floor {least.seconds:.2f} s, start of Python and torch {start.seconds:.2f} s ({start.cpu:.1f}). "
        "In parentheses: seconds of CPU, and anonymous memory."
    )
    return f"{markdown_table(header, rows)}\n\n{notes}"


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    runs = measure(folder, options.methods, options.rounds)
    print(f"\n{machine()}, medians of {options.rounds}\n\n{table(runs, options.methods)}")
    if options.json:
        write_runs(options.json, runs)


if __name__ == "__main__":
    main()
