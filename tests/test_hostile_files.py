"""Hostile model files are refused in one sentence, or are sound models; nothing runs, grows or hangs."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_files
import numpy as np
import pytest
from hostile_files import GIB, known

from streamgmm import GaussianMixture, load
from streamgmm.errors import FileFormatError, ParameterError


def run(count: int, folder: Path, seconds: float) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, hostile_files.__file__, str(count), os.fspath(folder)],
        capture_output=True, text=True, timeout=seconds, check=False,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check(found: dict[str, Any], count: int) -> None:
    assert "\n".join(found["wrong"][:50]) == ""
    assert sum(found["kinds"].values()) == count
    assert len(found["kinds"]) == 9
    assert 0 < found["loaded"] < count / 2
    assert found["control"], "the hook hears nothing"


def test_500_hostile_files_are_refused_or_sound(tmp_path):
    check(run(500, tmp_path, 200), 500)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_10_000_hostile_files_are_refused_or_sound(tmp_path):
    check(run(10_000, tmp_path, 1100), 10_000)


DEEP = "[" * 100_000 + "]" * 100_000

#: What a file with right hashes may not claim: facts, arrays, parts of the header, and the words of the refusal.
CLAIMS: dict[str, tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any], str]] = {
    "a seed that is none": ({"params": {"random_state": "x"}}, {}, {}, r"random_state must be None"),
    "a tolerance below zero": ({"params": {"tol": -1}}, {}, {}, r"tol must be"),
    "a count beyond all rows": ({"n_rows": 2**63}, {}, {}, r"9223372036854775808 where a count is expected"),
    "a count of half a row": ({"n_skipped": 0.5}, {}, {}, r"0.5 where a count is expected"),
    "a bound that is no number": ({"lower_bounds": [float("nan")]}, {}, {}, r"holds NaN, which is no number"),
    "a name for one of two features": ({"feature_names": ["a"]}, {}, {}, r"1 feature names for 2 features"),
    "single precision": ({}, {"means": np.zeros((2, 2), "f4")}, {}, r"'means' holds float32 where float64"),
    "no components": ({}, {"means": np.zeros((0, 2))}, {}, r"means must have the shape"),
    "weights of three": ({}, {"weights": np.ones(3) / 3}, {}, r"weights must have the shape \(2,\)"),
    "weights of two in all": ({}, {"weights": np.ones(2)}, {}, r"sum to 1"),
    "a negative variance": ({}, {"covariances": -np.stack([np.eye(2)] * 2)}, {}, r"not positive definite"),
    "a start of infinities": ({}, {"means_init": np.full((2, 2), np.inf)}, {}, r"means_init must be finite"),
    "too many arrays": ({}, {str(i): np.ones(1) for i in range(61)}, {}, r"holds 65 arrays, so it is no streamgmm"),
    "facts in a list": ({}, {}, {"facts": []}, r"facts or hashes are no mapping"),
    "hashes in a list": ({}, {}, {"sha256": []}, r"facts or hashes are no mapping"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_that_cannot_be_true_is_refused_in_words(tmp_path, claim):
    more_facts, more_arrays, changes, words = CLAIMS[claim]
    facts, arrays = hostile_files.sound(tmp_path)
    path = tmp_path / "claim.sgmm"
    path.write_bytes(hostile_files.whole({**facts, **more_facts}, {**arrays, **more_arrays}, **changes))
    with pytest.raises(FileFormatError, match=rf"claim\.sgmm .*{words}"):
        load(path)


@pytest.mark.parametrize("table", [DEEP, json.dumps({"__metadata__": {"streamgmm": DEEP}})], ids=["outside", "inside"])
def test_a_header_without_end_is_refused(tmp_path, table):
    (tmp_path / "deep.sgmm").write_bytes(hostile_files.packed(table, {}))
    with pytest.raises(FileFormatError, match=r"deep.sgmm cannot be read as a streamgmm file"):
        load(tmp_path / "deep.sgmm")


# -- things at a path that are no files of ours ------------------------------------------------------------------


@pytest.fixture
def good(tmp_path) -> Path:
    known().save(tmp_path / "good.sgmm")
    return tmp_path / "good.sgmm"


def sparse(path: Path, size: int, start: bytes = b"") -> Path:
    """A file of so many bytes that takes no room on the disk."""
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def is_the_known_one(model: GaussianMixture) -> bool:
    return np.array_equal(model.means_, known().means_) and np.array_equal(model.covariances_, known().covariances_)


def test_a_symbolic_link_is_not_followed(good):
    for name, target in {"link": good, "dangling": good.parent / "nothing", "device": Path("/dev/zero")}.items():
        (good.parent / name).symlink_to(target)
        with pytest.raises(FileFormatError, match=rf"{name}' is a symbolic link, which may lead anywhere"):
            load(good.parent / name)


def test_a_hard_link_and_a_path_with_dots_are_fine(good):
    os.link(good, good.parent / "hard.sgmm")
    (good.parent / "folder").mkdir()
    assert is_the_known_one(load(good.parent / "hard.sgmm"))
    assert is_the_known_one(load(good.parent / "folder" / ".." / "good.sgmm"))
    with pytest.raises(FileFormatError, match="There is no file"):
        load(good.parent / "no-folder" / ".." / "no.sgmm")


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null"), tmp_path):
        with pytest.raises(FileFormatError, match=r"There is no file .*: it is (a folder|no regular file)"):
            load(path)


def test_a_path_that_is_none_is_refused(tmp_path):
    for path in (tmp_path / "a\0b", tmp_path / ("x" * 5000), tmp_path / "\ud800"):
        with pytest.raises(FileFormatError, match="There is no file"):
            load(path)


def test_huge_files_are_refused_before_they_are_read(tmp_path):
    with pytest.raises(FileFormatError, match=r"has 3,221,225,472 bytes, but a model has at most 2,147,483,648"):
        load(sparse(tmp_path / "huge", 3 * GIB))
    with pytest.raises(FileFormatError, match=r"its header would have 1,000,000,000,000,000 bytes"):
        load(sparse(tmp_path / "liar", GIB, (10**15).to_bytes(8, "little")))


def test_what_does_not_fit_into_memory_is_said_in_a_sentence(tmp_path):
    """Of 1.9 GB that are right by their header, a process that may take 1 GiB more reads none."""
    table = {"__metadata__": {"streamgmm": "{}"}, "means": {"dtype": "F64", "shape": [1, 237_500_000]}}
    table["means"]["data_offsets"] = [0, 1_900_000_000]
    text = json.dumps(table).encode()
    start = len(text).to_bytes(8, "little") + text
    path = sparse(tmp_path / "large", len(start) + 1_900_000_000, start)
    code = (
        "import resource, sys; from pathlib import Path; from streamgmm import load\n"
        "taken = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30,) * 2)\n"
        "try:\n    load(sys.argv[1])\nexcept OSError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("FileFormatError large cannot be read as a streamgmm file"), done.stderr[-1000:]


# -- saving ------------------------------------------------------------------------------------------------------


def test_saving_does_not_follow_a_link_and_does_not_replace_what_is_no_file(good):
    (good.parent / "link").symlink_to(good)
    (good.parent / "folder").mkdir()
    os.mkfifo(good.parent / "pipe")
    before = good.read_bytes()
    for name, words in {"link": "a symbolic link", "folder": "a folder", "pipe": "no regular file"}.items():
        with pytest.raises(FileFormatError, match=rf"{name}' is {words}"):
            known().save(good.parent / name)
    assert sorted(os.listdir(good.parent)) == ["folder", "good.sgmm", "link", "pipe"]
    assert good.read_bytes() == before
    assert stat.S_ISFIFO((good.parent / "pipe").stat().st_mode)


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """For a while this process is nobody in particular, whom permissions hold back."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_or_a_file_without_permission_is_said_in_a_sentence():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        known().save(folder / "mine.sgmm")
        (folder / "mine.sgmm").chmod(0o000)
        (folder / "closed").mkdir()
        folder.chmod(0o555)
        (folder / "closed").chmod(0o000)
        try:
            with unprivileged():
                for path in (folder / "new.sgmm", folder / "closed" / "new.sgmm"):
                    with pytest.raises(FileFormatError, match=r"new\.sgmm' could not be written \(.*Permission denied"):
                        known().save(path)
                with pytest.raises(FileFormatError, match=r"mine\.sgmm cannot be read .*Permission denied"):
                    load(folder / "mine.sgmm")
        finally:
            folder.chmod(0o755)
            (folder / "closed").chmod(0o755)
        assert sorted(os.listdir(folder)) == ["closed", "mine.sgmm"]


@pytest.mark.parametrize(
    "changes",
    [{"tol": -1.0}, {"n_components": "x"}, {"random_state": -1}, {"means_init": [[np.nan]]}, {"weights_init": "abc"}],
    ids=str,
)
def test_what_load_would_refuse_is_not_saved(tmp_path, good, changes):
    before = good.read_bytes()
    with pytest.raises(ParameterError, match=next(iter(changes))):
        known().set_params(**changes).save(good)
    assert good.read_bytes() == before
    assert is_the_known_one(load(good))


@pytest.mark.parametrize("tol", [np.float32(0.5), np.int64(1), 1], ids=repr)
def test_numbers_of_any_type_are_saved_as_plain_ones(tmp_path, tol):
    known().set_params(tol=tol, warm_start=np.bool_(True), max_iter=np.int32(9)).save(tmp_path / "m.sgmm")
    found = load(tmp_path / "m.sgmm").get_params()
    assert (found["tol"], found["warm_start"], found["max_iter"]) == (float(tol), True, 9)
