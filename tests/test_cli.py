"""The command line: what it writes equals what Python gives, and what goes wrong is one sentence and exit code 1."""

from __future__ import annotations

import io
import logging
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import Result
from conftest import write_zarr
from rich.console import Console
from typer.testing import CliRunner
from zarr.storage import LocalStore

import streamgmm
from streamgmm import GaussianMixture, cli, load, open_source, prediction
from streamgmm.errors import DataError
from streamgmm.synthetic import random_mixture

ROWS = 40_000
COMMANDS = ("demo", "fit", "update", "statistics", "merge", "predict", "info")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def error_of(*arguments: object) -> str:
    """The one line on stderr of a command that must fail."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.stderr.endswith(f"{lines[0]}\n")
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40,000 x 4 rows of five components."""
    return write_zarr(tmp_path_factory.mktemp("rows"), random_mixture(5, 4, 4.0, 0).rows(ROWS, 0)[0], 10_000)


@pytest.fixture(scope="module")
def model(store: Path) -> Path:
    """A model file of five components fitted to the store."""
    GaussianMixture(5, random_state=0).fit(str(store)).save(store.parent / "model.sgmm")
    return store.parent / "model.sgmm"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A store of 2,500 x 3 rows in chunks of 1,000."""
    return write_zarr(tmp_path, random_mixture(2, 3, 4.0, 0).rows(2_500, 0)[0], 1_000, name="small.zarr")


# -- fit -----------------------------------------------------------------------------------------------------------


def test_fit_is_the_fit_of_python(store: Path, tmp_path: Path) -> None:
    result = succeed("fit", store, "-k", 5, "-o", tmp_path / "m.sgmm")
    saved, ours = load(tmp_path / "m.sgmm"), GaussianMixture(5, random_state=0).fit(str(store))
    np.testing.assert_array_equal(saved.means_, ours.means_)
    np.testing.assert_array_equal(saved.covariances_, ours.covariances_)
    assert f"converged after {ours.n_iter_} passes, lower bound {ours.lower_bound_:.6g} nats a row" in result.stdout
    assert result.stderr.count("\npass ") == 1 + ours.n_iter_, "the sample, and the reads after it"


def test_fit_hands_every_option_on(small: Path, tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    group.create_array("a", data=zarr.open_array(str(small))[:], chunks=(1_000, 3))
    options = "--array a -k 2 --covariance-type diag --tol 0.5 --reg-covar 0.001 --max-iter 7 --n-init 2 --seed 5"
    starts = "--init-params k-means++ --solver incremental --sample-rows 400"
    succeed("fit", tmp_path / "group.zarr", *options.split(), *starts.split(), "-o", tmp_path / "m.sgmm")
    expected = GaussianMixture(
        2,
        covariance_type="diag",
        tol=0.5,
        reg_covar=0.001,
        max_iter=7,
        n_init=2,
        init_params="k-means++",
        solver="incremental",
        sample_rows=400,
        random_state=5,
    ).get_params()
    assert load(tmp_path / "m.sgmm").get_params() == expected


def test_fit_warns_in_one_line_where_it_did_not_converge(store: Path, tmp_path: Path) -> None:
    result = succeed("fit", store, "-k", 5, "--max-iter", 2, "--tol", 0, "-o", tmp_path / "m.sgmm")
    warned = [line for line in result.stderr.splitlines() if line.startswith("Warning: ")]
    assert len(warned) == 1
    assert "did not converge in 2 passes" in warned[0]
    assert "not converged after 2 passes" in result.stdout


def test_fit_replaces_a_model_only_when_told(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.sgmm"
    output.write_text("precious")
    assert "exists already. Add --overwrite" in error_of("fit", small, "-o", output)
    assert output.read_text() == "precious"
    succeed("fit", small, "-o", output, "--overwrite")
    assert load(output).n_components == 1


def test_the_log_is_left_as_it_was(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("streamgmm")
    monkeypatch.setattr(log, "level", logging.ERROR)
    handlers = list(log.handlers)
    succeed("fit", small, "-o", tmp_path / "m.sgmm")
    assert (log.handlers, log.level) == (handlers, logging.ERROR)


# -- predict -------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(small: Path, tmp_path: Path) -> Path:
    """A model of two components fitted to the small store."""
    GaussianMixture(2, random_state=0).fit(str(small)).save(tmp_path / "two.sgmm")
    return tmp_path / "two.sgmm"


def test_predict_writes_the_labels_in_the_chunks_of_the_store(small: Path, two: Path, tmp_path: Path) -> None:
    result = succeed("predict", small, two, "-o", tmp_path / "labels.zarr")
    labels = zarr.open_array(str(tmp_path / "labels.zarr"), mode="r")
    assert labels.chunks == (1_000,)
    assert labels.nchunks_initialized == 3
    np.testing.assert_array_equal(labels[:], load(two).predict(zarr.open_array(str(small))[:]))
    assert set(np.unique(labels[:])) == {0, 1}
    assert "labels.zarr: 2,500 labels int64 in 3 chunks of 1,000" in result.stdout.replace("\n", "")


def test_predict_writes_every_chunk_once(
    small: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, plain = [], LocalStore.set

    async def noted(self: LocalStore, key: str, value: Any) -> None:
        written.append(key)
        await plain(self, key, value)

    monkeypatch.setattr(LocalStore, "set", noted)
    succeed("predict", small, two, "-o", tmp_path / "labels.zarr")
    assert sorted(key for key in written if key.startswith("c")) == ["c/0", "c/1", "c/2"]


def test_predict_says_one_line_where_there_is_no_terminal(small: Path, two: Path, tmp_path: Path) -> None:
    result = succeed("predict", small, two, "-o", tmp_path / "labels.zarr")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1


def test_progress_of_predict_adds_up_to_all_rows(
    small: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []

    @contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
        assert (what, total) == ("predicting", 2_500)
        yield heard.append

    monkeypatch.setattr(cli, "_bar", bar)
    succeed("predict", small, two, "-o", tmp_path / "labels.zarr")
    assert sorted(heard) == [500, 1_000, 1_000]


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "rows.zarr", "model.sgmm"], ["predict", "--nonsense"]])
def test_predict_asked_in_the_wrong_way_shows_its_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_predict_on_shards_writes_a_chunk_a_shard(two: Path, tmp_path: Path) -> None:
    rows = random_mixture(2, 3, 4.0, 0).rows(2_500, 0)[0]
    zarr.create_array(str(tmp_path / "s.zarr"), data=rows, chunks=(100, 3), shards=(500, 3))
    succeed("predict", tmp_path / "s.zarr", two, "-o", tmp_path / "labels.zarr")
    labels = zarr.open_array(str(tmp_path / "labels.zarr"), mode="r")
    assert labels.chunks == (500,)
    np.testing.assert_array_equal(labels[:], load(two).predict(rows))


def test_predict_replaces_labels_only_when_told(small: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels.zarr"
    zarr.create_array(str(output), data=np.full(4, 9))
    assert "exists already. Add --overwrite" in error_of("predict", small, two, "-o", output)
    assert zarr.open_array(str(output), mode="r").shape == (4,)
    succeed("predict", small, two, "-o", output, "--overwrite")
    assert zarr.open_array(str(output), mode="r").shape == (2_500,)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.zarr", "small.zarr", "two.sgmm"]


def test_predict_never_replaces_rows_or_foreign_folders(small: Path, two: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    not_a_store = error_of("predict", small, two, "-o", tmp_path / "thesis", "--overwrite")
    assert "is not a zarr array, so it is not replaced" in not_a_store
    assert "holds the rows that would be read" in error_of("predict", small, two, "-o", small, "--overwrite")
    assert "holds the rows that would be read" in error_of("predict", small, two, "-o", tmp_path, "--overwrite")
    assert "holds the rows that would be read" in error_of("predict", small, two, "-o", small / "c", "--overwrite")
    assert zarr.open_array(str(small), mode="r").shape == (2_500, 3)


def test_a_chunk_that_cannot_be_read_leaves_the_old_labels(small: Path, two: Path, tmp_path: Path) -> None:
    output = tmp_path / "labels.zarr"
    zarr.create_array(str(output), data=np.full(4, 9))
    (small / "c" / "1" / "0").write_bytes(b"broken")
    error = error_of("predict", small, two, "-o", output, "--overwrite")
    assert "chunk 1/0 of small.zarr" in error
    np.testing.assert_array_equal(zarr.open_array(str(output), mode="r")[:], np.full(4, 9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.zarr", "small.zarr", "two.sgmm"]


def test_chunks_that_hold_only_the_fill_value_are_written_too(tmp_path: Path) -> None:
    array = prediction.create_array(tmp_path / "a.zarr", (4,), (2,), np.int64, fill_value=-1)
    array[:] = -1
    assert array.nchunks_initialized == 2


# -- info ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_info_shows_weights_means_and_deviations(covariance_type: str, tmp_path: Path) -> None:
    shapes = {
        "full": np.tile(np.diag([4.0, 0.25]), (2, 1, 1)),
        "tied": np.diag([4.0, 0.25]),
        "diag": np.tile([4.0, 0.25], (2, 1)),
        "spherical": np.full(2, 4.0),
    }
    fitted = GaussianMixture.from_parameters(
        [0.25, 0.75], [[1.0, -20.5], [3.0, 1e7]], shapes[covariance_type], covariance_type=covariance_type
    )
    fitted.save(tmp_path / "m.sgmm")
    text = succeed("info", tmp_path / "m.sgmm").stdout
    assert f"m.sgmm: 2 components, {covariance_type} covariances, 2 features" in text
    second = "2.00" if covariance_type == "spherical" else "0.500"
    assert re.search(rf"^0 +0\.2500 +1\.00 ± 2\.00 +-20\.50*\d? ± {second}", text, re.MULTILINE)
    assert re.search(r"^1 +0\.7500 +3\.00 ± 2\.00 +1e\+07 ± ", text, re.MULTILINE)


def test_info_shows_the_names_of_features(tmp_path: Path) -> None:
    named = GaussianMixture.from_parameters([1.0], [[1.0, 2.0]], [[1.0, 1.0]], covariance_type="diag")
    named.feature_names_in_ = np.array(["temperature", "salinity"], dtype=object)
    named.save(tmp_path / "m.sgmm")
    assert re.search(r"^# +weight +temperature +salinity$", succeed("info", tmp_path / "m.sgmm").stdout, re.MULTILINE)


def test_info_of_a_store_gives_its_grid_and_the_plan(small: Path) -> None:
    text = succeed("info", small).stdout
    assert "small.zarr: shape (2500, 3), float64, chunks (1000, 3)" in text
    assert "Fitting 8 components would read, a pass: small.zarr: 2,500 rows x 3 features, 60 kB a pass" in text
    assert "Fitting 2 components" in succeed("info", small, "-k", 2).stdout


def test_info_of_a_group_asks_for_the_array_in_the_words_of_the_command_line(tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "g.zarr"), mode="w")
    group.create_array("a", data=np.ones((4, 2)))
    words = "group of arrays ['a']. Say which one with --array NAME, or by its own path."
    assert words in error_of("info", tmp_path / "g.zarr")
    assert "shape (4, 2)" in succeed("info", tmp_path / "g.zarr", "--array", "a").stdout


# -- what may be wrong with rows -----------------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A group of arrays that need a word: "nan" has NaN in row 7, "gone" lacks a chunk, "packed" holds integers."""
    rows = random_mixture(2, 3, 4.0, 0).rows(2_500, 0)[0]
    group = zarr.open_group(str(tmp_path / "odd.zarr"), mode="w")
    group.create_array("nan", data=np.where(np.arange(2_500)[:, None] == 7, np.nan, rows), chunks=(1_000, 3))
    group.create_array("gone", data=rows, chunks=(1_000, 3))
    (tmp_path / "odd.zarr" / "gone" / "c" / "1" / "0").unlink()
    packed = group.create_array("packed", data=np.round(rows * 100).astype(np.int16), chunks=(1_000, 3))
    packed.attrs["scale_factor"] = 0.01
    return tmp_path / "odd.zarr"


ODD = [("nan", "--nan-policy", "omit"), ("gone", "--missing-chunks", "fill"), ("packed", "--decode", "cf")]


@pytest.mark.parametrize(("array", "option", "value"), ODD)
def test_rows_that_need_a_word_are_refused_with_the_option_that_says_it(
    array: str, option: str, value: str, odd: Path, two: Path, tmp_path: Path
) -> None:
    refused = [
        error_of("fit", odd, "--array", array, "-o", tmp_path / "m.sgmm"),
        error_of("predict", odd, two, "--array", array, "-o", tmp_path / "l.zarr"),
    ]
    for error in refused:
        assert f"{option} {value}" in error
        assert "open_source" not in error
    assert not (tmp_path / "m.sgmm").exists()
    assert not (tmp_path / "l.zarr").exists()


@pytest.mark.parametrize(("array", "option", "value"), ODD)
def test_fit_predict_and_info_read_rows_as_they_are_told(
    array: str, option: str, value: str, odd: Path, tmp_path: Path
) -> None:
    said = ("--array", array, option, value)
    succeed("fit", odd, *said, "-k", 2, "-o", tmp_path / "m.sgmm")
    succeed("predict", odd, tmp_path / "m.sgmm", *said, "-o", tmp_path / "labels.zarr")
    assert "2,500 rows x 3 features" in succeed("info", odd, *said).stdout
    source = open_source(odd, array=array, **{option.strip("-").replace("-", "_"): value})
    ours = GaussianMixture(2, random_state=0).fit(source)
    np.testing.assert_array_equal(load(tmp_path / "m.sgmm").means_, ours.means_)
    labels = zarr.open_array(str(tmp_path / "labels.zarr"), mode="r")[:]
    np.testing.assert_array_equal(labels, ours.predict(source).compute())
    assert np.flatnonzero(labels == -1).tolist() == ([7] if array == "nan" else [])


def test_rows_left_out_are_counted(odd: Path, tmp_path: Path) -> None:
    result = succeed("fit", odd, "--array", "nan", "--nan-policy", "omit", "-o", tmp_path / "m.sgmm")
    assert re.search(r"; 2,499 rows in 1 read, 1 left out$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("option", ["nan-policy", "missing-chunks", "decode"])
@pytest.mark.parametrize("command", ["fit", "predict", "info"])
def test_a_word_that_means_nothing_is_refused(
    command: str, option: str, small: Path, two: Path, tmp_path: Path
) -> None:
    arguments = {
        "fit": ("fit", small, "-o", tmp_path / "m.sgmm"),
        "predict": ("predict", small, two, "-o", tmp_path / "l.zarr"),
        "info": ("info", small),
    }
    error = error_of(*arguments[command], f"--{option}", "perhaps")
    assert f"--{option} must be " in error
    assert "but it is 'perhaps'." in error


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("with array=NAME, or by", "with --array NAME, or by"),
        ('give nan_policy="omit".', "give --nan-policy omit."),
        ("with missing_chunks='fill' too", "with --missing-chunks fill too"),
        ('it with open_source(..., decode="cf") to', "it with --decode cf to"),
        ("with open_source(..., block_rows=9)", "with open_source(..., block_rows=9)"),
        ("sub_array=NAME", "sub_array=NAME"),
    ],
)
def test_advice_is_given_in_the_words_of_the_command_line(
    python: str, words: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise DataError(f"Say it\n  {python}")

    monkeypatch.setattr(cli, "open_source", refused)
    assert error_of("info", small) == f"Error: Say it {words}"


# -- errors, help, the process -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("fit nothere.zarr -o m.sgmm", "There is no zarr array or group that can be opened at 'nothere.zarr'"),
        ("fit small.zarr -o nowhere/m.sgmm", "There is no folder nowhere to write m.sgmm into. Make it first."),
        ("fit small.zarr -o folder", "folder is a folder, but a model is one file."),
        ("fit small.zarr -k 0 -o m.sgmm", "--n-components must be a whole number of at least 1, but it is 0."),
        ("fit small.zarr --covariance-type round -o m.sgmm", "--covariance-type must be one of 'full', 'tied'"),
        ("fit small.zarr -k 9999 -o m.sgmm", "n_components = 9999, n_samples = 2500"),
        ("fit small.zarr --array a -o m.sgmm", "is an array, not a group"),
        ("predict small.zarr nothere.sgmm -o l.zarr", "There is no file 'nothere.sgmm': it is not there."),
        ("predict small.zarr text.txt -o l.zarr", "text.txt cannot be read as a streamgmm file"),
        ("predict small.zarr other.sgmm -o l.zarr", "small.zarr has 3 features, but GaussianMixture is expecting 2"),
        ("predict small.zarr other.sgmm -o text.txt --overwrite", "text.txt is not a zarr array"),
        ("info text.txt", "text.txt cannot be read as a streamgmm file"),
        ("info nothere", "There is no zarr array or group that can be opened at 'nothere'"),
        ("demo text.txt", "text.txt: File exists."),
    ],
)
def test_errors_are_one_sentence(
    command: str, words: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("not a model")
    (tmp_path / "folder").mkdir()
    GaussianMixture.from_parameters([1.0], [[0.0, 0.0]], [[1.0, 1.0]], covariance_type="diag").save("other.sgmm")
    before = sorted(tmp_path.rglob("*"))
    assert words in error_of(*shlex.split(command))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unexpected_error_keeps_its_traceback(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(cli, "open_source", broken)
    assert isinstance(run("info", small).exception, ZeroDivisionError)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_the_help_runs(
    command: str, store: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"Example: streamgmm (.*\S)", succeed(command, "--help").stdout)
    example = shlex.split(found[1])
    assert example[0] == command
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.zarr").symlink_to(store)
    if command not in ("fit", "merge"):
        shutil.copy(model, tmp_path / "model.sgmm")
    for site in example[1:3] if command == "merge" else []:
        load(model).statistics(np.zeros((5, 4))).save(tmp_path / site)
    succeed(*example)


def test_version() -> None:
    assert succeed("--version").stdout == f"streamgmm {streamgmm.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_progress_moves_on_a_terminal(
    command: str, store: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(cli, "stderr", Console(file=screen, force_terminal=True, width=100))
    arguments = {
        "demo": ("demo", tmp_path, "--rows", 3_000),
        "fit": ("fit", store, "-o", tmp_path / "m.sgmm"),
        "predict": ("predict", store, model, "-o", tmp_path / "l.zarr"),
        "info": ("info", model),
        "update": ("update", store, shutil.copy(model, tmp_path / "u.sgmm")),
        "statistics": ("statistics", store, model, "-o", tmp_path / "s.sgmm"),
        "merge": ("merge", tmp_path / "here.sgmm", "-o", tmp_path / "n.sgmm"),
    }
    load(model).statistics(np.zeros((5, 4))).save(tmp_path / "here.sgmm")
    succeed(*arguments[command])
    shown = {"demo": "writing 100% reading", "predict": "predicting 100%", "fit": "reading", "update": "reading"}
    for word in shown.get(command, "").split():
        assert word in screen.getvalue()
    assert bool(screen.getvalue()) == (command in shown)
