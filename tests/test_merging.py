"""Statistics of sites: they add to those of all rows, and only where they were taken at the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from mixtures import KINDS, UNFINISHED, assert_close, blobs, given_start

from streamgmm import GaussianMixture, Statistics, load
from streamgmm.errors import DataError, DataTypeError, FileFormatError, ParameterError


def model_at(kind: str, offset: float = 0.0) -> GaussianMixture:
    start = given_start(kind)
    with UNFINISHED:
        return GaussianMixture(
            3, covariance_type=kind, max_iter=2, solver="em", **{**start, "means_init": start["means_init"] + offset}
        ).fit(blobs() + offset)


def summed(parts: list[Statistics]) -> Statistics:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_ten_sites_are_the_concatenated_rows(kind, offset):
    model, rows = model_at(kind, offset), blobs(5000, seed=1) + offset
    merged = summed([model.statistics(part) for part in np.array_split(rows, 10)])
    whole = model.statistics(rows)
    for name in ("moments", "common", "log_likelihood", "weight"):
        found, expected = getattr(merged.stats, name), getattr(whole.stats, name)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=0))
    one, other = (GaussianMixture.from_statistics(part, reg_covar=0.0) for part in (merged, whole))
    for name in ("weights_", "covariances_"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(one.means_ - offset, other.means_ - offset, rtol=1e-12, atol=max(1e-12, 1e-15 * offset))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_from_statistics_is_one_iteration_of_em(kind):
    model, rows = model_at(kind), blobs(2000, seed=1)
    found = GaussianMixture.from_statistics(model.statistics(rows))
    start = {"weights_init": model.weights_, "means_init": model.means_, "precisions_init": model.precisions_}
    with UNFINISHED:
        em = GaussianMixture(3, covariance_type=kind, solver="em", max_iter=1, **start).fit(rows)
    assert_close(found, em, 1e-11)
    assert found.lower_bound_ == pytest.approx(em.lower_bound_)
    assert found.n_rows_ == 2000
    assert found.effective_rows_ == pytest.approx(2000)
    assert found.partial_fit(rows[:100]).n_rows_ == 2100


def test_weights_and_stores_are_taken(tmp_path):
    model, rows = model_at("full"), blobs(900, seed=1)
    zarr.create_array(tmp_path / "rows.zarr", data=rows, chunks=(200, 3))
    double = model.statistics(tmp_path / "rows.zarr", sample_weight=np.full(900, 2.0))
    twice = model.statistics(rows) + model.statistics(rows)
    np.testing.assert_allclose(double.stats.moments, twice.stats.moments, rtol=1e-12)
    assert double.weight == 1800
    assert double.n_rows == 900
    with pytest.raises(DataError, match="2 features, but GaussianMixture is expecting 3"):
        model.statistics(rows[:, :2])
    with pytest.raises(DataError, match="weight zero"):
        model.statistics(rows, sample_weight=np.zeros(900))


def test_statistics_at_different_parameters_are_refused():
    one, other = model_at("full"), model_at("full", 1e-9)
    words = "taken at the parameters of different models .* Send one model to all sites"
    with pytest.raises(DataError, match=words):
        one.statistics(blobs()) + other.statistics(blobs())
    with pytest.raises(DataError, match=words):
        one.statistics(blobs()) + model_at("diag").statistics(blobs())
    with pytest.raises(TypeError, match="unsupported operand"):
        one.statistics(blobs()) + 1  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_travel_in_a_file(kind, tmp_path):
    model = model_at(kind)
    model.save(tmp_path / "model.sgmm")
    here = model.statistics(blobs())
    load(tmp_path / "model.sgmm").statistics(blobs(500, seed=2)).save(tmp_path / "there.sgmm")
    merged = here + load(tmp_path / "there.sgmm")
    expected = here + model.statistics(blobs(500, seed=2))
    assert (merged.stats.moments == expected.stats.moments).all()
    assert merged.fingerprint == here.fingerprint
    assert str(merged) == repr(merged)
    assert str(merged).startswith(f"statistics of 1,700 rows, 3 components, {kind} covariances, 3 features")


def test_a_file_holds_no_row_and_damage_is_seen(tmp_path):
    path = tmp_path / "statistics.sgmm"
    model_at("full").statistics(blobs()).save(path)
    content = bytearray(path.read_bytes())
    assert blobs()[0].tobytes() not in bytes(content)
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="do not match their hashes"):
        load(path)


@pytest.mark.parametrize("change", [{"weight": -1.0}, {"weight": 5.0}, {"n_rows": "many"}, {"log_likelihood": None}])
def test_facts_that_are_none_are_refused(change: dict[str, Any], tmp_path: Path):
    from streamgmm import files

    path = tmp_path / "statistics.sgmm"
    model_at("full").statistics(blobs()).save(path)
    found = files.read(path, "statistics")
    facts = {**found.facts, "stats": {**found.facts["stats"], **change}}
    files.write(path, files.Contents("statistics", facts, found.arrays))
    with pytest.raises(FileFormatError, match=r"does not hold statistics .* Take them again"):
        load(path)


def test_hyper_parameters_of_the_merged_model_are_checked():
    with pytest.raises(ParameterError, match="reg_covar must be"):
        GaussianMixture.from_statistics(model_at("full").statistics(blobs()), reg_covar=-1)


@pytest.mark.parametrize("thing", [None, "here.sgmm", 3, [1, 2]], ids=str)
def test_what_is_no_model_and_no_statistics_is_named(thing):
    model = GaussianMixture(3, random_state=0).fit(blobs())
    with pytest.raises(DataTypeError, match=f"made from Statistics, but a {type(thing).__name__} was given"):
        GaussianMixture.from_statistics(thing)
    with pytest.raises(DataTypeError, match=f"those of a GaussianMixture, but a {type(thing).__name__} was given"):
        model.match(thing)


@pytest.mark.parametrize("order", [[False, True, 2.0], [0.0, 1.0, 2.0], [0, 1], [[0], [1, 2]], "012", None], ids=str)
def test_an_order_must_be_whole_numbers(order):
    with pytest.raises(ParameterError, match="order must be the whole numbers 0 to 2, each once, but it is"):
        GaussianMixture(3, random_state=0).fit(blobs()).reordered(order)


def test_booleans_are_no_order():
    with pytest.raises(ParameterError, match="order must be the whole numbers 0 to 1"):
        GaussianMixture(2, random_state=0).fit(blobs()).reordered([False, True])


def test_a_fit_leaves_no_report_of_another_model():
    model = GaussianMixture(3, random_state=0).partial_fit(blobs())
    assert model.report_.n_rows == 1200
    assert not hasattr(model.fit(blobs()), "report_")
