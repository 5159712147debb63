"""How much memory there is, and work that waits for it."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the machine, did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "DefaultCPUAllocator" in text)


def available_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    # A container has less than its machine.
    limit = _text(_CGROUP / "memory.max")
    if limit.isdigit():
        free = min(free, int(limit) - int(_text(_CGROUP / "memory.current") or 0) + _given_back())
    return max(0, free)


def _given_back() -> int:
    """Bytes that count as used, but are files' contents that nobody has read for a while: a checkpoint's, for one."""
    lines = (line.split() for line in _text(_CGROUP / "memory.stat").splitlines())
    return next((int(value) for name, value in lines if name == "inactive_file"), 0)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


class MemoryBudget:
    """Lets threads, or processes that are forked from here, have so much memory at a time between them.

    What needs more than all of it runs alone.

    Args:
        total: bytes.
        forked: whether processes share it.
    """

    def __init__(self, total: int, forked: bool = False) -> None:
        self._total = total
        # The lock of the condition guards the number; a number in shared memory serves threads as well.
        self._changed = get_context("fork").Condition() if forked else threading.Condition()
        self._taken = get_context("fork").Value("q", 0, lock=False) if forked else ctypes.c_int64(0)

    @contextmanager
    def room(self, needed: int) -> Iterator[None]:
        """Wait until there is room for so many bytes, and have it meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken.value or self._taken.value + needed <= self._total)
            self._taken.value += needed
        try:
            yield
        finally:
            with self._changed:
                self._taken.value -= needed
                self._changed.notify_all()
