"""Seconds an iteration of EM in memory, ours beside those of other implementations.

    python benchmarks/peers.py                                   # full covariances, the whole grid: half an hour
    python benchmarks/peers.py --structures tied diag spherical  # beside scikit-learn, the only peer that has them
    python benchmarks/peers.py --shapes 8x16 --rounds 1          # quick and rough

Each implementation runs in a process of its own, from the same start on the same rows, with all cores; ours with one
thread as well. They take turns in one run, so that what else the machine does falls on all alike. An iteration, its
M-step with it, is the difference of a long and a short fit over the iterations that were made in between, which leaves
out the start, checks and the read before fitting; the long fit takes some seconds. Each ratio is the median over the
rounds of those of neighbours.

oneDAL gets an environment of its own, made on first use in ``--environments`` (its versions need an older NumPy).
pomegranate, gmmx (single precision, the only one it has) and Spark take part where this interpreter finds them
(``pip install pomegranate gmmx pyspark`` and Java), "absent" otherwise. The last column is the largest difference of
the mean log-likelihoods (nats) after a few iterations, of those that tell: that all did the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import geometric_mean, median
from tempfile import TemporaryDirectory

import numpy as np
from peer_worker import PEERS

GRID = [(2, 8), (8, 16), (16, 32), (64, 16), (32, 128)]
#: Shapes that no tuning saw.
UNSEEN = [(3, 20), (12, 50), (48, 24)]
#: Iterations of the short fit, and of one that tells how many make a long one, which are no more than the last. The
#: slowest peers, which take ten seconds an iteration, never make more than the few.
SHORT, FEW, MOST = 1, 3, 60
LONG_SECONDS = 2.0
#: Products of a pass (rows x components x features of a row), which makes ours last some tenths of a second.
WORK = 10**9
ROWS = (20_000, 2_000_000)

THREAD_LIMITS = ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
#: Package by peer, for those that take part where they are installed.
OPTIONAL = {"pomegranate": "pomegranate", "gmmx": "gmmx", "Spark": "pyspark"}
ONEDAL = ["numpy<2.1", "scikit-learn==1.5.2", "daal4py==2024.7", "packaging"]


class Peer:
    """An implementation in its own process, with the rows and the start that lie in a folder."""

    def __init__(self, name: str, python: str, folder: Path, structure: str, threads: int) -> None:
        script = Path(__file__).with_name("peer_worker.py")
        command = [python, str(script), name, str(folder), structure, str(threads)]
        environment = {**os.environ, **dict.fromkeys(THREAD_LIMITS, str(threads))}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.long = FEW
        self.likelihood = np.nan

    def prepare(self) -> None:
        """Libraries are loaded, what is made once is made, and the long fit gets its length."""
        self.fit(SHORT)
        few, _, self.likelihood = self.fit(FEW)
        if few < LONG_SECONDS:
            self.long = int(np.clip(LONG_SECONDS / self.iteration(), FEW, MOST))

    def fit(self, iterations: int) -> tuple[float, int, float]:
        """Seconds, iterations that were made, and the log-likelihood. RuntimeError where the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # the process has ended, as its answer says
            self.process.stdin.write(f"{iterations}\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended with {self.process.wait()}")
        return float(answer[0]), int(answer[1]), float(answer[2])

    def iteration(self) -> float:
        """Seconds of one."""
        short, few, _ = self.fit(SHORT)
        long, many, _ = self.fit(self.long)
        return max(long - short, 1e-3) / (many - few)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # its input ends, and so does it


def rows_and_means(d: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit-variance clusters, as many as make a pass worth timing, and where a fit starts."""
    means = 2.0 * np.random.default_rng(1).normal(size=(k, d))
    rng = np.random.default_rng(0)
    n = int(np.clip(WORK // (k * (1 + d + d * (d + 1) // 2)), *ROWS))
    rows = means[rng.integers(k, size=n)] + rng.normal(size=(n, d))
    return rows, means + 0.1 * rng.normal(size=(k, d))


def onedal_python(folder: Path) -> str:
    """The interpreter of an environment that has oneDAL; made where it is not there."""
    place = folder / "onedal"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ONEDAL], check=True)
    return str(python)


def interpreters(structure: str, environments: Path, wanted: Collection[str] = tuple(PEERS)) -> dict[str, str]:
    """By peer; says which of the optional ones are absent. Only ours and scikit-learn have all structures."""
    found = {"streamgmm": sys.executable}
    for name in wanted:
        if name == "scikit-learn":
            found[name] = sys.executable
        elif name == "oneDAL" and structure == "full":
            found[name] = onedal_python(environments)
        elif name in OPTIONAL and structure == "full":
            if importlib.util.find_spec(OPTIONAL[name]):
                found[name] = sys.executable
            else:
                print(f"{name}: absent")
    return found


def compare(
    d: int, k: int, structure: str, rounds: int, pythons: dict[str, str]
) -> tuple[dict[str, list[float]], float]:
    """Seconds an iteration by implementation, a value a round, and how far their likelihoods are apart.

    "one thread" is ours.
    """
    cores = len(os.sched_getaffinity(0))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        place = Path(folder)
        for name, values in zip(("rows", "means"), rows_and_means(d, k), strict=True):
            np.save(place / f"{name}.npy", values)

        def start(name: str, python: str, threads: int) -> Peer:
            return stack.enter_context(Peer(name, python, place, structure, threads))

        peers = {name: start(name, python, cores) for name, python in pythons.items()}
        peers["one thread"] = start("streamgmm", sys.executable, 1)
        for peer in peers.values():
            peer.prepare()
        found: dict[str, list[float]] = {name: [] for name in peers}
        for _ in range(rounds):
            for name, peer in peers.items():
                found[name].append(peer.iteration())
        return found, apart([peer.likelihood for peer in peers.values()])


def apart(likelihoods: list[float]) -> float:
    """Of those that are told, the largest difference."""
    return float(np.nanmax(likelihoods) - np.nanmin(likelihoods))


def ratios(found: dict[str, list[float]]) -> dict[str, float]:
    """Of each to ours, the median over the rounds."""
    ours = found["streamgmm"]
    return {
        name: median(theirs / mine for theirs, mine in zip(seconds, ours, strict=True))
        for name, seconds in found.items()
    }


def row(d: int, k: int, structure: str, found: dict[str, list[float]], difference: float, names: list[str]) -> str:
    over = ratios(found)
    seconds = " ".join(f"{median(found[name]):12.4f}" for name in names)
    beside = " ".join(f"{over[name]:12.2f}" for name in names if name != "streamgmm")
    return f"{structure:>9} {d:3d} {k:3d}  {seconds}  {beside}  {difference:9.1e}"


def shape(text: str) -> tuple[int, int]:
    d, k = text.split("x")
    return int(d), int(k)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", type=shape, default=[*GRID, *UNSEEN], help="dxk; default: all")
    parser.add_argument("--structures", nargs="+", default=["full"])
    parser.add_argument("--peers", nargs="+", choices=list(PEERS)[1:], default=list(PEERS)[1:])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "streamgmm-peers")
    arguments = parser.parse_args()
    for structure in arguments.structures:
        pythons = interpreters(structure, arguments.environments, arguments.peers)
        names = [*pythons, "one thread"]
        print(f"{'':18} {'seconds an iteration':^{13 * len(names)}} {'over ours':^{13 * len(names) - 13}}")
        heads = " ".join(f"{name:>12}" for name in names)
        print(f"{'':>9} {'d':>3} {'k':>3}  {heads}  {heads[13:]}  {'apart':>9}")
        over = {}
        for d, k in arguments.shapes:
            found, difference = compare(d, k, structure, arguments.rounds, pythons)
            over[d, k] = ratios(found)
            print(row(d, k, structure, found, difference, names), flush=True)
        for name in names[1:]:
            grid = [of[name] for at, of in over.items() if at in GRID]
            if grid:
                print(f"{name}: {geometric_mean(grid):.2f} in geometric mean over the grid, {min(grid):.2f} at least")


if __name__ == "__main__":
    main()
