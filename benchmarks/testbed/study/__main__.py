"""Does it work? Every merging method on real tasks.

    python -m benchmarks.testbed.study [--workers N] [--only NAME ...]

Hours of work on a few cores. What is done stays in the testbed's cache, so an interrupted study goes on where it was.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from fnmatch import fnmatchcase
from functools import partial

from tqdm import tqdm

from benchmarks.testbed.base_model import base_model_folder
from benchmarks.testbed.study.jobs import Job, all_jobs, unfinished
from benchmarks.testbed.study.merges import remove_abandoned
from benchmarks.testbed.study.page import FIGURES, README, page
from benchmarks.testbed.study.places import Places
from benchmarks.testbed.study.tasks import write_tasks
from esmerge.errors import InputError


def run_all(jobs: dict[str, Job], run: Callable[[str], bool], workers: int) -> str | None:
    """Run the jobs that are not done, each once those that it needs are done.

    Args:
        jobs: by name, with all that they need.
        run: runs a job by its name; whether it succeeded.
        workers: how many run at a time.

    Returns:
        The name of one that failed, after which no other was started.
    """
    waiting = unfinished(jobs)
    done = set(jobs) - set(waiting)
    running: dict[Future[bool], str] = {}
    failed: list[str] = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), initial=len(done), unit="job") as bar:
        while waiting or running:
            ready = [name for name, job in waiting.items() if done.issuperset(job.needs)]
            for name in ready[: 0 if failed else workers - len(running)]:
                del waiting[name]
                running[pool.submit(run, name)] = name
            if not running:
                break
            bar.set_postfix_str(", ".join(running.values()))
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                if future.result():
                    done.add(name)
                    bar.update()
                else:
                    failed.append(name)
    return failed[0] if failed else None


def _run_alone(name: str, places: Places) -> bool:
    """In a process with one thread, so that results do not depend on the number of cores."""
    log = places.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.testbed.study", "--job", name]
    with log.open("w", encoding="utf-8") as stream:
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | single, stdout=stream, stderr=stream, check=False)
    return done.returncode == 0


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="jobs at a time, of a core each")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of jobs")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    places = Places.usual()
    jobs = all_jobs(places, base_model_folder())
    if options.job is not None:
        jobs[options.job].run()
        return
    write_tasks(places.tasks())
    remove_abandoned(places)
    failed = run_all(_with_needs(jobs, options.only), partial(_run_alone, places=places), options.workers)
    if failed is not None:
        raise InputError(f"the job {failed} failed: see {places.log(failed)}, then run the study again.")
    page(places, README, FIGURES)


def _with_needs(jobs: dict[str, Job], patterns: list[str]) -> dict[str, Job]:
    """The jobs that match a pattern, and all that they need."""
    chosen = [name for name in jobs if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name in chosen:
        chosen += [need for need in jobs[name].needs if need not in chosen]
    return {name: job for name, job in jobs.items() if name in chosen}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"Error: {error}")
