"""A sample that is drawn by what rows hold and not by their numbers: the same in whatever order they lie.

A row is drawn where a hash of its values is small. Copies of a row are drawn all or none, and kept as one with their
number; where they are many, that is no even sample, and one by number is taken in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from streamgmm.protocols import Floats
from streamgmm.streams import Purpose, stream

#: An array of numbers that rows are drawn by.
Keys = np.ndarray[Any, np.dtype[np.uint64]]
#: The sign and the significand of a float64. Exponents are left out, so that units that are powers of two change none.
DIGITS = np.uint64(0x800F_FFFF_FFFF_FFFF)
#: Odd multipliers and shifts of SplitMix64 (Steele, Lea & Flood 2014, Figure 16).
MULTIPLIERS = np.array([0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB], dtype=np.uint64)
SHIFTS = np.array([30, 27], dtype=np.uint64)
HALF = np.uint64(32)
#: The rows of equal weight that a sample with copies tells as much as (Kish 1965), of all that it has, at least.
LEAST_EVEN = 0.75
#: Standard deviations by which there may be more or fewer rows than by number.
MOST_DEVIATIONS = 8.0


@dataclass(frozen=True, eq=False)
class Copies:
    """Rows (m, d) with their keys (m,) and weights (m,), and how many copies of each one row stands for (m,)."""

    rows: Floats
    keys: Keys
    weights: Floats
    numbers: Floats

    @classmethod
    def joined(cls, parts: Sequence[Copies], d: int) -> Copies:
        """Those of some parts of the rows, each once. The order of the parts changes nothing."""
        none = (np.empty((0, d)), np.empty(0, dtype=np.uint64), np.empty(0), np.empty(0))
        each = zip(none, *((part.rows, part.keys, part.weights, part.numbers) for part in parts), strict=True)
        return cls(*(np.concatenate(values) for values in each)).distinct()

    @staticmethod
    def most_bytes(n_rows: int, d: int) -> int:
        """Bytes of so many rows as they are drawn, and of a copy of them."""
        return 2 * 8 * n_rows * (d + 3)

    def distinct(self) -> Copies:
        """The same in the order of their keys, one row for all that are equal, with the sum of their weights."""
        order = np.argsort(self.keys)
        keys = self.keys[order]
        alike = keys[1:] == keys[:-1]
        if alike.any():  # copies, or rows whose keys are the same by chance
            tied = np.append(alike, False) | np.append(False, alike)
            among = order[tied]
            order[tied] = among[np.lexsort((self.weights[among], *self.rows[among].T[::-1], self.keys[among]))]
        rows = self.rows[order]
        alike[alike] = (rows[1:][alike] == rows[:-1][alike]).all(axis=1)
        if not alike.any():
            return Copies(rows, keys, self.weights[order], self.numbers[order])
        firsts = np.flatnonzero(np.append(True, ~alike))
        sums = (np.add.reduceat(values[order], firsts) for values in (self.weights, self.numbers))
        return Copies(rows[firsts], keys[firsts], *sums)

    def even(self, expected: float) -> bool:
        """Whether this is as good a sample as one by number that has so many rows: of as many rows but for chance, few
        of which are copies. Rows that are repeated often are either in it, or missing."""
        n_rows = float(self.numbers.sum())
        if n_rows == 0.0 or abs(n_rows - expected) > MOST_DEVIATIONS * sqrt(2.0 * expected):
            return False
        return n_rows**2 / float(self.numbers @ self.numbers) >= LEAST_EVEN * n_rows


@dataclass(frozen=True)
class Draw:
    """Rows are drawn whose key is below ``limit``. start: what keys begin with."""

    start: int
    limit: int

    @classmethod
    def of(cls, seed: int, n_rows: int, size: int) -> Draw:
        """About ``size`` out of ``n_rows`` rows, fewer than all."""
        start = stream(seed, Purpose.SAMPLE_VALUES).integers(2**64, dtype=np.uint64)
        return cls(int(start), (size << 64) // n_rows)

    def keys(self, x: Floats) -> Keys:
        """(b,) a number of each of the feature-major rows x (d, b), uniform in [0, 2**64) whatever their values are."""
        found = np.full(x.shape[1], self.start, dtype=np.uint64)
        for feature in x:
            found ^= (feature + 0.0).view(np.uint64) & DIGITS  # -0.0 is 0.0
            found *= MULTIPLIERS[0]
            found ^= found >> HALF
        for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=True):
            found ^= found >> shift
            found *= multiplier
        return found
