"""What the benchmarks of few reads stand on: the optimum, counted reads, results that are kept, and the verdicts."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mixtures import blobs, given_start

from streamgmm import GaussianMixture

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Scripts import what stands beside them."""
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def test_em_continued_from_a_model_ends_where_em_ends() -> None:
    optimum = import_module("optimum")
    rows = np.asarray(blobs())
    settings = {"solver": "em", "tol": 1e-13, "max_iter": 3000, **given_start("full")}
    start = GaussianMixture(3, **{**settings, "tol": 1.0}).fit(rows)
    found = optimum.continued(optimum.in_memory(rows), optimum.params_of(start))
    assert found.end == pytest.approx(GaussianMixture(3, **settings).fit(rows).score(rows), abs=1e-9)
    assert found.start == pytest.approx(start.score(rows), rel=1e-12)
    assert found.gap > 0


def test_a_store_counts_its_reads() -> None:
    cells = import_module("cells")
    with cells.stored(np.random.default_rng(0).normal(size=(100_000, 2))) as data:
        assert data.array.nchunks == 4
        assert data.reads() == 0
        model = GaussianMixture(1, solver="em").fit(data.array)
        assert data.reads() == model.n_passes_
        data.array[:10]
        with pytest.raises(AssertionError, match="c/0/0"):
            data.reads()


@pytest.mark.parametrize("script", ["reads", "stopping", "order"])
def test_what_was_measured_can_be_gone_on_from(script: str) -> None:
    cells, results = (import_module(name) for name in ("cells", "results"))
    lines = results.read(FOLDER / "measured" / f"{script}.jsonl")
    seeds = {cell.name: cell.seeds for cell in cells.CELLS}
    keys = [(line["cell"], line["seed"], line["method"]) for line in lines]
    assert len(set(keys)) == len(keys) > 0
    methods = import_module(script).METHODS
    assert all(seed < seeds[name] and method in methods for name, seed, method in keys)


def test_the_table_of_what_was_measured() -> None:
    cells, reads, results = (import_module(name) for name in ("cells", "reads", "results"))
    (cell,) = cells.cells_like(["gaussian-d2-k4-2"])
    found = reads.summaries(cell, results.read(FOLDER / "measured" / "reads.jsonl"))
    assert [summary.method for summary in found] == reads.METHODS
    assert found[0].within


def documented(header: str) -> list[list[str]]:
    """The cells of the table in how-it-works.md whose header begins so."""
    text = (FOLDER.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("| ").split("|")] for row in rows]


def test_the_documents_say_how_many_reads_were_measured() -> None:
    cells, stopping, results = (import_module(name) for name in ("cells", "stopping", "results"))
    kinds = {cell.name: cell.kind for cell in cells.CELLS}
    lines = results.read(FOLDER / "measured" / "stopping.jsonl")
    asked = []
    for kind in dict.fromkeys(kinds.values()):
        mine = [line for line in lines if kinds[line["cell"]] == kind]
        reads, most, gap, point, _ = stopping.Figures.of(mine)
        asked.append([str(len(mine)), f"{reads:g}", str(most), f"{gap:.1g}", f"{point:.2g}"])
        assert " NO" not in stopping.row("", mine, kind)
    assert [row[1:] for row in documented("data")] == asked
    gaps = np.array([(x["optimum"] - x["likelihood"]) / x["tol"] for x in lines if kinds[x["cell"]] == "0.8"])
    far = f"{(gaps > stopping.LARGEST_GAP).sum()} of the {len(gaps)} fits at 0.8 apart are more than 1.5 `tol` from"
    assert far in explained()


def explained() -> str:
    """How-it-works.md on one line."""
    return " ".join((FOLDER.parent / "docs" / "how-it-works.md").read_text(encoding="utf-8").split())


def test_the_documents_say_how_often_the_order_of_rows_mattered() -> None:
    cells, order, results = (import_module(name) for name in ("cells", "order", "results"))
    lines = results.read(FOLDER / "measured" / "order.jsonl")
    assert {(line["cell"], line["seed"]) for line in lines} == {(c.name, s) for c in cells.CELLS for s in range(3)}
    near = {name: sum(order.difference(x, name) <= limit for x in lines) for name, limit in order.LIMITS.items()}
    assert f"with `tol=1e-8` {near['tight']} of {len(lines)} pairs end within $10^{{-6}}$ nats a row" in explained()
    assert f"by default {near['default']} of {len(lines)} within 2 `tol`" in explained()
    same = sum(order.difference(x, name) == 0.0 for x in lines for name in order.LIMITS)
    assert f"In {same} of {2 * len(lines)} the likelihood is the same to the last bit" in explained()


def test_the_documents_say_what_was_measured_of_starts() -> None:
    starts = import_module("starts")
    done = starts.finished(FOLDER / "measured" / "starts.jsonl")
    assert set(done) == {(setting.name, seed) for setting in starts.SETTINGS for seed in range(40)}
    shown = [*starts.OURS.values(), starts.THEIRS, starts.CONTINUED]
    for setting, row in zip(starts.SETTINGS, documented("mixture"), strict=True):
        found = starts.shares(done, 40, setting)
        assert row == [setting.name, *(f"{found[name]:.2f}" for name in shown)]
        assert all(found[starts.OURS[n_init]] >= least for n_init, least in setting.required.items())


def test_every_cell_has_a_name_of_its_own_and_a_limit() -> None:
    cells, reads = import_module("cells"), import_module("reads")
    assert len({cell.name for cell in cells.CELLS}) == len(cells.CELLS) == 34
    assert {cell.kind for cell in cells.CELLS} == set(reads.LIMITS)
    with pytest.raises(SystemExit, match=r"No cell is like 'nothing'\. There are: gaussian-d2-k4-2, "):
        cells.cells_like(["nothing"])


def test_rows_lie_sorted_and_the_sample_is_what_the_suite_says() -> None:
    (cell,) = import_module("cells").cells_like(["t-d2-k4-1.5"])
    rows = cell.rows(0)
    assert (np.diff(rows[:, 0]) >= 0).all()
    assert (len(rows), cell.n_parameters, cell.sample_rows(len(rows))) == (200_000, 23, 20_000)


def test_results_are_not_measured_again(tmp_path: Path) -> None:
    """Those of another method, seed or cell are, and a line that was cut off is."""
    results = import_module("results")
    asked: list[tuple[str, int, list[str]]] = []

    def work(cell: Any, seed: int, methods: list[str]) -> Any:
        asked.append((cell.name, seed, methods))
        yield from ({"method": method} for method in methods)

    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"cell": "coads-k4", "seed": 0, "method": "a"}) + "\n" + '{"cell": "coads-k4", "se\n')
    arguments = argparse.Namespace(results=path, cells=["coads-k4"], seeds=2, jobs=1)
    lines = results.measure(arguments, work, ["a", "b"])
    assert asked == [("coads-k4", 0, ["b"]), ("coads-k4", 1, ["a", "b"])]
    assert sorted((line["seed"], line["method"]) for line in lines) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert results.measure(arguments, work, ["a", "b"]) == lines
    assert len(asked) == 2


def lines_of(gaps: dict[str, tuple[float, float]], unit: float) -> list[dict[str, Any]]:
    """Results of a cell whose optimum is -1, whatever the seed; gaps in units of U."""
    return [
        {
            "cell": "coads-k4",
            "seed": seed,
            "method": method,
            "n": 99_235,
            "sample_rows": 19_847,
            "likelihoods": [-1.0 - unit * gap for gap in pair],
            "optimum": -1.0,
            "inner_steps": 10,
            "rejected": int(seed == 0),
            "passes": 5,
        }
        for seed in range(4)
        for method, pair in gaps.items()
    ]


def test_the_table_says_what_is_met() -> None:
    reads = import_module("reads")
    (cell,) = import_module("cells").cells_like(["coads-k4"])
    unit = cell.unit(99_235)
    found = reads.summaries(cell, lines_of({"auto": (1.0, 0.6), "anderson": (2.0, 0.3), "em": (3.0, 2.0)}, unit))
    assert [summary.method for summary in found] == reads.METHODS
    np.testing.assert_allclose(found[0].medians, [1.0, 0.6], rtol=1e-6)
    assert not found[0].within
    assert str(found[0]).endswith("1.5 and 0.5  NO")
    said = "\n".join(reads.verdicts(found[:1], [found[1:]]))
    assert "rejected reads: 1 of 20 (5.0%)" in said
    assert "after 4 reads our median is at most 1.5 times the better of the other two in 1 of 1 cells" in said
    assert "after 6 reads our median is at most 1.5 times the better of the other two in 0 of 1 cells" in said
    assert "at most 2.00 times" in said


def test_what_an_optimum_lacks_is_measured_from_the_best_of_all() -> None:
    """Over seeds as well where the rows are real; seeds that miss a method are left out."""
    reads = import_module("reads")
    (cell,) = import_module("cells").cells_like(["coads-k4"])
    unit = cell.unit(99_235)
    lines = lines_of(dict.fromkeys(reads.METHODS, (1.0, 0.1)), unit)
    lines[0]["optimum"] += 3 * unit
    found = reads.summaries(cell, lines[:-1])
    np.testing.assert_allclose(found[0].lacking, [0.0, 3.0, 3.0], atol=1e-6)
    np.testing.assert_allclose(found[1].lacking, [3.0, 3.0, 3.0], atol=1e-6)


def test_fits_that_end_apart_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted and shuffled rows lead to one optimum here; where no difference is allowed, what EM gains is told."""
    order = import_module("order")
    rows = np.asarray(blobs(8_000))
    rows = rows[np.argsort(rows[:, 0])]
    cell = SimpleNamespace(k=3, rows=lambda seed: rows, sample_rows=lambda n: 1_600, unit=lambda n: 1e-3)
    (line,) = order.work(cell, 0, order.METHODS)
    assert order.difference(line, "tight") < 1e-6
    assert order.difference(line, "default") < 2.0
    assert order.summary([line], "tight", 1e-6).split()[1::3] == ["-", "yes"]
    monkeypatch.setattr(order, "LIMITS", {"tight": -1.0, "default": -1.0})
    (line,) = order.work(cell, 0, order.METHODS)
    assert -1e-12 < order.own_gap(line, "tight") < 1e-6
    assert order.own_gap(line, "default") < 2.0
    assert order.summary([line], "default", -1.0).split()[-1] == "NO"


def test_scikit_learn_goes_on_from_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bounds, as if it had not been cut off; and it ends where it has come to the target."""
    against = import_module("against_sklearn")
    rows, _ = against.recipe(against.K, against.D, 3_000, 2.0, 0)
    whole = against.until_as_good(rows, np.inf, tmp_path / "whole.jsonl")
    cut, kept = tmp_path / "cut.jsonl", []

    def append(path: Path, line: dict[str, Any]) -> None:
        kept.append(line)
        if line["iteration"] == 3:
            raise KeyboardInterrupt("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(against, "append", append)
        with pytest.raises(KeyboardInterrupt, match="cut off"):
            against.until_as_good(rows, np.inf, cut)
    resumed = against.until_as_good(rows, np.inf, cut)
    assert (resumed["likelihood"], resumed["iterations"]) == (whole["likelihood"], whole["iterations"])
    assert not resumed["reached"]
    early = against.until_as_good(rows, kept[1]["bound"], tmp_path / "early.jsonl")
    assert (early["iterations"], early["reached"]) == (2, True)


def test_peers_take_the_same_steps_from_the_same_start(tmp_path: Path) -> None:
    """Each in a process of its own, in this environment; what is said of them is made of ratios of neighbours."""
    peers = import_module("peers")
    rows, means = peers.rows_and_means(16, 32)
    np.save(tmp_path / "rows.npy", rows[:3_000])
    np.save(tmp_path / "means.npy", means)
    ends = []
    installed = [name for name, package in peers.OPTIONAL.items() if importlib.util.find_spec(package)]
    for name in ("streamgmm", "scikit-learn", *installed):
        with peers.Peer(name, sys.executable, tmp_path, "full", 1) as peer:
            _, made, likelihood = peer.fit(4)
        assert made == 4
        ends.append(likelihood)
    assert peers.apart(ends) < (1e-5 if "gmmx" in installed else 1e-9)  # which is in single precision
    nothing = peers.Peer("nothing", sys.executable, tmp_path, "full", 1)
    with nothing, pytest.raises(RuntimeError, match="ended with 1"):
        nothing.fit(1)
    timed = {"streamgmm": [1.0, 2.0, 1.0], "oneDAL": [3.0, 4.0, 5.0]}
    assert peers.ratios(timed) == {"streamgmm": 1.0, "oneDAL": 3.0}
    assert peers.row(2, 8, "full", timed, 0.5, ["streamgmm", "oneDAL"]).split() == [
        "full",
        "2",
        "8",
        "1.0000",
        "4.0000",
        "3.00",
        "5.0e-01",
    ]


def test_peers_that_are_not_installed_are_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = import_module("peers")
    monkeypatch.setattr(peers, "OPTIONAL", {"one that is": "numpy", "another": "no_such_package"})
    monkeypatch.setattr(peers, "onedal_python", lambda folder: "python of oneDAL")
    wanted = ["scikit-learn", "oneDAL", "one that is", "another"]
    found = peers.interpreters("full", tmp_path, wanted)
    assert list(found) == ["streamgmm", "scikit-learn", "oneDAL", "one that is"]
    assert capsys.readouterr().out == "another: absent\n"
    assert list(peers.interpreters("tied", tmp_path, wanted)) == ["streamgmm", "scikit-learn"]
    assert peers.apart([1.0, np.nan, 1.5]) == 0.5


def test_a_pass_beside_what_it_cannot_do_without() -> None:
    floor = import_module("floor")
    assert max(floor.cost_of_the_loops()) < 30.0
    rows, params = floor.unit_clusters(2, 2, 0.1)
    found = floor.measured(rows, params, 1)
    assert min(found.values()) > 0
    line = floor.row(2, 2, dict.fromkeys(found, 1.0) | {"pass": 4.0, "E-step, 2": 0.5, "bare read": 2.0}, 0.25)
    assert line.split() == [
        "2",
        "2",
        "1.00",
        "2.00",
        "2.00",
        "0.75",
        "1.00",
        "2.00",
        "2.00",
        "1.00",
        "float32,",
        "float32",
        "25.0%",
    ]


def test_the_share_of_rows_that_single_precision_refuses() -> None:
    """Whole panels are, of which one row is too far."""
    floor = import_module("floor")
    rows, params = floor.unit_clusters(2, 2, 2.0)
    scorer = floor.prepare(params, params.frame(), single=True)
    assert floor.share_left_to_double(rows, scorer) == 0.0
    rows[5] = 1e4
    assert floor.share_left_to_double(rows, scorer) == floor.PANEL_ROWS / len(rows)
    assert floor.share_left_to_double(rows, floor.prepare(params, params.frame())) == 1.0


def followed() -> list[tuple[str, str]]:
    """Names of the classes that asv runs, and of their time_* and peakmem_* methods."""
    sys.path.insert(0, str(FOLDER))
    try:
        tracked = import_module("tracked")
    finally:
        sys.path.remove(str(FOLDER))
    classes = [value for value in vars(tracked).values() if isinstance(value, type) and hasattr(value, "params")]
    return [(kind.__name__, name) for kind in classes for name in dir(kind) if name.startswith(("time_", "peakmem_"))]


@pytest.mark.parametrize(("kind", "name"), followed())
def test_what_is_followed_runs(kind: str, name: str) -> None:
    benchmark = getattr(import_module("tracked"), kind)()
    first = [values[0] for values in benchmark.params]
    assert len(first) == len(benchmark.param_names)
    benchmark.setup(*first)
    try:
        getattr(benchmark, name)(*first)
    finally:
        getattr(benchmark, "teardown", lambda *_: None)(*first)


def test_a_pass_beside_a_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short form: one store of each kind, and what is printed of them."""
    reading = import_module("reading")
    small = [reading.Layout("chunks", 2_000), reading.Layout("shards", 500, 5_000)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, "layouts", lambda gigabytes: small)
        reading.chunks(tmp_path, 0.001, 1)
        reading.sizes(tmp_path, [0.001, 0.002], 1)
    reading.many(tmp_path, 2_000, 1)
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +(?:chunks|shards)(?: +[\d.]+){4} (?:yes|NO)$", printed, re.MULTILINE)) == 2
    assert re.search(r"2,000 chunks: [\d,]+ tasks yes, graph [\d.]+ MB yes, [\d.]+ s outside of the tasks", printed)
    assert reading.zarr.open_array(tmp_path / "shards-0.001GB.zarr").shards == (5_000, 8)


def test_layouts_are_what_they_are_called() -> None:
    reading = import_module("reading")
    n = 1e9 / reading.ROW_BYTES
    large, small, shards = reading.layouts(1.0)
    assert n / large.chunk_rows == pytest.approx(100, rel=1e-3)
    assert n / small.chunk_rows == pytest.approx(20_000, rel=1e-3)
    assert shards.rows_per_shard == 50 * shards.chunk_rows == pytest.approx(n / 20, rel=1e-3)
