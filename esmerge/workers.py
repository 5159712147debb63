"""Does the same to many items at once: on threads, or in forked processes where threads would wait for each other.

Between two operators on tensors a thread needs the interpreter, which another one may hold: with blocks of rows that
fit a cache, the waiting adds up to a fifth of the time. Forked processes have an interpreter each and share what is in
memory already.
"""

import ctypes
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import TMonitor

from esmerge.errors import WorkerKilled

# What a forked process does with an item. Closures cannot be sent to a process, but are there if it is forked later.
_function: Callable[[int], Any] | None = None

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1


def can_fork(device: torch.device) -> bool:
    """Whether forked processes can do the work: neither GPUs nor systems other than Linux take that well.

    Nor do other threads of Python: in a forked process, a lock that one of them holds stays locked for ever.
    """
    if sys.platform != "linux" or device.type != "cpu" or torch.cuda.is_initialized():
        return False
    # The one that looks after progress bars holds none that is needed.
    others = [thread for thread in threading.enumerate() if not isinstance(thread, TMonitor)]
    return others == [threading.current_thread()]


def each(function: Callable[[int], Result], count: int, workers: int, processes: bool) -> Iterator[tuple[int, Result]]:
    """Call a function with the numbers 0 to count - 1, which are begun in this order.

    Args:
        workers: how many at a time.
        processes: in forked processes: what the function leaves behind is lost, but for its result.

    Yields:
        Each number and its result, once it is there.

    Raises:
        WorkerKilled: if a process was killed.
    """
    if workers == 1:
        for number in range(count):
            yield number, function(number)
        return
    pool: Executor
    if processes:
        pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (function, os.getpid()))
        run: Callable[[int], Any] = _run
    else:
        pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        run = function
    with pool, warnings.catch_warnings():
        # Python warns of forking beside threads; those of torch's operators are idle, and not needed afterwards.
        warnings.simplefilter("ignore", DeprecationWarning)
        futures: dict[Future[Any], int] = {pool.submit(run, number): number for number in range(count)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise WorkerKilled from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _begin(function: Callable[[int], Any], parent: int) -> None:
    """Make a process ready, and have it end with its parent."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    torch.set_num_threads(1)


def _run(number: int) -> Any:
    assert _function is not None
    return _function(number)
