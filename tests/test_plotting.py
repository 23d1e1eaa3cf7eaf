"""The picture shows what it says: ellipses of two deviations, true and estimated, without pyplot's global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from streamgmm.errors import MissingPackageError, ParameterError
from streamgmm.plotting import MOST_POINTS, draw, save_picture
from streamgmm.synthetic import Mixture, random_mixture

TRUTH = random_mixture(3, 4, 4.0, 7)


def test_ellipses_lie_two_deviations_from_the_means() -> None:
    rows, labels = TRUTH.rows(500, 0)
    axes = draw(rows, TRUTH, truth=TRUTH, labels=labels, features=(3, 1)).axes[0]
    curves = [line.get_xydata() for line in axes.lines if len(line.get_xydata()) > 1]
    assert len(curves) == 6
    for curve, j in zip(curves, (0, 1, 2, 0, 1, 2), strict=True):
        centred = curve - TRUTH.means[j, [3, 1]]
        precision = np.linalg.inv(TRUTH.covariances[j][np.ix_([3, 1], [3, 1])])
        np.testing.assert_allclose(np.einsum("id,de,ie->i", centred, precision, centred), 4.0, rtol=1e-9)
        np.testing.assert_allclose(curve[0], curve[-1], rtol=1e-9)


def test_the_legend_and_the_axes_say_what_is_drawn() -> None:
    rows, _ = TRUTH.rows(50, 0)
    axes = draw(rows, TRUTH, truth=TRUTH, features=(2, 0), title="three").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["true", "estimated"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("feature 2", "feature 0", "three")


def test_only_the_first_rows_are_drawn() -> None:
    rows, labels = TRUTH.rows(MOST_POINTS + 100, 0)
    points = draw(rows, TRUTH, labels=labels).axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(points, rows[:MOST_POINTS][:, _features(rows)])


def _features(rows: np.ndarray) -> list[int]:
    axes = draw(rows, TRUTH).axes[0]
    return [int(label.removeprefix("feature ")) for label in (axes.get_xlabel(), axes.get_ylabel())]


def test_the_features_are_those_that_show_the_components_apart() -> None:
    means = np.array([[0.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 0, 5]])
    mixture = Mixture(np.full(3, 1 / 3), means, np.tile(np.eye(4), (3, 1, 1)))
    axes = draw(mixture.rows(20, 0)[0], mixture).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("feature 1", "feature 3")


def test_one_component_is_drawn_too() -> None:
    mixture = random_mixture(1, 2, 1.0, 0)
    assert draw(mixture.rows(20, 0)[0], mixture).axes[0].get_xlabel() == "feature 0"


def test_a_picture_is_written(tmp_path: Path) -> None:
    save_picture(draw(TRUTH.rows(100, 0)[0], TRUTH), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_single_feature_is_refused() -> None:
    mixture = random_mixture(2, 1, 3.0, 0)
    with pytest.raises(ParameterError, match="this one has a single feature"):
        draw(mixture.rows(10, 0)[0], mixture)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"pip install streamgmm\[plot\]"):
        draw(TRUTH.rows(10, 0)[0], TRUTH)


def test_pyplot_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from streamgmm.plotting import draw, save_picture; assert 'matplotlib' not in sys.modules\n"
        "from streamgmm.synthetic import random_mixture; m = random_mixture(2, 2, 4.0, 0)\n"
        f"save_picture(draw(m.rows(9, 0)[0], m), {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
