"""How well do moving means are followed, and how soon is a jump seen?

    python benchmarks/drift.py             # about five minutes
    python benchmarks/drift.py --runs 10   # quick and rough

Tracking: three components in two features whose means move on circles, so many deviations a row. The error is what the
true mixture of the moment is better by on fresh rows, nats a row. It is shown for the rate of forgetting that the
documentation recommends, over the best rate on a grid of factors around it.

Alarm: four components of equal weight in three features, separation 2, batches of 2,000, default settings. In some runs
a mean jumps, in a random direction, at batch 100. Counted are the runs with an alarm within five batches of the jump,
and those with a false one: before the jump, and in runs of 200 batches without.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from streamgmm import GaussianMixture
from streamgmm.synthetic import Mixture, random_mixture

FACTORS = (1 / 8, 1 / 4, 1 / 2, 1 / 2**0.5, 1, 2**0.5, 2, 4, 8)
BATCHES, JUMP_AT, BATCH = 200, 100, 2_000


def recommended(speed: float, n_parameters: int) -> float:
    """The rate of forgetting for means that move ``speed`` deviations a row, root mean square over the rows."""
    return (4 * speed**2 / n_parameters) ** (1 / 3)


# -- tracking ------------------------------------------------------------------------------------------------------


def moving(turn: float) -> Mixture:
    """Means on circles of radius one about corners that lie five deviations apart."""
    corners = 5.0 * np.array([[0.0, 0.0], [1.0, 0.0], [0.5, 0.8]])
    angles = turn + np.array([0.0, 2.0, 4.0])
    means = corners + np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Mixture(np.array([0.5, 0.3, 0.2]), means, np.stack([np.eye(2)] * 3))


def tracking_error(rate: float, speed: float, size: int, n_batches: int, seed: int) -> float:
    """Mean over the second half of the batches of what the truth is better by, on 4,000 fresh rows each."""
    start = moving(0.0)
    model = GaussianMixture.from_parameters(start.weights, start.means, start.covariances)
    model.set_params(forgetting=min(rate, 1.0))
    errors = []
    for batch in range(n_batches):
        truth = moving(speed * size * batch)
        model.partial_fit(truth.rows(size, seed, batch)[0])
        if batch >= n_batches // 2:
            fresh, _ = moving(speed * size * (batch + 1)).rows(4_000, seed + 1, batch)
            now = moving(speed * size * (batch + 1))
            best = GaussianMixture.from_parameters(now.weights, now.means, now.covariances)
            errors.append(best.score(fresh) - model.score(fresh))
    return float(np.mean(errors))


def tracking(speed: float, size: int, n_batches: int, factors: Sequence[float] = FACTORS) -> tuple[float, float, float]:
    """The error at the recommended rate, the least error on the grid, and the factor where that is."""
    rate = recommended(speed, 17)
    errors = {factor: tracking_error(rate * factor, speed, size, n_batches, seed=0) for factor in factors}
    best = min(errors, key=lambda factor: errors[factor])
    return errors[1], errors[best], best


# -- alarm ---------------------------------------------------------------------------------------------------------


def alarms(seed: int, jump: float, n_batches: int, jump_at: int = JUMP_AT) -> np.ndarray:
    """(n_batches,) whether each batch raised an alarm. jump: deviations that a mean moves at batch ``jump_at``."""
    rng = np.random.default_rng(seed)
    mixture = random_mixture(4, 3, 2.0, seed)
    before = Mixture(np.full(4, 0.25), mixture.means, mixture.covariances)
    component, way = rng.integers(4), rng.standard_normal(3)
    means = before.means.copy()
    means[component] += jump * np.linalg.cholesky(before.covariances[component]) @ way / np.linalg.norm(way)
    after = Mixture(before.weights, means, before.covariances)
    model, raised = GaussianMixture(4, random_state=seed), np.zeros(n_batches, dtype=bool)
    for batch in range(n_batches):
        rows, _ = (before if batch < jump_at else after).rows(BATCH, seed, batch)
        raised[batch] = model.partial_fit(rows).report_.alarm
    return raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100)
    runs = range(parser.parse_args().runs)
    print("tracking: deviations a row, batch, recommended rate, error there, least error on the grid (factor), ratio")
    for speed, size in ((1e-6, 2_000), (1e-5, 2_000), (1e-5, 200), (1e-4, 200), (1e-4, 20), (1e-3, 20)):
        rate = recommended(speed, 17)
        n_batches = int(min(400, max(60, 12 / (rate * size))))
        error, least, factor = tracking(speed, size, n_batches)
        print(
            f"  {speed:.0e}  {size:5d}  {rate:.2e}  {error:.2e}  {least:.2e} ({factor:.2g})  {error / least:.2f}",
            flush=True,
        )
    false = sum(alarms(seed, 0.0, BATCHES, BATCHES).any() for seed in runs)
    print(f"alarm: {false} of {len(runs)} stationary runs of {BATCHES} batches raised one", flush=True)
    for jump in (0.25, 0.5, 1.0, 2.0):
        raised = [alarms(1_000 + seed, jump, JUMP_AT + 5) for seed in runs]
        within = [sum(map(any, (r[JUMP_AT : JUMP_AT + after] for r in raised))) for after in range(1, 6)]
        early = sum(r[:JUMP_AT].any() for r in raised)
        print(
            f"  jump of {jump:4.2f}: raised within 1 to 5 batches in {within} of {len(runs)}, before in {early}",
            flush=True,
        )


if __name__ == "__main__":
    main()
