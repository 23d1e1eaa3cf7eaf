"""Arithmetic of canonical blocks: integers in, integers out."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

from streamgmm.errors import ParameterError, shown

#: Bytes of float64 rows that a canonical block aims at where rows come from a store.
STORE_BLOCK_BYTES = 32 * 2**20

#: The same for rows in memory: nothing is read, so smaller blocks only spread the work over more threads.
MEMORY_BLOCK_BYTES = 4 * 2**20

#: Blocks that small arrays are cut into, as long as they are not below the least size.
MEMORY_BLOCKS = 8
LEAST_MEMORY_BLOCK_BYTES = 2**18


def canonical_block_rows(grid_rows: int, n_features: int, target_bytes: int) -> int:
    """The multiple of ``grid_rows`` whose rows as float64 come nearest to ``target_bytes``; at least one of them.

    A function of the source alone, never of the machine: the last bits of a fit depend on it.
    """
    return max(1, round(target_bytes / (8 * n_features * grid_rows))) * grid_rows


def memory_block_bytes(n_rows: int, n_features: int) -> int:
    """What a canonical block of rows in memory aims at."""
    part_rows = -(-n_rows // MEMORY_BLOCKS)  # rounded up, else a few rows would be a block of their own
    return min(MEMORY_BLOCK_BYTES, max(LEAST_MEMORY_BLOCK_BYTES, 8 * part_rows * n_features))


def checked_block_rows(block_rows: int | None, grid_rows: int, n_features: int, target_bytes: int) -> int:
    """``block_rows`` as the user gave it, else the canonical one. ParameterError where it is not a positive integer."""
    if block_rows is None:
        return canonical_block_rows(grid_rows, n_features, target_bytes)
    if isinstance(block_rows, bool) or not isinstance(block_rows, Integral) or block_rows < 1:
        raise ParameterError(
            f"block_rows must be a positive whole number of rows or None, but it is {shown(block_rows)}."
        )
    return int(block_rows)


def ranges(n_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive runs of ``size`` rows; the last one may be shorter."""
    return ((start, min(start + size, n_rows)) for start in range(0, n_rows, size))
