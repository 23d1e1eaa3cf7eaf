"""Model files made to do harm, and the process that opens them: run as a script with their number and a folder.

The process may take 1 GiB of address space beyond what its imports took, and an audit hook writes down what the
interpreter is asked to do. What came of it is printed as JSON.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import resource
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from streamgmm import GaussianMixture, load, open_source
from streamgmm.errors import FileFormatError, StreamGMMError

SEED = 81
GIB = 2**30
MOST_SECONDS = 1.0
#: Seconds after which a file counts as one that hangs.
HANGS = 20

#: Audit events (the beginnings of their names) that no file may cause.
FORBIDDEN = (
    "exec", "compile", "import", "code.", "marshal.", "pickle.", "ctypes.", "subprocess.", "socket.", "urllib.",
    "http.", "os.", "shutil.", "tempfile.",
)  # fmt: skip


def known() -> GaussianMixture:
    covariances = np.array([[[1.0, 0.5], [0.5, 2.0]], [[3.0, 0.0], [0.0, 1.0]]])
    model = GaussianMixture.from_parameters([0.25, 0.75], [[0.0, 1.0], [-2.0, 3.0]], covariances)
    return model.set_params(means_init=[[0.0, 0.0], [1.0, 1.0]], random_state=7)


# -- files by hand -----------------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def laden(folder: Path) -> GaussianMixture:
    """A model that carries all that can go from batch to batch: statistics, blocks, an average, a chart, a ledger."""
    rows, _ = known().sample(400)
    zarr.create_array(folder / "rows.zarr", data=rows, chunks=(100, 2))
    start = {"weights_init": [0.5, 0.5], "means_init": [[0.0, 0.0], [1.0, 1.0]], "precisions_init": [np.eye(2)] * 2}
    model = GaussianMixture(2, solver="incremental", tol=0.1, random_state=7, **start)
    source = open_source(folder / "rows.zarr", block_rows=100)
    model.fit(source).set_params(average=True).update(rows, batch_id="monday")
    return model


def sound(folder: Path, model: GaussianMixture | None = None) -> tuple[dict[str, Any], Arrays]:
    """The facts and the arrays of a model that was saved."""
    path = folder / "sound.sgmm"
    (model or known()).save(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end])
    facts = json.loads(table.pop("__metadata__")["streamgmm"])["facts"]
    spans = {name: slice(*(end + offset for offset in entry["data_offsets"])) for name, entry in table.items()}
    types = {name: next(key for key, value in NAMES.items() if value == table[name]["dtype"]) for name in spans}
    arrays = {name: np.frombuffer(data[span], types[name]) for name, span in spans.items()}
    return facts, {name: array.reshape(table[name]["shape"]) for name, array in arrays.items()}


def sealed(facts: Any, arrays: Arrays, /, **changes: Any) -> str:
    """A header whose hashes are right, as anyone can make it."""
    digests = {
        n: hashlib.sha256(f"{a.dtype.str}{a.shape}".encode() + a.tobytes()).hexdigest() for n, a in arrays.items()
    }
    header = {"format": 1, "kind": "model", "written_by": "a stranger", "sha256": digests, "facts": facts, **changes}
    header["seal"] = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    return json.dumps(header)


NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "u8": "U64", "i4": "I32", "u1": "U8", "b1": "BOOL"}


def table_of(text: Any, arrays: Arrays) -> dict[str, Any]:
    """The table at the beginning of a safetensors file."""
    table: dict[str, Any] = {"__metadata__": {"streamgmm": text}}
    first = 0
    for name, array in arrays.items():
        last = first + array.nbytes
        table[name] = {"dtype": NAMES[array.dtype.str[1:]], "shape": list(array.shape), "data_offsets": [first, last]}
        first = last
    return table


def packed(table: str, arrays: Arrays, length: int | None = None) -> bytes:
    head = table.encode(errors="surrogatepass")
    size = len(head) if length is None else length
    return size.to_bytes(8, "little") + head + b"".join(array.tobytes() for array in arrays.values())


def whole(facts: Any, arrays: Arrays, /, **changes: Any) -> bytes:
    return packed(json.dumps(table_of(sealed(facts, arrays, **changes), arrays)), arrays)


# -- what is done to them ----------------------------------------------------------------------------------------

ODD = [
    None, True, False, -1, 0, 1, 3, 2**62, 2**63, 2**64, 10**400, -0.0, 1.5, 1e308, 5e-324, float("nan"), float("inf"),
    "", "x", "full", "diag", "x" * 10_000, "\ud800", "\0", [], [1], [None], [[]], [float("nan")], [-1.5, 10**400],
    ["a", "b"], ["a"] * 1000, {}, {"a": 1}, {"": {"": [{}]}},
]  # fmt: skip

SHAPES = [
    [],
    [0],
    [-1],
    [2, 2],
    [2, 2, 2],
    [2, 0],
    [2**31, 2**31],
    [2**63, 2],
    [2**64],
    [4, 1, 1, 1] * 50,
    [[2]],
    None,
    "2",
]
OFFSETS = [[0, 0], [0, 8], [-8, 8], [8, 0], [0, 2**40], [2**63, 2**64 - 1], [0], [], None, [0.0, 16.0], [0, 16, 32]]
TYPES = ["F64", "BF16", "F8_E4M3", "F8_E5M2", "U64", "F16", "I8", "BOOL", "C64", "F4", "", None, 3]


class Maker:
    """Makes hostile file number so and so; the words tell how. Every second one is made of the last of the models."""

    def __init__(self, *models: tuple[dict[str, Any], Arrays]) -> None:
        self.models = models
        self._take(0)

    def _take(self, model: int) -> None:
        self.facts, self.arrays = self.models[model]
        self.good = whole(self.facts, self.arrays)

    def file(self, number: int) -> tuple[str, bytes]:
        self.rng = np.random.default_rng([SEED, number])
        self._take(number // 8 % len(self.models))
        kinds: list[Callable[[], bytes]] = [
            self.bytes_changed, self.table_changed, self.fact_changed, self.parameter_changed, self.array_changed,
            self.header_changed, self.cut_and_joined, self.foreign,
        ]  # fmt: skip
        kind = self.heavy if number % 100 == 99 else kinds[number % len(kinds)]
        return kind.__name__, kind()

    def one(self, values: Any) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def bytes_changed(self) -> bytes:
        data = np.frombuffer(self.good, "u1").copy()
        end = self.one([8, 60, len(data) - 200, len(data)])
        places = self.rng.integers(0, end, int(self.rng.integers(1, 9)))
        data[places] ^= self.rng.integers(1, 256, len(places), dtype="u1")
        return data.tobytes()

    def table_changed(self) -> bytes:
        text = sealed(self.facts, self.arrays)
        table = table_of(text, self.arrays)
        entry = table[self.one(list(self.arrays))]
        changes: list[Callable[[], Any]] = [
            lambda: entry.update(dtype=self.one(TYPES)),
            lambda: entry.update(shape=self.one(SHAPES)),
            lambda: entry.update(data_offsets=self.one(OFFSETS)),
            lambda: entry.update(dtype=self.one(TYPES), shape=self.one(SHAPES), data_offsets=self.one(OFFSETS)),
            lambda: entry.clear(),
            lambda: table.update(__metadata__=self.one([None, [], {"streamgmm": 3}, {"streamgmm": {}}, {}, "x"])),
            lambda: table.update(more={"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}),
        ]
        self.one(changes)()
        found = json.dumps(table)
        if self.rng.random() < 0.2:
            twice = json.dumps({"means": self.one([table["weights"], 3, None, {}])})
            found = f"{found[:-1]}, {twice[1:]}"
        lengths = [None] * 6 + [0, 1, 7, len(found) - 1, len(found) + 1, 2**24, 2**24 + 1, 2**63, 2**64 - 1]
        return packed(found, self.arrays, self.one(lengths))

    def fact_changed(self) -> bytes:
        facts = dict(self.facts)
        for _ in range(int(self.rng.integers(1, 3))):
            name = self.one([*facts, "unknown"])
            if "online" in facts and isinstance(facts.get("online"), dict) and self.rng.random() < 0.7:
                facts["online"] = self._deeper(facts["online"])
            elif self.rng.random() < 0.2:
                facts.pop(name, None)
            else:
                facts[name] = self.one(ODD)
        return whole(facts, self.arrays)

    def _deeper(self, facts: dict[str, Any]) -> dict[str, Any]:
        """With one value of what goes from batch to batch changed, at any depth."""
        name = self.one(list(facts))
        if isinstance(facts[name], dict) and facts[name] and self.rng.random() < 0.7:
            return {**facts, name: self._deeper(facts[name])}
        return {**facts, name: self.one(ODD)}

    def parameter_changed(self) -> bytes:
        name = self.one([*self.facts["params"], "weights_init", "unknown", "__class__", "self", ""])
        return whole({**self.facts, "params": {**self.facts["params"], name: self.one(ODD)}}, self.arrays)

    def array_changed(self) -> bytes:
        """Arrays with right hashes that are no mixture, or a far-fetched one."""
        name = self.one(list(self.arrays))
        array = self.arrays[name]
        power = 10.0 ** self.rng.uniform(-320, 308)
        with np.errstate(all="ignore"):
            changed = self.one([
                array * self.one([np.nan, np.inf, 0.0, -1.0, 1 + 1e-5, 1e308, 1e-320]),
                array * power, array + power, array.astype("f4"), array.astype("i8"), array.astype("u1"), array[:0],
                array[:1], array[..., :1], array[None], array.reshape(-1), np.zeros((0, 0)), np.ones(()), array[::-1],
                self.rng.normal(size=array.shape), np.zeros((3000, 1)), np.ones((1, 100_000)),
            ])  # fmt: skip
        arrays = {**self.arrays, name: np.ascontiguousarray(changed)}
        if self.rng.random() < 0.1:
            del arrays[self.one(list(arrays))]
        kind = self.one(["full", "full", "tied", "diag", "spherical"])
        if kind != "full" and "covariances" in arrays and self.rng.random() < 0.7:
            part = {"tied": np.eye(2), "diag": np.ones((2, 2)), "spherical": np.ones(2)}[kind]
            arrays["covariances"] = np.ascontiguousarray(part * self.one([1.0, -1.0, 0.0, power]))
        return whole({**self.facts, "covariance_type": kind}, arrays)

    def header_changed(self) -> bytes:
        name = self.one(["format", "kind", "sha256", "facts", "written_by", "unknown"])
        value = self.one([*ODD, {"means": []}, {"means": {}, "weights": 3}])
        return whole(self.facts, self.arrays, **{name: value})

    def cut_and_joined(self) -> bytes:
        data, place = self.good, int(self.rng.integers(len(self.good)))
        names = list(self.arrays)
        swapped = {**self.arrays, names[0]: self.arrays[names[1]], names[1]: self.arrays[names[0]]}
        exchanged = packed(json.dumps(table_of(sealed(self.facts, self.arrays), swapped)), swapped)
        parts = [data[:place], data[place:], data + data, data[:place] + data, b"\0" + data, data + b"\0" * place]
        return self.one([*parts, exchanged])

    def foreign(self) -> bytes:
        """Files of other kinds under the name of a model."""
        npy, npz, objects, zipped = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
        np.save(npy, self.arrays["means"])
        np.savez(npz, **self.arrays)
        np.save(objects, np.array([Trap()], object), allow_pickle=True)
        with zipfile.ZipFile(zipped, "w") as file:
            file.writestr("zarr.json", '{"zarr_format": 3, "node_type": "group"}')
        trap = pickle.dumps(Trap())
        others = [npy.getvalue(), npz.getvalue(), objects.getvalue(), zipped.getvalue(), trap, gzip.compress(self.good)]
        hdf5 = b"\x89HDF\r\n\x1a\n" + self.rng.bytes(500)
        table = json.dumps({"x": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}})
        texts = [b"", b"{}", b"import os\nos.abort()\n", b"{" * 200, table.encode(), json.dumps(self.facts).encode()]
        theirs = packed(table, {"x": np.ones(1)})
        inside = packed(json.dumps({"__metadata__": {"streamgmm": trap.hex()}}), {})
        return self.one([*others, hdf5, *texts, theirs, inside, self.rng.bytes(int(self.rng.integers(1, 2000)))])

    def heavy(self) -> bytes:
        """Little to write, much to do: deep, wide and long, each just about what is still read or a little more."""
        deep = "[" * 100_000 + "]" * 100_000
        many: Arrays = {f"a{i}": np.ones(1) for i in range(100_000)}
        nested: Any = 0
        for _ in range(900):
            nested = [nested]
        makers: list[Callable[[], bytes]] = [
            lambda: packed(deep, {}),
            lambda: packed(json.dumps({"__metadata__": {"streamgmm": deep}}), {}),
            lambda: packed(json.dumps(table_of("null", many)), many),
            lambda: packed(json.dumps({"__metadata__": {str(i): "" for i in range(100_000)}}), {}),
            lambda: packed(json.dumps({"__metadata__": {"streamgmm": "{" + '"a": 1, ' * 100_000 + '"b": 1}'}}), {}),
            lambda: packed(json.dumps({"__metadata__": {"streamgmm": '{"format": ' + "9" * 5000 + "}"}}), {}),
            lambda: whole({**self.facts, "lower_bounds": [-1.5] * 1_000_000}, self.arrays),
            lambda: whole({**self.facts, "feature_names": ["x"] * 1_000_000}, self.arrays),
            lambda: whole({**self.facts, "provenance": {"a": nested}}, self.arrays),
            lambda: whole({**self.facts, "provenance": {str(i): {} for i in range(200_000)}}, self.arrays),
            lambda: packed(" " * 16 * 2**20, {}),
        ]
        return self.one(makers)()


class Trap:
    """Whoever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 3",)


# -- the process that opens them ---------------------------------------------------------------------------------


class HangError(BaseException):
    """Nobody catches it on the way."""


class Watch:
    """Writes down the audit events that no file may cause, while it watches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.watching, self.events = os.fspath(folder), False, Counter[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        read = event == "open" and arguments[1] == "r" and os.fspath(arguments[0]).startswith(self.folder)
        if (event == "open" and not read) or event.startswith(FORBIDDEN):
            self.events[f"{event} {arguments!r:.100}"] += 1

    def load(self, path: Path) -> tuple[GaussianMixture | None, str]:
        """The model, if there is one, and what is wrong: nothing where the text is empty."""
        model, wrong = None, ""
        start = time.process_time()
        self.watching = True
        try:
            signal.setitimer(signal.ITIMER_REAL, HANGS)
            model = load(path)
        except FileFormatError as error:
            wrong = "" if len(str(error)) < 1000 else f"the sentence has {len(str(error))} characters"
        except BaseException as error:  # warnings among them
            wrong = f"{type(error).__name__}: {error!s:.200}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watching = False
        seconds = time.process_time() - start
        if seconds > MOST_SECONDS:
            wrong = wrong or f"took {seconds:.2f} s of the processor"
        if self.events:
            wrong = wrong or f"caused {dict(self.events)}"
            self.events.clear()
        return model, wrong


def unsound(model: GaussianMixture, folder: Path) -> str:
    """What is wrong with a model that was loaded; nothing where the text is empty."""
    for name in ("weights_", "means_", "covariances_", "precisions_", "precisions_cholesky_", "lower_bounds_"):
        if not np.isfinite(getattr(model, name)).all():
            return f"{name} is not finite"
    try:
        repr(model)
        labels = model.predict(model.means_)
        model.save(folder / "again.sgmm")
        with suppress(StreamGMMError), redirect_stdout(io.StringIO()):
            model.partial_fit(model.means_)
    except Exception as error:
        return f"was loaded, and then {type(error).__name__}: {error!s:.200}"
    return "" if ((labels >= 0) & (labels < len(model.weights_))).all() else "labels are out of range"


def main(count: int, folder: Path) -> None:
    """Open ``count`` hostile files and print what came of it, as JSON."""
    maker, watch = Maker(sound(folder, known()), sound(folder, laden(folder))), Watch(folder)

    def late(*_: Any) -> None:
        raise HangError(f"nothing after {HANGS} s")

    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="X does not have valid feature names")
    path = folder / "hostile.sgmm"
    for model in maker.models:
        path.write_bytes(whole(*model))
        first, wrong = watch.load(path)
        assert first is not None, wrong  # what is imported on first use is there now
        assert unsound(first, folder) == ""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + GIB, taken + GIB))
    found: dict[str, Any] = {"loaded": 0, "wrong": [], "kinds": Counter()}
    for number in range(count):
        kind, data = maker.file(number)
        path.write_bytes(data)
        model, wrong = watch.load(path)
        found["kinds"][kind] += 1
        if model is not None:
            found["loaded"] += 1
            wrong = wrong or unsound(model, folder)
        if wrong:
            found["wrong"].append(f"file {number} ({kind}): {wrong}")
    watch.watching = True
    compile("1", "a control", "eval")
    watch.watching = False
    found["control"] = bool(watch.events)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
