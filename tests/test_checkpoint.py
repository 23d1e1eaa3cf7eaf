"""A fit that was stopped goes on from its checkpoint: to the same bits, no read twice, and only if it is the same."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from mixtures import SLOW_KINDS, as_given, assert_identical, mixture_of
from sklearn.base import clone
from test_cli import error_of, succeed
from test_reads import CountingStore, keys_of

from streamgmm import GaussianMixture, open_source
from streamgmm.checkpoint import Keeper
from streamgmm.errors import FileFormatError, ParameterError
from streamgmm.files import Contents, write
from streamgmm.history import Log
from streamgmm.synthetic import recipe

#: A fit of these takes three reads or four after that of the start, and few steps on the sample between them.
ROWS, LABELS = recipe(4, 3, 24_000, 1.5, 4)
SETTINGS = {"n_components": 4, "random_state": 0, "sample_rows": 4_000}
#: How a fit reads: few times, accelerated for want of a large sample, and as textbook EM from several starts.
WAYS: dict[str, dict[str, Any]] = {
    "surrogate": {"tol": 1e-7},
    "anderson": {"sample_rows": 600},
    "few": {"sample_rows": 30, "max_iter": 12},
    "em": {"solver": "em", "n_init": 2, "init_params": "random", "max_iter": 8, "tol": 0.0},
}


class StoppedError(Exception):
    """Ends a fit from within."""


def model_for(way: str = "surrogate", **changed: Any) -> GaussianMixture:
    return GaussianMixture(**{**SETTINGS, **WAYS[way], **changed})


def stopped_after(passes: int, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], call: Any) -> None:
    """Run ``call`` until the pass after so many begins to be told, which it does not survive."""
    told = Log.report

    def report(log: Log, record: Any) -> None:
        if record.iteration > passes:
            raise error("stopped here")
        told(log, record)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "report", report)
        with pytest.raises(error, match="stopped here"):
            call()


def of_both(model: GaussianMixture) -> tuple[Any, ...]:
    records = [str(record) for record in model.history_]
    return model.lower_bounds_, model.n_passes_, model.converged_, records, model.effective_rows_


@pytest.fixture(scope="module", params=WAYS)
def never_stopped(request, tmp_path_factory) -> tuple[str, GaussianMixture]:
    """A way, and its fit with a checkpoint, which is that without one."""
    way = request.param
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The fit did not converge")
        whole = model_for(way).fit(ROWS, checkpoint=tmp_path_factory.mktemp("whole") / "c")
        assert_identical(model_for(way).fit(ROWS), whole)
    assert whole.n_iter_ > 2
    return way, whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The checkpoint of a fit that has ended."""
    path = tmp_path_factory.mktemp("finished") / "c"
    model_for().fit(ROWS, checkpoint=path)
    return path


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The fit did not converge")
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_what_goes_on_ends_as_what_was_never_stopped(never_stopped, passes, tmp_path, monkeypatch):
    way, whole = never_stopped
    path = tmp_path / "stopped"
    stopped_after(passes, monkeypatch, StoppedError, lambda: model_for(way).fit(ROWS, checkpoint=path))
    again = model_for(way).fit(ROWS, checkpoint=path)
    assert_identical(again, whole)
    assert of_both(again) == of_both(whole)
    first, second = (model.partial_fit(ROWS[:500]) for model in (copy.deepcopy(whole), again))
    assert_identical(first, second)


@pytest.mark.parametrize("kind", SLOW_KINDS)
def test_every_structure_goes_on(kind, tmp_path, monkeypatch):
    path = tmp_path / "c"
    whole = model_for(covariance_type=kind).fit(ROWS)
    stopped_after(1, monkeypatch, StoppedError, lambda: model_for(covariance_type=kind).fit(ROWS, checkpoint=path))
    again = model_for(covariance_type=kind).fit(ROWS, checkpoint=path)
    assert_identical(again, whole)
    assert of_both(again) == of_both(whole)


def test_a_slow_fit_goes_on(tmp_path, monkeypatch):
    """Many reads after a small sample: what extrapolates slow reads is kept as well."""
    rows, _ = recipe(3, 2, 6_000, 0.8, 17)
    settings = {"n_components": 3, "sample_rows": 600, "tol": None}
    whole = model_for(**settings).fit(rows)
    assert whole.n_passes_ > 6
    path = tmp_path / "c"
    stopped_after(4, monkeypatch, StoppedError, lambda: model_for(**settings).fit(rows, checkpoint=path))
    again = model_for(**settings).fit(rows, checkpoint=path)
    assert_identical(again, whole)
    assert of_both(again) == of_both(whole)


def test_a_finished_fit_gives_its_model_again_without_a_read(tmp_path):
    path = tmp_path / "rows.zarr"
    zarr.create_array(path, data=ROWS, chunks=(2_000, 3))
    array = zarr.open_array(CountingStore(path, read_only=True), mode="r")
    source = open_source(array, block_rows=2_000)
    once = model_for().fit(source, checkpoint=tmp_path / "c")
    before = array.store.reads()
    ends = {(f"c/{number}/0", "None") for number in (0, 11)}
    assert before == {(key, "None"): once.n_passes_ + ((key, "None") in ends) for key in keys_of(path)}, (
        "the first and the last block are looked at once more"
    )
    again = model_for().fit(source, checkpoint=tmp_path / "c")
    assert_identical(again, once)
    assert {key for key, n in array.store.reads().items() if n > before[key]} == ends


# -- only the same fit -----------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "parameters": (
        {"n_components": 5, "reg_covar": 1e-3},
        ROWS,
        r"n_components was 4 and is 5; reg_covar was 1e-06 and",
    ),
    "seed": ({"random_state": 1}, ROWS, r"seed was '\w+' and is '\w+'"),
    "rows": ({}, ROWS + 1e-9, r"contents was '\w+' and is"),
    "fewer rows": ({}, ROWS[:-1], r"rows was 24000 and is 23999"),
    "another type": ({}, ROWS.astype("f4"), r"dtype was 'float64' and is 'float32'"),
    "a given start": (as_given(mixture_of(ROWS, LABELS, "full")), ROWS, r"means_init was None and is '\w+'"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_fit_is_refused_with_what_differs(other, finished, tmp_path):
    path = shutil.copy(finished, tmp_path / "c")
    before = path.read_bytes()
    changed, rows, words = OTHERS[other]
    model = model_for(**changed)
    with pytest.raises(ParameterError, match=f"^c is the checkpoint of another fit: .*{words}.*another path"):
        model.fit(rows, checkpoint=path)
    assert path.read_bytes() == before
    assert not hasattr(model, "means_")


def test_weights_are_part_of_what_was_read(tmp_path):
    path, weights = tmp_path / "c", np.ones(len(ROWS))
    model_for().fit(ROWS, sample_weight=weights, checkpoint=path)
    weights[7] = 2.0
    with pytest.raises(ParameterError, match="contents was"):
        model_for().fit(ROWS, sample_weight=weights, checkpoint=path)


@pytest.mark.parametrize("stored", ["zarr", "dask"])
def test_weights_in_memory_are_looked_at_as_a_whole(stored, tmp_path):
    array = zarr.create_array(tmp_path / "rows.zarr", data=ROWS, chunks=(2_000, 3))
    rows = open_source(array, block_rows=2_000) if stored == "zarr" else da.from_array(ROWS, chunks=(2_000, 3))
    path, weights = tmp_path / "c", np.ones(len(ROWS))
    once = model_for().fit(rows, sample_weight=weights, checkpoint=path)
    assert_identical(model_for().fit(rows, sample_weight=weights.copy(), checkpoint=path), once)
    weights[12_001] = 2.0
    with pytest.raises(ParameterError, match="weights was"):
        model_for().fit(rows, sample_weight=weights, checkpoint=path)


def test_a_dask_array_that_changed_in_its_middle_is_refused(tmp_path):
    """All of its blocks are looked at where there are no more than 16."""
    path, rows = tmp_path / "c", ROWS.copy()
    model_for().fit(da.from_array(rows, chunks=(2_000, 3)), checkpoint=path)
    rows[9_000] += 1e-9
    with pytest.raises(ParameterError, match="contents was"):
        model_for().fit(da.from_array(rows, chunks=(2_000, 3)), checkpoint=path)


def test_a_store_that_was_written_since_is_refused(tmp_path):
    array = zarr.create_array(tmp_path / "rows.zarr", data=ROWS, chunks=(2_000, 3))
    model_for().fit(tmp_path / "rows.zarr", checkpoint=tmp_path / "c")
    time.sleep(0.01)
    array[9_000] = 0.5
    with pytest.raises(ParameterError, match=r"chunks \(bytes, time of the last\) was"):
        model_for().fit(tmp_path / "rows.zarr", checkpoint=tmp_path / "c")


def test_what_does_not_change_a_fit_may_differ(tmp_path, monkeypatch):
    """Where nobody gave a seed, that of the checkpoint is taken."""
    path = tmp_path / "c"
    stopped_after(1, monkeypatch, StoppedError, lambda: model_for(random_state=None).fit(ROWS, checkpoint=path))
    again = model_for(random_state=None, verbose_interval=3).fit(ROWS, checkpoint=path)
    assert_identical(model_for(random_state=None).fit(ROWS, checkpoint=path), again)


def test_more_passes_may_be_asked_for(tmp_path):
    path = tmp_path / "c"
    with pytest.warns(UserWarning, match="did not converge in 1"):
        model_for(max_iter=1).fit(ROWS, checkpoint=path)
    assert_identical(model_for().fit(ROWS, checkpoint=path), model_for().fit(ROWS))


def test_an_interrupted_warm_start_goes_on(tmp_path, monkeypatch):
    """The attributes hold what was found until then, and so does the file."""
    path, model = tmp_path / "c", model_for(warm_start=True, tol=1e-3).fit(ROWS)
    whole = clone(model).fit(ROWS).set_params(tol=1e-8).fit(ROWS)
    model.set_params(tol=1e-8)
    stopped_after(2, monkeypatch, KeyboardInterrupt, lambda: model.fit(ROWS, checkpoint=path))
    assert_identical(model.fit(ROWS, checkpoint=path), whole)
    assert model.n_passes_ == whole.n_passes_ > 3
    model.means_ = model.means_ + 1e-9
    with pytest.raises(ParameterError, match="the mixture of the warm start was"):
        model.fit(ROWS, checkpoint=path)


def test_a_generator_as_seed_is_told_of(tmp_path):
    path, generator = tmp_path / "c", np.random.RandomState(0)
    once = model_for(random_state=generator).fit(ROWS, checkpoint=path)
    assert_identical(model_for(random_state=np.random.RandomState(0)).fit(ROWS, checkpoint=path), once)
    with pytest.raises(ParameterError, match=r"seed was .* a generator moves on with every call"):
        model_for(random_state=generator).fit(ROWS, checkpoint=path)


def test_a_dask_array_goes_on(tmp_path, monkeypatch):
    path, rows = tmp_path / "c", da.from_array(ROWS, chunks=(3_000, 3))
    whole = model_for().fit(rows)
    stopped_after(2, monkeypatch, StoppedError, lambda: model_for().fit(rows, checkpoint=path))
    assert_identical(model_for().fit(rows, checkpoint=path), whole)


def test_what_cannot_be_kept_is_said_before_anything_is_read(tmp_path):
    with pytest.raises(ParameterError, match='checkpoint is for the solvers "auto" and "em"'):
        model_for(solver="incremental").fit(ROWS, checkpoint=tmp_path / "c")
    with pytest.raises(FileFormatError, match="There is no folder"):
        model_for().fit(ROWS, checkpoint=tmp_path / "no" / "c")
    for name, words in (("a\0b", "null"), ("c" * 300, "too long")):
        with pytest.raises(FileFormatError, match=f"could not be written .*{words}.*choose another path"):
            model_for().fit(ROWS, checkpoint=tmp_path / name)
    model_for().fit(ROWS).save(tmp_path / "model")
    with pytest.raises(FileFormatError, match="holds a model, but a checkpoint was asked for"):
        model_for().fit(ROWS, checkpoint=tmp_path / "model")


def test_a_damaged_file_is_refused(finished, tmp_path):
    path = shutil.copy(finished, tmp_path / "c")
    data = bytearray(path.read_bytes())
    for place in (20, len(data) // 3, len(data) - 9):
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FileFormatError, match="damaged"):
            model_for().fit(ROWS, checkpoint=path)


@pytest.mark.parametrize("facts", [{}, {"identity": {}, "seed": "no"}, {"identity": 3, "seed": "1"}])
def test_a_file_of_another_version_is_refused(facts, tmp_path):
    write(tmp_path / "c", Contents("checkpoint", facts, {}))
    with pytest.raises(FileFormatError, match="cannot be gone on from"):
        model_for().fit(ROWS, checkpoint=tmp_path / "c")


# -- what stops it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_leaves_what_was_found(way, kept, tmp_path, monkeypatch):
    path = tmp_path / "c" if kept else None
    model = model_for(way)
    stopped_after(2, monkeypatch, KeyboardInterrupt, lambda: model.fit(ROWS, checkpoint=path))
    assert (model.converged_, model.n_iter_) == (False, 2)
    assert [record.iteration for record in model.history_][-2:] == [1, 2]
    two = model_for(way, max_iter=2)
    with pytest.warns(UserWarning, match="did not converge in 2"):
        two.fit(ROWS)
    assert_identical(model, two)
    assert model.n_passes_ == 3


def test_an_interrupt_before_a_pass_is_kept_leaves_the_one_before_it(monkeypatch):
    keep = Keeper.keep

    def interrupted(keeper: Keeper, state: Any, index: int, records: Any) -> None:
        if len(records) > 3:  # the sample and two passes were kept
            raise KeyboardInterrupt
        keep(keeper, state, index, records)

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "keep", interrupted)
        model = model_for()
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            model.fit(ROWS)
    assert [record.iteration for record in model.history_] == [0, 1, 2]
    assert model.n_iter_ == 2


def test_the_command_line_goes_on(tmp_path):
    zarr.create_array(tmp_path / "rows.zarr", data=ROWS, chunks=(2_000, 3))
    options = ("fit", tmp_path / "rows.zarr", "-k", 4, "--sample-rows", 4_000, "--checkpoint", tmp_path / "c")
    first = succeed(*options, "-o", tmp_path / "m.sgmm")
    again = succeed(*options, "-o", tmp_path / "again.sgmm")
    assert (tmp_path / "again.sgmm").read_bytes() == (tmp_path / "m.sgmm").read_bytes()
    reads = first.stderr.count("\npass ")
    assert reads > 2
    assert f"c: going on after {reads} reads" in again.stderr
    assert again.stderr.count("\npass ") == 0
    refused = error_of(*options, "--seed", 1, "-o", tmp_path / "no.sgmm")
    assert "c is the checkpoint of another fit: seed was" in refused
    rows = ("fit", tmp_path / "rows.zarr", "-k", 4, "-o", tmp_path / "new.sgmm", "--checkpoint")
    assert "would be checkpoint and model" in error_of(*rows, tmp_path / "new.sgmm")
    for place in (tmp_path / "rows.zarr", tmp_path / "rows.zarr" / "c"):
        assert "holds the rows that would be read. Choose another --checkpoint" in error_of(*rows, place)


def test_an_interrupt_before_the_first_pass_leaves_nothing(tmp_path, monkeypatch):
    model = model_for()
    stopped_after(0, monkeypatch, KeyboardInterrupt, lambda: model.fit(ROWS))
    assert not hasattr(model, "means_")


#: Of the store that is fitted.
CHUNKS = 12

FIT = """
import sys
from streamgmm import GaussianMixture, open_source
store, checkpoint, model = sys.argv[1:]
from test_reads import counted
from pathlib import Path
source = open_source(counted(Path(store)), block_rows=2_000)
print("begins", flush=True)
GaussianMixture(4, random_state=0, sample_rows=4_000, tol=1e-7).fit(source, checkpoint=checkpoint).save(model)
"""


def begun(tmp_path: Path, name: str) -> subprocess.Popen[str]:
    """A fit in a process of its own, which has imported all it needs."""
    paths = tmp_path / "rows.zarr", tmp_path / f"{name}.checkpoint", tmp_path / f"{name}.sgmm"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FIT, *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def ended(tmp_path: Path, name: str) -> tuple[bytes, float, float]:
    """The model of a fit that is left alone, how many times it has read the rows, and seconds from its beginning."""
    log = tmp_path / "rows.zarr.log"
    log.unlink(missing_ok=True)
    with begun(tmp_path, name) as process:
        began = time.monotonic()
        assert process.wait() == 0
    reads = len(log.read_text().splitlines()) / CHUNKS
    return (tmp_path / f"{name}.sgmm").read_bytes(), reads, time.monotonic() - began


def killed_fits(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random instants; then the fit is left alone, and ends as the one that was never killed."""
    zarr.create_array(tmp_path / "rows.zarr", data=ROWS, chunks=(len(ROWS) // CHUNKS, 3))
    whole, reads, seconds = ended(tmp_path, "whole")
    rng, found = np.random.default_rng(4), set()
    for name in map(str, range(kills)):
        with begun(tmp_path, name) as process:
            time.sleep(rng.uniform(0.0, 0.8 * seconds))
            process.send_signal(signal.SIGKILL)
        checkpoint = tmp_path / f"{name}.checkpoint"
        done = reads_in(checkpoint) if checkpoint.exists() else 0
        model, more, _ = ended(tmp_path, name)
        assert model == whole
        assert done + more == pytest.approx(reads), f"kill {name}: {more} reads after {done}"
        found.add(done)
    assert len(found) > min(kills, 10) / 10, "all kills at the same read would say little"


def reads_in(checkpoint: Path) -> int:
    from streamgmm.checkpoint import CLASSES
    from streamgmm.files import read
    from streamgmm.stored_values import unpacked

    contents = read(checkpoint, "checkpoint")
    return int(unpacked(contents.facts["kept"], contents.arrays, CLASSES).n_passes)


def test_a_kill_changes_no_bit_and_repeats_no_read(tmp_path):
    killed_fits(tmp_path, 1)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_twenty_kills_change_no_bit_and_repeat_no_read(tmp_path):
    killed_fits(tmp_path, 20)
