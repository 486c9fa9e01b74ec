"""Which safetensors files hold a model, and what stands in them: names, shapes, dtypes, values.

A folder may hold several sets of weights: the default and variants such as fp16, each one file or
shards with an index. The names are those of diffusers and transformers.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

# Dtypes that hold weights as they are, in the words of safetensors. NumPy has no float8 of its own,
# so safetensors doesn't read it; both kinds are exact in bfloat16.
_FLOAT8 = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
FLOATING = ("BF16", "F16", "F32", "F64", *_FLOAT8)
_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "BOOL": np.bool_}
_DTYPES |= {f"{x}{bits}": f"{x.lower()}{bits // 8}" for x in "IU" for bits in (8, 16, 32, 64)}
_DTYPES |= {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# Least bits, without the sign, of what isn't finite when it is rounded to bfloat16.
_INFINITE_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F7F8000}
_CHECKED_AT_ONCE = 2**18  # elements: they and their bits stay in a CPU's cache

# Weights that the libraries take unasked. Of both forms diffusers takes the shards, transformers
# the single file (`modeling_utils.py` of either).
_DEFAULTS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
)
# Of a variant, diffusers and transformers put its name in other places.
_INDEX = re.compile(r".+\.safetensors(\.[^.]+)?\.index(\.[^.]+)?\.json")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")

# First bytes of what takes the place of a safetensors file, and what that is.
_IMPOSTORS = {
    rb"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    rb"GGUF": "a GGUF file, whose weights are quantized already: give the 16-bit safetensors",
    rb"\s*<(!doctype|html|head|\?xml)": "an HTML or XML page, as a failed download leaves it",
    rb"PK\x03\x04|\x80[\x02-\x05]": "a pickle of PyTorch, which isn't read: convert it first",
    rb"\s*[{\[]": "JSON text, as a failed download leaves it",
    rb"\x00\x05\x16\x07": "metadata of macOS (AppleDouble), not the file itself",
    rb"\x89HDF": "an HDF5 file",
    rb"\Z": "empty",
}
# Names of tensors that tell a quantized format, and whose it is.
_QUANTIZED = {
    r".+\.comfy_quant": "ComfyUI's comfy_quant",
    r".+\.(wscales|wtscale|smooth_factor(_orig)?)": "SVDQuant (nunchaku)",
    r".+\.(quant_state\.bitsandbytes__.+|SCB|absmax|nested_absmax|quant_map)": "bitsandbytes",
    r".+\.(weight_packed|weight_zero_point|weight_shape)": "compressed-tensors",
    r".+\.(qweight|qzeros|g_idx)": "GPTQ or AWQ",
    r".+\.(weight_scale_2|pre_quant_scale|weight_s_rel)": "ModelOpt or ComfyUI, in 4 bits",
    r"(.+\.)?scaled_fp8|.+\.(scale_(weight|input)|(weight|input)_scale(_inv)?)": "scaled float8",
    r".+\.(weight\._(data|scale|shift)|weight_qtype)": "optimum-quanto",
}


class CheckpointError(ValueError):
    """A model folder or checkpoint that can't be used; the message names the file or tensor."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors of one or several safetensors files, memory-mapped and read by name."""

    path: Path  # of the folder, the single file or the index
    files: dict[str, Path]  # tensor name to file
    shapes: dict[str, tuple[int, ...]]  # tensor name to shape
    dtypes: dict[str, str]  # tensor name to dtype in the words of safetensors, such as "BF16"
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)  # of a single file
    prefix: str = ""  # that every name has in the files and lacks here

    def read(self, name: str) -> np.ndarray:
        """Return one tensor in its stored dtype, bfloat16 through ml_dtypes; float8 as bfloat16.

        It is read-only, and not in memory yet: what is looked at of it comes from the file.

        Raises:
          CheckpointError: the file has changed since it was opened.
        """
        file, stored = self.files[name], self.prefix + name
        try:
            return _mapped(file, stored)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file}: {stored} can't be read any more: {error}") from None

    @property
    def bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(
            math.prod(shape) * int(re.search(r"\d+|$", self.dtypes[name])[0] or 8) // 8
            for name, shape in self.shapes.items()
        )

    def stored_dtype(self, name: str) -> str:
        """Return a tensor's dtype in the words of safetensors, such as "BF16"."""
        return self.dtypes[name]

    def under(self, prefix: str) -> "Checkpoint":
        """Return the tensors whose names have a prefix, without it."""
        names = [name for name in self.files if name.startswith(prefix)]
        files, shapes, dtypes = (
            {name[len(prefix) :]: table[name] for name in names}
            for table in (self.files, self.shapes, self.dtypes)
        )
        return Checkpoint(self.path, files, shapes, dtypes, self.metadata, self.prefix + prefix)

    def without(self, pattern: str) -> "Checkpoint":
        """Return the tensors whose names don't start with what a regular expression matches."""
        names = [name for name in self.files if not re.match(pattern, name)]
        files, shapes, dtypes = (
            {name: table[name] for name in names}
            for table in (self.files, self.shapes, self.dtypes)
        )
        return Checkpoint(self.path, files, shapes, dtypes, self.metadata, self.prefix)


def read_json(path: Path) -> dict:
    """Read a JSON object; raises CheckpointError naming the file if it is absent or malformed."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file; expected one with a JSON object")
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; expected a diffusers model folder") from None
    except RecursionError:
        raise CheckpointError(f"{path} can't be read as JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        told = _impostor(path)
        if told and not told.startswith("JSON"):
            raise CheckpointError(f"{path} is {told}") from None
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open the safetensors of a model.

    Args:
      path: a folder, of which the default weights are taken, or a variant if it is all there is; an
        index of shards; or a safetensors file.

    Raises:
      CheckpointError: no safetensors there, several sets of which none is the default, a shard is
        missing, an index that doesn't fit its shards, or a file is corrupt or truncated.
    """
    path = Path(path)
    chosen = _default_weights(path) if path.is_dir() else path
    if _INDEX.fullmatch(chosen.name):
        return _open_shards(path, chosen)
    if _SHARD.fullmatch(chosen.name) and not chosen.name.endswith("-00001-of-00001.safetensors"):
        raise CheckpointError(
            f"{chosen} is one of several shards; give their folder, with its index, or the index"
        )
    header, metadata = _read_header(chosen)
    shapes, dtypes = ({name: x[i] for name, x in header.items()} for i in range(2))
    return Checkpoint(path, dict.fromkeys(header, chosen), shapes, dtypes, metadata)


def weights_in(folder: Path) -> list[Path]:
    """Return the sets of weights in a folder, each an index of shards or a file, sorted.

    Hidden files, such as those that macOS puts beside others, are left alone.
    """
    names = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    indexes = [path for path in names if _INDEX.fullmatch(path.name)]
    shards = {shard for index in indexes for shard in _weight_map(index, strict=False).values()}
    singles = [x for x in names if x.name.endswith(".safetensors") and x.name not in shards]
    return sorted([*indexes, *singles])


def is_finite_in_bfloat16(value: np.ndarray) -> bool:
    """Return whether a floating array of any shape is finite, also when rounded to bfloat16."""
    flat = value.ravel(order="K")  # a view where the elements lie side by side
    starts = range(0, flat.size, _CHECKED_AT_ONCE)
    return all(_is_finite(flat[start : start + _CHECKED_AT_ONCE]) for start in starts)


def _is_finite(flat: np.ndarray) -> bool:  # [elements], at least one
    if flat.dtype.itemsize == 8:
        with np.errstate(over="ignore"):
            flat = flat.astype(np.float32)
    bits = flat.view(f"u{flat.dtype.itemsize}")
    magnitude = bits & bits.dtype.type(2 ** (8 * bits.dtype.itemsize - 1) - 1)
    return int(magnitude.max()) < _INFINITE_BITS[flat.dtype.name]


def find_prefix(
    names: Iterable[str], telling: str, path: Path | str = "", within: str = ""
) -> str | None:
    """Return what stands before a name that tells a model from others; None if it isn't there.

    Wrappers and programs put their own words before every name of a model, such as "_orig_mod." or
    "model.diffusion_model.".

    Args:
      names: of tensors.
      telling: the name of one of the model's tensors.
      path: of the file, for errors.
      within: regular expression that the prefix must hold.

    Raises:
      CheckpointError: there are several such models.
    """
    found = {name[: -len(telling)] for name in names if name.endswith(telling)}
    found = sorted(x for x in found if (not x or x.endswith(".")) and re.search(within, x))
    if len(found) > 1:
        listed = ", ".join(repr(prefix) for prefix in found)
        raise CheckpointError(
            f"{path} holds {telling} several times, behind the prefixes {listed}; "
            "give a file with one model of a kind"
        )
    return found[0] if found else None


def open_folder(folder: Path) -> tuple[dict[str, Any], Checkpoint]:
    """Return the contents of a component's config.json, and its opened tensors.

    Args:
      folder: the component's.

    Raises:
      CheckpointError: a file can't be used, or the component is quantized.
    """
    config = read_json(folder / "config.json")
    checkpoint = open_checkpoint(folder)
    refuse_quantized(folder, checkpoint.shapes, config)
    return config, checkpoint


def unwrap(checkpoint: Checkpoint, telling: str) -> Checkpoint:
    """Return a model's tensors without the prefix that all their names share, if there is one."""
    prefix = find_prefix(checkpoint.shapes, telling, checkpoint.path)
    if not prefix or not all(name.startswith(prefix) for name in checkpoint.shapes):
        return checkpoint
    return checkpoint.under(prefix)


def quantized_by(names: Iterable[str]) -> str | None:
    """Return whose quantized format the names of tensors belong to; None for none."""
    names = list(names)
    for pattern, format_ in _QUANTIZED.items():
        if any(map(re.compile(pattern).fullmatch, names)):
            return format_
    return None


def refuse_quantized(path: Path, names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a model is quantized: its values mean nothing without their scales.

    Args:
      path: of the model, for the error.
      names: of its tensors.
      config: contents of its config.json, or {}.
    """
    described = config.get("quantization_config")
    method = described.get("quant_method") if isinstance(described, dict) else described
    if found := quantized_by(names) or method:
        raise CheckpointError(f"{path} is quantized already, by {found}; give the 16-bit model")


def _default_weights(folder: Path) -> Path:
    found = weights_in(folder)
    for path in found:
        if not path.is_file():
            raise CheckpointError(f"{path} is no regular file, or a link to none")
    by_name = {path.name: path for path in found}
    if default := next((by_name[name] for name in _DEFAULTS if name in by_name), None):
        return default
    if len(found) == 1:
        return found[0]
    if found and all(_SHARD.fullmatch(name) for name in by_name):
        raise CheckpointError(f"{folder} holds shards without their *.safetensors.index.json")
    if not found:
        raise CheckpointError(
            f"{folder} holds 0 safetensors files and no index; expected one file or "
            "one *.safetensors.index.json"
        )
    raise CheckpointError(
        f"{folder} holds several sets of weights, none of which is the default: "
        f"{', '.join(by_name)}; leave one"
    )


def _weight_map(index: Path, *, strict: bool = True) -> dict[str, str]:
    """Return tensor name to file name; without `strict` {} for an index that can't be used."""
    try:
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{index}: weight_map must be an object from tensors to files")
        for name, shard in found.items():
            # Shards lie beside their index: a path could lead out of the model.
            if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
                raise CheckpointError(
                    f"{index}: weight_map[{name!r}] is {shard!r}; expected the name of a "
                    "safetensors file in the same folder"
                )
    except CheckpointError:
        if strict:
            raise
        return {}
    return found


def _open_shards(path: Path, index: Path) -> Checkpoint:
    weight_map = _weight_map(index)
    shards = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    if missing := [file.name for file in shards if not file.exists()]:
        raise CheckpointError(f"{index} names missing shards: {', '.join(missing)}")
    headers = {shard: _read_header(shard)[0] for shard in shards}
    files = {name: index.parent / shard for name, shard in weight_map.items()}
    for name, shard in files.items():
        if name not in headers[shard]:
            raise CheckpointError(f"{index} says that {name} is in {shard.name}; it isn't")
    for shard, header in headers.items():
        for name in header:
            if name not in weight_map and files.setdefault(name, shard) != shard:
                raise CheckpointError(f"{path}: {name} is in several shards and not in the index")
    shapes, dtypes = ({name: headers[x][name][i] for name, x in files.items()} for i in range(2))
    return Checkpoint(path, files, shapes, dtypes)


def _read_header(file: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], dict[str, str]]:
    """Return shape and dtype of every tensor, and the metadata."""
    if not file.exists():
        raise CheckpointError(f"{file} does not exist")
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file; expected safetensors")
    try:
        with safe_open(file, "np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            header = {name: (tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()}
            return header, tensors.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        told = _impostor(file)
        raise CheckpointError(
            f"{file} is {told}"
            if told
            else f"{file} is not a readable safetensors file, or cut off: {error}"
        ) from None


def _impostor(file: Path) -> str | None:
    """Return in words what a file is that is no safetensors file, if its first bytes tell."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return None
    found = (told for pattern, told in _IMPOSTORS.items() if re.match(pattern, start, re.I))
    return next(found, None)


@functools.cache
def _float8_table(dtype: str) -> np.ndarray:
    """Return the bfloat16 value of each byte, [256]."""
    return np.arange(256, dtype=np.uint8).view(_FLOAT8[dtype]).astype(ml_dtypes.bfloat16)


def _mapped(file: Path, name: str) -> np.ndarray:
    """Return a tensor by its place in the file (the format: safetensors' README, "Format").

    The library itself copies it, and holds the interpreter's lock meanwhile.
    """
    status = file.stat()
    start, tensors = _places(file, status.st_size, status.st_mtime_ns)
    described = tensors[name]
    dtype, shape = described["dtype"], tuple(described["shape"])
    stored = np.dtype(np.uint8 if dtype in _FLOAT8 else _DTYPES[dtype])
    first, end = described["data_offsets"]
    if end - first != math.prod(shape) * stored.itemsize:
        raise ValueError(f"it has {end - first} bytes, which isn't {list(shape)} of {dtype}")
    if first == end:
        return np.zeros(shape, _float8_table(dtype).dtype if dtype in _FLOAT8 else stored)
    value = np.asarray(np.memmap(file, stored, "r", start + first, shape))
    return _float8_table(dtype)[value] if dtype in _FLOAT8 else value


@functools.lru_cache(maxsize=32)
def _places(file: Path, size: int, time: int) -> tuple[int, dict[str, Any]]:
    """Return where a file's data begins and what its header says, as long as it is as it was."""
    with safe_open(file, "np"), file.open("rb") as stream:  # which checks that the header is sound
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))
