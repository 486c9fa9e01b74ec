"""Compiled programs that are kept on disk, so that the second start needn't compile."""

import glob
import os
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from quartz_jax.pipelines import keep_programs, program_counts

_EVENTS = {
    "/jax/compilation_cache/cache_hits": "from_cache",
    "/jax/compilation_cache/cache_misses": "compiled",
}
_counts: Counter[str] = Counter()
# JAX's words; the name is that of a program, which its files' names start with.
_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '(.+?)': ")


def enable(use: bool = True) -> Path | None:
    """Turn JAX's persistent compilation cache on; call it before anything compiles.

    The folder is JAX_COMPILATION_CACHE_DIR if that is set, else quartz-jax in the user's cache
    folder: XDG_CACHE_HOME, or ~/.cache. JAX_ENABLE_COMPILATION_CACHE=false turns it off as well.
    A folder that can't be written costs a warning, not the run. Programs that a kill or a full disk
    left damaged are removed when JAX stumbles over them, and so written anew: by itself it would
    leave them, and warn at every start. What models are traced to is kept in a folder beside them,
    see `models.programs`: JAX looks into its cache only when a program is traced and lowered.

    Args:
      use: False turns the cache off.

    Returns:
      The folder, or None where the cache is off.
    """
    config: Any = jax.config  # its options are attributes that no stub lists
    if not (use and config.jax_enable_compilation_cache):
        jax.config.update("jax_enable_compilation_cache", False)
        keep_programs(None)
        return None
    folder = config.jax_compilation_cache_dir or str(_user_folder())
    jax.config.update("jax_compilation_cache_dir", folder)
    # Small programs too: a start has hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _mend(Path(folder))
    keep_programs(Path(folder) / "traced")
    if not _counts:
        _counts.update(dict.fromkeys(_EVENTS.values(), 0))
        jax.monitoring.register_event_listener(_count)
    return Path(folder)


def counts() -> dict[str, int]:
    """Return how many programs were "compiled" and came "from_cache" since `enable`.

    Of those that models run, also how many were "traced", or "kept" since an earlier start. Empty
    where the cache isn't used: it is off, or its folder can't be written.
    """
    return dict(_counts) | program_counts() if _counts.total() else {}


def _mend(folder: Path) -> None:
    """Remove programs that JAX warns of from the cache, and say so once instead of for each."""
    warnings.filterwarnings("always", message=_DAMAGED.pattern)
    shown, said = warnings.showwarning, False

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        nonlocal said
        found = _DAMAGED.match(str(message))
        if found is None:
            return shown(message, *where, **more)
        try:
            for path in folder.glob(f"{glob.escape(found[1])}-*"):
                path.unlink(missing_ok=True)
            told = "they are compiled anew"
        except OSError as error:
            told = f"they can't be removed ({error.strerror}), delete the folder"
        if not said:
            print(f"{folder} holds damaged programs: {told}", file=sys.stderr)
        said = True

    warnings.showwarning = show


def _user_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quartz-jax" / "compiled"


def _count(event: str, **_) -> None:
    if event in _EVENTS:
        _counts[_EVENTS[event]] += 1
