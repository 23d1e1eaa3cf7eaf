"""Hyper-parameters of a fit, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamgmm.checks import check_hyper_parameters, forgetting_rate
from streamgmm.covariance import STRUCTURES, AbstractCovariance

DEFAULT_TOL = 1e-3
#: By default the gap to the optimum may be this part of P / 2n, the statistical error of the exact estimate.
DEFAULT_GAP = 0.1


@dataclass(frozen=True, eq=False)
class Settings:
    """Hyper-parameters of a fit, checked."""

    n_components: int
    structure: type[AbstractCovariance]
    tol: float | None
    reg_covar: float
    max_iter: int
    n_init: int
    init_params: str
    weights_init: Any
    means_init: Any
    precisions_init: Any
    solver: str
    step_exponent: float
    forgetting: float
    prior_rows: float | None
    average: bool
    sample_rows: int | None
    compute_dtype: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """From the estimator's parameters; ParameterError at the first that has no meaning."""
        check_hyper_parameters(values)
        return cls(
            structure=STRUCTURES[values["covariance_type"]],
            tol=None if values["tol"] is None else float(values["tol"]),
            reg_covar=float(values["reg_covar"]),
            n_components=int(values["n_components"]),
            max_iter=int(values["max_iter"]),
            n_init=int(values["n_init"]),
            step_exponent=float(values["step_exponent"]),
            forgetting=forgetting_rate(values["forgetting"]),
            average=bool(values["average"]),
            prior_rows=None if values["prior_rows"] is None else float(values["prior_rows"]),
            sample_rows=None if values["sample_rows"] is None else int(values["sample_rows"]),
            **{
                name: values[name]
                for name in ("init_params", "weights_init", "means_init", "precisions_init", "solver", "compute_dtype")
            },
        )

    @property
    def given(self) -> tuple[Any, Any, Any]:
        """The starting values that the user gave, None each where not."""
        return self.weights_init, self.means_init, self.precisions_init

    @property
    def seeks_start(self) -> bool:
        """Whether any of the starting values is still to be found."""
        return any(given is None for given in self.given)

    @property
    def single(self) -> bool:
        """Whether passes over the data are made in single precision."""
        return self.compute_dtype == "float32"

    @property
    def change(self) -> float:
        """``tol`` where it bounds the change of the mean log-likelihood in a pass."""
        return DEFAULT_TOL if self.tol is None else self.tol

    def gap(self, n_rows: int, n_parameters: int) -> float:
        """``tol`` where it bounds the predicted gap to the optimum."""
        return DEFAULT_GAP * n_parameters / (2.0 * n_rows) if self.tol is None else self.tol

    def n_parameters(self, d: int) -> int:
        """Free parameters of a mixture in d features."""
        k = self.n_components
        return self.structure.n_parameters(k, d) + k * d + k - 1
