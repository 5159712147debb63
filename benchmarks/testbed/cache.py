"""Where downloads, the converted base and the trained specialists are kept between runs."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """The testbed's folder in the user's cache: `$ESMERGE_CACHE`, or `esmerge/testbed` under the XDG cache."""
    if chosen := os.environ.get("ESMERGE_CACHE"):
        return Path(chosen).expanduser()
    # An empty XDG_CACHE_HOME counts as unset, as the XDG specification says.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esmerge" / "testbed"


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `folder` if the block succeeds, so a folder that exists is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp made it private to its owner
        try:
            temporary.rename(folder)
        except OSError:
            # Another process may have finished the same work first: its result is as good as ours.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
