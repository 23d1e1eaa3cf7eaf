"""Model files of format 1 as they were first written: every later version reads the same numbers from them.

The files and format-1.json, which says what is in them, were made once by ``write_golden``. They are never made anew:
what cannot be read any more needs a new format number, and a reader for this one.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from streamgmm import GaussianMixture, files, load
from streamgmm.covariance import STRUCTURES
from streamgmm.errors import FileFormatError
from streamgmm.learned import Learned, Model
from streamgmm.params import MixtureParams

DATA = Path(__file__).parent / "data"
KINDS = tuple(STRUCTURES)
ROWS = [[0.0, 0.0], [1.5, -0.25], [-3.0, 10.0], [8.0, -1e-3], [0.1, 7.0]]

#: What the bytes of the files hash to.
HASHES = {
    "full": "39119e204731c702612f29f765e9d0b70911ffefbaa5bb81f69395ff0fefcb6c",
    "tied": "5817092e60d1ff3c66adceaa83047229a75ca0502b04ec4579a53395a3ade4ca",
    "diag": "2fbd7a8d40d3a4df0ba57ec6cdcc5bb8c558efeb26394c7d388d573bc52bb2b6",
    "spherical": "68ce1643d8ae4d20bdae578bfc1555904488f10702ebc89b30efb1ae1120141f",
}


def write_golden(folder: Path) -> None:
    """Write the files and what is in them; densities are those of scipy.stats."""
    weights, means = np.array([0.1, 1 / 3, 17 / 30]), np.array([[0.1 + 0.2, np.pi], [-1e-17, 4.7], [1.1, -2.5e-8]])
    matrices = np.array([[[2.0, 0.7], [0.7, 1 / 3]], [[0.1, 0.0], [0.0, 5.0]], [[np.e, -0.1], [-0.1, 0.3]]])
    covariances = {
        "full": matrices,
        "tied": matrices[0],
        "diag": np.diagonal(matrices, axis1=1, axis2=2),
        "spherical": np.array([1 / 7, 2.0, 0.9]),
    }
    expected = {}
    for number, (kind, structure) in enumerate(STRUCTURES.items()):
        params = MixtureParams(weights, means, structure(np.array(covariances[kind])))
        provenance = {
            "seed": f"{7 * 10**37 + number:032x}",
            "block_rows": 131_072,
            "packages": {
                "streamgmm": "0.1.0",
                "numpy": "2.4.6",
                "scipy": "1.17.1",
                "dask": "2026.8.0",
                "zarr": "3.1.6",
            },
            "python": "3.11.7",
            "machine": "x86_64",
            "cpu_features": ["SSE", "AVX2", "AVX512F"],
            "blas": ["openblas 0.3.31 SkylakeX"],
        }
        bounds = (-5.25, -4.0 - 1e-15, -3.9999999999999)
        learned = Learned(params, True, 3, 4, bounds, n_rows=9_007_199_254_740_993, n_skipped=12, provenance=provenance)
        settings = GaussianMixture(
            3,
            covariance_type=kind,
            tol=None if kind == "full" else 0.1 + 0.2,
            n_init=2,
            init_params="k-means++",
            random_state=None if kind == "tied" else 2**70,
            means_init=means + 0.1 if kind == "diag" else None,
            solver="em",
        ).get_params()
        names = ("temperature", "pressure / µPa")
        files.write(folder / f"format-1-{kind}.sgmm", Model(learned, settings, names).contents())
        dense = params.covariance.dense(3, 2)
        pairs = zip(means, dense, strict=True)
        joint = np.log(weights) + np.stack([multivariate_normal(m, c).logpdf(ROWS) for m, c in pairs], axis=1)
        density = logsumexp(joint, axis=1)
        expected[kind] = {
            "arrays": {"weights_": weights, "means_": means, "covariances_": params.covariance.values},
            "facts": {
                "converged_": True,
                "n_iter_": 3,
                "n_passes_": 4,
                "lower_bounds_": bounds,
                "n_rows_": learned.n_rows,
                "n_skipped_": 12,
                "feature_names": names,
                "provenance": provenance,
            },
            "settings": settings,
            "score_samples": density,
            "predict_proba": np.exp(joint - density[:, None]),
        }
    text = json.dumps(expected, indent=1, sort_keys=True, default=np.ndarray.tolist)
    (folder / "format-1.json").write_text(text + "\n", encoding="utf-8")


def golden(kind: str) -> Path:
    return DATA / f"format-1-{kind}.sgmm"


def expected(kind: str) -> dict[str, Any]:
    return json.loads((DATA / "format-1.json").read_text(encoding="utf-8"))[kind]


def same_bits(found: Any, numbers: Any) -> bool:
    array = np.asarray(numbers, dtype=np.float64)
    return found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_the_ones_that_were_first_written(kind):
    assert hashlib.sha256(golden(kind).read_bytes()).hexdigest() == HASHES[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_read_to_the_bit(kind):
    model, known = load(golden(kind)), expected(kind)
    assert all(same_bits(getattr(model, name), numbers) for name, numbers in known["arrays"].items())
    facts = known["facts"]
    assert model.feature_names_in_.tolist() == facts.pop("feature_names")
    assert model._provenance == facts.pop("provenance")
    assert {name: getattr(model, name) for name in facts} == facts
    assert model.lower_bound_ == facts["lower_bounds_"][-1]
    settings, means_init = model.get_params(), known["settings"].pop("means_init")
    assert settings["means_init"] is None if means_init is None else same_bits(settings["means_init"], means_init)
    assert {name: settings[name] for name in known["settings"]} == known["settings"]


def test_one_of_them_has_a_given_start():
    assert [expected(kind)["settings"]["means_init"] is not None for kind in KINDS].count(True) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_other_hands(kind):
    """The expected densities were computed by scipy.stats when the files were written."""
    model, known = load(golden(kind)), expected(kind)
    rows = pd.DataFrame(ROWS, columns=model.feature_names_in_)
    np.testing.assert_allclose(model.score_samples(rows), known["score_samples"], rtol=1e-12)
    np.testing.assert_allclose(model.predict_proba(rows), known["predict_proba"], rtol=1e-12, atol=1e-12)
    assert model.predict(rows).tolist() == np.argmax(known["predict_proba"], axis=1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_they_can_be_told_in_words(kind):
    words = repr(load(golden(kind)))
    assert f"3 components, {kind} covariances, 2 features" in words
    assert "converged after 3 passes" in words
    assert "9,007,199,254,740,993 rows in 4 reads, 12 left out" in words
    assert "pressure / µPa" in words


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_saved_again_as_they_were(tmp_path, kind):
    load(golden(kind)).save(tmp_path / "again.sgmm")
    before, after = files.read(golden(kind), "model"), files.read(tmp_path / "again.sgmm", "model")
    assert after.facts.pop("params").items() >= before.facts.pop("params").items()
    assert after.facts == before.facts
    assert after.arrays.keys() == before.arrays.keys()
    assert all(same_bits(after.arrays[name], array) for name, array in before.arrays.items())


# -- other versions ----------------------------------------------------------------------------------------------


def rewritten(path: Path, kind: str, *, facts: Any = (), params: Any = (), arrays: Any = ()) -> Path:
    """The golden file with more facts, hyper-parameters and arrays, as another version might write it."""
    found = files.read(golden(kind), "model")
    settings = {**found.facts["params"], **dict(params)}
    contents = files.Contents(
        "model", {**found.facts, "params": settings, **dict(facts)}, {**found.arrays, **dict(arrays)}
    )
    files.write(path, contents)
    return path


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FORMAT", 2)
    path = tmp_path / "newer.sgmm"
    files.write(path, files.Contents("model", {}, {}))
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match=r"newer.sgmm has format 2; .* reads format 1. Install a newer streamgmm"):
        load(path)


def test_facts_and_arrays_that_this_version_does_not_know_are_left_aside(tmp_path):
    """A later version may say more; what would change the meaning of a file gets another format number."""
    more = {"facts": {"written_on": "a Sunday", "n_rows_seen": 3}, "arrays": {"history": np.ones((2, 2))}}
    found = load(rewritten(tmp_path / "more.sgmm", "tied", **more))
    assert all(same_bits(getattr(found, name), numbers) for name, numbers in expected("tied")["arrays"].items())


def test_a_hyper_parameter_that_this_version_does_not_know_is_refused(tmp_path):
    """It says how to fit, and a fit without it would be another one."""
    with pytest.raises(FileFormatError, match=r"more.sgmm does not describe a mixture .*annealing"):
        load(rewritten(tmp_path / "more.sgmm", "tied", params={"annealing": 0.5}))


@pytest.mark.parametrize(
    "missing", ["params", "converged", "lower_bounds", "n_rows", "n_skipped", "feature_names", "provenance"]
)
def test_a_missing_fact_is_named(tmp_path, missing):
    found = files.read(golden("diag"), "model")
    facts = {name: fact for name, fact in found.facts.items() if name != missing}
    files.write(tmp_path / "less.sgmm", files.Contents("model", facts, found.arrays))
    with pytest.raises(FileFormatError, match=rf"less.sgmm does not describe a mixture \('{missing}'\)"):
        load(tmp_path / "less.sgmm")
