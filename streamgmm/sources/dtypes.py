"""Which arrays can be rows: two axes, real numbers of at most 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamgmm.errors import DataError, DataTypeError


def require_real_rows(
    shape: tuple[float, ...],
    dtype: np.dtype[Any],
    name: str,
    *,
    column: bool = False,
    stored: bool = False,
    grows: bool = False,
) -> None:
    """DataError where ``shape`` is not (n, d) with both at least 1; DataTypeError where ``dtype`` is not real.

    column: one number a row is asked for, (n,).  stored: the array lies in a store, so that it has no reshape.
    grows: rows may still come, so that there may be none yet.
    """
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataTypeError(
            f"{name} holds values of type {dtype}. Rows must be real numbers of at most 64 bits: boolean, integer or "
            "floating point. Convert the values first."
        )
    if column and len(shape) != 1:
        raise DataError(f"{name} has shape {shape}, but one number a row is expected: (n,).")
    if not column and len(shape) != 2:
        raise DataError(
            f"{name} has {len(shape)} dimension(s) {shape}, but rows need two: (rows, features). "
            f"{_way_out(shape, stored)}"
        )
    if not grows:
        require_some_rows(shape, name)
    if n_columns(shape) == 0:
        raise DataError(f"Found array with 0 feature(s) (shape={shape}) in {name} while a minimum of 1 is required.")


def require_some_rows(shape: tuple[float, ...], name: str) -> None:
    """DataError where there is no row."""
    if shape[0] == 0:
        raise DataError(f"{name} has 0 rows (shape={shape}) while a minimum of 1 is required.")


def _way_out(shape: tuple[float, ...], stored: bool) -> str:
    array = "dask.array.from_zarr(PATH)" if stored else "array"
    if len(shape) < 2:
        single_row = "" if stored else " if it has a single feature, or array.reshape(1, -1) if it is a single row"
        return f"Reshape your data with {array}.reshape(-1, 1){single_row}."
    return (
        f"Reshape your data with {array}.reshape(-1, {shape[-1]}) if the last axis holds the features, or with "
        f"{array}.reshape(-1, 1) if each value is a row of its own; several variables on one grid are joined with "
        "dask.array.stack([a.ravel(), b.ravel()], axis=1)."
    )


def require_unmasked(values: Any, name: str) -> None:
    """DataTypeError where values of a masked array are masked: what lies below a mask means nothing."""
    if isinstance(values, np.ma.MaskedArray) and values.dtype.names is None and np.ma.is_masked(values):
        raise DataTypeError(
            f"{name} is a masked array, and some of its values are masked. Fill them in, or drop those rows: "
            'array.filled(numpy.nan) with open_source(..., nan_policy="omit") leaves them out.'
        )


def n_columns(shape: tuple[Any, ...]) -> int:
    """Features of an array of this shape; a column has one."""
    return int(shape[1]) if len(shape) > 1 else 1
