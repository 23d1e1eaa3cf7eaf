"""Thousands of bad inputs: each ends in a sound model or in an error of ours, and never in anything else.

A case is made from its number alone, so a failure is found again by the number that it prints: ``outcome(number,
folder)`` runs it.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_inputs import KNOWN, Choices, Draw, TheirError, array, nothing_like, rows, values
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from typer.testing import CliRunner

from streamgmm import GaussianMixture, load, open_source
from streamgmm.cli import app
from streamgmm.errors import DegenerateComponentWarning, RegularisationWarning, SampleWarning, StreamGMMError

OURS = (DegenerateComponentWarning, RegularisationWarning, SampleWarning, ConvergenceWarning)
MOST_SECONDS = 10.0


# -- the other arguments -----------------------------------------------------------------------------------------

ODD = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, np.nan, np.inf, -np.inf, 1e300, 5e-324, "", "x", b"full", [], {}, (), 1j,
    10**9, 10**30, 10**400, 10**5000, np.int64(2), np.float32(0.5), np.bool_(True), np.array(2), np.array([1, 2]),
    Fraction(1, 3), Decimal("0.5"), object(), np.str_("full"), GaussianMixture,
]  # fmt: skip

#: Values that are allowed, and end a fit of a few rows soon.
ALLOWED: dict[str, list[Any]] = {
    "n_components": [1, 2, 3, 10**9],
    "covariance_type": ["full", "tied", "diag", "spherical"],
    "tol": [None, 0, 1e-3, 1e300, Fraction(1, 3), np.float32(0.5)],
    "reg_covar": [0, 1e-6, 1e-300, 1e300, Fraction(1, 3), 1],
    "max_iter": [0, 1, 5, 20],
    "n_init": [1, 3, 10**9],
    "init_params": ["auto", "kmeans", "k-means++", "random", "random_from_data", "split", "vq", "samples"],
    "random_state": [0, 2**200, None, np.random.RandomState(0), np.random.default_rng(0), np.int64(3)],
    "warm_start": [True, False, np.bool_(True)],
    "verbose": [0],
    "verbose_interval": [1, 10**30],
    "solver": ["auto", "em", "incremental"],
    "sample_rows": [None, 2, 20, 10**9],
}
GIVEN = ("weights_init", "means_init", "precisions_init")


def hyper_parameters(draw: Draw) -> dict[str, Any]:
    found: dict[str, Any] = {"max_iter": 5, "n_components": int(draw.rng.integers(1, 4))}
    for name, allowed in ALLOWED.items():
        if draw.rng.random() < 0.2:
            found[name] = draw.among(name, allowed)
    if draw.rng.random() < 0.2:
        name = str(draw.rng.choice([*ALLOWED, *GIVEN]))
        found[name] = draw.among(name, ODD)
    if draw.rng.random() < 0.1:
        name = str(draw.rng.choice(GIVEN))
        draw.words.append(name)
        found[name] = array(draw)
    if isinstance(found["max_iter"], int) and found["max_iter"] > 100:
        found["max_iter"] = 100  # it would be taken at its word
    return found


def weights(draw: Draw) -> Any:
    n = int(draw.rng.integers(0, 60))
    size = draw.among("weights' shape", [(n,), (n, 1), (), (3, 3)], 0.8)
    return rows(draw) if draw.rng.random() < 0.3 else values(draw, size)


def options(draw: Draw) -> dict[str, Any]:
    allowed: dict[str, list[Any]] = {
        "nan_policy": ["omit", "raise"],
        "missing_chunks": ["fill", "refuse"],
        "decode": ["cf", "refuse"],
        "block_rows": [7, 1, None, 10**30],
        "array": ["x", None, "", "../x", "x/..", "no"],
        "storage_options": [None, {}, {"anon": True}],
    }
    found = {}
    for name, values_of in allowed.items():
        if draw.rng.random() < 0.3:
            found[name] = draw.among(name, [*values_of, ODD[int(draw.rng.integers(len(ODD)))]], 0.5)
    return found


# -- cases -------------------------------------------------------------------------------------------------------


def fit_case(draw: Draw) -> None:
    settings, x = hyper_parameters(draw), rows(draw)
    chosen = options(draw) if draw.rng.random() < 0.3 else {}
    weight = weights(draw) if draw.rng.random() < 0.2 else None
    model = GaussianMixture(**{"random_state": 0, **settings})
    source = open_source(x, **chosen) if chosen else x
    model.fit(source, sample_weight=weight)
    require_sound(model)
    require_results(model, source)
    if draw.rng.random() < 0.3:
        saved = draw.folder.with_suffix(".sgmm")
        model.save(saved)
        assert np.array_equal(load(saved).means_, model.means_), "another model was loaded"


def predict_case(draw: Draw) -> None:
    model = draw.of("model", {"known": lambda: KNOWN, "not fitted": GaussianMixture}, 0.9)
    name = draw.among("method", ["predict", "predict_proba", "score_samples", "score", "bic", "aic", "plan"])
    x = rows(draw)
    found = getattr(model, name)(x)
    if name in {"score", "bic", "aic"}:
        assert not np.isnan(found), f"{name} is {found}"
    elif name != "plan":
        found = np.asarray(found)
        require_result(name, found, model.n_components)


def given_case(draw: Draw) -> None:
    """Models from given parameters, and what is asked of them."""
    kind = draw.among("covariance_type", ["diag", *ALLOWED["covariance_type"], *ODD], 0.4)
    diagonal = kind == "diag" if isinstance(kind, str) else False
    known = (KNOWN.weights_, KNOWN.means_, np.ones((2, 2)) if diagonal else KNOWN.covariances_)
    arrays = []
    for found in known:
        power = float(draw.rng.integers(-330, 308)) if draw.rng.random() < 0.4 else 0.0
        draw.words.append(f"times 1e{power:.0f}")
        arrays.append(array(draw) if draw.rng.random() < 0.2 else found * 10.0**power)
    model = GaussianMixture.from_parameters(*arrays, covariance_type=kind)
    require_sound(model)
    require_results(model, model.means_[:, ::-1] + values(draw, model.means_.shape))
    model.sample(draw.among("n_samples", [3, 1, 0, -1, 10**30, "x", None, 2.5, True], 0.5))


def load_case(draw: Draw) -> None:
    path = draw.folder.with_suffix(".sgmm")
    KNOWN.save(path)
    data = bytearray(path.read_bytes())
    choices: Choices = {
        "bytes": lambda: data.__setitem__(slice(0, 40), draw.rng.bytes(int(draw.rng.integers(60)))),
        "cut": lambda: data.__delitem__(slice(int(draw.rng.integers(len(data))), None)),
        "none": lambda: None,
    }
    draw.of("damage", choices)
    path.write_bytes(data)
    given = {"the path": path, "text": os.fspath(path), "its folder": path.parent, "missing": path / "no"}
    odd = nothing_like(draw, np.zeros((2, 2))) if draw.rng.random() < 0.3 else None
    model = load(given[draw.among("path", list(given), 0.6)] if odd is None else odd)
    assert np.array_equal(model.means_, KNOWN.means_)


def command_case(draw: Draw) -> None:
    """The command line: exit code 0, or one line that begins with "Error: ", or how it is used."""
    found = rows(draw)
    model = draw.folder.with_suffix(".sgmm")
    KNOWN.save(model)
    if draw.rng.random() < 0.3:
        model.write_bytes(draw.rng.bytes(200))
    texts = ["-1", "0", "2", "2.5", "nan", "inf", "1e400", "x", "", "9" * 500, "é\udcff", "--", "a b", "../x", "full"]
    flags = ["-k", "--array", "--covariance-type", "--tol", "--reg-covar", "--max-iter", "--n-init", "--init-params",
             "--nan-policy", "--missing-chunks", "--decode", "--seed"]  # fmt: skip
    good = {"--array": ["x"], "--nan-policy": ["omit"], "--missing-chunks": ["fill"], "--decode": ["cf"],
            "--init-params": ["random"], "-k": ["2"], "--max-iter": ["5"]}  # fmt: skip
    extra = []
    for flag in draw.rng.choice(flags, int(draw.rng.integers(0, 4)), replace=False):
        extra += [str(flag), draw.among(flag, [*good.get(flag, ["2"]), *texts], 0.6)]
    path = os.fspath(found) if isinstance(found, str | Path) else os.fspath(draw.folder / "x")
    output = draw.among("output", [os.fspath(draw.folder.with_suffix(".out")), path, "", "/", os.fspath(model)], 0.8)
    commands: Choices = {
        "fit": lambda: ["fit", path, "-o", output, "--max-iter", "3", *extra],
        "predict": lambda: ["predict", path, os.fspath(model), "-o", output, *extra[:2]],
        "info": lambda: ["info", path, *extra],
        "info of a model": lambda: ["info", os.fspath(model)],
        "demo": lambda: ["demo", output, "--rows", "10"],
        "nonsense": lambda: [draw.among("command", texts), path],
    }
    arguments = draw.of("command", commands)
    if draw.rng.random() < 0.1:
        arguments.append("--overwrite")
    if draw.rng.random() < 0.1:
        arguments.append("--help")
    arguments = [text.replace("\0", "").replace("\ud800", "") for text in arguments]  # no shell could pass those
    draw.words.append(f"{arguments!r:.300}")
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in {0, 1, 2}, f"exit code {result.exit_code}"
    assert "Traceback" not in result.output, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code != 1 or len(errors) == 1, f"not one line of error: {result.output!r}"


CASES = (
    fit_case,
    fit_case,
    fit_case,
    predict_case,
    command_case,
    fit_case,
    fit_case,
    given_case,
    predict_case,
    load_case,
)


# -- laws --------------------------------------------------------------------------------------------------------


def require_sound(model: GaussianMixture) -> None:
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bounds_"):
        assert np.isfinite(getattr(model, name)).all(), f"{name} is not finite"
    assert abs(model.weights_.sum() - 1) < 1e-6
    assert (model.weights_ >= 0).all()
    repr(model)


def require_results(model: GaussianMixture, x: Any) -> None:
    """What was fitted can be used on the rows that it was fitted to."""
    try:
        for name in ("predict", "predict_proba", "score_samples"):
            require_result(name, np.asarray(getattr(model, name)(x)), model.n_components)
    except StreamGMMError as error:
        if np.isfinite(x).all() if isinstance(x, np.ndarray) else True:
            raise AssertionError(f"a sound model, and then: {error}") from error


def require_result(name: str, found: np.ndarray, k: int) -> None:
    if name == "predict":
        assert ((found >= -1) & (found < k)).all(), "labels are out of range"
        return
    left_out = np.isnan(found if found.ndim == 1 else found[:, 0])
    if name == "predict_proba":
        assert np.isnan(found[left_out]).all()
        assert (np.abs(found[~left_out].sum(axis=1) - 1) < 1e-9).all(), "responsibilities do not sum to 1"
    else:
        assert (found[~left_out] < np.inf).all()  # beyond 1e154 deviations a log density is below all numbers


@dataclass(frozen=True)
class Outcome:
    """How a case ended. kind: "sound", or the class of an error of ours.  wrong: what should not have happened."""

    kind: str
    wrong: str


def outcome(number: int, folder: Path) -> Outcome:
    draw = Draw(number, folder)
    start, kind, wrong = time.monotonic(), "sound", ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            CASES[number % len(CASES)](draw)
        except (StreamGMMError, NotFittedError, TheirError) as error:
            kind = type(error).__name__
        except Exception as error:
            kind, wrong = "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    seconds = time.monotonic() - start
    foreign = [
        f"{w.category.__name__}: {w.message}"
        for w in caught
        if not issubclass(w.category, OURS) and "feature names, but" not in str(w.message)  # scikit-learn's contract
    ]
    if foreign:
        wrong = wrong or f"warns with {foreign[0]}"
    if seconds > MOST_SECONDS:
        wrong = wrong or f"took {seconds:.0f} s"
    return Outcome(kind, wrong and f"case {number}: {wrong}\n    {'; '.join(draw.words)}")


def check(numbers: range, folder: Path) -> None:
    outcomes = [outcome(number, folder) for number in numbers]
    assert "\n".join(found.wrong for found in outcomes if found.wrong) == ""
    kinds = Counter(found.kind for found in outcomes)
    # cases that all fail at the door, or all pass, would say little
    assert 0.1 < kinds["sound"] / len(outcomes) < 0.8
    assert len(kinds) >= 8


def test_500_bad_inputs_end_in_an_error_of_ours_or_in_a_sound_model(tmp_path):
    check(range(500), tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_10_000_bad_inputs_end_in_an_error_of_ours_or_in_a_sound_model(tmp_path):
    check(range(10_000), tmp_path)
