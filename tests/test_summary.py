"""A fitted mixture to look at: exact text, HTML that is whole and safe, and values that are out of the ordinary."""

from __future__ import annotations

import re
import tracemalloc
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from support import KINDS, Case

from streamgmm.covariance import STRUCTURES
from streamgmm.errors import ParameterError
from streamgmm.params import MixtureParams
from streamgmm.summary import Summary, aligned

#: Tags of HTML that have no end.
VOID = {"br"}
NASTY = '<script>alert("1")</script>&amp;'


def diagonal(weights: Any, means: Any, variances: Any) -> MixtureParams:
    return MixtureParams(
        np.array(weights, float), np.array(means, float), STRUCTURES["diag"](np.array(variances, float))
    )


def equal(k: int, d: int) -> MixtureParams:
    """k components alike in d features, with mean zero and deviation one."""
    return diagonal(np.full(k, 1 / k), np.zeros((k, d)), np.ones((k, d)))


SMALL = Summary(
    diagonal([0.25, 0.75], [[1.0, -20.5], [30.0, 1e7]], [[4.0, 0.25], [1e-4, 9e10]]),
    ("temperature", "depth"),
    converged=True,
    n_iter=12,
    n_passes=13,
    lower_bound=-4.1035321,
    n_rows=2_500,
    n_skipped=1_200,
)


class Page(HTMLParser):
    """What a browser would make of HTML: tags, attributes and the text of cells; all that opens must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.rows: list[list[str]] = []
        self.caption = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "caption":
            self.caption += data
        elif self.open[-1] in {"td", "th"}:
            self.rows[-1][-1] += data
        else:
            assert not data.strip(), f"{data!r} stands outside the cells"

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    @property
    def components(self) -> list[list[str]]:
        return self.rows[1:-1]

    @property
    def note(self) -> str:
        return self.rows[-1][0]

    def count(self, tag: str) -> int:
        return self.tags.count(tag)

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def lines(summary: Summary) -> list[str]:
    return str(summary).splitlines()


# -- text ----------------------------------------------------------------------------------------------------------


def test_the_text_is_two_headings_a_table_and_a_note() -> None:
    assert lines(SMALL) == [
        "2 components, diag covariances, 2 features",
        "converged after 12 passes, lower bound -4.10353 nats a row; 2,500 rows in 13 reads, 1,200 left out",
        "",
        "#  weight       temperature            depth",
        "0  0.2500       1.00 ± 2.00  -20.500 ± 0.500",
        "1  0.7500  30.0000 ± 0.0100    1e+07 ± 3e+05",
        "",
        "Features are mean ± standard deviation.",
    ]


def test_the_prompt_of_python_shows_the_same() -> None:
    assert repr(SMALL) == str(SMALL)


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({}, "not fitted to rows"),
        (
            {"converged": True, "n_iter": 1, "n_passes": 1, "lower_bound": 0.5, "n_rows": 1},
            "converged after 1 step, lower bound 0.5 nats a row; 1 row in 1 read",
        ),
        (
            {"n_iter": 1_000, "n_passes": 1_001, "lower_bound": -1e-9, "n_skipped": 7},
            "not converged after 1,000 passes, lower bound -1e-09 nats a row; 1,001 reads, 7 left out",
        ),
        ({"n_passes": 1, "n_rows": 9}, "not converged after 0 passes; 9 rows in 1 read"),
    ],
)
def test_the_second_heading_says_how_the_mixture_was_found(facts: dict[str, Any], state: str) -> None:
    assert lines(Summary(equal(1, 1), **facts))[:2] == ["1 component, diag covariances, 1 feature", state]


def test_text_shows_four_features_and_says_so() -> None:
    header = "#  weight    feature 0    feature 1    feature 2    feature 3"
    for d in (4, 5):
        assert lines(Summary(equal(1, d)))[3] == header
    assert lines(Summary(equal(1, 4)))[-1] == "Features are mean ± standard deviation."
    assert lines(Summary(equal(1, 5)))[-1] == (
        "Features are mean ± standard deviation. Shown: the first 4 of 5 features."
    )


def test_many_components_are_cut_and_counted() -> None:
    summary = Summary(equal(300, 500))
    text, page = lines(summary), Page(summary._repr_html_())
    numbers = [str(j) for j in range(40)]
    assert text[0] == "300 components, diag covariances, 500 features"
    assert [line.split()[0] for line in text[4:-2]] == numbers
    assert [row[0] for row in page.components] == numbers
    assert text[-1].endswith(" Shown: the first 4 of 500 features, the first 40 of 300 components.")
    assert page.note.endswith(" Shown: the first 12 of 500 features, the first 40 of 300 components.")
    assert "Shown" not in str(Summary(equal(40, 1)))


@pytest.mark.parametrize(
    ("mean", "deviation", "cell"),
    [
        (0.0, 1e-150, "0 ± 1e-150"),
        (-1e150, 1e150, "-1e+150 ± 1e+150"),
        (123_456.7, 1.0, "123457 ± 1"),
        (99_999.0, 999.0, "99999 ± 999"),
        (1.0, 1_234.0, "1 ± 1.23e+03"),
        (1.0, 0.002, "1.00000 ± 0.00200"),
        (1.0, 0.0005, "1 ± 0.0005"),
        (-1e-9, 1.0, "0.00 ± 1.00"),
    ],
)
def test_a_mean_has_the_decimals_of_three_digits_of_its_deviation(mean: float, deviation: float, cell: str) -> None:
    assert lines(Summary(diagonal([1.0], [[mean]], [[deviation**2]])))[4] == f"0  1.0000  {cell}"


@pytest.mark.parametrize(
    ("weight", "cell"), [(0.0, "0"), (1e-20, "1e-20"), (0.00012, "0.0001"), (9.9e-5, "9.9e-05"), (1.0, "1.0000")]
)
def test_a_small_weight_is_told_from_none(weight: float, cell: str) -> None:
    summary = Summary(diagonal([weight], [[0.0]], [[1.0]]))
    assert lines(summary)[4].split()[1] == cell
    assert Page(summary._repr_html_()).components == [["0", cell, "0.00 ± 1.00"]]


@pytest.mark.parametrize("kind", KINDS)
def test_deviations_are_those_of_the_covariance_matrices(kind: str) -> None:
    case = Case(k=3, d=4, n=1, seed=0)
    params = case.mixture(kind)
    summary = Summary(params)
    expected = np.sqrt(np.diagonal(params.covariance.dense(3, 4), axis1=1, axis2=2))
    np.testing.assert_array_equal(summary.deviations, expected)
    np.testing.assert_array_equal(summary.weights, params.weights)
    np.testing.assert_array_equal(summary.means, params.means)
    assert lines(summary)[0] == f"3 components, {kind} covariances, 4 features"


def test_a_wide_mixture_takes_no_matrix_for_every_component() -> None:
    summary = Summary(equal(300, 500))
    tracemalloc.start()
    assert str(summary)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300 * 500 * 500 * 8 / 10


# -- names ---------------------------------------------------------------------------------------------------------


def test_features_without_names_are_numbered() -> None:
    assert Summary(equal(1, 2)).feature_names == ("feature 0", "feature 1")
    assert SMALL.feature_names == ("temperature", "depth")


def test_too_few_names_are_refused() -> None:
    with pytest.raises(ParameterError, match=r"There are 1 feature names for 2 features\. Give one for each, or none"):
        Summary(equal(1, 2), ("one",))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("x" * 20, "x" * 20),
        ("x" * 21, "x" * 19 + "…"),
        ("x" * 100_000, "x" * 19 + "…"),
        ("a\nb\tc\x1b[31md\r", "a�b�c�[31md�"),
        ("\u202edlrow", "�dlrow"),
        ("\ud800", "�"),
        ("[red]", "[red]"),
    ],
)
def test_a_name_is_short_and_moves_nothing_in_text(name: str, shown: str) -> None:
    text = lines(Summary(equal(1, 2), (name, "z")))
    assert len(text) == 7
    assert text[3].split() == ["#", "weight", shown, "z"]


def test_wide_characters_and_marks_do_not_shift_columns() -> None:
    assert aligned([["水温", "e\u0301"], ["12345", "ab"]]) == " 水温   e\u0301\n12345  ab"


# -- HTML ----------------------------------------------------------------------------------------------------------


def test_html_shows_the_same_as_text() -> None:
    page = Page(SMALL._repr_html_())
    headings, note = lines(SMALL)[:2], lines(SMALL)[-1]
    assert page.rows == [
        ["#", "weight", "temperature", "depth"],
        ["0", "0.2500", "1.00 ± 2.00", "-20.500 ± 0.500"],
        ["1", "0.7500", "30.0000 ± 0.0100", "1e+07 ± 3e+05"],
        [note],
    ]
    assert page.caption == "".join(headings)
    assert page.count("caption") == page.count("br") == 1


def test_html_tells_readers_of_screens_what_is_a_header() -> None:
    page = Page(SMALL._repr_html_())
    assert page.values("scope") == ["col"] * 4 + ["row"] * 2
    assert page.count("th") == 6


def test_html_draws_weights_as_bars() -> None:
    bars = [style for style in Page(SMALL._repr_html_()).values("style") if "gradient" in style]
    assert [re.findall(r"([\d.]+)%", bar) for bar in bars] == [["25.0", "25.0"], ["75.0", "75.0"]]


def test_html_loads_and_runs_nothing() -> None:
    page = Page(Summary(equal(2, 3), (NASTY, "b", "c"))._repr_html_())
    assert set(page.tags) == {"table", "caption", "br", "thead", "tbody", "tfoot", "tr", "th", "td"}
    assert {name for name, _ in page.attributes} == {"style", "scope", "colspan"}
    assert not [value for _, value in page.attributes if "url" in value]


@pytest.mark.parametrize("name", [NASTY, "</th></table>", '" onload="x', "a & b", "<!-- ", "x" * 80])
def test_a_name_in_html_is_text(name: str) -> None:
    page = Page(Summary(equal(1, 2), (name, "z"))._repr_html_())
    assert page.rows[0] == ["#", "weight", name, "z"]
    assert page.components == [["0", "1.0000", "0.00 ± 1.00", "0.00 ± 1.00"]]


def test_a_long_name_in_html_ends() -> None:
    page = Page(Summary(equal(1, 1), ("<" * 100_000,))._repr_html_())
    assert page.rows[0][2] == "<" * 79 + "…"


def test_html_shows_twelve_features() -> None:
    for d, shown in ((12, 12), (13, 12)):
        page = Page(Summary(equal(1, d))._repr_html_())
        assert page.rows[0][2:] == [f"feature {i}" for i in range(shown)]
        assert len(page.components[0]) == 2 + shown
        assert page.values("colspan") == [str(2 + shown)]
        assert ("Shown: the first 12 of 13 features." in page.note) == (d == 13)
