"""Where files that may be made again are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$DS_ALIGN_CACHE, else ds_align in $XDG_CACHE_HOME, else ~/.cache/ds_align."""
    own = os.environ.get("DS_ALIGN_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ds_align"
