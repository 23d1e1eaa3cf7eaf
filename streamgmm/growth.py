"""What of a store that grows is new, and whether what was learned of it before is as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

from streamgmm.errors import DataError
from streamgmm.fingerprints import WHOLE, FingerprintingExecutor
from streamgmm.ledger import Ledger, StoreRecord, Unit
from streamgmm.protocols import Block, Executor
from streamgmm.sources import ZarrSource, look, place_key, rows_written

#: Units that a sentence names.
MOST_NAMED = 3

#: Why a chunk may never come, and the way out.
UNSTORED = (
    "if all its rows have the fill value, zarr did not store it and never will: "
    'open_source(..., missing_chunks="fill") takes it as it reads'
)

#: The way out where a store took the place of another, as log files do that are rotated.
ANOTHER = "If other rows begin here, give their store another path, or learn it as a batch with batch_id=NAME."

#: Size and time of the chunks of rows [start, stop).
StampOf = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Growth:
    """What of a store is to be learned. units: [start, stop) of each, in order.  waiting: rows that are there but not
    learned yet, and ``why``.  record: what was learned of the store before.  changed: units of it whose rows are others
    now, with the stamps of today."""

    record: StoreRecord
    units: tuple[tuple[int, int], ...]
    stamps: tuple[tuple[int, int], ...]
    waiting: int = 0
    why: str = ""
    changed: tuple[Unit, ...] = ()


def growth(
    ledger: Ledger,
    source: ZarrSource,
    executor: Executor,
    stop: Any,
    *,
    flush: bool,
    say: Callable[[str], None],
    takes_back: bool = False,
) -> tuple[Ledger, Growth]:
    """What of a store is new, and can be learned. Raises DataError where what was learned before has changed.

    Also the ledger, in which a store that has moved has its new place.  takes_back: whether rows of the ledger's first
    store can be unlearned: that they have changed is then no error.
    """
    written = look(source.array)  # before the rows are read: what is written meanwhile is seen the next time
    said = rows_written(source, stop)
    ledger, record = _known(ledger, source, executor, say)
    record, changed = _compared(record, source, executor, written.stamp)
    if changed and not (takes_back and record.key == ledger.stores[0].key):
        raise DataError(_changed(source.name, changed))
    learned, why = record.n_rows, ""
    end = source.n_rows if flush else max(0, written.last) * source.grid_rows
    if said is not None:
        end = said
    elif end < source.n_rows:
        why = "nothing that follows on them shows that they are written; say stop=ROWS, or flush=True for all"
    hole = None if source.reading.fills else written.absent(learned, end)
    if hole is not None:
        where = f"chunk {hole} (from row {hole * source.grid_rows:,} on) is not there"
        if flush or said is not None or not source.reading.waits:
            raise DataError(
                f"{source.name}: {where}, though rows up to {end:,} are said to be written. Write it, or wait for the "
                f"writer, before the rows behind it are learned. {UNSTORED[0].upper()}{UNSTORED[1:]}."
            )
        end, why = hole * source.grid_rows, f"{where} yet; {UNSTORED}"
    units = _cut(learned, end, source.unit_rows, flush=flush)
    reached = units[-1][1] if units else learned
    if not why and reached < source.n_rows:
        rest = "a rest of less than a unit waits for more rows; flush=True learns it now"
        why = rest if reached < end else f"no more than {end:,} rows are said to be written"
    stamps = tuple(written.stamp(*unit) for unit in units)
    return ledger, Growth(record, units, stamps, max(0, source.n_rows - reached), why, changed)


def _cut(start: int, stop: int, size: int, *, flush: bool) -> tuple[tuple[int, int], ...]:
    """The units of rows [start, stop): they end at multiples of ``size``; a rest counts where ``flush``."""
    units = []
    while start < stop:
        end = (start // size + 1) * size
        if end > stop and not flush:
            break
        units.append((start, min(end, stop)))
        start = end
    return tuple(units)


class Witness:
    """What a fit notes of a store, all of whose rows it learns: how its chunks are now, and how its rows read."""

    def __init__(self, source: ZarrSource, executor: Executor) -> None:
        self._source = source
        self._written = look(source.array)  # before the rows are read
        self.executor = FingerprintingExecutor(executor, source.unit_rows)

    def record(self) -> StoreRecord:
        """The record of the store, once ``executor`` has read all of it."""
        source, marks = self._source, self.executor.fingerprints
        cut = _cut(0, source.n_rows, source.unit_rows, flush=True)
        units = [Unit(*rows, mark, self._written.stamp(*rows)) for rows, mark in zip(cut, marks, strict=True)]
        return StoreRecord.of_units(_key(source), source.name, units)


def _known(
    ledger: Ledger, source: ZarrSource, executor: Executor, say: Callable[[str], None]
) -> tuple[Ledger, StoreRecord]:
    """The record of a store: by its place, else by its first and last rows, for it may have moved.

    A store in memory has no place, and is known by its first rows alone: the others may have changed since.
    """
    key = place_key(source.array)
    record = None if key is None else ledger.store(key)
    if record is not None:
        if key == record.key or source.n_rows <= record.n_rows:
            return ledger, record
        return _at(ledger, record, source)  # the longest copy is the one that must not be cut
    for known in ledger.stores:
        if _holds(known, source, executor):
            if key is None:
                return ledger, known
            say(f"{source.name} is taken for {known.name}, learned before at another place: its rows are the same")
            return _at(ledger, known, source)
    return ledger, StoreRecord.empty(_key(source), source.name)


def _holds(known: StoreRecord, source: ZarrSource, executor: Executor) -> bool:
    """Whether the rows of a store begin, and end where it has a place, as what was learned of another."""
    units = known.units()
    ends = [units[0], units[-1]] if units else []
    if place_key(source.array) is None:
        ends = ends[:1]
    if not ends or ends[-1].stop > source.n_rows:
        return False
    return _fingerprints(source, executor, ends) == [unit.fingerprint for unit in ends]


def _key(source: ZarrSource) -> str:
    """The key of a store's record: of its place, else one that no store has."""
    return place_key(source.array) or token_hex(32)


def _at(ledger: Ledger, known: StoreRecord, source: ZarrSource) -> tuple[Ledger, StoreRecord]:
    """A record that is in the ledger, at the place of ``source``."""
    here = known.at(_key(source), source.name)
    return replace(ledger, stores=tuple(here if store is known else store for store in ledger.stores)), here


def _compared(
    record: StoreRecord, source: ZarrSource, executor: Executor, stamp: StampOf
) -> tuple[StoreRecord, tuple[Unit, ...]]:
    """The record with the stamps of today, and the units that have changed since they were learned.

    Rows whose chunks were written again since are read and compared with their fingerprints, and so are the last ones
    where the store does not say when a chunk was written. A changed unit keeps its old stamp in the record. DataError
    where the store has fewer rows than were learned, unless it is a copy from before the others came.
    """
    if source.n_rows < record.n_rows:
        if place_key(source.array) in record.others and _is_part(record, source, executor):
            return record, ()
        raise DataError(
            f"{source.name} has {source.n_rows:,} rows, but {record.n_rows:,} of it were learned before. It was cut or "
            f"replaced; restore it, or fit again. {ANOTHER}"
        )
    units = record.units()
    today = [replace(unit, stamp=stamp(unit.start, unit.stop)) for unit in units]
    suspects = [unit for unit, now in zip(units, today, strict=True) if unit.stamp != now.stamp]
    if units and not any(unit.stamp[0] for unit in today):
        suspects = [units[-1]]
    if not suspects:
        return record, ()
    found = _fingerprints(source, executor, suspects)
    changed = {unit.start for unit, mark in zip(suspects, found, strict=True) if unit.fingerprint != mark}
    same = [old if now.start in changed else now for old, now in zip(units, today, strict=True)]
    return record.with_units(same), tuple(unit for unit in today if unit.start in changed)


def _is_part(record: StoreRecord, source: ZarrSource, executor: Executor) -> bool:
    """Whether all rows of a copy are the first ones of what was learned. DataError where some of them have changed."""
    units = [unit for unit in record.units() if unit.stop <= source.n_rows]
    marks = _fingerprints(source, executor, units)
    changed = tuple(unit for unit, mark in zip(units, marks, strict=True) if unit.fingerprint != mark)
    if changed:
        raise DataError(_changed(source.name, changed))
    return bool(units) and units[-1].stop == source.n_rows


def _changed(name: str, changed: tuple[Unit, ...]) -> str:
    """Words for rows that were learned and have changed."""
    more = f" and {len(changed) - MOST_NAMED:,} more" if len(changed) > MOST_NAMED else ""
    named = ", ".join(map(str, changed[:MOST_NAMED]))
    return (
        f"{name}: {named}{more} were learned before and have changed since. Running statistics cannot take them back: "
        f'restore the rows, or fit again (solver="incremental" can learn them anew). {ANOTHER}'
    )


def _fingerprints(source: ZarrSource, executor: Executor, units: list[Unit]) -> list[bytes]:
    watching = FingerprintingExecutor(executor, WHOLE)
    watching.map_reduce(_read, None, [source.block(unit.start, unit.stop) for unit in units])
    return list(watching.fingerprints)


def _read(shared: None, block: Block) -> int:
    return sum(len(piece.rows) for piece in block.pieces())
