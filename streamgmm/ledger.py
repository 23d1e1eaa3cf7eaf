"""Which rows have been learned: by place in a store that grows, by the name of a batch, by the number in a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from streamgmm.protocols import Integers

#: Bytes of a fingerprint.
FINGERPRINT_BYTES = 16


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of a store that were learned in one step.

    fingerprint: of the rows as they were read.  stamp: size in bytes of what is stored, and when it was last written in
    nanoseconds, 0 where the store does not tell.
    """

    start: int
    stop: int
    fingerprint: bytes
    stamp: tuple[int, int]

    def __str__(self) -> str:
        return f"rows {self.start:,} to {self.stop - 1:,}"


@dataclass(frozen=True, eq=False)
class StoreRecord:
    """What was learned of one store, in order from its first row.

    key: hash of the place of the store.  name: its last part, for sentences.  stops: (u,) ends of the units.
    fingerprints: (u, 16) uint8.  stamps: (u, 2).  others: keys of places where it was before, or where a copy is.
    """

    key: str
    name: str
    stops: Integers
    fingerprints: np.ndarray[tuple[int, int], np.dtype[np.uint8]]
    stamps: Integers
    others: tuple[str, ...] = ()

    def at(self, key: str, name: str) -> StoreRecord:
        """The record of the same rows at another place. It answers for the old place too: copies are one store."""
        others = tuple(known for known in (self.key, *self.others) if known != key)
        return replace(self, key=key, name=name, others=others)

    @classmethod
    def empty(cls, key: str, name: str) -> StoreRecord:
        none = np.empty((0, FINGERPRINT_BYTES), dtype=np.uint8)
        return cls(key, name, np.empty(0, dtype=np.int64), none, np.empty((0, 2), dtype=np.int64))

    @property
    def n_rows(self) -> int:
        """Rows that were learned: those before this number."""
        return int(self.stops[-1]) if len(self.stops) else 0

    def units(self) -> list[Unit]:
        starts = [0, *self.stops[:-1]] if len(self.stops) else []
        return [
            Unit(int(start), int(stop), fingerprint.tobytes(), (int(stamp[0]), int(stamp[1])))
            for start, stop, fingerprint, stamp in zip(starts, self.stops, self.fingerprints, self.stamps, strict=True)
        ]

    def with_units(self, units: Sequence[Unit]) -> StoreRecord:
        """With these units, in order from the first row, in the place of its own; all places stay known."""
        return replace(StoreRecord.of_units(self.key, self.name, units), others=self.others)

    def extended(self, units: Sequence[Unit]) -> StoreRecord:
        """With units that follow on those before, or take the place of the ones with the same rows."""
        if not units:
            return self
        if units[0].start < self.n_rows:
            by_start = {unit.start: unit for unit in (*self.units(), *units)}
            return self.with_units([by_start[start] for start in sorted(by_start)])
        new = self.with_units(units)
        return replace(
            self,
            stops=np.concatenate([self.stops, new.stops]),
            fingerprints=np.concatenate([self.fingerprints, new.fingerprints]),
            stamps=np.concatenate([self.stamps, new.stamps]),
        )

    @classmethod
    def of_units(cls, key: str, name: str, units: Sequence[Unit]) -> StoreRecord:
        """Of units in order from the first row."""
        return cls(
            key,
            name,
            np.array([unit.stop for unit in units], dtype=np.int64),
            np.frombuffer(b"".join(unit.fingerprint for unit in units), dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES),
            np.array([unit.stamp for unit in units], dtype=np.int64).reshape(-1, 2),
        )


@dataclass(frozen=True, eq=False)
class Ledger:
    """All that was learned, by where it came from.

    stores: one record a store.  batches: rows of each named batch.  n_stream: batches of a stream.
    """

    stores: tuple[StoreRecord, ...] = ()
    batches: Mapping[str, int] = field(default_factory=dict)
    n_stream: int = 0

    def store(self, key: str) -> StoreRecord | None:
        """The record of the store at a place, if any of its rows were learned."""
        return next((record for record in self.stores if key in (record.key, *record.others)), None)

    def with_store(self, record: StoreRecord) -> Ledger:
        """With ``record`` in the place of the one with its key, or as a new one where it has any rows."""
        keys = [known.key for known in self.stores]
        if record.key not in keys:
            return self if not record.n_rows else replace(self, stores=(*self.stores, record))
        return replace(self, stores=tuple(record if known.key == record.key else known for known in self.stores))

    def with_batch(self, name: str, n_rows: int) -> Ledger:
        return replace(self, batches={**self.batches, name: n_rows})
