"""Where a fit stands after each of its reads, in one file that is replaced each time, and how it goes on from there."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamgmm.covariance import STRUCTURES
from streamgmm.errors import FileFormatError, NumericalError, ParameterError
from streamgmm.files import Contents, read, require_target, write
from streamgmm.history import PassRecord
from streamgmm.ledger import StoreRecord
from streamgmm.params import MixtureParams
from streamgmm.pilot import Pilot
from streamgmm.protocols import Block, Executor, Source
from streamgmm.quadratic import Nothing, Outer, SquaredLength, Squares
from streamgmm.solvers.anderson import Accelerated, Coordinates, Secants
from streamgmm.solvers.em import Restarts, Run
from streamgmm.solvers.gain import Gain, Point
from streamgmm.solvers.surrogate import Progress, Trail
from streamgmm.sources import WeightedSource, ZarrSource, stamps_of
from streamgmm.stats import Frame, Listed, SufficientStats
from streamgmm.stored_values import packed, unpacked

#: Of a hash that stands for what is too long to be told.
DIGITS = 32
#: Blocks of a dask array that are looked at.
MOST_LOOKED_AT = 16
#: The name of what a warm start begins at.
WARM_START = "the mixture of the warm start"
#: What a solver goes on from.
State = Restarts | Accelerated | Progress


@dataclass(frozen=True, eq=False)
class Kept:
    """What a fit goes on from.

    pilot, n_pilots, complete: what the reads before the first pass told, how many there were, whether the sample has
    all rows.  record: of a store.  state: of the solver, None before its first pass.  index: which start it comes from.
    records: the history.
    """

    pilot: Pilot
    n_pilots: int
    complete: bool
    record: StoreRecord | None
    state: State | None = None
    index: int = 0
    records: tuple[PassRecord, ...] = ()

    @property
    def published(self) -> MixtureParams | None:
        """What an interrupt leaves in the attributes; None before the first pass."""
        if self.state is None:
            return None
        return self.state.published if isinstance(self.state, Progress) else self.state.result().params

    @property
    def n_passes(self) -> int:
        """Reads of all rows until now."""
        if self.state is None:
            return self.n_pilots
        done = self.state.n_passes if isinstance(self.state, Restarts) else len(self.state.bounds)
        return self.n_pilots + done


CLASSES = (
    Kept, Pilot, StoreRecord, PassRecord, Restarts, Run, Accelerated, Coordinates, Secants, Progress, Point, Gain,
    Trail, MixtureParams, SufficientStats, Frame, Outer, Squares, SquaredLength, Nothing, *STRUCTURES.values(),
)  # fmt: skip


@dataclass
class Keeper:
    """Holds what a fit goes on from: in memory, and in the file at ``path`` where there is one.

    identity: what the fit is of, see ``identity_of``.
    """

    path: Path | None
    seed: int
    identity: Mapping[str, Any]
    kept: Kept | None = None

    @classmethod
    def opened(cls, path: Any, seed: int, identity: Mapping[str, Any], *, any_seed: bool) -> Keeper:
        """With what the file holds, where there is one. ParameterError, with the differences, where it is of another
        fit; FileFormatError where it is damaged.

        any_seed: whether the file's own seed takes the place of one that was drawn for this call.
        """
        path = Path(path)
        if not path.exists():
            return cls(path, seed, identity)
        contents = read(path, "checkpoint")
        try:
            found, theirs = dict(contents.facts["identity"]), int(contents.facts["seed"], 16)
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(path, error) from error
        if any_seed:
            seed = theirs
        try:
            kept = unpacked(contents.facts["kept"], contents.arrays, CLASSES)
            if not isinstance(kept, Kept):
                raise TypeError("no state of a fit")
            ends = None if kept.published is None else digest_of(kept.published)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, NumericalError) as error:
            raise _unusable(path, error) from error
        if identity.get(WARM_START) == ends is not None:  # what this very fit had found when it was interrupted
            identity = {**identity, WARM_START: found.get(WARM_START)}
        differences = _differences({**found, "seed": f"{theirs:x}"}, {**identity, "seed": f"{seed:x}"})
        if differences:
            raise ParameterError(
                f"{path.name} is the checkpoint of another fit: {'; '.join(differences)}. Give the same data and "
                "parameters to go on with it (as random_state a number: a generator moves on with every call), or "
                "another path to begin anew."
            )
        return cls(path, seed, identity, kept)

    @property
    def name(self) -> str:
        return "" if self.path is None else self.path.name

    @property
    def state(self) -> State | None:
        return None if self.kept is None else self.kept.state

    @property
    def index(self) -> int:
        """The start that the state comes from."""
        return 0 if self.kept is None else self.kept.index

    def begin(self, kept: Kept) -> Kept:
        """Before the first pass."""
        self._keep(kept)
        return kept

    def keep(self, state: State, index: int, records: Sequence[PassRecord]) -> None:
        """After a pass."""
        assert self.kept is not None
        self._keep(replace(self.kept, state=state, index=index, records=tuple(records)))

    def _keep(self, kept: Kept) -> None:
        self.kept = kept
        if self.path is not None:
            facts, arrays = packed(kept)
            facts = {"identity": dict(self.identity), "seed": f"{self.seed:x}", "kept": facts}
            write(self.path, Contents("checkpoint", facts, arrays))


def _unusable(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(
        f"{path.name} cannot be gone on from ({error or type(error).__name__}): another version of streamgmm wrote it, "
        "or it is damaged. Use that version, or another path to begin anew."
    )


def require_keepable(solver: str, path: Any) -> None:
    """ParameterError where a solver goes on from more than a file holds, FileFormatError where none can be written.

    Before anything is read.
    """
    if solver == "incremental":
        raise ParameterError(
            'checkpoint is for the solvers "auto" and "em": "incremental" goes on from the statistics of every block, '
            "which it does not write after each read. Leave checkpoint out, or choose another solver."
        )
    require_target(path)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} was {theirs.get(name)!r:.60} and is {ours.get(name)!r:.60}"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]


# -- what a fit is of ----------------------------------------------------------------------------------------------


def identity_of(
    source: Source, executor: Executor, hyper: Mapping[str, Any], last: MixtureParams | None
) -> dict[str, Any]:
    """Plain values that are others for other rows, weights, blocks or parameters.

    Rows and weights in memory are looked at as a whole. Of a store the sizes and times of its chunks are asked for, and
    the first and the last block read; of others blocks that are spread evenly.  hyper: the parameters of the estimator.
    last: where a warm start begins.
    """
    weights = source.weights if isinstance(source, WeightedSource) else None
    rows = source.source if isinstance(source, WeightedSource) else source
    blocks = looked_at = source.blocks()
    if not source.in_memory:
        count = min(len(blocks), 2 if isinstance(rows, ZarrSource) else MOST_LOOKED_AT)
        looked_at = [blocks[round(i)] for i in np.linspace(0, len(blocks) - 1, count)]
    marks = executor.sized(1).map_reduce(_mark, None, looked_at, source.graph).values
    found: dict[str, Any] = {
        "rows": source.n_rows,
        "features": source.n_features,
        "dtype": source.dtype.name,
        "block_rows": source.block_rows,
        "contents": hashlib.sha256("".join(marks).encode()).hexdigest()[:DIGITS],
        "omits_nan": blocks[0].omits_nan,
        "chunks (bytes, time of the last)": stamps_of(source),
    }
    if weights is not None and weights.in_memory:
        found["weights"] = _digest(*(piece.rows for block in weights.blocks() for piece in block.pieces()))
    for name, value in hyper.items():
        if name not in ("random_state", "max_iter", "verbose", "verbose_interval"):
            found[name] = value.item() if isinstance(value, np.generic) else _plain(value)
    if last is not None:
        found[WARM_START] = digest_of(last)
    return found


def digest_of(params: MixtureParams) -> str:
    return _digest(params.weights, params.means, params.covariance.values)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(number) for key, number in value.items()}
    return _digest(np.asarray(value, dtype=np.float64))


def _digest(*arrays: np.ndarray[Any, Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:DIGITS]


def _mark(shared: None, block: Block) -> Listed:
    """The hash of a block's rows and weights, however it is cut into pieces."""
    rows, weights = hashlib.sha256(), hashlib.sha256()
    for piece in block.pieces():
        rows.update(np.ascontiguousarray(piece.rows).tobytes())
        if piece.weights is not None:
            weights.update(np.ascontiguousarray(piece.weights).tobytes())
        del piece
    return Listed((rows.hexdigest() + weights.hexdigest(),))
