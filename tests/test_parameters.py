"""Every parameter changes something that can be seen, or is refused by its name."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import UNFINISHED, assert_identical, blobs, given_start
from sklearn.exceptions import ConvergenceWarning

from streamgmm import GaussianMixture, files
from streamgmm.errors import ParameterError

KINDS_OF_START = ("split", "kmeans", "k-means++", "vq", "random_from_data", "samples", "random")
START = given_start("full")

#: what a fit starts with in these tests, unless a parameter is changed
BASE = {"n_components": 3, "random_state": 0, "solver": "em"}


def fit(**changed: Any) -> GaussianMixture:
    return GaussianMixture(**{**BASE, **changed}).fit(blobs())


# -- what can be seen --------------------------------------------------------------------------------------------------

Seen = Callable[[dict[str, Any]], Any]


def attribute(name: str, **others: Any) -> Seen:
    """An attribute of the fitted model."""
    return lambda changed: np.asarray(getattr(fit(**others, **changed), name)).tolist()


def shape_of(name: str) -> Seen:
    return lambda changed: getattr(fit(**changed), name).shape


def first_lower_bound(changed: dict[str, Any]) -> float:
    return fit(**changed).lower_bounds_[0]


def passes_of_a_second_fit(changed: dict[str, Any]) -> int:
    return GaussianMixture(**BASE, **changed).fit(blobs()).fit(blobs()).n_iter_


def learned_on(changed: dict[str, Any]) -> Any:
    """Means after a fit of half the rows and two batches of the others: more of them than all count alike."""
    first, *others = np.array_split(blobs(6000), [3000, 4500])
    model = GaussianMixture(**BASE, **changed).fit(first)
    for batch in others:
        model.partial_fit(batch)
    return model.means_.tolist()


def learned_after_a_given_mixture(changed: dict[str, Any]) -> Any:
    covariances = np.linalg.inv(START["precisions_init"])
    model = GaussianMixture.from_parameters(START["weights_init"], START["means_init"], covariances)
    return model.set_params(**changed).partial_fit(blobs()).means_.tolist()


def printed(**others: Any) -> Seen:
    """The lines that a fit prints."""

    def lines(changed: dict[str, Any]) -> list[str]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            fit(**{**others, **changed})
        return out.getvalue().splitlines()

    return lines


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter: another valid value, what it changes (None: nothing, see SYNONYMS), and values that it refuses."""

    other: Any
    seen: Seen | None
    refused: tuple[Any, ...]


NOT_WHOLE = (1.5, True, "3", None, [2])
NOT_AN_AMOUNT = (-1e-3, np.nan, np.inf, "small", True, [1.0])

TABLE: dict[str, Parameter] = {
    "n_components": Parameter(2, shape_of("means_"), (0, -1, *NOT_WHOLE)),
    "covariance_type": Parameter("diag", shape_of("covariances_"), ("round", "Full", None, 3, ["full"])),
    "tol": Parameter(1e-9, attribute("n_iter_", max_iter=2000), NOT_AN_AMOUNT),
    "reg_covar": Parameter(1e-2, attribute("covariances_"), (None, *NOT_AN_AMOUNT)),
    "max_iter": Parameter(0, attribute("n_passes_"), (-1, *NOT_WHOLE)),
    "n_init": Parameter(4, attribute("n_passes_", init_params="random_from_data"), (0, -1, *NOT_WHOLE)),
    "init_params": Parameter("random", first_lower_bound, ("Kmeans", "", None, 1)),
    "weights_init": Parameter(
        START["weights_init"], attribute("weights_", max_iter=0), ([0.5, 0.5], [0.5, 0.5, 0.5], [2, -1, 0], "abc")
    ),
    "means_init": Parameter(
        START["means_init"], attribute("means_", max_iter=0), (np.zeros((3, 2)), np.full((3, 3), np.inf), "abc")
    ),
    "precisions_init": Parameter(
        START["precisions_init"],
        attribute("precisions_", max_iter=0),
        (np.eye(3), np.zeros((3, 3, 3)), np.full((3, 3, 3), np.nan), "abc"),
    ),
    "random_state": Parameter(1, attribute("means_", init_params="random"), (-1, 1.5, "dice", True, [1])),
    "warm_start": Parameter(True, passes_of_a_second_fit, (1, "yes", None)),
    "verbose": Parameter(1, printed(), (-1, 1.5, "1", None)),
    "verbose_interval": Parameter(2, printed(verbose=1), (0, -1, *NOT_WHOLE)),
    "solver": Parameter("incremental", attribute("lower_bounds_", tol=1e-6), ("newton", "EM", None, 1)),
    "step_exponent": Parameter(0.6, learned_on, (0.5, 1.1, None, *NOT_AN_AMOUNT)),
    "forgetting": Parameter(
        {"half_life": 200},
        learned_on,
        (0, 1.5, "slowly", {}, {"half_life": 0.5}, {"rows": 9}, {"half_life": "9"}, True),
    ),
    "average": Parameter(True, learned_on, (1, "yes", None)),
    "prior_rows": Parameter(20, learned_after_a_given_mixture, (0, 0.5, *NOT_AN_AMOUNT)),
    "sample_rows": Parameter(400, attribute("n_passes_", solver="auto"), (0, 1, 1.5, True, "3", [2])),
    "compute_dtype": Parameter("float32", first_lower_bound, ("float16", "single", np.float32, None)),
}

#: names of one thing, until one of them becomes a thing of its own
SYNONYMS = {"init_params": ("auto", "split")}


def test_every_parameter_stands_in_the_table() -> None:
    assert set(TABLE) == set(GaussianMixture().get_params())
    assert {name for name, entry in TABLE.items() if entry.seen is None} <= set(SYNONYMS)


@pytest.mark.parametrize("name", [name for name, entry in TABLE.items() if entry.seen is not None])
def test_another_value_changes_something(name: str) -> None:
    seen = TABLE[name].seen
    assert seen is not None
    assert seen({}) == seen({}), "what is looked at must not change by itself"
    assert seen({name: TABLE[name].other}) != seen({})


@pytest.mark.parametrize("name", SYNONYMS)
def test_synonyms_are_the_same_to_the_bit(name: str) -> None:
    one, other = (fit(**{name: value}) for value in SYNONYMS[name])
    assert_identical(one, other)
    assert one.lower_bounds_ == other.lower_bounds_


REFUSED = [(name, value) for name, entry in TABLE.items() for value in entry.refused]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(REFUSED)])
def test_a_value_without_meaning_is_refused_by_name(name: str, value: Any) -> None:
    """Before anything is learned, so the model stays unfitted."""
    model = GaussianMixture(**{**BASE, name: value})
    with pytest.raises(ParameterError, match=f"^{name} must "):
        model.fit(blobs())
    assert not hasattr(model, "weights_")


WELCOME = [
    ("n_components", np.int8(3)),
    ("tol", 0),
    ("tol", np.float32(0.5)),
    ("reg_covar", 0),
    ("max_iter", np.int32(80)),
    ("n_init", np.uint8(1)),
    ("weights_init", (0.25, 0.25, 0.5)),
    ("means_init", START["means_init"].tolist()),
    ("precisions_init", np.asarray(START["precisions_init"], dtype=np.float32)),
    ("random_state", np.int64(0)),
    ("warm_start", np.bool_(True)),
    ("verbose", False),
    ("verbose_interval", np.uint8(1)),
    ("step_exponent", np.float32(1)),
    ("forgetting", np.float64(0.1)),
    ("forgetting", {"effective_rows": np.int64(100)}),
    ("average", np.bool_(True)),
    ("prior_rows", np.int8(3)),
    ("sample_rows", np.int16(500)),
]


@pytest.mark.parametrize(("name", "value"), WELCOME, ids=[f"{name}-{value!r:.20}" for name, value in WELCOME])
def test_numbers_of_any_type_are_taken(name: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # tol=0 never converges
        model = fit(**{name: value})
    assert np.isfinite(model.means_).all()


def test_a_small_integer_type_counts_passes_beyond_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    with UNFINISHED:
        fit(tol=0.0, max_iter=260, verbose=1, verbose_interval=np.uint8(130))
    assert [line[:8] for line in capsys.readouterr().out.splitlines()[1:]] == ["pass 130", "pass 260"]


# -- kinds of starts ---------------------------------------------------------------------------------------------------


def start(kind: str, seed: int) -> GaussianMixture:
    return fit(init_params=kind, max_iter=0, random_state=seed)


def test_every_kind_of_start_is_another_one() -> None:
    starts = {kind: start(kind, 0) for kind in KINDS_OF_START}
    for one, other in combinations(starts.values(), 2):
        assert np.abs(one.means_ - other.means_).max() > 1e-2
        assert abs(one.score(blobs()) - other.score(blobs())) > 1e-3


def test_the_first_lower_bound_is_that_of_the_start() -> None:
    for kind in KINDS_OF_START:
        with UNFINISHED:
            model = fit(init_params=kind, max_iter=1)
        assert model.lower_bounds_ == pytest.approx([start(kind, 0).score(blobs())], rel=1e-13)


def test_splits_are_the_best_start_and_chance_the_worst() -> None:
    """On average over 20 seeds."""
    means = {kind: np.mean([start(kind, seed).score(blobs()) for seed in range(20)]) for kind in KINDS_OF_START}
    assert means["split"] == max(means.values())
    assert {"random", "samples"} == set(sorted(means, key=means.__getitem__)[:2])


def test_seeds_far_apart_find_small_clusters_and_random_rows_do_not() -> None:
    """Three clusters of ten rows far from a thousand others: has each of them a mean of its own?"""
    centres = np.array([[0.0, 0.0], [500.0, 0.0], [0.0, 500.0], [-500.0, -500.0]])
    labels = np.repeat(np.arange(4), [1000, 10, 10, 10])
    rows = centres[labels] + np.random.default_rng(2).standard_normal((len(labels), 2))

    def found(kind: str, seed: int) -> bool:
        model = GaussianMixture(4, solver="em", init_params=kind, max_iter=0, random_state=seed).fit(rows)
        distances = np.linalg.norm(model.means_[:, None] - centres, axis=2)
        return bool((distances.min(axis=0) < 3.0).all())

    kinds = ("kmeans", "k-means++", "random_from_data", "random")
    shares = {kind: np.mean([found(kind, seed) for seed in range(20)]) for kind in kinds}
    assert shares["kmeans"] == 1.0
    assert shares["k-means++"] >= 0.9
    assert shares["random_from_data"] <= 0.1
    assert shares["random"] == 0.0


def test_random_responsibilities_put_every_component_in_the_middle() -> None:
    rows = blobs()
    for seed in range(5):
        spread = np.ptp(start("random", seed).means_, axis=0) / rows.std(axis=0)
        assert (spread < 0.2).all()
        assert (np.ptp(start("kmeans", seed).means_, axis=0) > rows.std(axis=0)).all()


# -- what is printed and what is logged --------------------------------------------------------------------------------


def lines_of(capsys: pytest.CaptureFixture[str], **changed: Any) -> tuple[list[str], int]:
    """What a fit prints, and its number of passes."""
    capsys.readouterr()
    model = fit(**changed)
    return capsys.readouterr().out.splitlines(), model.n_iter_


def test_nothing_is_printed_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys)[0] == []
    assert lines_of(capsys, verbose=0, verbose_interval=1)[0] == []


@pytest.mark.parametrize("interval", [1, 4, 1000])
def test_every_so_many_passes_are_printed_and_the_last(capsys: pytest.CaptureFixture[str], interval: int) -> None:
    lines, n = lines_of(capsys, verbose=1, verbose_interval=interval)
    assert n % 4 != 0, "the last pass must be another than every fourth"
    assert lines[0].startswith("the array: 1,200 rows x 3 features")
    told = [int(line.split()[1]) for line in lines[1:]]
    assert told == sorted({*range(interval, n + 1, interval), n})
    assert lines[-1].endswith("  converged")


def test_the_last_pass_is_printed_where_max_iter_ends_the_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with UNFINISHED:
        lines, _ = lines_of(capsys, verbose=1, max_iter=3, tol=0.0)
    assert [line[:8] for line in lines[1:]] == ["pass   3"]


def test_seconds_are_printed_from_two_on(capsys: pytest.CaptureFixture[str]) -> None:
    once, _ = lines_of(capsys, verbose=1)
    for verbose in (2, 3):
        twice, _ = lines_of(capsys, verbose=verbose)
        assert [line.rsplit("  ", 1)[0] for line in twice[1:]] == once[1:]
        assert all(line.endswith(" s") for line in twice[1:])


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_the_log_has_a_line_for_every_pass_whatever_is_printed(verbose: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        model = fit(verbose=verbose, verbose_interval=7)
    passes = [record for record in caplog.records if record.getMessage().startswith("pass ")]
    assert {(record.name, record.levelname) for record in caplog.records} == {("streamgmm", "INFO")}
    assert [int(record.getMessage().split()[1]) for record in passes] == list(range(1, model.n_iter_ + 1))
    for record, bound in zip(passes, model.lower_bounds_, strict=True):
        assert f"log-likelihood/row {bound: .6f}" in record.getMessage()
    assert len(caplog.records) == len(passes) + 2, "the plan, and the search for starts"


def test_restarts_share_the_lines_of_their_passes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="streamgmm"):
        model = fit(n_init=3, init_params="random")
    passes = [message for message in caplog.messages if message.startswith("pass ")]
    assert len(passes) == model.n_passes_ - 1


def test_the_log_is_silent_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    """A library sets up no handler: without one, lines below a warning go nowhere."""
    fit()
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# -- where random numbers come from ------------------------------------------------------------------------------------


def seed_of(model: GaussianMixture, folder: Path) -> str:
    """The seed that the model file tells."""
    model.save(folder / "model.sgmm")
    return files.read(folder / "model.sgmm", "model").facts["provenance"]["seed"]


def sought(random_state: Any) -> GaussianMixture:
    """A start whose every bit depends on the seed."""
    return fit(random_state=random_state, init_params="random", max_iter=0)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**70])
def test_an_integer_gives_the_same_fit_each_time(seed: int, tmp_path: Path) -> None:
    one, other = sought(seed), sought(seed)
    assert_identical(one, other)
    assert seed_of(one, tmp_path) == seed_of(other, tmp_path)
    assert not np.array_equal(one.means_, sought(seed + 1).means_)


def test_none_draws_another_seed_each_time_and_the_file_tells_it(tmp_path: Path) -> None:
    models = [sought(None) for _ in range(3)]
    seeds = [seed_of(model, tmp_path) for model in models]
    assert len(set(seeds)) == 3
    for seed in seeds:
        assert len(seed) == 32
        assert set(seed) <= set("0123456789abcdef")
    assert not np.array_equal(models[0].means_, models[1].means_)


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng], ids=["RandomState", "Generator"])
def test_a_generator_moves_on(make: Callable[[int], Any], tmp_path: Path) -> None:
    generator, twin = make(5), make(5)
    first, second = sought(generator), sought(generator)
    assert seed_of(first, tmp_path) != seed_of(second, tmp_path)
    assert not np.array_equal(first.means_, second.means_)
    assert_identical(first, sought(twin))
    assert_identical(second, sought(twin))


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    fit(random_state=None).sample(3)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_restarts_start_from_different_places() -> None:
    """After one pass the best of more starts has a bound that is not lower, and here it is higher."""
    bounds = []
    for n_init in (1, 2, 8):
        with UNFINISHED:
            bounds.append(fit(n_init=n_init, init_params="random_from_data", max_iter=1, random_state=6).lower_bound_)
    assert bounds[0] < bounds[2]
    assert bounds == sorted(bounds)


def test_samples_follow_the_same_rules() -> None:
    model = fit()

    def rows(random_state: Any) -> np.ndarray:
        return model.set_params(random_state=random_state).sample(20)[0]

    np.testing.assert_array_equal(rows(3), rows(3))
    assert not np.array_equal(rows(3), rows(4))
    assert not np.array_equal(rows(None), rows(None))
    for make in (np.random.RandomState, np.random.default_rng):
        generator, twin = make(5), make(5)
        first, second = rows(generator), rows(generator)
        assert not np.array_equal(first, second)
        np.testing.assert_array_equal(first, rows(twin))
        np.testing.assert_array_equal(second, rows(twin))
    with pytest.raises(ParameterError, match="random_state must be None, a non-negative integer"):
        rows("dice")
