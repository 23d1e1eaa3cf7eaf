"""A fitted mixture to look at: a small table, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from unicodedata import combining, east_asian_width

import numpy as np

from streamgmm.errors import ParameterError
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats

#: Components that are shown, and features in text and in HTML: more fit no screen.
MOST_COMPONENTS = 40
MOST_FEATURES = 4
MOST_FEATURES_HTML = 12
#: Characters of a feature's name, in text and in HTML.
LONGEST_NAME = 20
LONGEST_NAME_HTML = 80


@dataclass(frozen=True, eq=False, repr=False)
class Summary:
    """A mixture of k components in d features, and how it was learned. Prints as a table; notebooks show it as HTML.

    params: the mixture.  feature_names: (d,) or empty for "feature 0", "feature 1", ...  converged, n_iter: whether
    and after how many passes EM stopped.  n_passes: reads of all rows, 0 where none were learned from.  lower_bound:
    nats a row.  n_rows, n_skipped: rows learned from (None where they were not counted), and rows left out.  n_steps:
    batches that were learned in a step.

    Raises ParameterError where there are names for more or fewer features than the mixture has.
    """

    params: MixtureParams
    feature_names: tuple[str, ...] = ()
    converged: bool = False
    n_iter: int = 0
    n_passes: int = 0
    lower_bound: float = -math.inf
    n_rows: int | None = None
    n_skipped: int = 0
    n_steps: int = 0

    def __post_init__(self) -> None:
        d = self.params.n_features
        names = tuple(str(name) for name in self.feature_names) or numbered_features(d)
        if len(names) != d:
            raise ParameterError(f"There are {len(names)} feature names for {d} features. Give one for each, or none.")
        object.__setattr__(self, "feature_names", names)

    @property
    def weights(self) -> Floats:
        """(k,) weights of the components."""
        return self.params.weights

    @property
    def means(self) -> Floats:
        """(k, d) means, in the data's units."""
        return self.params.means

    @property
    def deviations(self) -> Floats:
        """(k, d) standard deviations along the features, in the data's units."""
        k, d = self.means.shape
        return np.sqrt(self.params.covariance.variances(k, d))

    def __repr__(self) -> str:
        """The table as text: a line for each component."""
        names = [_legible(name, LONGEST_NAME) for name in self.feature_names[:MOST_FEATURES]]
        table = aligned([["#", "weight", *names], *self._rows(MOST_FEATURES)])
        return "\n".join([*self._headings(), "", table, "", self._note(MOST_FEATURES)])

    def _repr_html_(self) -> str:
        names = [_legible(name, LONGEST_NAME_HTML) for name in self.feature_names[:MOST_FEATURES_HTML]]
        header = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("#", "weight", *names))
        rows = zip(self._rows(MOST_FEATURES_HTML), self.weights, strict=False)
        body = "\n".join(_html_row(cells, float(weight)) for cells, weight in rows)
        return (
            '<table style="text-align:right">\n'
            f'<caption style="caption-side:top;text-align:left">{"<br>".join(self._headings())}</caption>\n'
            f"<thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            f'<tfoot><tr><td colspan="{2 + len(names)}" style="text-align:left">{self._note(MOST_FEATURES_HTML)}</td>'
            "</tr></tfoot>\n</table>"
        )

    def _headings(self) -> tuple[str, str]:
        k, d = self.means.shape
        kind = self.params.covariance.kind
        return f"{_many(k, 'component')}, {kind} covariances, {_many(d, 'feature')}", self._state()

    def _state(self) -> str:
        if not self.n_iter and not self.n_passes:
            learned = f"learned from {_many(self.n_rows or 0, 'row')} in {_many(self.n_steps, 'step')}"
            return learned if self.n_steps else "not fitted to rows"
        in_memory = 0 < self.n_passes <= self.n_iter  # the pilot read brought all rows
        taken = _many(self.n_iter, "step") if in_memory else _many(self.n_iter, "pass", "passes")
        state = f"{'converged' if self.converged else 'not converged'} after {taken}"
        if math.isfinite(self.lower_bound):
            state += f", lower bound {self.lower_bound:.6g} nats a row"
        if not self.n_passes:
            return state
        rows = "" if self.n_rows is None else f"{_many(self.n_rows, 'row')} in "
        steps = f", {_many(self.n_steps, 'step')} since" if self.n_steps else ""
        left_out = f", {self.n_skipped:,} left out" if self.n_skipped else ""
        return f"{state}; {rows}{_many(self.n_passes, 'read')}{steps}{left_out}"

    def _rows(self, most_features: int) -> Iterator[list[str]]:
        shown = np.s_[:MOST_COMPONENTS, :most_features]
        cells = parameter_cells(self.weights[:MOST_COMPONENTS], self.means[shown], self.deviations[shown])
        return ([str(j), *row] for j, row in enumerate(cells))

    def _note(self, most_features: int) -> str:
        k, d = self.means.shape
        parts = [
            f"the first {most} of {n} {what}"
            for most, n, what in ((most_features, d, "features"), (MOST_COMPONENTS, k, "components"))
            if n > most
        ]
        left_out = f" Shown: {', '.join(parts)}." if parts else ""
        return f"Features are mean ± standard deviation.{left_out}"


# -- tables --------------------------------------------------------------------------------------------------------


def numbered_features(d: int) -> tuple[str, ...]:
    """Names of d features that have none."""
    return tuple(f"feature {i}" for i in range(d))


def parameter_cells(weights: Floats, means: Floats, deviations: Floats) -> Iterator[list[str]]:
    """For each component its weight, and the mean ± deviation of each feature: weights (k,), the others (k, d)."""
    for weight, mean, deviation in zip(weights, means, deviations, strict=True):
        yield [_weight(weight), *(_mean_and_deviation(*pair) for pair in zip(mean, deviation, strict=True))]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns that end at the same place, two spaces between them; a line for each row."""
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = ([" " * (width - _width(cell)) + cell for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def _html_row(cells: list[str], weight: float) -> str:
    """A component; its weight is also a bar behind the number."""
    number, *rest = cells
    end = f"{100 * weight:.1f}%"
    bar = f'<td style="background:linear-gradient(to right,#4682b455 {end},transparent {end})">{rest[0]}</td>'
    others = "".join(f"<td>{cell}</td>" for cell in rest[1:])
    return f'<tr><th scope="row">{number}</th>{bar}{others}</tr>'


# -- words and numbers ---------------------------------------------------------------------------------------------


def _weight(weight: float) -> str:
    """Four decimals; what they cannot show, with its power of ten."""
    return f"{weight:.4f}" if weight >= 1e-4 else f"{weight:.2g}"


def _mean_and_deviation(mean: float, deviation: float) -> str:
    """Both with the decimals that show three digits of the deviation."""
    if not 1e-3 <= deviation < 1e3 or abs(mean) >= 1e5:
        return f"{mean:z.6g} ± {deviation:.3g}"
    decimals = 2 - math.floor(math.log10(deviation))
    return f"{mean:z.{decimals}f} ± {deviation:.{decimals}f}"


def _many(n: int, one: str, more: str = "") -> str:
    return f"{n:,} {one if n == 1 else more or one + 's'}"


def _legible(name: str, longest: int) -> str:
    """A name in at most so many characters, none of which moves the cursor or turns the direction of writing."""
    shortened = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shortened)


def _width(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters take two, combining marks none."""
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)
