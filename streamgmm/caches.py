"""Where the statistics of every block are kept from pass to pass: in memory while they are small, else in one file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from streamgmm.covariance import AbstractCovariance
from streamgmm.files import RecordFile
from streamgmm.protocols import Caches, Floats
from streamgmm.quadratic import OUTER
from streamgmm.stats import SufficientStats

#: More than this is kept in a file.
MOST_BYTES_IN_MEMORY = 64 * 2**20

#: Statistics that are about while one block's take the place of others: sums, and what a change of origin needs.
COPIES = 12

#: Numbers of a record beside its arrays.
FACTS = ("log_likelihood", "log_likelihood_squares", "weight", "n_rows", "n_skipped")


def record_length(structure: type[AbstractCovariance], k: int, d: int) -> int:
    """Numbers that the statistics of a block are made of."""
    common = OUTER.size(d) if structure.shared else 0
    return k * (1 + d + structure.quadratic.size(d)) + common + k * d + d + len(FACTS)


def caches_bytes(n_blocks: int, structure: type[AbstractCovariance], k: int, d: int) -> int:
    """Bytes of the statistics of so many blocks."""
    return 8 * n_blocks * record_length(structure, k, d)


def held_bytes(n_blocks: int, at_a_time: int, structure: type[AbstractCovariance], k: int, d: int, models: int) -> int:
    """Bytes that the caller's process holds of the statistics of blocks, those of ``at_a_time`` blocks just read.

    models: starts that were made; the best one's and the present one's are there.
    """
    kept = caches_bytes(n_blocks, structure, k, d)
    kept = min(models, 2) * kept if kept <= MOST_BYTES_IN_MEMORY else 0
    return kept + (2 * at_a_time + COPIES) * caches_bytes(1, structure, k, d)


def make_caches(n_blocks: int, structure: type[AbstractCovariance], k: int, d: int) -> Caches[SufficientStats]:
    """Room for the statistics of each block. FileFormatError where they need a file and the disk has no room."""
    if caches_bytes(n_blocks, structure, k, d) <= MOST_BYTES_IN_MEMORY:
        room: list[Any] = [None] * n_blocks
        return room
    return FileCaches(n_blocks, structure, k, d)


class FileCaches:
    """Statistics in a file, a record a block; one of them at a time is in memory."""

    def __init__(self, n_blocks: int, structure: type[AbstractCovariance], k: int, d: int) -> None:
        self._structure, self._k, self._d = structure, k, d
        self._records = RecordFile(n_blocks, record_length(structure, k, d))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, block: int, /) -> SufficientStats:
        return stats_of(self._records[block], self._structure, self._k, self._d)

    def __setitem__(self, block: int, value: SufficientStats, /) -> None:
        self._records[block] = record_of(value)


def record_of(stats: SufficientStats) -> Floats:
    """Statistics as one vector."""
    arrays = (stats.moments, stats.common, stats.origin, stats.scale)
    facts = [float(getattr(stats, name)) for name in FACTS]
    return np.concatenate([*(array.reshape(-1) for array in arrays), facts])


def stats_of(record: Floats, structure: type[AbstractCovariance], k: int, d: int) -> SufficientStats:
    """What ``record_of`` made a vector of."""
    shapes = [(k, 1 + d + structure.quadratic.size(d)), (OUTER.size(d) if structure.shared else 0,), (k, d), (d,)]
    moments, common, origin, scale = _cut(record, shapes)
    log_likelihood, squares, weight, n_rows, n_skipped = record[-len(FACTS) :].tolist()
    return SufficientStats(
        structure.quadratic,
        moments,
        common,
        origin,
        scale,
        log_likelihood,
        squares,
        weight,
        int(n_rows),
        int(n_skipped),
    )


def _cut(record: Floats, shapes: list[tuple[int, ...]]) -> Iterator[Floats]:
    first = 0
    for shape in shapes:
        size = int(np.prod(shape))
        yield record[first : first + size].reshape(shape)
        first += size
