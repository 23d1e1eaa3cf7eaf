"""The one file format: arrays and a JSON header in a safetensors file. Nothing in it runs code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import struct
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from streamgmm.errors import FileFormatError
from streamgmm.protocols import Floats

FORMAT = 1
#: Key of the JSON text in the safetensors header
HEADER = "streamgmm"
#: Bytes of a whole file, and of its header: more is refused before anything is allocated.
LARGEST_FILE = 2 * 2**30
LARGEST_HEADER = 16 * 2**20
#: A file that was begun and is older than this belongs to a writer that is no more.
OLD_SECONDS = 3600.0
#: Arrays in a file: a model has six at most.
MOST_ARRAYS = 64


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds. kind: "model" or "statistics". facts: plain JSON values. arrays: named arrays."""

    kind: str
    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, Any]]


def write(path: str | Path, contents: Contents) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one, never a part.

    Raises FileFormatError where that is not possible; what stood at ``path`` is then as it was.
    """
    target = _as_path(path)
    data = _encoded(contents, target.name)
    with _in_words(target):
        _require_replaceable(target)
        _replace(target, data)


def require_target(path: str | Path) -> None:
    """FileFormatError where nothing could be written to ``path``, which is found out before the work is done."""
    target = _as_path(path)
    with _in_words(target):
        _require_replaceable(target)


@contextmanager
def _in_words(target: Path) -> Iterator[None]:
    """What a file system says of a path, too long or with a NUL in it too, as a FileFormatError."""
    try:
        yield
    except FileFormatError:
        raise
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"{str(target)!r:.200} could not be written ({error}). What stood there is as it was; choose another path, "
            "or mend what is named."
        ) from error


def _encoded(contents: Contents, name: str) -> bytes:
    """The bytes of a file; FileFormatError, naming it, where they would be more than is read back."""
    arrays = {name: np.asarray(array, order="C") for name, array in contents.arrays.items()}
    header = {
        "format": FORMAT,
        "kind": contents.kind,
        "written_by": f"streamgmm {version('streamgmm')}",
        "sha256": {name: _digest(array) for name, array in arrays.items()},
        "facts": dict(contents.facts),
    }
    header["seal"] = _seal(header)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    size = sum(array.nbytes for array in arrays.values())
    if len(text) > LARGEST_HEADER // 2 or size > LARGEST_FILE - LARGEST_HEADER:  # it is escaped once more
        raise FileFormatError(
            f"{name} would have {size:,} bytes and a header of {len(text):,}, more than is read back: at most "
            f"{LARGEST_FILE:,} and {LARGEST_HEADER:,}. Use fewer components or features."
        )
    return save(arrays, metadata={HEADER: text})


def _require_replaceable(target: Path) -> None:
    """FileFormatError where there is no folder to write into, or what stands there is no file of its own."""
    if not target.parent.is_dir():
        raise FileFormatError(
            f"There is no folder {str(target.parent)!r} to write {target.name!r} into. Make it first."
        )
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise FileFormatError(
            f"{str(target)!r} is a symbolic link, which writing would replace. Give the path of the file it leads to."
        )
    if not stat.S_ISREG(mode):
        raise FileFormatError(f"{str(target)!r} is {_kind(mode)}, which is not replaced. Give the path of a file.")


def _replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    _sweep(target)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sweep(target: Path) -> None:
    """Remove what writers of the same file left beside it when they were killed, once it is old."""
    form = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{32}}")
    with suppress(OSError):  # it is in nobody's way
        for entry in os.scandir(target.parent):
            if form.fullmatch(entry.name) and time.time() - entry.stat(follow_symlinks=False).st_mtime > OLD_SECONDS:
                os.unlink(entry.path)


def read(path: str | Path, *kinds: str) -> Contents:
    """Read and verify a file of one of ``kinds``. FileFormatError where it is damaged, foreign, newer or another."""
    target = _as_path(path)
    try:
        _require_plausible(target)
        return _read(target, kinds)
    except FileFormatError:
        raise
    except (
        SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise FileFormatError(
            f"{target.name} cannot be read as a streamgmm file ({error or type(error).__name__}). It is damaged or "
            "something else; take a backup, or fit again."
        ) from error


def _read(path: Path, kinds: tuple[str, ...]) -> Contents:
    with safe_open(str(path), framework="numpy") as file:
        names = list(file.keys())
        if len(names) > MOST_ARRAYS:
            raise FileFormatError(f"{path.name} holds {len(names):,} arrays, so it is no streamgmm file.")
        header = _header(path, file.metadata())
        arrays = {name: file.get_tensor(name) for name in names}
    if header["kind"] not in kinds:
        asked = " or ".join(kinds)
        raise FileFormatError(f"{path.name} holds a {header['kind']!s:.40}, but a {asked} was asked for.")
    found, expected = {name: _digest(array) for name, array in arrays.items()}, header["sha256"]
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise FileFormatError(
            f"{path.name} is damaged: the contents of {wrong[:MOST_ARRAYS]} do not match their hashes. Take a backup, "
            "or fit again."
        )
    return Contents(header["kind"], header["facts"], arrays)


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, Path)):
        raise FileFormatError(f"A path is expected, but a {type(path).__name__} was given. Give the path of a file.")
    return Path(path)


def _require_plausible(path: Path) -> None:
    """FileFormatError where there is no file of its own, or one that claims more bytes than it has or may have."""
    try:
        found = path.lstat()
    except (OSError, ValueError) as error:
        raise FileFormatError(
            f"There is no file {str(path)!r}: it is not there. Give the path that a model was saved to."
        ) from error
    if stat.S_ISLNK(found.st_mode):
        raise FileFormatError(
            f"{str(path)!r} is a symbolic link, which may lead anywhere. Give the path of the file it leads to."
        )
    if not stat.S_ISREG(found.st_mode):
        raise FileFormatError(
            f"There is no file {str(path)!r}: it is {_kind(found.st_mode)}. Give the path that a model was saved to."
        )
    if found.st_size > LARGEST_FILE:
        raise FileFormatError(
            f"{path.name} has {found.st_size:,} bytes, but a model has at most {LARGEST_FILE:,}. It is something else."
        )
    with open(path, "rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(LARGEST_HEADER, found.st_size - 8):
        raise FileFormatError(
            f"{path.name} cannot be read as a streamgmm file (its header would have {length:,} bytes). It is damaged "
            "or something else; take a backup, or fit again."
        )


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "no regular file"


def _header(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    header: Any = json.loads((metadata or {}).get(HEADER, "null"), parse_constant=_refuse_constant)
    if not isinstance(header, dict) or not {"format", "kind", "sha256", "facts", "seal"} <= header.keys():
        raise FileFormatError(f"{path.name} is a safetensors file, but streamgmm did not write it.")
    if header["format"] != FORMAT:
        raise FileFormatError(
            f"{path.name} has format {header['format']!r:.40}; this version of streamgmm reads format {FORMAT}. "
            "Install a newer streamgmm to open it."
        )
    if header["seal"] != _seal(header):
        raise FileFormatError(
            f"{path.name} is damaged: its header does not match its hash. Take a backup, or fit again."
        )
    if not (isinstance(header["facts"], dict) and isinstance(header["sha256"], dict)):
        raise FileFormatError(f"{path.name} has a header whose facts or hashes are no mapping, so it is damaged.")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"its header holds {name}, which is no number")


def _seal(header: Mapping[str, Any]) -> str:
    """The hash of all of the header but the seal itself, the hashes of the arrays included."""
    rest = {name: value for name, value in header.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(array: np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)  # no copy of what may be large
    return digest.hexdigest()


# -- plain values of a header ----------------------------------------------------------------------------------------


def as_count(value: Any) -> int:
    """A whole number of at least zero; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise TypeError(f"{value!r:.40} where a count is expected")
    return value


def as_number(value: Any) -> float:
    """A finite number; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise TypeError(f"{value!r:.40} where a finite number is expected")
    return float(value)


def as_amount(value: Any) -> float:
    """A finite number of at least zero; TypeError otherwise."""
    if as_number(value) < 0:
        raise TypeError(f"{value!r:.40} where a number of at least zero is expected")
    return float(value)


def as_floats(arrays: Mapping[str, Any], name: str, shape: tuple[int | None, ...]) -> Floats:
    """An array of finite numbers; one without an element is not in the file."""
    found = as_array(arrays, name, np.dtype(np.float64), shape)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} is not finite")
    return found


def as_array(arrays: Mapping[str, Any], name: str, dtype: np.dtype[Any], shape: tuple[int | None, ...]) -> Any:
    array = arrays.get(name)
    if array is None:
        if all(shape):  # something is expected there
            raise KeyError(name)
        array = np.empty([size or 0 for size in shape], dtype=dtype)
    fits = len(shape) == array.ndim and all(
        size in (None, found) for size, found in zip(shape, array.shape, strict=True)
    )
    if array.dtype != dtype or not fits:
        raise TypeError(f"{name!r} holds {array.dtype} of shape {array.shape} where {dtype} of {shape} is expected")
    return array


# -- records of a fixed size, for as long as this process lives --------------------------------------------------------


class RecordFile:
    """Vectors of float64, all of one length, in one file that has no name: nothing of it is left behind.

    Records are read and written one at a time and never mapped: pages of a mapping would count as the process's own,
    and a full disk would kill it instead of raising an error.
    """

    def __init__(self, n_records: int, length: int) -> None:
        """Raises FileFormatError, with the numbers, where the folder for temporary files has no room."""
        self._n_records, self._length = n_records, length
        folder, needed = tempfile.gettempdir(), n_records * 8 * length
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise _no_room(n_records, needed, f"{free:,} are free")
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it lives as long as the records
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self._n_records

    def __getitem__(self, number: int) -> Floats:
        """The record as it was written last, read-only."""
        return np.frombuffer(os.pread(self._file.fileno(), 8 * self._length, self._place(number)))

    def __setitem__(self, number: int, record: Floats) -> None:
        left, place = memoryview(record.tobytes()), self._place(number)
        if len(left) != 8 * self._length:
            raise ValueError(f"a record of {len(left):,} bytes among those of {8 * self._length:,}")
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, place)
                left, place = left[written:], place + written
        except OSError as error:
            raise _no_room(self._n_records, self._n_records * 8 * self._length, str(error)) from error

    def _place(self, number: int) -> int:
        if not 0 <= number < self._n_records:
            raise IndexError(f"record {number} of {self._n_records}")
        return 8 * self._length * number


def _no_room(n_records: int, needed: int, why: str) -> FileFormatError:
    return FileFormatError(
        f"The statistics of {n_records:,} blocks take {needed:,} bytes in a file of the folder for temporary files, "
        f"{tempfile.gettempdir()!r}, but there is no room for it ({why}). Set TMPDIR to a folder with more room, give "
        "the source larger blocks (block_rows=), or use a solver that keeps no statistics of blocks."
    )
