"""What it costs to find the merging coefficients: plain forward passes, the paper's procedure, and esmerge.

Every variant runs in a process of its own, on the same probe and the same adapters; the rounds are interleaved,
so that a busy moment of the machine hits all of them.

    python -m benchmarks.speed.coefficients
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.speed.measure import machine, markdown_table, run_measured
from benchmarks.testbed.base_model import base_model_folder
from esmerge.checkpoint import Checkpoint

VARIANTS = {
    "imports": "nothing but the imports",
    "forward": "(a) forward passes, with logits",
    "forward-no-logits": "(a) forward passes, without",
    "paper-0": "(b) paper's procedure, N = 0",
    "paper-16": "(b) paper's procedure, N = 16",
    "esmerge-factors": "(c) esmerge, factors",
    "esmerge-weights": "(c) esmerge, weights",
}
# Without these there is nothing to compare.
COMPARED = ("forward", "paper-16", "esmerge-factors", "esmerge-weights")
# How far alpha and the scores of two procedures may be apart in float32, relative to their norms.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Figures:
    """Medians over the rounds: seconds, and bytes of the process."""

    load: float
    work: float
    peak_rss: float
    peak_anonymous: float


@dataclass(frozen=True)
class Benchmark:
    """The inputs of all runs."""

    base: Path
    folder: Path
    batch_size: int

    def run(self, variant: str, dtype: str) -> Figures:
        """One run of one variant."""
        options = ["--base", str(self.base), "--dtype", dtype, "--batch-size", str(self.batch_size)]
        module = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.variants"]
        usage = run_measured([*module, variant, str(self.folder), *options])
        seconds = json.loads((self.folder / f"{variant}.json").read_text())
        work = seconds.get("work", 0.0)
        print(f"{dtype} {variant}: {work:.2f} s, {usage.peak_rss / 1e6:.0f} MB", file=sys.stderr)
        return Figures(seconds["load"], work, usage.peak_rss, usage.peak_anonymous)

    def rounds(self, count: int, dtype: str, variants: Sequence[str]) -> dict[str, Figures]:
        """The medians of some variants."""
        runs = [{variant: self.run(variant, dtype) for variant in variants} for _ in range(count)]
        fields = ("load", "work", "peak_rss", "peak_anonymous")
        return {
            variant: Figures(*(median(getattr(run[variant], field) for run in runs) for field in fields))
            for variant in variants
        }

    def disagreement(self) -> dict[str, float]:
        """How far esmerge is from the paper's procedure in the last runs: largest relative difference by kind."""
        files = [self.folder / f"{variant}.safetensors" for variant in ("paper-0", "esmerge-factors")]
        theirs, ours = (Checkpoint({file: None}) for file in files)
        if theirs.tensors.keys() != ours.tensors.keys():
            raise SystemExit(f"{files[0]} and {files[1]} hold different tensors")
        worst: dict[str, float] = {}
        for name in theirs:
            kind, expected = name.partition(".")[0], theirs.read(name).double()
            difference = float((ours.read(name).double() - expected).norm() / expected.norm())
            worst[kind] = max(worst.get(kind, 0.0), difference)
        return worst


def table(figures: Mapping[str, Figures]) -> str:
    """All figures, times also relative to the forward passes and memory to the paper's procedure."""
    floor, paper = figures["forward"], figures["paper-16"]
    rows = []
    for variant, own in figures.items():
        row = [VARIANTS[variant], f"{own.load:.1f} s", f"{own.work:.1f} s", f"{own.work / floor.work:.2f}"]
        for field in ("peak_rss", "peak_anonymous"):
            size = getattr(own, field)
            row += [f"{size / 1e6:.0f} MB", f"{size / getattr(paper, field):.2f}"]
        rows.append(row)
    header = ["", "loading", "work", "/ forward", "peak resident", "/ paper 16", "of it anonymous", "/ paper 16"]
    return markdown_table(header, rows)


def aims(figures: Mapping[str, Figures]) -> str:
    """What was aimed at, and whether it was reached."""
    floor, paper = figures["forward"], figures["paper-16"]
    lines = []
    for variant in ("esmerge-factors", "esmerge-weights"):
        own = figures[variant]
        for what, ratio, bound in (
            ("time / forward passes", own.work / floor.work, 2.0),
            ("time / paper's procedure with N = 16", own.work / paper.work, 1 / 3),
            ("peak resident memory / paper's", own.peak_rss / paper.peak_rss, 1 / 3),
            ("peak anonymous memory / paper's", own.peak_anonymous / paper.peak_anonymous, 1 / 3),
        ):
            verdict = "reached" if ratio <= bound else "missed"
            lines.append(f"- {variant}: {what} {ratio:.2f}, aim {bound:.2f}: {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="model folder (SmolLM2-135M-Instruct of the testbed)")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of all variants (%(default)s)")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="to run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (%(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="probe inputs (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="probe inputs per batch (%(default)s)")
    parser.add_argument("--threads", type=int, help="of each run (torch's default: all cores)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    base = options.base or base_model_folder()
    # What waits for other threads spins only briefly, in all variants: other load on the machine does less harm.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    threads = f"{options.threads} threads" if options.threads else "all threads"
    report: dict[str, object] = {"machine": machine(), "threads": options.threads, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(prefix="esmerge-speed-") as folder:
        prepare = [sys.executable, "-m", "benchmarks.speed.inputs", folder, "--base", str(base)]
        subprocess.run([*prepare, "--samples", str(options.samples)], check=True)
        benchmark = Benchmark(base, Path(folder), options.batch_size)
        # Equal work is shown in float32, where rounding hides nothing.
        for variant in ("paper-0", "esmerge-factors"):
            benchmark.run(variant, "float32")
        report["disagreement"] = disagreement = benchmark.disagreement()
        if max(disagreement.values()) > TOLERANCE:
            raise SystemExit(f"esmerge and the paper's procedure disagree in float32: {disagreement}")
        for dtype in options.dtypes:
            figures = benchmark.rounds(
                options.rounds, dtype, sorted({*options.variants, *COMPARED}, key=list(VARIANTS).index)
            )
            report[dtype] = {name: vars(own) for name, own in figures.items()}
            print(
                f"\n{dtype}, {machine()}, {threads}, medians of {options.rounds}\n\n{table(figures)}\n\n{aims(figures)}"
            )
    listed = ", ".join(f"{kind} {value:.0e}" for kind, value in disagreement.items())
    print(f"- esmerge and the paper's procedure in float32, largest relative differences: {listed}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
