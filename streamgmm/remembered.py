"""The statistics of each block of a store, kept with a model: what was learned of a block can be taken back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from streamgmm.caches import MOST_BYTES_IN_MEMORY, caches_bytes, record_length, record_of, stats_of
from streamgmm.files import as_array, as_floats
from streamgmm.params import MixtureParams
from streamgmm.protocols import Integers
from streamgmm.stats import SufficientStats
from streamgmm.stored_stats import sound


@dataclass(frozen=True, eq=False)
class Remembered:
    """stops: (b,) ends of the blocks of a store, from its first row on.  blocks: the statistics of each of them, taken
    at the parameters of its last visit."""

    stops: tuple[int, ...]
    blocks: tuple[SufficientStats, ...]

    STOPS: ClassVar[str] = "blocks_stops"
    RECORDS: ClassVar[str] = "blocks_records"

    def rows(self, block: int) -> tuple[int, int]:
        """[start, stop) of a block."""
        return (self.stops[block - 1] if block else 0), self.stops[block]

    def holding(self, row: int) -> int:
        """The block that holds a row."""
        return int(np.searchsorted(self.stops, row, side="right"))

    @property
    def n_bytes(self) -> int:
        """What the blocks take in memory."""
        return record_of(self.blocks[0]).nbytes * len(self.blocks)

    def has_room(self, params: MixtureParams, more: int = 1) -> bool:
        """Whether a model keeps so many more blocks."""
        return fits(len(self.blocks) + more, params)

    def reordered(self, order: Integers) -> Remembered:
        """Components ``order``, the numbers they have now."""
        return Remembered(self.stops, tuple(stats.reordered(order) for stats in self.blocks))

    # -- in a file -------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it, by its name in a file."""
        records = np.stack([record_of(stats) for stats in self.blocks])
        return {self.STOPS: np.array(self.stops, dtype=np.int64), self.RECORDS: records}

    @classmethod
    def of(cls, arrays: Mapping[str, Any], params: MixtureParams, units: Integers | None) -> Self:
        """What arrays of a file describe. units: (u,) ends of the units that were learned of the store, if any.

        Raises KeyError, TypeError or ValueError where the blocks are not made of these units.
        """
        stops = as_array(arrays, cls.STOPS, np.dtype(np.int64), (None,))
        if units is None or not len(units) or stops[-1] != units[-1] or not np.isin(stops, units).all():
            raise ValueError("blocks that are not made of the units of a store")
        if not (np.diff(stops, prepend=0) > 0).all():
            raise ValueError("blocks of a store that do not follow on each other")
        k, d = params.means.shape
        structure = type(params.covariance)
        records = as_floats(arrays, cls.RECORDS, (len(stops), record_length(structure, k, d)))
        blocks = tuple(sound(stats_of(record, structure, k, d)) for record in records)
        if any(not np.array_equal(stats.scale, blocks[0].scale) for stats in blocks):
            raise ValueError("blocks whose statistics have different scales")
        return cls(tuple(stops.tolist()), blocks)


def fits(n_blocks: int, params: MixtureParams) -> bool:
    """Whether a model keeps the statistics of so many blocks."""
    k, d = params.means.shape
    return caches_bytes(n_blocks, type(params.covariance), k, d) <= MOST_BYTES_IN_MEMORY
