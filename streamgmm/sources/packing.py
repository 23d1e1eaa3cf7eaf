"""Numbers packed by the CF conventions, as xarray writes them to zarr: attributes say what the stored ones mean."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Floats, Rows

#: No integer type holds more.
LARGEST_INTEGER = 2**64

#: Whole numbers up to here are exact in float64.
LARGEST_WHOLE = 2**53

#: Attributes that make the stored numbers something else than the values.
PACKING = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")


@dataclass(frozen=True)
class Packing:
    """values = stored * scale_factor + add_offset, and NaN where the stored number is one of ``missing``.

    CF conventions 1.11, sections 2.5.1 and 8.1.  dtype: that of the stored numbers; another one only for integers that
    the attribute _Unsigned declares unsigned, or signed.  missing: numbers that dtype holds.  names: the attributes
    that say so.
    """

    names: tuple[str, ...]
    scale_factor: float
    add_offset: float
    missing: tuple[float, ...]
    dtype: np.dtype[Any]

    def decoded(self, stored: Rows, locate: Callable[[int, int], str]) -> Floats:
        """The values (m, d) as float64. DataError, with the words of ``locate``, where a number would be rounded."""
        stored = stored.view(self.dtype)
        # in the stored type: the text 1e20 of an attribute is not the float64 that a stored float32 1e20 becomes
        absent = np.isin(stored, np.array(self.missing, dtype=self.dtype))
        if stored.dtype.kind in "iu" and stored.dtype.itemsize == 8:
            rounded = ((stored > LARGEST_WHOLE) | (stored < -LARGEST_WHOLE)) & ~absent
            if rounded.any():
                row, *column = map(int, np.argwhere(rounded)[0])
                raise DataError(
                    f"The stored number {stored[row, *column]} in {locate(row, *(column or [0]))} is beyond 2**53, so "
                    "float64 cannot hold it. Store the values in another type."
                )
        values = stored.astype(np.float64)
        values *= self.scale_factor
        values += self.add_offset
        values[absent] = np.nan
        return values


def packing_of(
    attributes: Mapping[str, Any], dtype: np.dtype[Any], fill_value: Any, zarr_format: int, name: str
) -> Packing | None:
    """How the numbers of an array are packed; None where they are the values themselves.

    Raises DataError where an attribute is not the number that the conventions ask for.
    """
    missing = {key: _numbers(attributes, key, name) for key in ("_FillValue", "missing_value")}
    names = [key for key in PACKING if key in attributes]
    if zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes and fill_value is not None:
        # what xarray writes into version 2 stores: there the fill value is the missing value, not an attribute
        missing["fill_value"] = (np.asarray(fill_value).item(),)
        names.append("fill_value")
    scale, offset = (float(_number(attributes.get(key, default), key, name)) for key, default in NEUTRAL.items())
    stored = _declared(attributes, dtype)
    held = {
        _held(value, stored, key, name, wraps=stored != dtype)
        for key, values in missing.items()
        for value in values
        if value == value  # NaN is missing anyway
    }
    if scale == 1.0 and offset == 0.0 and not held and stored == dtype:
        return None
    return Packing(tuple(names), scale, offset, tuple(sorted(held)), stored)


def _declared(attributes: Mapping[str, Any], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the stored numbers: of integers, _Unsigned may say that they are unsigned, or that they are not."""
    kind = {"true": "u", "false": "i"}.get(str(attributes.get("_Unsigned")).lower())
    return dtype if kind is None or dtype.kind not in "iu" else np.dtype(dtype.str.replace(dtype.kind, kind))


def _held(value: float, dtype: np.dtype[Any], key: str, name: str, *, wraps: bool) -> float:
    """``value`` as the stored number that means it. DataError where ``dtype`` holds none.

    wraps: the number may be that of the other signedness which has the same bits.
    """
    if dtype.kind == "f":
        with np.errstate(over="ignore"):
            number = float(dtype.type(value))
        if np.isinf(number) == np.isinf(value):
            return number
    elif abs(value) <= LARGEST_INTEGER and value == int(value):
        limits = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        wrap = 2 ** (8 * dtype.itemsize) if wraps else 0
        for whole in (int(value), int(value) + wrap, int(value) - wrap):
            if limits[0] <= whole <= limits[1]:
                return whole
    raise DataError(
        f"The attribute {key} of {name} is {value}, which its type {dtype} does not hold, so no stored number can mean "
        "it. Mend the attribute, or remove it if no number is missing."
    )


NEUTRAL = {"scale_factor": 1.0, "add_offset": 0.0}


def _numbers(attributes: Mapping[str, Any], key: str, name: str) -> tuple[float, ...]:
    """The number of an attribute, or each of a list of them; none where it is absent."""
    value = attributes.get(key)
    if value is None:
        return ()
    return tuple(_number(item, key, name) for item in (value if isinstance(value, list) else [value]))


def _number(value: Any, key: str, name: str) -> float:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError("not a number")
        number = _text_number(value) if isinstance(value, str) else value
        finite = np.isfinite(float(number))
    except (TypeError, ValueError, OverflowError, binascii.Error, struct.error) as error:
        raise DataError(
            f"The attribute {key} of {name} is {value!r}, but the CF conventions ask for a number. Mend the attribute, "
            "or remove it if the stored numbers are the values."
        ) from error
    if key in NEUTRAL and (not finite or (key == "scale_factor" and number == 0)):
        wanted = "finite, and a scale not zero"
        raise DataError(f"The attribute {key} of {name} is {number}, but it must be {wanted}. Mend the attribute.")
    return number


def _text_number(text: str) -> float:
    """A number in words, or as xarray writes a floating-point _FillValue into version 3 stores: base64 of 8 bytes."""
    try:
        return float(text)
    except ValueError:
        return float(struct.unpack("<d", base64.b64decode(text, validate=True))[0])
