"""Runs a command as a child process and measures its memory from outside, where nothing slows it down."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLING_SECONDS = 0.01


@dataclass(frozen=True)
class Usage:
    """What a process needed.

    Attributes:
        seconds: from its start to its end.
        peak_rss: most resident memory in bytes, pages of mapped files included.
        peak_anonymous: most resident memory in bytes that no file backs. Mapped pages can be given back to
            the system at any time, these cannot.
    """

    seconds: float
    peak_rss: int
    peak_anonymous: int


def run_measured(command: Sequence[str], folder: Path | None = None) -> Usage:
    """Run a command to its end in the working directory `folder`.

    The peak of all resident memory is the kernel's own count (VmHWM); anonymous memory is sampled.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    start = time.perf_counter()
    peaks = {"VmHWM": 0, "RssAnon": 0}
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            while process.poll() is None:
                for field, value in _memory(process.pid).items():
                    if field in peaks:
                        peaks[field] = max(peaks[field], value)
                time.sleep(SAMPLING_SECONDS)
        except BaseException:
            process.terminate()
            raise
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(seconds, peaks["VmHWM"], peaks["RssAnon"])


def _memory(pid: int) -> dict[str, int]:
    """The fields of /proc/<pid>/status that are sizes, in bytes; none once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {field: int(value.removesuffix("kB")) * 1024 for field, value in pairs}


def machine() -> str:
    """One line about where this ran."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = models[0].partition(":")[2].strip() if models else platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores, {name}, {memory:.0f} GiB, Python {platform.python_version()}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])
