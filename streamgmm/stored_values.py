"""Frozen values, made of one another, as plain values and a few arrays of a file, and back: states of solvers.

Nothing but the classes that a reader names can come out of a file. What is one object in two places stays one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np

from streamgmm.covariance import STRUCTURES, AbstractCovariance

Array = np.ndarray[Any, Any]

#: Numbers that JSON has no word for.
ODD = {"nan": nan, "inf": inf, "-inf": -inf}


def packed(value: Any) -> tuple[dict[str, Any], dict[str, Array]]:
    """``value`` as facts and arrays of a file. TypeError where something in it cannot be kept."""
    packer = _Packer()
    root = packer.plain(value)
    arrays = {f"numbers_{kind}": np.concatenate(parts) for kind, parts in packer.numbers.items()}
    return {"objects": packer.objects, "root": root}, arrays


def unpacked(facts: Mapping[str, Any], arrays: Mapping[str, Array], classes: Iterable[type]) -> Any:
    """What was packed. KeyError, TypeError, ValueError or IndexError where it is nothing that was packed here.

    classes: those of which it may be made.
    """
    unpacker = _Unpacker(arrays, {cls.__name__: cls for cls in classes})
    for described in facts["objects"]:
        unpacker.made.append(unpacker.made_of(described))
    return unpacker.value(facts["root"])


class _Packer:
    """objects: one entry for each dataclass, after those it is made of.  numbers: arrays laid end to end, by type."""

    def __init__(self) -> None:
        self.objects: list[dict[str, Any]] = []
        self.numbers: dict[str, list[Array]] = {}
        self._sizes: dict[str, int] = {}
        self._known: dict[int, tuple[int, Any]] = {}

    def plain(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (np.bool_, np.integer)):
            return value.item()
        if isinstance(value, int):
            return value
        if isinstance(value, float):
            return float(value) if isfinite(value) else {"odd": str(float(value))}
        if isinstance(value, (tuple, list)):
            return {"items": [self.plain(item) for item in value]}
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, type) and issubclass(value, AbstractCovariance):
            return {"structure": value.kind}
        if is_dataclass(value) and not isinstance(value, type):
            return {"object": self._object(value)}
        raise TypeError(f"a {type(value).__name__} cannot be kept in a file")

    def _array(self, value: Array) -> dict[str, Any]:
        kind = value.dtype.newbyteorder("=").name
        at = self._sizes.get(kind, 0)
        self.numbers.setdefault(kind, []).append(value.ravel())
        self._sizes[kind] = at + value.size
        return {"array": kind, "shape": list(value.shape), "at": at}

    def _object(self, value: Any) -> int:
        known = self._known.get(id(value))
        if known is None:
            described = {field.name: self.plain(getattr(value, field.name)) for field in fields(value) if field.init}
            self.objects.append({"class": type(value).__name__, "fields": described})
            known = self._known[id(value)] = (len(self.objects) - 1, value)  # it must outlive its number
        return known[0]


class _Unpacker:
    def __init__(self, arrays: Mapping[str, Array], classes: Mapping[str, type]) -> None:
        self._arrays, self._classes = arrays, classes
        self.made: list[Any] = []

    def made_of(self, described: Mapping[str, Any]) -> Any:
        values = {name: self.value(plain) for name, plain in described["fields"].items()}
        return self._classes[described["class"]](**values)

    def value(self, plain: Any) -> Any:
        if not isinstance(plain, dict):
            return plain
        if "object" in plain:
            return self.made[plain["object"]]
        if "items" in plain:
            return tuple(self.value(item) for item in plain["items"])
        if "odd" in plain:
            return ODD[plain["odd"]]
        if "structure" in plain:
            return STRUCTURES[plain["structure"]]
        size, at = int(np.prod(plain["shape"], dtype=np.int64)), plain["at"]
        numbers = self._arrays.get(f"numbers_{plain['array']}", np.empty(0, dtype=plain["array"]))
        if not (at >= 0 and size >= 0 and at + size <= len(numbers)):
            raise ValueError("an array that lies outside what the file holds")
        return numbers[at : at + size].reshape(plain["shape"]).copy()
