"""Traced programs that are kept on disk, so that the next start neither traces nor lowers them.

JAX's compilation cache is asked once a program is lowered, which for a transformer's step takes
longer than all else at its first call: kernels are lowered in Python. Here what was lowered is kept
as `jax.export` writes it, under a name made of all that it was traced from: the code of this
library, versions, JAX's settings, the device, the module's structure and the arrays' shapes.
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import importlib
import importlib.metadata
import os
import re
import sys
import threading
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
from jax import export

_PACKAGES = Path(__file__).resolve().parent.parent  # where this library's packages lie
_CODE = ("models", "pallas_kernels", "quartz_jax")
# Whose functions and classes have names: what they do is in a program's name too, as the hash of
# this library's code or as a version. Of anyone else's, an edition would run in another's place.
_KNOWN = {*_CODE, "flax", "jax", "jaxlib", "ml_dtypes", "numpy", *sys.stdlib_module_names}
# Custom calls that JAX gives no guarantee for across versions; here its version is in the name.
_CUSTOM_CALLS = (
    "mosaic_gpu",
    "mosaic_gpu_v2",
    "triton_kernel_call",
    "__gpu$xla.gpu.triton",
    "__cudnn$fmhaSoftmax",
    "__cudnn$fmhaScaleBiasSoftmax",
)
_DIGEST = hashlib.sha256().digest_size  # bytes of the SHA-256 that a file starts with
# Of JAX's settings, those that change no program: where files lie, and what is told.
_NO_MATTER = re.compile(r"jax_(.*cache.*|.*log.*|.*dump.*|.*debug.*|.*profiler.*|traceback.*)")
_folder: Path | None = None
counts: Counter[str] = Counter()  # of programs that were "traced", or "kept" since an earlier start


class Unnamed(ValueError):
    """What a program is traced from has no name that would be the same in another process."""


def keep(folder: Path | None) -> None:
    """Keep programs in a folder from now on, or None to keep none, which is how it starts."""
    global _folder
    _folder = folder


def is_on() -> bool:
    """Whether programs are kept."""
    return _folder is not None


class Found:
    """What one function was lowered to in this process: models loaded after it run it as it is."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # by kinds of leaves, folder and settings, then by kinds of arguments
        self.programs: dict[Any, dict[Any, Callable]] = {}


class Program:
    """A function under `jax.jit` whose lowered forms are kept, one for each set of shapes."""

    def __init__(
        self,
        jitted: Callable,  # of leaves and more
        leaves: Sequence[jax.Array],
        made_of: Any,  # all that it is traced from, but for shapes and dtypes
        found: Found | None = None,  # with the same jitted and made_of
    ):
        self._jitted = jitted
        self._leaves = list(leaves)
        self._made_of = made_of
        found = found or Found()
        mesh = jax.sharding.get_abstract_mesh()
        key = tuple(map(_kind, leaves)), _folder, mesh, tuple(_settings().items())
        self._lock = found.lock
        with found.lock:
            self._found = found.programs.setdefault(key, {})

    def __call__(self, *args: Any) -> Any:
        """Return the function of the leaves and args."""
        given, tree = jax.tree.flatten(args)
        kind = tree, tuple(map(_kind, given))
        with self._lock:
            if kind not in self._found:
                self._found[kind] = self._find(kind, tree, given)
        return self._found[kind](self._leaves, given)

    def _find(self, kind: tuple, tree: Any, given: list) -> Callable:
        """Return a function of leaves and flat arguments: what was kept, or is traced now."""
        jitted = self._jitted

        def plain(leaves: list, given: list) -> Any:
            return jitted(leaves, *jax.tree.unflatten(tree, given))

        try:
            path = self._path(kind)
            exported = _read(path) or self._trace(path, tree, given)
        except (Unnamed, ValueError, NotImplementedError, TypeError):
            counts["traced"] += 1  # what can't be named or written runs all the same
            return plain
        return jax.jit(exported.call)

    def _path(self, kind: tuple) -> Path:
        if _folder is None or any(x is None for x in kind[1]):
            raise Unnamed
        where = {device.platform for leaf in self._leaves for device in leaf.devices()}
        if where - {jax.default_backend()}:
            raise Unnamed(
                "programs are lowered for the default backend, and the weights lie on others"
            )
        described = [self._made_of, *kind, [_kind(leaf) for leaf in self._leaves], _surroundings()]
        return _folder / f"{hashlib.sha256(name(described).encode()).hexdigest()}.program"

    def _trace(self, path: Path, tree: Any, given: list) -> export.Exported:
        jitted = self._jitted

        def flat(leaves: list, given: list) -> Any:
            return jitted(leaves, *jax.tree.unflatten(tree, given))

        checks = [export.DisabledSafetyCheck.custom_call(call) for call in _CUSTOM_CALLS]
        exported = export.export(jax.jit(flat), disabled_checks=checks)(self._leaves, given)
        _write(path, bytes(exported.serialize()))
        counts["traced"] += 1
        return exported


def name(value: Any) -> str:
    """Return a text that equal values have in every process, and others don't.

    Raises:
      Unnamed: there is none: of a lambda or a local function, say, which may have seen anything, or
        of code outside of this library and those that it rests on.
    """
    plain = bool | int | float | complex | str | bytes
    if value is None or value is types.NoneType or isinstance(value, plain):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{name(type(value))}.{value.name}"
    if isinstance(value, functools.partial):
        return f"partial{name((value.func, value.args, value.keywords))}"
    if isinstance(value, types.MethodType):
        return f"method{name((value.__func__, value.__self__))}"
    if callable(value) and hasattr(value, "__qualname__"):
        return _name_of_code(value)
    if isinstance(value, np.dtype | np.generic):
        return f"{type(value).__name__}({value!s})"
    if isinstance(value, np.ndarray | jax.Array):  # of which repr leaves elements out
        data = np.asarray(value)
        return f"array{_kind(data)}{hashlib.sha256(data.tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return _listed("{}", sorted(f"{name(key)}: {name(x)}" for key, x in value.items()))
    if isinstance(value, set | frozenset):
        return _listed("{}", sorted(map(name, value)))
    if isinstance(value, list | tuple):
        kind = "" if type(value) in (list, tuple) else name(type(value))
        return kind + _listed("[]", map(name, value))
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return name(type(value)) + name(fields)
    return _plain(value)


def _listed(brackets: str, parts: Any) -> str:
    return brackets[0] + ", ".join(parts) + brackets[1]


def _name_of_code(value: Any) -> str:
    """Return where a class or function stands, if that is in a module and leads back to it."""
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", "<>")
    _check_known(module)
    try:
        found: Any = importlib.import_module(module) if module else None
    except ImportError:
        raise Unnamed(f"{value!r} is of a module that can't be imported") from None
    for step in path.split("."):
        found = getattr(found, step, None)
    if found is not value:
        raise Unnamed(f"{value!r} can't be found by its name")
    return f"{module}.{path}"


def _plain(value: Any) -> str:
    """Return the repr of a value, unless it holds what another process has otherwise."""
    text = repr(value)
    if re.search(r"\bat 0x|<locals>|<lambda>|object at", text):
        raise Unnamed(f"{text} means nothing elsewhere")
    kind = type(value)
    _check_known(kind.__module__)
    return f"{kind.__module__}.{kind.__qualname__} {text}"


def _check_known(module: str | None) -> None:
    if str(module).split(".")[0] not in _KNOWN:
        raise Unnamed(f"the code of {module} isn't in the name")


def _kind(leaf: Any) -> tuple | None:
    """Return shape, dtype and whether the type is weak; None for what isn't an array."""
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    return tuple(leaf.shape), str(leaf.dtype), bool(getattr(leaf, "weak_type", False))


def _surroundings() -> list[Any]:
    """Return all that a trace depends on besides what it is of."""
    if not jax.sharding.get_abstract_mesh().empty:
        raise Unnamed("a mesh is set")
    device = jax.devices()[0]
    flax = importlib.metadata.version("flax")
    return [
        (jax.__version__, jaxlib.__version__, flax, device.client.platform_version),
        (device.platform, device.device_kind, jax.device_count()),
        _settings(),
        _code(),
    ]


def _settings() -> dict[str, str]:
    """Return those of JAX's settings, as they are in this thread, that may change a program."""
    config: Any = jax.config
    return {key: str(x) for key, x in config.values.items() if not _NO_MATTER.fullmatch(key)}


@functools.cache
def _code() -> str:
    """Return the SHA-256 of this library's code and of the data that steers it."""
    found = [x for folder in _CODE for kind in ("*.py", "*.json") for x in _files(folder, kind)]
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(path.as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _files(folder: str, kind: str) -> list[Path]:
    """Return code and tuned settings; models and what was measured of them lie there too."""
    beside = ("tiny_flux", "tiny_flux_photo", "evaluations", "benchmarks")
    found = (_PACKAGES / folder).rglob(kind)
    if kind == "*.py":
        return list(found)
    return [x for x in found if not set(x.relative_to(_PACKAGES).parts) & set(beside)]


def _read(path: Path) -> export.Exported | None:
    """Return what was kept; None for nothing, or for what a kill or a full disk left damaged."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        return None
    exported = export.deserialize(bytearray(data[_DIGEST:]))
    counts["kept"] += 1
    return exported


def _write(path: Path, data: bytes) -> None:
    """Write a program, whole or not at all; a folder that can't be written costs a warning."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(data).digest() + data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        warnings.warn(f"{path.parent} can't be written: {error.strerror}", stacklevel=2)
