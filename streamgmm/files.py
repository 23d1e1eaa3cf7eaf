"""The one file format: arrays and a JSON header in a safetensors file. Nothing in it runs code."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from streamgmm.errors import FileFormatError

FORMAT = 1
#: Key of the JSON text in the safetensors header
HEADER = "streamgmm"
#: Bytes of a whole file, and of its header: more is refused before anything is allocated.
LARGEST_FILE = 2 * 2**30
LARGEST_HEADER = 16 * 2**20


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds. kind: "model". facts: plain JSON values. arrays: named arrays."""

    kind: str
    facts: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray[Any, Any]]


def write(path: str | Path, contents: Contents) -> None:
    """Write beside ``path``, flush to disk, then replace: a reader sees the old file or the new one, never a part."""
    target = Path(path)
    if target.is_symlink():
        raise FileFormatError(
            f"{str(path)!r} is a symbolic link, which writing would replace. Give the path of the file it leads to."
        )
    if not target.parent.is_dir():
        raise FileFormatError(
            f"There is no folder {str(target.parent)!r} to write {target.name!r} into. Make it first."
        )
    arrays = {name: np.asarray(array, order="C") for name, array in contents.arrays.items()}
    header = {
        "format": FORMAT,
        "kind": contents.kind,
        "written_by": f"streamgmm {version('streamgmm')}",
        "sha256": {name: _digest(array) for name, array in arrays.items()},
        "facts": dict(contents.facts),
    }
    header["seal"] = _seal(header)
    text = json.dumps(header, sort_keys=True)
    size = sum(array.nbytes for array in arrays.values())
    if len(text) > LARGEST_HEADER // 2 or size > LARGEST_FILE - LARGEST_HEADER:  # it is escaped once more
        raise FileFormatError(
            f"{target.name} would have {size:,} bytes and a header of {len(text):,}, more than is read back: at most "
            f"{LARGEST_FILE:,} and {LARGEST_HEADER:,}. Use fewer components or features."
        )
    data = save(arrays, metadata={HEADER: text})
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
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


def read(path: str | Path, kind: str) -> Contents:
    """Read and verify a file of ``kind``. FileFormatError where it is damaged, foreign, newer or of another kind."""
    _require_plausible(Path(path))
    try:
        with safe_open(str(path), framework="numpy") as file:
            header = _header(path, file.metadata())
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(
            f"{Path(path).name} cannot be read as a streamgmm file ({error}). It is damaged or something else; "
            "take a backup, or fit again."
        ) from error
    if header["kind"] != kind:
        raise FileFormatError(f"{Path(path).name} holds a {header['kind']}, but a {kind} was asked for.")
    digests = {name: _digest(array) for name, array in arrays.items()}
    if digests != header["sha256"]:
        names = sorted({name for name, _ in set(digests.items()) ^ set(header["sha256"].items())})
        raise FileFormatError(
            f"{Path(path).name} is damaged: the contents of {names} do not match their hashes. Take a backup, or fit "
            "again."
        )
    return Contents(kind, header["facts"], arrays)


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
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no regular file"
        raise FileFormatError(f"There is no file {str(path)!r}: it is {what}. Give the path that a model was saved to.")
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


def _header(path: str | Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    header: Any = json.loads((metadata or {}).get(HEADER, "null"))
    if not isinstance(header, dict) or not {"format", "kind", "sha256", "facts", "seal"} <= header.keys():
        raise FileFormatError(f"{Path(path).name} is a safetensors file, but streamgmm did not write it.")
    if header["format"] != FORMAT:
        raise FileFormatError(
            f"{Path(path).name} has format {header['format']}; this version of streamgmm reads format {FORMAT}. "
            "Install a newer streamgmm to open it."
        )
    if header["seal"] != _seal(header):
        raise FileFormatError(
            f"{Path(path).name} is damaged: its header does not match its hash. Take a backup, or fit again."
        )
    return header


def _seal(header: Mapping[str, Any]) -> str:
    """The hash of all of the header but the seal itself, the hashes of the arrays included."""
    rest = {name: value for name, value in header.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(f"{array.dtype.str}{array.shape}".encode() + array.tobytes()).hexdigest()
