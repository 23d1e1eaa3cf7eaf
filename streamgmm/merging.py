"""Statistics that travel between sites: they add, and a model follows from them, without a row leaving its place."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from streamgmm import files
from streamgmm.errors import DataError, FileFormatError
from streamgmm.files import Contents
from streamgmm.learned import mixture_arrays, stored_mixture
from streamgmm.params import MixtureParams
from streamgmm.stats import SufficientStats
from streamgmm.stored_stats import arrays_of, facts_of, stats_of


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """What the rows of one site leave behind at the parameters of one model: ``GaussianMixture.statistics`` takes them.

    ``a + b`` are the statistics of both sites' rows, to rounding those of all rows in one place.
    ``GaussianMixture.from_statistics`` makes the next model from them: one step of EM over all sites.
    """

    stats: SufficientStats
    params: MixtureParams

    @property
    def n_rows(self) -> int:
        return self.stats.n_rows

    @property
    def weight(self) -> float:
        """The sum of the row weights; the number of rows where there are none."""
        return self.stats.weight

    @property
    def log_likelihood(self) -> float:
        """Mean log-likelihood a row, in nats, at the parameters that the statistics were taken at."""
        return self.stats.log_likelihood / self.stats.weight

    @property
    def fingerprint(self) -> str:
        """A hash of the parameters that the statistics were taken at: only those with the same one add."""
        digest = hashlib.sha256(self.params.covariance.kind.encode())
        for array in mixture_arrays(self.params).values():
            digest.update(f"{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        k, d = self.params.means.shape
        kind = self.params.covariance.kind
        return (
            f"statistics of {self.n_rows:,} rows, {k} components, {kind} covariances, {d} features, at parameters "
            f"{self.fingerprint[:8]}: log-likelihood/row {self.log_likelihood:.6g}"
        )

    __repr__ = __str__

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of rows. DataError where they were taken at different parameters."""
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.fingerprint != other.fingerprint:
            raise DataError(
                "These statistics were taken at the parameters of different models "
                f"({self.fingerprint[:8]} and {other.fingerprint[:8]}), so their sum means nothing. Send one model to "
                "all sites, and take the statistics with that."
            )
        return replace(self, stats=self.stats + other.stats)

    def save(self, path: str | Path) -> None:
        """Write to one file, as a model is written; ``load`` reads it. FileFormatError where that is not possible."""
        facts = {"covariance_type": self.params.covariance.kind, "stats": facts_of(self.stats)}
        files.write(
            path, Contents("statistics", facts, {**mixture_arrays(self.params), **arrays_of(self.stats, "stats")})
        )

    @classmethod
    def of(cls, contents: Contents, name: str) -> Statistics:
        """What a file holds; FileFormatError, naming the file, where those are no statistics."""
        try:
            params = stored_mixture(contents.facts, contents.arrays)
            return cls(stats_of(contents.facts["stats"], contents.arrays, "stats", params), params)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
            raise FileFormatError(
                f"{name} does not hold statistics ({error or type(error).__name__}). Take them again."
            ) from error
