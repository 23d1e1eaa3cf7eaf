"""The command line as a process: exit codes, Ctrl-C, readers that leave, and terminals that cannot show everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_zarr

from streamgmm import GaussianMixture
from streamgmm.synthetic import random_mixture


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40,000 x 4 rows of five components."""
    return write_zarr(tmp_path_factory.mktemp("rows"), random_mixture(5, 4, 4.0, 0).rows(40_000, 0)[0], 10_000)


@pytest.fixture(scope="module")
def model(store: Path) -> Path:
    """A model file of five components fitted to the store."""
    GaussianMixture(5, random_state=0).fit(str(store)).save(store.parent / "model.sgmm")
    return store.parent / "model.sgmm"


def test_a_process_of_its_own(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamgmm.cli", "info"]
    good = subprocess.run([*command, str(model)], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert "5 components, full covariances, 4 features" in good.stdout
    bad = subprocess.run([*command, str(tmp_path / "nothere")], capture_output=True, text=True, check=False)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("Error: There is no zarr array or group")
    assert bad.stderr.count("\n") == 1


def started(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "streamgmm.cli", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_ctrl_c_ends_a_fit_with_one_line(store: Path, tmp_path: Path) -> None:
    command = ("fit", store, "--tol", 0, "--max-iter", 100_000, "-k", 8, "-o", tmp_path / "m.sgmm")
    with started(*command, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        while not process.stderr.readline().startswith("pass "):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, rest = process.communicate(timeout=60)
    lines = [line for line in rest.splitlines() if not line.startswith("pass ")]
    assert (process.returncode, output, lines) == (130, "", ["Interrupted."])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["info MODEL", pytest.param("fit STORE -o OUTPUT", marks=pytest.mark.long)])
def test_a_reader_that_left_ends_a_command_quietly(command: str, store: Path, model: Path, tmp_path: Path) -> None:
    places = {"MODEL": model, "STORE": store, "OUTPUT": tmp_path / "m.sgmm"}
    ours, theirs = os.pipe()
    os.close(ours)
    with started(*(places.get(word, word) for word in command.split()), stdout=theirs) as process:
        os.close(theirs)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "Error" not in said
    assert "Traceback" not in said
    assert (tmp_path / "m.sgmm").exists() == command.startswith("fit")


def test_a_terminal_without_some_characters_is_served_too(tmp_path: Path) -> None:
    named = GaussianMixture.from_parameters([1.0], [[1.0]], [[1.0]], covariance_type="diag")
    named.feature_names_in_ = np.array(["水温 °C"], dtype=object)
    named.save(tmp_path / "m.sgmm")
    western = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    with started("info", tmp_path / "m.sgmm", stdout=subprocess.PIPE, encoding="latin-1", env=western) as process:
        output, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert "?? °C" in output
    assert "1.00 ± 1.00" in output


def test_help_needs_no_scikit_learn_and_no_matplotlib() -> None:
    code = "import sys, streamgmm.cli; print(sorted({'sklearn', 'matplotlib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
