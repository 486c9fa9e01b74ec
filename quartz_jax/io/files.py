"""Outputs that are checked before any work and appear complete or not at all; hashes."""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock


def read_text(path: Path) -> str:
    """Return a text file's contents, without the byte order mark that Windows' editors write.

    Raises:
      ValueError: it is no regular file (a pipe may never end), or isn't UTF-8.
      OSError: it can't be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} isn't UTF-8, save it as that: {error}") from None


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
      ValueError: it is no regular file, isn't UTF-8 or no JSON, is nested too deeply, or has a
        field twice.
      OSError: it can't be read.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except KeyError as error:
        raise ValueError(f"{path} has a field twice: {error}") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; KeyError for a field that stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(name for name in names if names.count(name) > 1))
    return found


def check_output(
    path: Path,
    *,
    folder: bool = False,
    overwrite: bool = True,
    is_ours: Callable[[Path], bool] | None = None,
) -> Path:
    """Check before any work that an output can be made, without leaving a trace.

    Args:
      path: the file or folder that will be written.
      folder: whether it is a folder.
      overwrite: whether it may exist already.
      is_ours: whether a folder that isn't empty may be replaced; None for any.

    Raises:
      ValueError: it exists and may not, is of the other kind, its name isn't UTF-8 or a link to
        itself, or its folder can't be written.
    """
    _check_name(path)
    if path.exists() and not overwrite:
        raise ValueError(f"output {path} exists already; choose another, or pass --overwrite")
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"output {path} is {'a file' if folder else 'a folder'}; choose another")
    if is_ours and path.exists() and any(path.iterdir()) and not is_ours(path):
        raise ValueError(
            f"output {path} holds files that this command didn't make; choose another, or empty it"
        )
    try:
        nearest = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"output {path} can't be written: {error.strerror}") from None
    return path


def _check_name(path: Path) -> None:
    """Raise ValueError for a name that can't be written or leads nowhere."""
    shown = str(path).encode(errors="backslashreplace").decode()
    if shown != str(path) or "\0" in shown:
        raise ValueError(f"output {shown!r} isn't UTF-8; choose another name")
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:
        loop = error.errno == errno.ELOOP
        reason = "it is a link to itself" if loop else error.strerror
        raise ValueError(f"output {path} can't be written: {reason}") from None


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if an input is a folder to be made, lies in it or, a folder, around it."""
    path = path.resolve()
    for item in inputs:
        # Each step of the input's path is followed: its folder or the file may be a link.
        steps = [step.resolve() for step in (item.absolute(), *item.absolute().parents)]
        if any(step.is_relative_to(path) for step in steps):
            raise ValueError(f"output {path} holds {item}, which it is made from; choose another")
        if path.is_relative_to(steps[0]):
            raise ValueError(f"output {path} lies in {item}, which it is made from; choose another")


def check_space(path: Path, needed: int) -> None:
    """Raise ValueError unless the disk that will hold `path` has `needed` bytes free."""
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise ValueError(
            f"output {path} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or choose another disk"
        )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside a file, and put it in the file's place on success.

    The disk has it by then, so that a power failure leaves the old file or the new, none empty.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside a folder, and put it in the folder's place on success."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkFolder:
    """What `resumable_folder` gives: a folder in the making, and records of what is finished."""

    contents: Path  # becomes the output
    records: Path  # JSON files; gone when the output is complete
    scratch: Path  # for what gets its place in `contents` when it is complete; absent at first

    def read_record(self, name: str) -> Any:
        """Return a record, or None if it was never written, or not to its end."""
        try:
            return read_json(self.records / f"{name}.json")
        except (FileNotFoundError, ValueError):
            return None

    def write_record(self, name: str, value: Any) -> None:
        """Write a record, whole or not at all."""
        with atomic_file(self.records / f"{name}.json") as path:
            path.write_text(json.dumps(value), encoding="utf-8")


def work_folder(path: Path) -> Path:
    """Return the folder that `resumable_folder` works in."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def resumable_folder(
    path: Path, identity: Any, *, incurable: type[Exception], overwrite: bool = False
) -> Iterator[WorkFolder]:
    """Make a folder so that a killed process can be run again and goes on where it was.

    The work is beside the output, under `work_folder`. Any end but success and `incurable` leaves
    it, a full disk for example.

    Args:
      path: the folder, put in place on success.
      identity: JSON that says what is made: work is only gone on with where it is the same.
      incurable: what running again wouldn't cure; it removes the work.
      overwrite: start anew where the work found there is of something else.

    Raises:
      ValueError: another process is at it, or the work found there is of something else.
      OSError: a file couldn't be read or written.
    """
    work = work_folder(path)
    work.mkdir(parents=True, exist_ok=True)
    folder = WorkFolder(
        contents=work / "contents", records=work / "records", scratch=work / "scratch"
    )
    with locked(work / "lock", path):
        _start_or_go_on(work, folder, identity, overwrite)
        try:
            yield folder
            _replace_folder(folder.contents, path)
        except incurable:
            shutil.rmtree(work, ignore_errors=True)
            raise
        except OSError as error:
            raise OSError(
                f"output {path} can't be written: {error}; run the same command again to go on"
            ) from error
        shutil.rmtree(work, ignore_errors=True)
    if os.name == "nt":
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def locked(lock: Path, path: Path) -> Iterator[None]:
    """Hold a lock file, which the system releases however the process ends, and then remove it.

    Args:
      lock: the file; its folder is made.
      path: what the lock is for, named where another process has it.

    Raises:
      ValueError: another process has it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, blocking=False):
            try:
                yield
            finally:
                if os.name != "nt":  # where what is open can't be removed
                    lock.unlink(missing_ok=True)
    except filelock.Timeout:
        raise ValueError(f"another process is writing {path}; wait for it or stop it") from None


def _start_or_go_on(work: Path, folder: WorkFolder, identity: Any, overwrite: bool) -> None:
    identity = json.loads(json.dumps(identity))
    found = folder.read_record("identity")
    if found not in (None, identity) and not overwrite:
        raise ValueError(
            f"{work} holds unfinished work of another model, recipe or version; delete it, or pass "
            "--overwrite to start anew"
        )
    if found != identity:
        for part in (folder.contents, folder.records):
            shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(folder.scratch, ignore_errors=True)
    folder.contents.mkdir(exist_ok=True)
    folder.write_record("identity", identity)


def _replace_folder(new: Path, path: Path) -> None:
    if path.exists():
        os.replace(path, _replaced(path))
    os.replace(new, path)
    shutil.rmtree(_replaced(path), ignore_errors=True)


def recover_folder(path: Path) -> None:
    """Undo what a kill left of a folder's replacement: put the old one back, or remove it."""
    if path.exists():
        shutil.rmtree(_replaced(path), ignore_errors=True)
    elif _replaced(path).exists():
        os.replace(_replaced(path), path)


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file, or a folder's files, and wait until the disk has them."""
    files = [source] if source.is_file() else [x for x in source.rglob("*") if x.is_file()]
    for file in files:
        copy = target / file.relative_to(source) if source.is_dir() else target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        sync(copy)


def sync(path: Path) -> None:
    """Wait until the disk has a file, or all files below a folder."""
    for item in path.rglob("*") if path.is_dir() else [path]:
        if item.is_file():
            with item.open("rb+") as stream:  # Windows syncs nothing that is open for reading only
                os.fsync(stream.fileno())


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def hash_files(folder: Path, pattern: str) -> str:
    """Return the SHA-256, in hex, of the names and contents of the files below a folder."""
    files = sorted(x for x in folder.rglob(pattern) if x.is_file() and not is_system_file(x))
    return join_hashes((file.relative_to(folder).as_posix(), hash_file(file)) for file in files)


def hash_file(file: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unchanged(path: Path, sha256: str) -> bool:
    """Whether a file, or a folder as `hash_files` sees it, has a hash.

    The answer yes is kept in the user's cache together with sizes and times, and no file is read
    again as long as those are the same.
    """
    find = functools.partial(hash_file, path) if path.is_file() else lambda: hash_files(path, "*")
    return _is_known(sha256, stamps(path), find)


def hold(files: Sequence[Path], sha256: str) -> bool:
    """Whether files have a hash together, each by its own name; remembered as by `unchanged`."""

    def find() -> str:
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
            hashes = pool.map(hash_file, files)
            return join_hashes((x.name, found) for x, found in zip(files, hashes, strict=True))

    return _is_known(sha256, [stamp for file in files for stamp in stamps(file)], find)


def _is_known(sha256: str, stamped: list[tuple[str, int, int]], find: Callable[[], str]) -> bool:
    """Whether a hash is what `find` gives, or gave for the same sizes and times."""
    key = hashlib.sha256(json.dumps([sha256, stamped]).encode()).hexdigest()
    note = cache_folder() / "unchanged" / key
    if note.exists():
        return True
    found = find()
    if found == sha256:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return found == sha256


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """Return path, size and time of a file, or of those that `hash_files` sees of a folder."""
    inside = sorted(x for x in path.rglob("*") if x.is_file() and not is_system_file(x))
    files = [path] if path.is_file() else inside
    return [(str(x.absolute()), x.stat().st_size, x.stat().st_mtime_ns) for x in files]


def is_system_file(path: Path) -> bool:
    """Whether an operating system puts a file of this name anywhere, unasked."""
    return path.name.startswith("._") or path.name in (".DS_Store", "Thumbs.db", "desktop.ini")


def cache_folder() -> Path:
    """Return where this user's caches of quartz-jax are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quartz-jax"


def join_hashes(hashes: Iterable[tuple[str, str]]) -> str:
    """Return what `hash_files` does, from the files' names and hashes."""
    digest = hashlib.sha256()
    for name, value in hashes:
        digest.update(f"{name}\0".encode() + bytes.fromhex(value))
    return digest.hexdigest()
