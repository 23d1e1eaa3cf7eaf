"""Which arrays can be rows: two axes, real numbers of at most 64 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from streamgmm.errors import DataError, DataTypeError


def require_real_rows(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """DataError where ``shape`` is not (n, d) with both at least 1; DataTypeError where ``dtype`` is not real."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataTypeError(
            f"{name} holds values of type {dtype}. Rows must be real numbers of at most 64 bits: boolean, integer or "
            "floating point. Convert the values first."
        )
    if len(shape) != 2:
        raise DataError(
            f"{name} has {len(shape)} dimension(s) {shape}, but rows need two: (rows, features). Reshape your data "
            "with array.reshape(-1, 1) if it has a single feature, or array.reshape(1, -1) if it is a single row."
        )
    if shape[0] == 0:
        raise DataError(f"{name} has 0 rows (shape={shape}) while a minimum of 1 is required.")
    if shape[1] == 0:
        raise DataError(f"Found array with 0 feature(s) (shape={shape}) in {name} while a minimum of 1 is required.")
