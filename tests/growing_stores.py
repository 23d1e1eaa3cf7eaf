"""Stores that grow while they are learned from: how writers append, and learners that may be killed at any moment.

Writer and learner run in processes of their own. These are forked from a server that has imported what they need and
run none of it, so that a restart takes milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from streamgmm import GaussianMixture, load, updating

#: Rows of a chunk.
CHUNK = 40

#: What a writer calls the number of rows that it has written.
ATTRIBUTE = "rows_written"

#: Seconds between two appends, and between the pieces of one.
PAUSE, SHORT_PAUSE = 0.05, 0.005

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["streamgmm.estimator", "distributed", __name__])


def rows_of(start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of the one table that all writers write: whole numbers below 2^13 in three clusters."""
    within = np.random.default_rng(0).integers(1, 1024, size=(stop, 2))
    cluster = np.random.default_rng(1).integers(3, size=stop)
    return (within + 3000 * np.stack([cluster, (cluster == 1)], axis=1))[start:].astype(np.float64)


def new_store(path: Path, n_rows: int, *, chunk: int = CHUNK, **options: Any) -> zarr.Array[Any]:
    """A new store with the first rows."""
    array = zarr.create_array(str(path), shape=(n_rows, 2), chunks=(chunk, 2), dtype="float64", **options)
    array[...] = rows_of(0, n_rows)
    return array


def file_of(model: GaussianMixture, folder: Path) -> bytes:
    """The bytes of the file that the model is saved as: all that it is, and all that it knows of stores."""
    model.save(folder / "file.sgmm")
    return (folder / "file.sgmm").read_bytes()


def restarted(model: GaussianMixture, folder: Path) -> GaussianMixture:
    """The model that another process would go on with."""
    model.save(folder / "restarted.sgmm")
    return load(folder / "restarted.sgmm")


# -- how a store grows: each takes the array from the rows it has to ``end`` ----------------------------------------


def append(array: zarr.Array[Any], end: int) -> None:
    """As zarr appends: the new shape is there before the rows. Only whole chunks, but for the last ones."""
    array.append(rows_of(array.shape[0], end))


def write_then_resize(array: zarr.Array[Any], end: int) -> None:
    """Through a handle of the larger shape, which nobody else knows of until the rows are there."""
    start = array.shape[0]
    metadata = array.metadata.update_shape((end, 2))
    larger = zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))
    larger[start:end] = rows_of(start, end)
    array.resize((end, 2))


def write_then_say(array: zarr.Array[Any], end: int) -> None:
    """Into room that was made long before; an attribute says how far the rows go."""
    start = array.attrs[ATTRIBUTE]
    if end > array.shape[0]:
        array.resize((2 * end, 2))
    array[start:end] = rows_of(start, end)
    array.attrs[ATTRIBUTE] = end


def resize_then_write(array: zarr.Array[Any], end: int) -> None:
    """Room first, then chunk by chunk in order, each in pieces, so that it is written several times."""
    start = array.shape[0]
    array.resize((end, 2))
    piece = CHUNK // 3
    places = sorted({*range(start, end, piece), *range(-(-start // CHUNK) * CHUNK, end, CHUNK), start, end})
    for first, last in pairwise(places):
        array[first:last] = rows_of(first, last)
        time.sleep(SHORT_PAUSE)


@dataclass(frozen=True)
class Manner:
    """How a store grows, and how it is learned.

    grow: takes the array to a number of rows.  whole: whether only whole chunks are appended.  stop: what update is
    told.  checkpoints: whether update itself saves, after every unit.  settings: of the mixture.  fits: whether it is
    fitted to the first rows; else it begins with nothing.
    """

    grow: Callable[[zarr.Array[Any], int], None]
    whole: bool = False
    stop: Callable[[Path], int | str | None] = lambda path: None
    checkpoints: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    fits: bool = False

    def mixture(self) -> GaussianMixture:
        return GaussianMixture(**{"random_state": 5, "step_exponent": 1.0, **self.settings})

    def ends(self, start: int) -> Iterator[int]:
        """The rows of the store after each append."""
        rng = np.random.default_rng(start)
        while True:
            start += CHUNK * int(rng.integers(1, 4)) if self.whole else int(rng.integers(1, 3 * CHUNK))
            yield start

    def update(self, model: GaussianMixture, path: Path, **options: Any) -> Any:
        return model.update(path, stop=self.stop(path), **options)


def published(path: Path) -> int:
    return int(zarr.open_array(str(path), mode="r").shape[0])


def attribute(path: Path) -> str:
    return ATTRIBUTE


FEW = {"n_components": 1, "reg_covar": 0.0}

MANNERS = {
    "appended": Manner(append, whole=True, settings=FEW),
    "appended, checkpoints": Manner(append, whole=True, checkpoints=True, settings=FEW),
    "written, then resized": Manner(write_then_resize, stop=published, settings=FEW, fits=True),
    "written, then said": Manner(write_then_say, stop=attribute, settings=FEW),
    "resized, then written": Manner(resize_then_write, settings=FEW),
    "resized, then written, k=3": Manner(resize_then_write, settings={"n_components": 3}, fits=True),
}


# -- processes -----------------------------------------------------------------------------------------------------


def write(name: str, path: Path, stop: Any) -> None:
    """Append until ``stop`` is set; the store then ends within a chunk, and nothing is left to be written."""
    manner, array = MANNERS[name], zarr.open_array(str(path), mode="r+")
    for end in manner.ends(array.shape[0]):
        manner.grow(array, end)
        if stop.wait(PAUSE):
            break
    end += 7 + (end % CHUNK == CHUNK - 7)
    manner.grow(array, end)
    if manner.grow is write_then_say:
        array.resize((end, 2))


#: What a learner is doing.
STAGES = ("import", "load", "update", "save")


def learn(name: str, path: Path, saved: Path, stage: Any, saves: Any) -> None:
    """Load, update and save for ever; ``stage`` says what of it is being done, and ``saves`` how often it was."""
    manner = MANNERS[name]
    updating.CHECKPOINT_SECONDS = 0.0
    while True:
        stage.value = STAGES.index("load")
        model = load(saved) if saved.exists() else manner.mixture()
        stage.value = STAGES.index("update")
        manner.update(model, path, checkpoint=saved if manner.checkpoints else None)
        if not manner.checkpoints:
            stage.value = STAGES.index("save")
            model.save(saved)
        saves.value += 1


@contextmanager
def writing(name: str, path: Path) -> Iterator[None]:
    """While another process appends to the store; afterwards all is written."""
    stop = PROCESSES.Event()
    writer = PROCESSES.Process(target=write, args=(name, path, stop))
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()
    assert writer.exitcode == 0


#: When a learner is killed: at any moment, as it saves, or at any moment after it has saved once.
MOMENTS = ("any", "save", "later")


def killed_learner(name: str, path: Path, saved: Path, moment: str, seconds: float) -> str:
    """Start a learner, kill it so many seconds after the moment has come, and say what it was doing."""
    stage, saves = PROCESSES.RawValue("i", 0), PROCESSES.RawValue("i", 0)
    learner = PROCESSES.Process(target=learn, args=(name, path, saved, stage, saves))
    come = {"any": lambda: stage.value, "save": lambda: STAGES[stage.value] == "save", "later": lambda: saves.value}
    learner.start()
    try:
        deadline = time.monotonic() + 60.0
        while not come[moment]() and learner.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0)
        time.sleep(seconds)
    finally:
        if learner.is_alive():
            os.kill(learner.pid, signal.SIGKILL)
        learner.join()
    assert learner.exitcode == -signal.SIGKILL, "the learner had ended before it was killed"
    return STAGES[stage.value]
