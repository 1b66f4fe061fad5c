"""Compiled code kept from run to run, as compiling takes longer than most of what is then computed.

JAX's own compilation cache, and the machine code of `scale.lanes`, lie in one folder: that which JAX is told
of (`JAX_COMPILATION_CACHE_DIR`), otherwise `compiled` in alignpro's cache. `JAX_ENABLE_COMPILATION_CACHE=0`
turns both off. See docs/scale.md.
"""

import contextlib
import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from alignpro.errors import AlignProError
from alignpro.files import atomic_write, cache_folder

MOST = 2**29
"""Bytes beyond which the oldest of what alignpro's own folder holds is removed."""
LEAST_SECONDS = 0.02
"""Compilations that took less time are not worth a file."""
_DIGEST = 32


def _processor() -> str:
    """Words that tell processors apart which cannot run each other's code."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = {line for line in file if line.startswith(("model name", "flags", "Features"))}
        return platform.machine() + "".join(sorted(lines))
    return platform.machine() + platform.processor()


def own_folder() -> Path:
    """The folder for this processor, so that a home directory can serve machines of several kinds."""
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    return cache_folder() / "compiled" / kind


def keep() -> None:
    """Turn JAX's compilation cache on, unless the user has chosen a folder or turned it off.

    Where the folder cannot be written to, nothing is kept and nothing is said.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return
    try:
        folder = own_folder()
        # For the user alone: what lies there is run.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        _prune(folder)
    except (OSError, RuntimeError):  # no such folder can be made, or there is no home
        return
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def _prune(folder: Path, most: int = MOST) -> None:
    """Remove empty files, which a full disk leaves, and the oldest files while there are too many bytes.

    Another process that meets a file as it goes compiles anew.
    """
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            seen = entry.stat()
            files.append((seen.st_mtime, seen.st_size, entry.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if size == 0 or total > most:
            total -= size
            with contextlib.suppress(OSError):
                os.unlink(path)


def folder() -> Path | None:
    """The folder in use; None where nothing is to be kept."""
    config: Any = jax.config
    if not config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return None
    return Path(config.jax_compilation_cache_dir)


@functools.lru_cache
def _sources() -> bytes:
    """A digest of the code that writes machine code."""
    here = Path(__file__).parent / "scale"
    return hashlib.sha256(
        b"".join((here / name).read_bytes() for name in ("lanes.py", "vectors.py"))
    ).digest()


def key(*parts: object) -> str:
    """The name of what is made of these parts by this version of this code."""
    digest = hashlib.sha256(_sources())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def load(name: str) -> bytes | None:
    """The content kept under the name; None where there is none, or a damaged one."""
    if (where := folder()) is None:
        return None
    try:
        stored = (where / f"{name}-machine").read_bytes()
    except OSError:
        return None
    digest, content = stored[:_DIGEST], stored[_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


def store(name: str, content: bytes) -> None:
    """Keep the content under the name, atomically; a folder that cannot be written to keeps nothing."""
    if (where := folder()) is None:
        return
    with contextlib.suppress(OSError, AlignProError):
        where.mkdir(parents=True, exist_ok=True)
        with atomic_write(where / f"{name}-machine") as file:
            file.write(hashlib.sha256(content).digest() + content)
