"""What a fit did, one record a pass, and what it says of it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from math import isfinite, nan

logger = logging.getLogger("streamgmm")


@dataclass(frozen=True)
class PassRecord:
    """One pass over the rows by one model.

    iteration: which pass; 0 for the sample, which the pilot read brought.  restart: the start that the model comes
    from.  log_likelihood: the mean per row (nats) at the parameters that entered the pass; of the sample's own rows in
    pass 0.  change: of it, since the last pass that was not rejected.  measure: what is said of it in words, where it
    is a bound of the mean log-likelihood instead.  predicted_gap: nats a row by which the likelihood is expected to
    rise yet, NaN where nobody knows.  inner_steps: EM steps on the sample before the next pass.  rejected: whether the
    parameters were worse than those of an earlier pass, which the fit goes on from.  rows, bytes, seconds: of the
    read, and since the pass before.
    """

    iteration: int
    restart: int
    log_likelihood: float
    change: float
    converged: bool
    measure: str = "log-likelihood"
    predicted_gap: float = nan
    inner_steps: int = 0
    rejected: bool = False
    rows: int = 0
    bytes: int = 0
    seconds: float = nan

    def __str__(self) -> str:
        change = f"{self.change: .2e}" if isfinite(self.change) else "-"
        line = (
            f"pass {self.iteration:3d}  start {self.restart}  {self.measure}/row {self.log_likelihood: .6f}  "
            f"change {change}"
        )
        if isfinite(self.predicted_gap):
            line += f"  predicted gap {self.predicted_gap:.2e}"
        if self.inner_steps:
            line += f"  {self.inner_steps} steps on the sample"
        return line + "  rejected" * self.rejected + "  converged" * self.converged


@dataclass
class Log:
    """What a fit says: every line to the log "streamgmm", and some of them printed; and its passes, in ``records``.

    verbose: 0 prints nothing, 1 the plan and a line every ``interval`` passes, 2 the seconds that a pass took as well.
    rows, bytes: of a pass.
    """

    verbose: int = 0
    interval: int = 1
    max_iter: int = 0
    rows: int = 0
    bytes: int = 0
    records: list[PassRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last = time.monotonic()

    def say(self, line: str, *, printed: bool = True) -> None:
        logger.info(line)
        if self.verbose and printed:
            print(line)

    def report(self, record: PassRecord) -> None:
        """A line for a pass; one whose best start converges, and the last one, are printed always."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self.records.append(replace(record, rows=self.rows, bytes=self.bytes, seconds=seconds))
        logger.info("%s  %.2f s", record, seconds)
        if self.verbose and (
            record.converged or record.iteration in (0, self.max_iter) or record.iteration % self.interval == 0
        ):
            print(record if self.verbose == 1 else f"{record}  {seconds:.2f} s")
