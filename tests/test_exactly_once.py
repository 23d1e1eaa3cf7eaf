"""Learners are killed at random moments while another process writes; yet every row is learned, and once.

What a killed learner leaves behind is the last file that it saved. A process that starts from there must neither miss
rows nor take them twice, however the store grows meanwhile.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from growing_stores import ATTRIBUTE, CHUNK, MANNERS, MOMENTS, Manner, killed_learner, new_store, rows_of, writing

from streamgmm import GaussianMixture, load

#: Kills of each manner: by default, and in the long form.
KILLS = {
    "appended": (2, 20),
    "appended, checkpoints": (2, 14),
    "written, then resized": (2, 17),
    "written, then said": (1, 16),
    "resized, then written": (1, 16),
    "resized, then written, k=3": (2, 17),
}

FIRST_ROWS = 130

#: Most seconds that a learner lives on; loading, updating and saving takes it a tenth of this.
LIFE = 0.3

#: And where it is killed as it saves, which takes about so long.
SAVING = 0.002


def start(manner: Manner, path: Path, saved: Path) -> Path | None:
    """The store with its first rows and the model that knows them, where there is one; also a copy of its file."""
    n_rows = FIRST_ROWS // CHUNK * CHUNK if manner.whole else FIRST_ROWS
    new_store(path, n_rows).attrs[ATTRIBUTE] = n_rows
    if not manner.fits:
        return None
    manner.mixture().fit(path).save(saved)
    before = saved.with_name("before.sgmm")
    before.write_bytes(saved.read_bytes())
    return before


def facts(path: Path) -> dict[str, Any]:
    """What the header of a model file says of its running statistics, read by hand."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["streamgmm"])["facts"]["online"]


def assert_counted_once(model: GaussianMixture, rows: np.ndarray) -> None:
    """One component that weighs all rows alike is the table's counts and sums; they are whole numbers, and exact.

    A row too many and another too few would have to agree in both columns, their squares and their product.
    """
    n, mean = len(rows), model.means_[0]
    assert model.effective_rows_ == pytest.approx(n, rel=1e-9)
    np.testing.assert_array_equal(np.rint(n * mean), rows.sum(axis=0))
    np.testing.assert_allclose(n * mean, np.rint(n * mean), atol=1e-3)
    products = n * (model.covariances_[0] + np.outer(mean, mean))
    np.testing.assert_array_equal(np.rint(products), rows.T @ rows)


def kill(name: str, path: Path, saved: Path, kills: int) -> Counter[str]:
    """Kill so many learners one after the other, a third of them as they save; what each of them was doing."""
    rng, hit, learned = np.random.default_rng(len(name)), Counter(), n_rows(saved)
    for number in range(kills):
        moment = MOMENTS[number % len(MOMENTS)]
        if moment == "save" and MANNERS[name].checkpoints:
            moment = "any"  # it saves within update
        seconds = rng.uniform(0.0, SAVING if moment == "save" else LIFE)
        hit[killed_learner(name, path, saved, moment, seconds)] += 1
        before, learned = learned, n_rows(saved)
        assert learned >= before
    return hit


def n_rows(saved: Path) -> int:
    return facts(saved)["n_rows"] if saved.exists() else 0


@pytest.mark.parametrize("name", MANNERS)
def test_every_row_is_learned_once_whatever_is_killed(tmp_path, request, name):
    manner, kills = MANNERS[name], KILLS[name][request.config.getoption("--long")]
    path, saved = tmp_path / "rows.zarr", tmp_path / "model.sgmm"
    before = start(manner, path, saved)
    first = n_rows(saved)
    with writing(name, path):
        hit = kill(name, path, saved, kills)
    assert hit.total() == kills
    assert "import" not in hit
    if kills >= len(MOMENTS):
        assert n_rows(saved) > first  # killed learners learn, too
    rows = np.asarray(zarr.open_array(str(path), mode="r")[:])
    np.testing.assert_array_equal(rows, rows_of(0, len(rows)))
    left = [file.name for file in tmp_path.iterdir() if file.name.startswith(f".{saved.name}.")]
    assert len(left) <= kills  # what was being written when the learner was killed, under another name

    killed = load(saved) if saved.exists() else manner.mixture()
    assert len(rows) % CHUNK
    manner.update(killed, path, flush=True)
    killed.save(saved)
    assert killed.n_rows_ == len(rows)
    if manner.settings["n_components"] == 1:
        assert_counted_once(killed, rows)

    undisturbed = manner.mixture() if before is None else load(before)
    manner.update(undisturbed, path, flush=True)
    undisturbed.save(tmp_path / "undisturbed.sgmm")
    assert facts(saved) == facts(tmp_path / "undisturbed.sgmm")
    assert saved.read_bytes() == (tmp_path / "undisturbed.sgmm").read_bytes()
    print(f"{name}: {len(rows)} rows, {facts(saved)['n_steps']} steps, killed {dict(hit)}, {len(left)} files left")


def test_the_long_form_kills_a_hundred_times():
    assert [sum(kills) for kills in zip(*KILLS.values(), strict=True)] == [10, 100]
    assert KILLS.keys() == MANNERS.keys()
