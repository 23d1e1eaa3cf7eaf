"""The one file format: whole or refused, whatever happens to its bytes."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import streamgmm
from streamgmm import GaussianMixture, files, load
from streamgmm.errors import FileFormatError

FACTS = {"n_iter": 12, "lower_bounds": [-1.25, -1.125], "params": {"tol": None, "covariance_type": "full"}}
ARRAYS = {"means": np.array([[1.0, 2.0], [3.0, np.pi]]), "counts": np.arange(3), "empty": np.empty((0, 2))}


def contents(kind: str = "model") -> files.Contents:
    return files.Contents(kind, FACTS, ARRAYS)


def same(found: files.Contents, expected: files.Contents) -> bool:
    return (
        found.kind == expected.kind
        and found.facts == expected.facts
        and found.arrays.keys() == expected.arrays.keys()
        and all(
            a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
            for a, b in ((found.arrays[name], expected.arrays[name]) for name in expected.arrays)
        )
    )


@pytest.fixture
def path(tmp_path) -> Path:
    files.write(tmp_path / "a.sgmm", contents())
    return tmp_path / "a.sgmm"


def header_of(path: Path) -> dict[str, Any]:
    """The JSON header, read by hand as the format says: eight bytes of length, then JSON."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["streamgmm"])


def rewritten(path: Path, **changes: Any) -> Path:
    """The same file with changes to its header, written by safetensors itself."""
    header = {**header_of(path), **changes}
    save_file(load_file(path), path, metadata={"streamgmm": json.dumps(header)})
    return path


def test_what_is_written_is_read(path):
    assert same(files.read(path, "model"), contents())


def test_the_header_says_what_the_file_is(path):
    header = header_of(path)
    assert header["format"] == files.FORMAT == 1
    assert header["kind"] == "model"
    assert header["facts"] == FACTS
    assert header["written_by"] == f"streamgmm {streamgmm.__version__}"
    assert all(len(digest) == 64 for digest in header["sha256"].values())
    assert header["sha256"].keys() >= ARRAYS.keys()


def test_other_readers_of_safetensors_can_open_it(path):
    assert np.array_equal(load_file(path)["means"], ARRAYS["means"])


def test_arrays_of_any_layout(tmp_path):
    wide = np.arange(24.0).reshape(4, 6)
    arrays = {"fortran": np.asfortranarray(wide), "strided": wide[::2, ::-3], "scalar": np.array(2.5)}
    files.write(tmp_path / "b", files.Contents("model", {}, arrays))
    found = files.read(tmp_path / "b", "model").arrays
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_changed_byte_is_noticed_wherever_it_is(path, mask):
    """Refused, or without any effect on what is read; never other contents, never another error."""
    data = path.read_bytes()
    noticed = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
        try:
            found = files.read(path, "model")
        except FileFormatError:
            noticed += 1
        else:
            assert same(found, contents()), f"byte {position} of {len(data)} changed what is read: {found}"
    assert noticed > 0.5 * len(data)


def test_a_truncated_file_is_refused_at_every_length(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FileFormatError, match=r"a\.sgmm (cannot be read|is damaged|is a safetensors file)"):
            files.read(path, "model")


def test_changed_arrays_are_named(path):
    data = bytearray(path.read_bytes())
    position = data.index(struct.pack("<d", np.pi))
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"a.sgmm is damaged: the contents of \['means'\] do not match"):
        files.read(path, "model")


def test_a_missing_array_is_named(path):
    arrays = load_file(path)
    header = header_of(path)
    del arrays["counts"]
    save_file(arrays, path, metadata={"streamgmm": json.dumps(header)})
    with pytest.raises(FileFormatError, match=r"contents of \['counts'\] do not match"):
        files.read(path, "model")


def test_a_newer_format_is_refused(path):
    with pytest.raises(
        FileFormatError, match=r"has format 2; this version of streamgmm reads format 1. Install a newer"
    ):
        files.read(rewritten(path, format=2), "model")


def test_another_kind_is_refused(path):
    with pytest.raises(FileFormatError, match=r"a.sgmm holds a model, but a checkpoint was asked for"):
        files.read(path, "checkpoint")


@pytest.mark.parametrize("missing", ["format", "kind", "sha256", "facts", "seal"])
def test_a_header_without_one_of_its_parts_is_refused(path, missing):
    header = header_of(path)
    del header[missing]
    save_file(load_file(path), path, metadata={"streamgmm": json.dumps(header)})
    with pytest.raises(FileFormatError, match="streamgmm did not write it"):
        files.read(path, "model")


@pytest.mark.parametrize("text", ["null", "[]", "3", '"model"'])
def test_a_header_that_is_no_object_is_refused(path, text):
    save_file(load_file(path), path, metadata={"streamgmm": text})
    with pytest.raises(FileFormatError, match="streamgmm did not write it"):
        files.read(path, "model")


@pytest.mark.parametrize("changes", [{"sha256": 3}, {"sha256": []}, {"sha256": None}])
def test_a_header_with_parts_of_another_type_is_refused(path, changes):
    with pytest.raises(FileFormatError, match=r"a\.sgmm"):
        files.read(rewritten(path, **changes), "model")


def test_files_of_others_are_refused(tmp_path):
    save_file({"x": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        FileFormatError, match=r"other\.safetensors is a safetensors file, but streamgmm did not write it"
    ):
        files.read(tmp_path / "other.safetensors", "model")
    for name, data in {"empty": b"", "text": b"hello world", "pickle": b"\x80\x04K\x01."}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FileFormatError, match=f"{name} cannot be read as a streamgmm file"):
            files.read(tmp_path / name, "model")


def test_paths_that_are_no_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileFormatError, match="There is no file"):
            files.read(path, "model")
    assert issubclass(FileFormatError, OSError)


# -- atomic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path, monkeypatch, failing):
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    before = path.read_bytes()
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        files.write(path, files.Contents("model", {"other": 1}, {}))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.sgmm"]


def test_the_new_file_is_on_disk_before_it_takes_the_old_one_s_place(path, monkeypatch):
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    files.write(path, contents())
    assert events == ["fsync", "replace", "fsync"]  # the file, the name, the directory


def test_writing_into_a_missing_directory_says_so(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        files.write(tmp_path / "nowhere" / "a.sgmm", contents())


def test_a_reader_never_sees_a_part(path):
    """While the file is written again and again, every read finds it whole."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2) as pool:
        writes = pool.submit(lambda: [files.write(path, contents()) for _ in range(30)])
        while not writes.done():
            assert same(files.read(path, "model"), contents())
        writes.result()
    assert os.listdir(path.parent) == ["a.sgmm"]


# -- models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "tied", "diag", "spherical"])
def test_a_model_comes_back_whole(tmp_path, structure):
    rows = np.random.default_rng(0).normal(size=(200, 3))
    model = GaussianMixture(2, covariance_type=structure, random_state=3, reg_covar=1e-5, tol=1e-2).fit(rows)
    model.save(tmp_path / "m.sgmm")
    found = load(tmp_path / "m.sgmm")
    assert found.get_params() == model.get_params()
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bounds_"):
        assert np.array_equal(getattr(found, name), getattr(model, name))
    for name in ("converged_", "n_iter_", "n_passes_", "lower_bound_", "n_features_in_"):
        assert getattr(found, name) == getattr(model, name)
    assert np.array_equal(found.predict_proba(rows), model.predict_proba(rows))


def test_a_changed_byte_never_gives_another_model(tmp_path):
    model = GaussianMixture.from_parameters([0.25, 0.75], [[0.0], [1.0]], [1.0, 2.0], covariance_type="spherical")
    path = tmp_path / "m.sgmm"
    model.save(path)
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x02]) + data[position + 1 :])
        try:
            found = load(path)
        except FileFormatError:
            continue
        assert found.get_params() == model.get_params(), f"byte {position}"
        assert (found.n_iter_, found.converged_, found.lower_bounds_) == (0, False, []), f"byte {position}"
        assert np.array_equal(found.means_, model.means_)


def test_a_file_that_describes_no_mixture_is_refused(tmp_path, path):
    with pytest.raises(FileFormatError, match=r"a\.sgmm does not describe a mixture"):
        load(path)
    facts = {"params": {}, "covariance_type": "full", "feature_names": []}
    arrays = {"weights": np.ones(1), "means": np.zeros((1, 1)), "covariances": -np.ones((1, 1, 1))}
    files.write(path, files.Contents("model", facts, arrays))
    with pytest.raises(FileFormatError, match=r"does not describe a mixture.*not positive definite"):
        load(path)


def test_no_path_and_no_weight_of_a_row_is_saved(tmp_path):
    rows = np.random.default_rng(0).normal(size=(50, 2))
    model = GaussianMixture(1, random_state=np.random.default_rng(1)).fit(rows)
    model.save(tmp_path / "secret-folder.sgmm")
    assert b"secret-folder" not in (tmp_path / "secret-folder.sgmm").read_bytes()
    assert load(tmp_path / "secret-folder.sgmm").random_state is None


def test_what_a_killed_writer_left_is_swept_away_once_it_is_old(tmp_path):
    """An hour later; what another writer is at, and files of other names, stay."""
    names = [f".m.sgmm.{'0' * 32}", f".m.sgmm.{'1' * 32}", f".m.sgmm.{'x' * 32}", f".n.sgmm.{'0' * 32}"]
    for name in names:
        (tmp_path / name).write_bytes(b"begun")
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / names[1])
    files.write(tmp_path / "m.sgmm", files.Contents("model", {}, {}))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "m.sgmm"])
