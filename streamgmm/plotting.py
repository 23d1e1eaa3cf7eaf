"""Pictures of mixtures. The one place that imports matplotlib, and only once a picture is asked for."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streamgmm.errors import MissingPackageError, ParameterError
from streamgmm.protocols import Floats, Integers, Rows
from streamgmm.synthetic import Mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Rows drawn as points; more make a picture slower and no clearer.
MOST_POINTS = 6_000


def draw(
    rows: Rows,
    estimate: Mixture,
    *,
    truth: Mixture | None = None,
    labels: Integers | None = None,
    features: tuple[int, int] | None = None,
    title: str = "",
) -> Figure:
    """Two features of a mixture: rows as points, components as ellipses of 2 standard deviations.

    rows: (n, d), of which the first few thousand are drawn; give a sample.  estimate, truth: the mixtures (k, d) to
    compare.  labels: (n,) components that colour the rows.  features: the two columns; by default those in which the
    components of ``estimate`` lie farthest apart.

    Raises MissingPackageError where matplotlib is not installed, ParameterError where there is a single feature.
    """
    if estimate.means.shape[1] < 2:
        raise ParameterError("A picture shows two features of a mixture, but this one has a single feature.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "A picture needs matplotlib, which is not installed. Install it with: pip install streamgmm[plot]"
        ) from error
    pair = _clearest_pair(estimate) if features is None else features
    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    axes = figure.add_subplot()
    _points(axes, rows[:MOST_POINTS, list(pair)], None if labels is None else labels[:MOST_POINTS])
    if truth is not None:
        _ellipses(axes, truth, pair, "true", color="black", linewidth=3.2, alpha=0.35)
    _ellipses(axes, estimate, pair, "estimated", color="black", linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_xlabel(f"feature {pair[0]}")
    axes.set_ylabel(f"feature {pair[1]}")
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="mean and 2 deviations", loc="best")
    return figure


def save_picture(figure: Figure, path: str | Path) -> None:
    """Write the picture to ``path``; its ending chooses the format."""
    figure.savefig(path, dpi=150)


def _points(axes: Axes, points: Rows, labels: Integers | None) -> None:
    colours = np.zeros(len(points)) if labels is None else labels % 10
    axes.scatter(points[:, 0], points[:, 1], s=3, c=colours, cmap="tab10", vmin=0, vmax=9, alpha=0.35, linewidths=0)


def _ellipses(axes: Axes, mixture: Mixture, pair: tuple[int, int], name: str, **style: Any) -> None:
    """One closed curve and a cross for each component; the first one carries the name for the legend."""
    angle = np.linspace(0.0, 2.0 * np.pi, 129)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for j, (mean, covariance) in enumerate(zip(mixture.means, mixture.covariances, strict=True)):
        centre = mean[list(pair)]
        curve = centre[:, None] + 2.0 * np.linalg.cholesky(covariance[np.ix_(pair, pair)]) @ circle
        axes.plot(*curve, label=name if j == 0 else None, **style)
        axes.plot(*centre, marker="+", markersize=8, **{**style, "linestyle": "none"})


def _clearest_pair(mixture: Mixture) -> tuple[int, int]:
    """The two features in which the two nearest means are farthest apart, in average deviations."""
    scaled: Floats = mixture.means / np.sqrt((mixture.deviations**2).mean(axis=0))
    k, d = scaled.shape
    pairs = list(combinations(range(d), 2))
    if k < 2:
        return pairs[0]
    first, second = np.triu_indices(k, 1)
    squares = (scaled[first] - scaled[second]) ** 2
    return max(pairs, key=lambda pair: float(squares[:, list(pair)].sum(axis=1).min()))
