"""What the comparisons of merges share: commands run from outside, several rounds of them, medians, tables."""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from benchmarks.speed.measure import machine, run_measured

SPECIALISTS = ("molecule", "protein", "cell")
# Depth is what makes these models larger or smaller; 24 layers are 0.5B parameters.
LLAMA: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4864,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Run:
    """What one run of a command needed.

    Attributes:
        seconds: from its start to its end.
        cpu: seconds of all its threads, in user and kernel mode. Other load on the machine hardly changes them.
        peak_rss: most resident memory in bytes, pages of mapped files included.
        peak_anonymous: most resident memory in bytes that no file backs.
    """

    seconds: float
    cpu: float
    peak_rss: float
    peak_anonymous: float


R = TypeVar("R", bound=Run)


def run(command: Sequence[str | Path], folder: Path | None = None) -> Run:
    """Run a command to its end in the working directory `folder`.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    before = cpu_seconds(resource.RUSAGE_CHILDREN)
    usage = run_measured([str(part) for part in command], folder)
    cpu = cpu_seconds(resource.RUSAGE_CHILDREN) - before
    return Run(usage.seconds, cpu, usage.peak_rss, usage.peak_anonymous)


def cpu_seconds(who: int) -> float:
    """Seconds in user and kernel mode, as `resource.getrusage` knows them."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def rounds(tasks: Mapping[str, Callable[[], R]], count: int) -> dict[str, list[R]]:
    """Run every task once per round, so that a change of the machine's load meets them all alike."""
    runs: dict[str, list[R]] = {name: [] for name in tasks}
    for number in range(count):
        for name, task in tasks.items():
            os.sync()  # what an earlier task wrote is not this one's to wait for
            done = task()
            runs[name].append(done)
            print(f"round {number + 1}: {name} {done.seconds:.2f} s, {done.cpu:.2f} s of CPU", file=sys.stderr)
    return runs


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have: a folder for inputs and results, rounds, a file for the figures."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def write_runs(file: Path, runs: Mapping[str, Sequence[Run]], **others: Any) -> None:
    """Write every run, and the machine, as JSON."""
    figures = {name: [asdict(one) for one in found] for name, found in runs.items()}
    file.write_text(json.dumps({"machine": machine(), **others, "runs": figures}, indent=2) + "\n")


def median(runs: Sequence[R]) -> R:
    """The median of each figure."""
    kind = type(runs[0])
    return kind(**{field.name: statistics.median(getattr(one, field.name) for one in runs) for field in fields(kind)})


def esmerge(recipe: Path, output: Path) -> Run:
    """`esmerge merge` of a recipe; the output is removed first."""
    shutil.rmtree(output, ignore_errors=True)
    command = Path(sys.executable).with_name("esmerge")
    return run([command, "merge", recipe, "-o", output, "--quiet"])


def interpreter(statement: str = "import torch") -> Run:
    """The start and the end of Python and of one statement."""
    return run([sys.executable, "-c", statement])


def write_recipe(file: Path, base: Path, specialists: Mapping[str, Path], **fields: Any) -> Path:
    """A recipe with uniform coefficients for a full checkpoint, unless `fields` say otherwise."""
    recipe = {
        "base": str(base),
        "specialists": {name: {"model": str(path)} for name, path in specialists.items()},
        "coefficients": "uniform",
        "output": {"format": "full"},
        **fields,
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peer_python(venv: Path, packages: Sequence[str]) -> Path:
    """The interpreter of a virtual environment with the given packages, installed one after the other if it is new."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        for package in packages:
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return python


def megabytes(size: float) -> str:
    """A size in MB, in words."""
    return f"{size / 1e6:,.0f} MB"


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
