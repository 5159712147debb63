"""A merged model published on a Hub of one's own, over loopback, and loaded back from there."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "tests" / "hub_server.py"
BASE = "owner/base"
MODEL = "owner/merged"


def available() -> bool:
    """Whether the server is there: it comes with the source tree, not with an installed package."""
    return SERVER.exists()


def publish_and_ask(folder: Path, base: Path) -> str:
    """Publish a merged adapter with its card, and ask the copy that the Hub hands out.

    Args:
        folder: of the adapter.
        base: folder of its base, which is put on the Hub too.

    Raises:
        subprocess.CalledProcessError: if one of the two fails.
    """
    with tempfile.TemporaryDirectory() as home, _serving(base, Path(home)) as environment:
        publish = ["publish", str(folder), MODEL, "--yes", "--quiet", "--license", "apache-2.0", "--base-model", BASE]
        _run(environment, "-c", "from esmerge.cli import main; main()", *publish)
        return _run(environment, "-m", "benchmarks.testbed.ask", MODEL).strip()


@contextmanager
def _serving(base: Path, home: Path) -> Iterator[Mapping[str, str]]:
    """Runs the server; gives the environment in which programs use it."""
    command = [sys.executable, str(SERVER), "--home", str(home), "--add", str(base), BASE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            exports = server.stdout.readline().removeprefix("export ").split()
            given = {name: value for name, _, value in (pair.partition("=") for pair in exports)}
            yield {**os.environ, **given, "HF_HUB_OFFLINE": "0"}
        finally:
            server.terminate()


def _run(environment: Mapping[str, str], *arguments: str) -> str:
    """What a Python program prints; its errors go where ours go."""
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    return done.stdout
