"""What a fit did, one record a pass."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite


@dataclass(frozen=True)
class PassRecord:
    """One read of the data by one model: log_likelihood is the mean per row at the parameters that entered the pass.

    measure: what is said of it in words, where it is a bound of the mean log-likelihood instead.
    """

    iteration: int
    restart: int
    log_likelihood: float
    change: float
    converged: bool
    measure: str = "log-likelihood"

    def __str__(self) -> str:
        state = "  converged" if self.converged else ""
        change = f"{self.change: .2e}" if isfinite(self.change) else "-"
        return (
            f"pass {self.iteration:3d}  start {self.restart}  {self.measure}/row {self.log_likelihood: .6f}  "
            f"change {change}{state}"
        )
