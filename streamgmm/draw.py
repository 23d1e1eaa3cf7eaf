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

from streamgmm.protocols import Floats, Integers
from streamgmm.streams import Purpose, stream

#: An array of numbers that rows are drawn by.
Keys = np.ndarray[Any, np.dtype[np.uint64]]
#: Odd multipliers and shifts of SplitMix64 (Steele, Lea & Flood 2014, Figure 16).
MULTIPLIERS = np.array([0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB], dtype=np.uint64)
SHIFTS = np.array([30, 27], dtype=np.uint64)
HALF = np.uint64(32)
#: The rows of equal weight that a sample with copies tells as much as (Kish 1965), of all that it has, at least.
LEAST_EVEN = 0.75
#: Standard deviations by which there may be more or fewer rows than by number.
MOST_DEVIATIONS = 8.0
#: A tile may have so many times the rows that are expected of it, and so many more, before copies are sought in it.
MANY, MORE = 2.0, 64
#: Digits of the weight of copies, whose last ones depend on the order in which their weights are added up.
WEIGHT_DIGITS = 40


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
        """Bytes of so many rows as they are drawn, and of two copies of them."""
        return 3 * 8 * n_rows * (d + 3)

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

    @property
    def row_weights(self) -> Floats:
        """(m,) the weights, whichever of the copies came first."""
        fraction, exponent = np.frexp(self.weights)
        settled = np.ldexp(np.rint(np.ldexp(fraction, WEIGHT_DIGITS)), exponent - WEIGHT_DIGITS)
        return np.where(self.numbers > 1.0, settled, self.weights)

    def even(self, others: Copies) -> bool:
        """Whether this is as good a sample as others that were drawn by number: as many rows but for chance, and few
        copies in both. A row that is repeated often is in the one with all its copies, or missing; and if it is
        missing, the others have it."""
        n_rows, expected = self.numbers.sum(), others.numbers.sum()
        apart = abs(n_rows - expected) > MOST_DEVIATIONS * sqrt(2.0 * expected)
        return not apart and all(
            of.numbers.sum() >= LEAST_EVEN * (of.numbers @ of.numbers) > 0.0 for of in (self, others)
        )


@dataclass(frozen=True)
class Draw:
    """Rows are drawn whose key is below ``limit``. start: what keys begin with."""

    start: int
    limit: int

    @classmethod
    def of(cls, seed: int, n_rows: int, size: int) -> Draw:
        """About ``size`` out of ``n_rows`` rows, or all of them."""
        start = stream(seed, Purpose.SAMPLE_VALUES).integers(2**64, dtype=np.uint64)
        return cls(int(start), (min(size, n_rows) << 64) // n_rows)

    @property
    def all_rows(self) -> bool:
        return self.limit >= 2**64

    def drawn(self, keys: Keys) -> Integers:
        """The numbers of those of some rows that are drawn."""
        return np.flatnonzero(keys < np.uint64(self.limit))

    def many(self, n_drawn: int, n_rows: int) -> bool:
        """Whether so many of ``n_rows`` rows are drawn that some may be copies."""
        return n_drawn > MANY * self.limit / 2**64 * n_rows + MORE

    def order(self, rows: Floats, weights: Floats) -> Integers:
        """One order (m,) of rows (m, d) with weights (m,), in whatever order they come."""
        return np.lexsort((weights, self.keys(rows.T)))

    def by_number(self, rows: Floats, weights: Floats) -> Copies:
        """Rows (m, d) that were drawn by their number."""
        return Copies(rows, self.keys(rows.T), weights, np.ones(len(rows))).distinct()

    def keys(self, x: Floats) -> Keys:
        """(b,) a number of each of the feature-major rows x (d, b), uniform in [0, 2**64) whatever their values are."""
        found = np.full(x.shape[1], self.start, dtype=np.uint64)
        for feature in x:
            found ^= (feature + 0.0).view(np.uint64)  # -0.0 is 0.0
            found *= MULTIPLIERS[0]
            found ^= found >> HALF
        for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=True):
            found ^= found >> shift
            found *= multiplier
        return found
