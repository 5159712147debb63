"""Runs a command as a child process and measures its memory from outside, where nothing slows it down."""

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLING_SECONDS = 0.01
# Of several processes: looking at their pages takes longer, and stops them meanwhile.
SLOW_SAMPLING_SECONDS = 0.1


@dataclass(frozen=True)
class Usage:
    """What a process and those that it started needed.

    Attributes:
        seconds: from its start to its end.
        peak_rss: most resident memory in bytes, pages of mapped files included; pages that several share count once.
        peak_anonymous: most resident memory in bytes that no file backs. Mapped pages can be given back to
            the system at any time, these cannot.
    """

    seconds: float
    peak_rss: int
    peak_anonymous: int


def run_measured(command: Sequence[str], folder: Path | None = None) -> Usage:
    """Run a command to its end in the working directory `folder`.

    The peak of a process alone is the kernel's own count (VmHWM); anonymous memory, and that of several processes, is
    sampled.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    start = time.perf_counter()
    resident = anonymous = 0
    with subprocess.Popen(command, cwd=folder) as process:
        try:
            while process.poll() is None:
                now = _memory(process.pid)
                resident, anonymous = max(resident, now[0]), max(anonymous, now[1])
                time.sleep(SLOW_SAMPLING_SECONDS if _children(process.pid) else SAMPLING_SECONDS)
        except BaseException:
            process.terminate()
            raise
    seconds = time.perf_counter() - start
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(seconds, resident, anonymous)


def _memory(pid: int) -> tuple[int, int]:
    """All resident and anonymous memory of a process and those that it started, in bytes; 0 once it has ended."""
    children = _children(pid)
    if not children:
        sizes = _sizes(Path(f"/proc/{pid}/status"))
        return sizes.get("VmHWM", 0), sizes.get("RssAnon", 0)
    shares = [_sizes(Path(f"/proc/{own}/smaps_rollup")) for own in (pid, *children)]
    return sum(own.get("Pss", 0) for own in shares), sum(own.get("Pss_Anon", 0) for own in shares)


def _children(pid: int) -> list[int]:
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in _children(child)]


def _sizes(file: Path) -> dict[str, int]:
    """The fields of a file of a process that are sizes, in bytes; none once it has ended."""
    try:
        lines = file.read_text().splitlines()
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
