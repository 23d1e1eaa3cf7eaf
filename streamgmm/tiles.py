"""Rows of a block in tiles: checked, and in the coordinates in which they are squared and summed, feature by feature.

Tiles are counted from the block's first row and run on across the pieces that it comes in, so that the last bits of
what is summed do not depend on how rows are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from streamgmm.errors import DataError
from streamgmm.protocols import Block, Booleans, Floats, Piece, Rows
from streamgmm.quadratic import AbstractQuadratic
from streamgmm.stats import Frame

#: Whole numbers up to here are exact in float64.
LARGEST_WHOLE = 2**53


class Span(NamedTuple):
    """Consecutive rows of a block as they are stored, from number ``row`` on.

    rows: (b, d) float64, contiguous.  weights: (b,), or None where every row counts once.
    """

    row: int
    rows: Floats
    weights: Floats | None

    def part(self, start: int, stop: int) -> Span:
        """Its rows [start, stop), counted from its first."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Span(self.row + start, self.rows[start:stop], weights)

    def parts(self, n_rows: int) -> Iterator[Span]:
        """The same in spans of ``n_rows``."""
        return (self.part(start, start + n_rows) for start in range(0, len(self.rows), n_rows))


class Tile(NamedTuple):
    """Consecutive rows [row, row + b) of a block, ready to be multiplied.

    features: (F, b) = [1; z; Q(z)], the products only where asked for.  weights: (b,) or None.  skipped: (b,) True for
    rows that are left out, or None; they are zero in z and have weight zero.
    """

    row: int
    features: Floats
    weights: Floats | None
    skipped: Booleans | None = None

    @property
    def n_skipped(self) -> int:
        return 0 if self.skipped is None else int(self.skipped.sum())


def spans(block: Block, n_rows: int) -> Iterator[Span]:
    """The block in spans of a multiple of ``n_rows``, counted from its first row; the last is what remains.

    Rows that lie in one piece are a view of it where they can be, else ``n_rows`` at a time are a copy in a buffer that
    is used again. Raises DataError at a whole number that float64 cannot hold.
    """
    n_rows = min(n_rows, block.stop - block.start)
    buffer, counts = np.empty((n_rows, block.n_features)), np.empty(n_rows)
    row, filled, weighted = block.start, 0, False

    def collected() -> Span:
        return Span(row, buffer[:filled], counts[:filled] if weighted else None)

    for piece in block.pieces():
        if piece.rows.dtype.kind in "iu" and piece.rows.dtype.itemsize == 8:
            _require_exact(piece.rows, block, row + filled)
        weighted = piece.weights is not None
        start = 0
        while start < len(piece.rows):
            whole = (len(piece.rows) - start) // n_rows * n_rows
            if not filled and whole and _usable(piece):
                part = slice(start, start + whole)
                yield Span(row, piece.rows[part], None if piece.weights is None else piece.weights[part])
                row, start = row + whole, start + whole
                continue
            stop = min(start + n_rows - filled, len(piece.rows))
            end = filled + stop - start
            with np.errstate(over="ignore", invalid="ignore"):  # of longer floats; what is not finite is refused
                buffer[filled:end] = piece.rows[start:stop]
            if piece.weights is not None:
                counts[filled:end] = piece.weights[start:stop]
            start, filled = stop, end
            if filled == n_rows:
                yield collected()
                row, filled = row + filled, 0
        del piece  # else it lives while the next one is read
    if filled:
        yield collected()


def _usable(piece: Piece) -> bool:
    """Whether compiled loops can take the piece as it is: native float64, one row after the other."""
    parts = (part for part in piece if part is not None)
    return all(part.dtype == np.float64 and part.flags.c_contiguous and part.flags.aligned for part in parts)


def tiles(block: Block, frame: Frame, quadratic: AbstractQuadratic, n_rows: int, *, products: bool) -> Iterator[Tile]:
    """The block in tiles of ``n_rows``; one buffer serves them all. Raises as ``spans`` and ``tile_of`` do."""
    d = block.n_features
    n_moments = 1 + d + (quadratic.size(d) if products else 0)
    buffer = np.empty((n_moments, min(n_rows, block.stop - block.start)))
    for span in spans(block, n_rows):
        for part in span.parts(n_rows):
            yield tile_of(part, block, frame, quadratic, part_of(buffer, len(part.rows)))
        del part, span  # else what they are views of lives while more is read


def part_of(buffer: Floats, n_rows: int) -> Floats:
    """A buffer (m, n) as one of (m, n_rows) whose rows follow each other, whatever was in it."""
    return buffer.reshape(-1)[: len(buffer) * n_rows].reshape(len(buffer), n_rows)


def tile_of(span: Span, block: Block, frame: Frame, quadratic: AbstractQuadratic, features: Floats) -> Tile:
    """The tile of a span of the block, in ``features`` (F, b), or (1 + d, b) where products are not asked for.

    Rows with NaN are left out where the block says so. Raises DataError, naming the place, at the first other value
    that is NaN or infinite.
    """
    d = len(frame.shift)
    features[0] = 1.0
    z = features[1 : 1 + d]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused, with its place
        np.subtract(span.rows.T, frame.shift[:, None], out=z)
        z *= frame.scale[:, None]
    weights = span.weights
    skipped = _rows_with_nan(z) if block.omits_nan else None
    if skipped is not None:
        z[np.isnan(z)] = 0.0  # an infinity beside it is refused all the same
    _require_finite(z, block, span.row)
    if weights is not None:
        z[:, weights == 0] = 0.0  # a row that counts for nothing must not overflow either
    if skipped is not None:
        z[:, skipped] = 0.0
        weights = np.where(skipped, 0.0, 1.0 if weights is None else weights)
    if len(features) > 1 + d:
        quadratic.expand(z, features[1 + d :])
    return Tile(span.row, features, weights, skipped)


def _rows_with_nan(z: Floats) -> Booleans | None:
    """(b,) True where a row has NaN; None where none has."""
    with np.errstate(invalid="ignore", over="ignore"):
        if not np.isnan(z.sum()):
            return None
    found = np.asarray(np.isnan(z).any(axis=0))
    return found if found.any() else None


def _require_exact(rows: Rows, block: Block, first_row: int) -> None:
    """DataError at the first whole number that float64 would round."""
    if rows.size and (rows.max() > LARGEST_WHOLE or rows.min() < -LARGEST_WHOLE):
        bad = (rows > LARGEST_WHOLE) | (rows < -LARGEST_WHOLE)
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        column = int(np.flatnonzero(bad[row])[0])
        raise DataError(
            f"The whole number {rows[row, column]} in {block.locate(first_row + row, column)} is beyond 2**53, so "
            "float64 cannot hold it. Subtract an offset from that feature, or divide it, and convert it to float64."
        )


def _require_finite(z: Floats, block: Block, first_row: int) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(z.sum()):
            return
    bad = ~np.isfinite(z)
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=0))[0])
        column = int(np.flatnonzero(bad[:, row])[0])
        missing = np.isnan(z[column, row])
        way_out = 'leave rows with NaN out with open_source(..., nan_policy="omit"), or' if missing else "remove or"
        raise DataError(
            f"Input contains {'NaN' if missing else 'infinity'} in {block.locate(first_row + row, column)}. Every "
            f"value must be finite, in the model's units too: {way_out} fill them in before fitting or predicting."
        )
