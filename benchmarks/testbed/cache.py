"""Where downloads, the converted base and the trained specialists are kept between runs."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esmerge.cache import user_cache


def cache_folder() -> Path:
    """The testbed's folder in the user's cache: `$ESMERGE_CACHE`, or `esmerge/testbed` under the XDG cache."""
    return user_cache("ESMERGE_CACHE", "testbed")


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
