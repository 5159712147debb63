"""Where things are kept between runs."""

import os
from pathlib import Path


def user_cache(variable: str, name: str) -> Path:
    """A folder in the user's cache: what the environment's `variable` says, or `esmerge/<name>` under the XDG cache."""
    if chosen := os.environ.get(variable):
        return Path(chosen).expanduser()
    # An empty XDG_CACHE_HOME counts as unset, as the XDG specification says.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esmerge" / name
