"""What a model carries from batch to batch, as one value, and how it lies in a model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from streamgmm.checks import LARGEST_MEAN, checked_mixture
from streamgmm.drift import Chart
from streamgmm.files import as_amount, as_array, as_count, as_floats, as_number
from streamgmm.kernel import m_step
from streamgmm.ledger import FINGERPRINT_BYTES, Ledger, StoreRecord
from streamgmm.params import MixtureParams
from streamgmm.protocols import Floats, Integers
from streamgmm.remembered import Remembered
from streamgmm.solvers.stepwise import LEAST_WEIGHT, Average, Running
from streamgmm.stored_stats import arrays_of, facts_of, stats_of


@dataclass(frozen=True, eq=False)
class Online:
    """What a model carries from batch to batch.

    running: None while rows are kept for a start.  remembered: the blocks of the first store of the ledger, where
    ``running`` is made of them and nothing else.  chart: of drift.  kept_rows, kept_weights: (m, d) and (m,), empty
    once the model has started.  n_steps: batches that were learned in a step.
    """

    running: Running | None
    chart: Chart | None
    kept_rows: Floats
    kept_weights: Floats
    ledger: Ledger = field(default_factory=Ledger)
    n_rows: int = 0
    n_skipped: int = 0
    n_steps: int = 0
    remembered: Remembered | None = None

    @classmethod
    def nothing(cls, d: int) -> Online:
        """Before the first batch of d features."""
        return cls(None, None, np.empty((0, d)), np.empty(0))

    @classmethod
    def started(cls, running: Running, n_rows: int, n_skipped: int, ledger: Ledger | None = None) -> Online:
        """With a mixture that was learned from so many rows."""
        nothing, blank = cls.nothing(running.params.n_features), Chart.blank(running.params)
        return replace(nothing, running=running, chart=blank, ledger=ledger or Ledger()).with_counts(n_rows, n_skipped)

    def with_counts(self, n_rows: int, n_skipped: int) -> Online:
        """After so many more rows were learned, and left out."""
        return replace(self, n_rows=self.n_rows + n_rows, n_skipped=self.n_skipped + n_skipped)

    def reordered(self, order: Integers) -> Online:
        """Components ``order``, the numbers they have now."""
        running = None if self.running is None else self.running.reordered(order)
        chart = None if self.chart is None else replace(self.chart, innovation=self.chart.innovation[order])
        remembered = None if self.remembered is None else self.remembered.reordered(order)
        return replace(self, running=running, chart=chart, remembered=remembered)

    # -- in a file -------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """All that is an array, by its name in a file; what has no element is left out."""
        found: dict[str, np.ndarray[Any, Any]] = {"kept_rows": self.kept_rows, "kept_weights": self.kept_weights}
        if self.running is not None:
            found |= arrays_of(self.running.stats, "running")
            if self.running.average is not None:
                params = self.running.params
                found |= arrays_of(self.running.average.stats, "average")
                found |= {"running_weights": params.weights, "running_means": params.means}
                found |= {"running_covariances": params.covariance.values}
        if self.remembered is not None:
            found |= self.remembered.arrays()
        if self.chart is not None:
            found["chart_innovation"] = self.chart.innovation
        for name in _LEDGER:
            parts = [getattr(record, name) for record in self.ledger.stores]
            if parts:
                found[f"ledger_{name}"] = np.concatenate(parts)
        return {name: array for name, array in found.items() if array.size}

    def facts(self) -> dict[str, Any]:
        """All that is not an array, as plain values."""
        running, average = self.running, None if self.running is None else self.running.average
        return {
            "n_features": self.kept_rows.shape[1],
            "n_rows": self.n_rows,
            "n_skipped": self.n_skipped,
            "n_steps": self.n_steps,
            "running": running and {**facts_of(running.stats), "memory": running.memory, "squares": running.squares},
            "average": average and {**facts_of(average.stats), "rows": average.rows},
            "chart": self.chart and {"surplus": self.chart.surplus, "noise": self.chart.noise},
            "stores": [[[record.key, *record.others], record.name, len(record.stops)] for record in self.ledger.stores],
            "batches": dict(self.ledger.batches),
            "n_stream": self.ledger.n_stream,
        }

    @classmethod
    def of(cls, facts: Mapping[str, Any], arrays: Mapping[str, Any], published: MixtureParams | None) -> Online:
        """What ``facts`` and ``arrays`` describe. published: the mixture of the file, None where it has none yet.

        Raises KeyError, TypeError or ValueError where that is nothing that a model can carry.
        """
        d = as_count(facts["n_features"])
        if not 1 <= d < 2**31 or (published is not None and d != published.n_features):
            raise ValueError(f"{d} features in what is carried from batch to batch")
        kept = as_floats(arrays, "kept_rows", (None, d)), as_floats(arrays, "kept_weights", (None,))
        if len(kept[0]) != len(kept[1]) or (kept[1] <= 0).any():
            raise ValueError("rows that are kept without a weight above zero each")
        running = None if facts["running"] is None else _running(facts, arrays, published)
        if running is None and published is not None:
            raise ValueError("a mixture without the statistics that made it")
        chart = None if published is None or facts["chart"] is None else _chart(facts["chart"], arrays, published)
        n_rows, n_skipped, n_steps = (as_count(facts[name]) for name in ("n_rows", "n_skipped", "n_steps"))
        ledger = _ledger(facts, arrays)
        remembered = None
        if running is not None and Remembered.STOPS in arrays:
            remembered = Remembered.of(arrays, running.params, ledger.stores[0].stops if ledger.stores else None)
        return cls(running, chart, *kept, ledger, n_rows, n_skipped, n_steps, remembered)


#: Arrays of a store's record.
_LEDGER = ("stops", "fingerprints", "stamps")


def _chart(said: Mapping[str, Any], arrays: Mapping[str, Any], published: MixtureParams) -> Chart:
    innovation = as_floats(arrays, "chart_innovation", (published.n_components, 1 + published.n_features))
    return Chart(innovation, as_number(said["surplus"]), as_amount(said["noise"]))


def _running(facts: Mapping[str, Any], arrays: Mapping[str, Any], published: MixtureParams | None) -> Running:
    if published is None:
        raise ValueError("running statistics without a mixture")
    said, average = facts["running"], facts["average"]
    memory, squares = as_amount(said["memory"]), as_amount(said["squares"])
    if not 0 < squares <= 1.0 / LEAST_WEIGHT:
        raise ValueError(f"{squares} as the sum of squared weights")
    stats = stats_of(said, arrays, "running", published)
    if average is None:
        return _fitting(Running(stats, published, memory, squares))
    weights, means, covariances = (arrays[f"running_{name}"] for name in ("weights", "means", "covariances"))
    params = checked_mixture(weights, means, covariances, published.covariance.kind)
    if params.means.shape != published.means.shape:
        raise ValueError("running parameters of another shape than the published ones")
    averaged = Average(stats_of(average, arrays, "average", published), published, as_amount(average["rows"]))
    return _fitting(Running(stats, params, memory, squares, averaged))


def _fitting(running: Running) -> Running:
    """The same; ValueError where the statistics are not those that the mixture follows from."""
    params, stats = running.params, running.stats
    k, d = params.means.shape
    with np.errstate(all="ignore"):
        made, report = m_step(stats, params, 0.0, running.least_rows * running.squares)
        variances, theirs = made.covariance.variances(k, d), params.covariance.variances(k, d)
        far = (made.means - params.means) ** 2 > 1e-8 * theirs + 1e-16 * params.means**2
        wide = ~(variances <= (1.0 + 1e-6) * theirs)
    starved = list(report.starved)
    far[starved], wide[starved] = False, False
    if far.any() or wide.any() or np.abs(made.weights - params.weights).max() > 1e-9:
        raise ValueError("running statistics that belong to another mixture")
    if np.abs(stats.origin).max() > LARGEST_MEAN:
        raise ValueError("running statistics about an origin that float64 cannot square")
    return running


def _ledger(facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> Ledger:
    said = [([str(key) for key in keys], str(name), as_count(n)) for keys, name, n in facts["stores"]]
    total = sum(n for *_, n in said)
    stops = as_array(arrays, "ledger_stops", np.dtype(np.int64), (total,))
    stamps = as_array(arrays, "ledger_stamps", np.dtype(np.int64), (total, 2))
    marks = as_array(arrays, "ledger_fingerprints", np.dtype(np.uint8), (total, FINGERPRINT_BYTES))
    records, first = [], 0
    for (key, *others), name, n in said:
        part = slice(first, first + n)
        if n and not (np.diff(stops[part], prepend=0) > 0).all():
            raise ValueError("units of a store that do not follow on each other")
        records.append(StoreRecord(key, name, stops[part], marks[part], stamps[part], tuple(others)))
        first += n
    batches = {str(name): as_count(n) for name, n in facts["batches"].items()}
    return Ledger(tuple(records), batches, as_count(facts["n_stream"]))
