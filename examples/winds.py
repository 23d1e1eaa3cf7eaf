"""Eleven years of winds over the globe, a month at a time: six regimes that follow the seasons, and what drift found.

Shows a model that learns as the data arrive: it is fitted to the first year; then, for each month, it is loaded from
its file, says how far the month is from what it expects, learns the month in one step, and is saved. Nothing but the
file goes from month to month. One model remembers all months alike, the other forgets half of what it knows in a year.

A cell counts by its area, since cells are narrow near the poles; and neighbours have much the same wind, so a patch of
six by six cells counts as one row. What the chart of drift finds first is no weather: in May 1983 winds become less
likely at once, above all over land, and in April 1992 likely again over land and there alone. Weather keeps neither to
coasts nor to the first of a month: those who analysed it seem to have changed how they treat land.

    python examples/winds.py DIRECTORY

Writes forgets.sgmm, remembers.sgmm and winds.png into DIRECTORY. Needs the Debian package ferret-datasets (U.S. Navy
winds of 1982 to 1992, a cell every 2.5 degrees) and matplotlib. Takes about ten seconds.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.io import netcdf_file

from streamgmm import GaussianMixture, load

#: Where the Debian package puts the winds, and the relief of the earth that tells land from sea.
WINDS = Path("/usr/share/ferret-vis/data/monthly_navy_winds.cdf")
RELIEF = WINDS.with_name("etopo60.cdf")

N_COMPONENTS = 6

#: Months that the start is found on.
FIRST = 12

#: Neighbouring cells that count as one row.
PATCH = 36

#: The two models of the months after the first year, and colours of theirs.
MODELS = {"remembers all months": "#c8463c", "half-life of a year": "#3b6fb6"}

COMPASS = ["N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW"]
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]

#: Months before and after a step that are compared; steps that are named.
STEP_MONTHS, N_STEPS = 6, 4

#: Colours of regimes: greens for winds from anywhere, the calm ones pale; then from easterly to westerly winds.
PALETTE = ["#b9ddc0", "#79b79a", "#3b7f72", "#c8463c", "#f2a03d", "#3b6fb6"]


class Winds(NamedTuple):
    """rows: (months, cells, 2) m/s towards east and north.  months: (months,) datetime64.  land: (cells,) bool.

    weights: (cells,) what a cell counts.  latitudes, longitudes: the axes of the grid of cells, in degrees.
    """

    rows: np.ndarray
    months: np.ndarray
    land: np.ndarray
    weights: np.ndarray
    latitudes: np.ndarray
    longitudes: np.ndarray


def variable(path, name):
    """A variable of a netCDF file as an array of this machine's byte order, and the names of its axes."""
    with netcdf_file(path, mmap=False) as file:
        found = file.variables[name]
        values = found.data.astype(found.data.dtype.newbyteorder("="))
        if (values == getattr(found, "missing_value", np.nan)).any():
            raise ValueError(f"{path.name}: {name} has missing values")
        return values, found.dimensions


def read_winds():
    if not WINDS.is_file():
        sys.exit("This example needs the winds of ferret-datasets: apt-get install ferret-datasets")
    east, (time, latitude, longitude) = variable(WINDS, "UWND")
    north, _ = variable(WINDS, "VWND")
    hours, latitudes, longitudes = (variable(WINDS, name)[0] for name in (time, latitude, longitude))
    days = (hours / 24).astype("timedelta64[D]")
    months = (np.datetime64("1980-01-14") + days).astype("datetime64[M]")  # "hour since 1980-01-14 14:00:00"
    order = np.argsort((longitudes + 30) % 360)  # from 30° W eastwards, where the edge cuts no continent
    rows = np.stack([east, north], axis=-1)[:, :, order].reshape(len(months), -1, 2)
    longitudes = (longitudes[order] + 30) % 360 - 30
    area = np.repeat(np.cos(np.radians(latitudes)).clip(0), len(longitudes))
    land = (relief(latitudes, longitudes) > 0).ravel()
    return Winds(rows, months, land, area / PATCH, latitudes, longitudes)


def relief(latitudes, longitudes):
    """Metres above the sea (latitudes, longitudes), from the nearest cell of one degree."""
    heights, (latitude, longitude) = variable(RELIEF, "ROSE")
    lines = np.abs(variable(RELIEF, latitude)[0][:, None] - latitudes).argmin(axis=0)
    way = variable(RELIEF, longitude)[0][:, None] - longitudes
    columns = np.abs((way + 180) % 360 - 180).argmin(axis=0)
    return heights[np.ix_(lines, columns)]


def learn(path, winds):
    """Learn the months after the first year, each as if in a process of its own; yields its report, and the weights."""
    for rows in winds.rows[FIRST + load(path).n_steps_ :]:  # a loop that was broken off goes on where it was
        model = load(path)
        model.partial_fit(rows, sample_weight=winds.weights)
        model.save(path)
        yield model.report_, model.weights_


def name_regimes(model):
    """Components in the order of PALETTE, and the name of each of them."""
    speeds = np.hypot(*model.means_.T)
    spreads = np.sqrt(np.trace(model.covariances_, axis1=1, axis2=2))
    steady = speeds > spreads
    order = np.lexsort([np.where(steady, model.means_[:, 0], spreads), steady])
    names = [
        f"from {compass(*model.means_[k])}, {speeds[k]:.1f} m/s" if steady[k] else f"variable, ± {spreads[k]:.1f} m/s"
        for k in order
    ]
    return order, names


def compass(east, north):
    """Where a wind comes from."""
    return COMPASS[round(np.degrees(np.arctan2(-east, -north)) / 22.5) % 16]


def without_seasons(values):
    """Monthly values (months,) less the median of the same month in all years."""
    years = values.reshape(-1, 12)
    return (years - np.median(years, axis=0)).ravel()


def step(values, i):
    """The step of a series (months,) at month i: the mean after it less the mean before."""
    return values[i : i + STEP_MONTHS].mean() - values[i - STEP_MONTHS : i].mean()


def largest_steps(values):
    """The months at which a series takes its largest steps, none within the reach of a larger one."""
    left, found = range(STEP_MONTHS, len(values) - STEP_MONTHS + 1), []
    while left and len(found) < N_STEPS:
        found.append(max(left, key=lambda i: abs(step(values, i))))
        left = [i for i in left if abs(i - found[-1]) > STEP_MONTHS]
    return sorted(found)


def alarms_in_words(reports, months):
    """The months with an alarm, as spans."""
    alarms = np.flatnonzero([report.alarm for report in reports])
    spans = np.split(alarms, np.flatnonzero(np.diff(alarms) > 1) + 1)
    words = [" to ".join(str(months[i]) for i in dict.fromkeys([*span[:1], *span[-1:]])) for span in spans]
    return ", ".join(words) or "none"


def mean_of(values, weights):
    """Means (months, ...) of values (months, cells, ...), cells weighted."""
    return np.tensordot(values, weights / weights.sum(), axes=(1, 0))


def main(directory):
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    winds = read_winds()
    n_months, n_cells, _ = winds.rows.shape
    print(f"{n_months * n_cells:,} winds of {n_months} months, {winds.months[0]} to {winds.months[-1]}")

    year = 12 * winds.weights.sum()
    model = GaussianMixture(N_COMPONENTS, random_state=0, tol=1e-5, max_iter=500)
    model.fit(winds.rows[:FIRST].reshape(-1, 2), sample_weight=np.tile(winds.weights, FIRST))
    paths = [directory / "remembers.sgmm", directory / "forgets.sgmm"]
    reports, weights = [], []
    for path, forgetting in zip(paths, (None, {"half_life": year}), strict=True):
        model.set_params(forgetting=forgetting).save(path)
        for found, learned in zip((reports, weights), zip(*learn(path, winds), strict=True), strict=True):
            found.append(learned)

    last = load(paths[-1])
    order, names = name_regimes(last)
    shares = np.stack([last.predict_proba(rows) for rows in winds.rows])[:, :, order]
    print_regimes(names, mean_of(shares, winds.weights))

    # the model of the first year, which stays as it is, says how likely every wind is, over land and over sea
    likely = np.stack([model.score_samples(rows) for rows in winds.rows])
    sides = {"land": winds.land, "sea": ~winds.land}
    of_side = {name: without_seasons(mean_of(likely[:, part], winds.weights[part])) for name, part in sides.items()}
    at = largest_steps(of_side["land"])
    print(f"{'step':<10}{'land':>6}{'sea':>7}   nats a row, by the model of the first year")
    for i in at:
        print(f"{winds.months[i]!s:<10}" + " ".join(f"{step(values, i):+6.2f}" for values in of_side.values()))
    for name, found in zip(MODELS, reports, strict=True):
        mean = np.mean([report.log_likelihood for report in found])
        print(f"{name}: {mean:.4f} nats a row before a month is learned; ", end="")
        print(f"alarms in {alarms_in_words(found, winds.months[FIRST:])}")

    figure = Figure(figsize=(14, 15), layout="constrained")
    maps, charts = figure.subfigures(2, height_ratios=[1, 2.6])
    draw_maps(maps, winds, shares, likely, names, at[0])
    draw_charts(charts, winds, reports, weights[-1], order, mean_of(shares, winds.weights), of_side, at)
    figure.savefig(directory / "winds.png", dpi=100)
    print("wrote winds.png")


def print_regimes(names, shares):
    """shares: (months, k) of the globe, by the model after the last month."""
    print(f"{'regime':<24}{'share':>7}{'most':>12}{'least':>12}")
    for name, values in zip(names, shares.T, strict=True):
        season = values.reshape(-1, 12).mean(axis=0)
        most, least = (f"{season[i]:.1%} {MONTHS[i]}" for i in (season.argmax(), season.argmin()))
        print(f"{name:<24}{season.mean():7.1%}{most:>12}{least:>12}")


def draw_maps(figure, winds, shares, likely, names, i):
    """The regimes of January and July, and what the step in month i did to the log-likelihood of each cell."""
    shape = len(winds.latitudes), len(winds.longitudes)
    west, east = winds.longitudes[[0, -1]]
    place = {"extent": (west - 1.25, east + 1.25, -91.25, 91.25), "origin": "lower", "aspect": "auto"}
    *seasons, third = figure.subplots(1, 3, sharey=True)
    for month, name, axes in zip((0, 6), ("January", "July"), seasons, strict=True):
        labels = shares[month::12].mean(axis=0).argmax(axis=-1).reshape(shape)
        axes.imshow(labels, cmap=ListedColormap(PALETTE), vmin=-0.5, vmax=len(PALETTE) - 0.5, **place)
        axes.set_title(f"The most likely regime in {name}", loc="left")
    change = likely[i : i + 12].mean(axis=0) - likely[i - 12 : i].mean(axis=0)
    picture = third.imshow(change.reshape(shape), cmap="PuOr", vmin=-2.5, vmax=2.5, **place)
    third.set_title(f"Log-likelihood, the year from {winds.months[i]} less that before", loc="left")
    figure.colorbar(picture, ax=third, label="nats", pad=0.01)
    heights = relief(winds.latitudes, winds.longitudes)
    for axes in (*seasons, third):
        axes.contour(winds.longitudes, winds.latitudes, heights, levels=[0], colors="black", linewidths=0.6)
        axes.set(xticks=range(0, 301, 60), yticks=range(-90, 91, 30))
    patches = [Patch(color=colour, label=name) for colour, name in zip(PALETTE, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(names), frameon=False)


def draw_charts(figure, winds, reports, weights, order, shares, of_side, at):
    """Four charts over the months; at: the months of the steps."""
    months, learned = winds.months, winds.months[FIRST:]
    charts = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1, 1.3, 1])
    likelihood, alarm, share, side = charts
    expected, error, seen = (
        np.array([getattr(report, name) for report in reports[-1]])
        for name in ("expected", "standard_error", "log_likelihood")
    )
    likelihood.fill_between(
        learned, expected - 2 * error, expected + 2 * error, color="#cdd5de", label="expected ± 2 standard errors"
    )
    likelihood.plot(learned, seen, ".-", color="black", label="seen")
    likelihood.set_title(f"Log-likelihood of a month before it is learned, nats a row ({[*MODELS][-1]})", loc="left")
    for (name, colour), found in zip(MODELS.items(), reports, strict=True):
        alarm.plot(learned, [report.alarm_statistic for report in found], color=colour, label=name)
    alarm.axhline(1, color="black", linestyle=":")
    alarm.set_yscale("log")
    alarm.set_title("Statistic of drift; above one is an alarm", loc="left")
    for k, colour in zip(order, PALETTE, strict=True):
        share.plot(learned, [after[k] for after in weights], color=colour, linewidth=2.5)
    for values, colour in zip(shares.T, PALETTE, strict=True):
        share.plot(months, values, color=colour, linewidth=1)
    share.set_title(f"Shares of regimes in a month (thin), weights of components (thick, {[*MODELS][-1]})", loc="left")
    for (name, values), colour in zip(of_side.items(), ("#8a5a1c", "#3b6fb6"), strict=True):
        side.plot(months, values, color=colour, label=name)
    for i in at:
        side.axvline(months[i], color="black", linestyle=":", linewidth=1)
        side.text(months[i], 1, f" {months[i]}", transform=side.get_xaxis_transform(), va="top")
    side.set_title(
        "Log-likelihood by the model of the first year, less the usual one of the month, nats a row", loc="left"
    )
    for axes in charts:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (likelihood, alarm, side):
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where to write: python examples/winds.py DIRECTORY")
    main(sys.argv[1])
