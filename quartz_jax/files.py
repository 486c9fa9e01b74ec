"""Outputs that are checked before any work and appear complete or not at all; hashes."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(path: Path, *, folder: bool = False, overwrite: bool = True) -> Path:
    """Check before any work that an output can be made, without leaving a trace.

    Args:
      path: the file or folder that will be written.
      folder: whether it is a folder.
      overwrite: whether it may exist already.

    Raises:
      ValueError: it exists and may not, is of the other kind, or its folder can't be written.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"output {path} exists already; choose another, or pass --overwrite")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"output {path} is {'a file' if folder else 'a folder'}; choose another")
    try:
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"output {path} can't be written: {error.strerror}") from None
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside a file, and put it in the file's place on success."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside a folder, and put it in the folder's place on success."""
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{x}") for x in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def hash_files(folder: Path, pattern: str) -> str:
    """Return the SHA-256, in hex, of the names and contents of the files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob(pattern) if file.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
