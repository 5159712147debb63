"""Merges three rank-8 adapters on all linear layers of a 0.5B Llama: esmerge and PEFT's `add_weighted_adapter`.

From adapters on disk to a merged adapter on disk, inside the process: imports do not count, nor does loading the base,
which PEFT needs. The merge alone, from factors in memory to factors in memory, is measured after it: of PEFT that is
`add_weighted_adapter`. Each run is a process of its own, in turns.

    python -m benchmarks.speed.adapters FOLDER

FOLDER is filled with the inputs (1 GB), which a later run uses again. PEFT's svd takes minutes per round.
"""

import argparse
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import machine, markdown_table
from benchmarks.speed.random_models import write_adapter, write_llama
from benchmarks.speed.side_by_side import (
    LLAMA,
    SPECIALISTS,
    Run,
    command_line,
    cpu_seconds,
    median,
    megabytes,
    rounds,
    run,
    write_recipe,
    write_runs,
)

LAYERS = 24
RANK = 8
DENSITY = 0.5
# Each combination type of PEFT in the words of a recipe.
FACTORS: dict[str, Any] = {"space": "factors", "output": {"format": "adapter"}}
WEIGHTS: dict[str, Any] = {"space": "weights", "output": {"format": "adapter", "rank": RANK}}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", **FACTORS},
    "ties": {"method": {"name": "ties", "density": DENSITY}, **FACTORS},
    "dare_linear": {"method": {"name": "dare_linear", "density": DENSITY}, **FACTORS},
    "svd": {"method": "linear", **WEIGHTS},
    "ties_svd": {"method": {"name": "ties", "density": DENSITY}, **WEIGHTS},
}
SPEEDUPS = {"linear": 3, "ties": 3, "dare_linear": 3, "svd": 100, "ties_svd": 5}


def prepare(folder: Path) -> None:
    """Write the base and the adapters, as far as they are not there."""
    base = folder / "base"
    if not base.exists():
        write_llama(base, 0, num_hidden_layers=LAYERS, **LLAMA)
    for seed, name in enumerate(SPECIALISTS):
        if not (folder / name).exists():
            write_adapter(folder / name, base, seed, RANK)


@dataclass(frozen=True)
class Merge(Run):
    """A merge from disk to disk.

    Attributes:
        alone: seconds without reading the adapters and writing the result.
    """

    alone: float


class Stopwatch:
    """Seconds, and seconds of CPU, since it was made."""

    def __init__(self) -> None:
        self._start, self._cpu = time.perf_counter(), cpu_seconds(resource.RUSAGE_SELF)

    def read(self) -> dict[str, float]:
        """Both so far, by the names they have in `Run`."""
        return {"seconds": time.perf_counter() - self._start, "cpu": cpu_seconds(resource.RUSAGE_SELF) - self._cpu}


def peft(folder: Path, combination: str) -> dict[str, float]:
    """The child process of PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    first, *others = SPECIALISTS
    output = folder / "merged"
    shutil.rmtree(output, ignore_errors=True)
    whole = Stopwatch()
    model = PeftModel.from_pretrained(model, folder / first, first)
    for name in others:
        model.load_adapter(folder / name, name)
    settings: dict[str, Any] = {"combination_type": combination, "density": DENSITY}
    if combination.endswith("svd"):
        # Its default computes singular vectors only to drop them.
        settings |= {"svd_rank": RANK, "svd_full_matrices": False}
    weights = [1 / len(SPECIALISTS)] * len(SPECIALISTS)
    alone = Stopwatch()
    model.add_weighted_adapter(list(SPECIALISTS), weights, "merged", **settings)
    seconds = alone.read()["seconds"]
    model.save_pretrained(output, selected_adapters=["merged"])
    return {**whole.read(), "alone": seconds}


def ours(folder: Path, combination: str) -> dict[str, float]:
    """The child process of esmerge."""
    from esmerge.pipeline import merge
    from esmerge.recipe import load_recipe

    output = folder / "merged"
    shutil.rmtree(output, ignore_errors=True)
    recipe = load_recipe(folder / f"{combination}.yaml")
    whole = Stopwatch()
    merge(recipe, output, progress=False)
    return {**whole.read(), "alone": _ours_alone(recipe)}


def _ours_alone(recipe: Any) -> float:
    """Seconds of the same merge with all factors in memory, before and after, on as many threads as a merge takes."""
    import torch

    from esmerge.merging import TensorStream, merge_factors, merge_low_rank
    from esmerge.plan import make_plan
    from esmerge.plan_merger import make_merger

    plan = make_plan(recipe)
    merger, device = make_merger(plan, None), torch.device("cpu")
    deltas: dict[str, Any] = {target.name: plan.deltas(target) for target in plan.merged}

    def one(target: Any) -> Any:
        own = deltas[target.name]
        if recipe.space == "factors":
            return merge_factors(merger, target.name.removesuffix(".weight"), target.layer, own, False, device)
        stream = TensorStream(plan.checkpoint, target.stored, target.shape, own, device)
        return merge_low_rank(merger, target.name, target.layer, stream, RANK)

    # Factors are so small that a merge takes one thread for them.
    threads = 1 if recipe.space == "factors" else torch.get_num_threads()
    torch.set_num_threads(1)
    watch = Stopwatch()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        merged = list(pool.map(one, plan.merged))
    assert len(merged) == len(plan.merged)
    return watch.read()["seconds"]


ENGINES: dict[str, Callable[[Path, str], dict[str, float]]] = {"esmerge": ours, "PEFT": peft}


def child(folder: Path, engine: str, combination: str) -> Merge:
    """Run one engine in a process of its own; time is what it reports of the merge, memory that of the process."""
    report = folder / "report.json"
    script = [sys.executable, "-m", "benchmarks.speed.adapters"]
    usage = run([*script, folder, "--child", engine, combination, report])
    return Merge(**{**asdict(usage), **json.loads(report.read_text())})


def table(runs: Mapping[str, Sequence[Merge]], combinations: list[str]) -> str:
    """Medians, ratios, and which aims are met."""
    rows = []
    for name in combinations:
        mine, theirs = median(runs[f"{name} esmerge"]), median(runs[f"{name} PEFT"])
        speedup = theirs.seconds / mine.seconds
        rows.append(
            [
                name,
                *(f"{one.seconds:.2f} s ({one.cpu:.2f})" for one in (mine, theirs)),
                f"{speedup:.1f} x ({theirs.cpu / mine.cpu:.1f})",
                f"{mine.alone:.2f} s",
                f"{theirs.alone:.2f} s",
                f"{theirs.alone / mine.alone:.1f} x",
                f"{SPEEDUPS[name]} x: {'yes' if speedup >= SPEEDUPS[name] else 'no'}",
                *(f"{megabytes(one.peak_rss)} ({megabytes(one.peak_anonymous)})" for one in (mine, theirs)),
            ]
        )
    header = ["combination", "esmerge", "PEFT", "faster", "alone, esmerge", "alone, PEFT", "faster", "aim"]
    header += ["memory, esmerge", "memory, PEFT"]
    return f"{markdown_table(header, rows)}\n\nIn parentheses: seconds of CPU, and anonymous memory."


def main() -> None:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("--combinations", nargs="+", default=list(COMBINATIONS), choices=COMBINATIONS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.child:
        engine, combination, report = options.child
        Path(report).write_text(json.dumps(ENGINES[engine](folder, combination)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    sources = {name: folder / name for name in SPECIALISTS}
    for name in options.combinations:
        write_recipe(folder / f"{name}.yaml", folder / "base", sources, **COMBINATIONS[name])
    tasks = {
        f"{name} {engine}": partial(child, folder, engine, name) for name in options.combinations for engine in ENGINES
    }
    runs = rounds(tasks, options.rounds)
    print(f"\n{machine()}, medians of {options.rounds}\n\n{table(runs, options.combinations)}")
    if options.json:
        write_runs(options.json, runs)


if __name__ == "__main__":
    main()
