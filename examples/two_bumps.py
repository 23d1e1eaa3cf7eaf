"""The classic small mixture: two bumps on a line, recovered to within their standard errors.

Shows that the estimates are right, and how right they can be: rows are drawn from a mixture whose five parameters are
known, the mixture is fitted, and each estimate is printed beside the truth with its standard error, which comes from
the observed information (the negative Hessian of the log-likelihood at the estimate).

    python examples/two_bumps.py

Needs nothing beyond streamgmm. Takes a few seconds.
"""

import numpy as np

from streamgmm import GaussianMixture

NAMES = ("weight 1", "mean 1", "mean 2", "deviation 1", "deviation 2")
TRUTH = np.array([0.3, -2.0, 0.5, 0.5, 1.0])  # the second weight is what is left of one

#: Change of the mean log-likelihood (nats a row) that stops EM. It leaves a hundredth of a standard error at a million
#: rows; `remaining_error` measures it.
TOL = 1e-10

#: Rows whose derivatives are in memory at one time.
BATCH = 65_536


def draw(n, seed):
    """Rows (n, 1) of the mixture: a component for each, then a normal deviate."""
    rng = np.random.default_rng(seed)
    weight, *means_and_deviations = TRUTH
    means, deviations = np.reshape(means_and_deviations, (2, 2))
    component = (rng.random(n) >= weight).astype(int)
    return (means[component] + deviations[component] * rng.standard_normal(n))[:, None]


def fit(x, seed):
    """The fitted model, from a start that the library finds itself."""
    return GaussianMixture(2, tol=TOL, max_iter=2_000, random_state=seed).fit(x)


def estimates(model):
    """(weight 1, mean 1, mean 2, deviation 1, deviation 2), component 1 being the one on the left."""
    order = np.argsort(model.means_[:, 0])
    deviations = np.sqrt(model.covariances_[order, 0, 0])
    return np.concatenate([model.weights_[order[:1]], model.means_[order, 0], deviations])


def derivatives(theta, x):
    """Gradient (5,) and Hessian (5, 5) of the log-likelihood of rows x (n, 1) at theta.

    Written with the complete data's derivatives, as Louis (1982, J. R. Stat. Soc. B 44, 226-233, eq. 3.2): where s_j
    and h_j are the gradient and Hessian of log(w_j N(x | mu_j, sigma_j)) and r_j the responsibilities, a row has the
    gradient s = sum r_j s_j and the Hessian sum r_j (h_j + s_j s_j^T) - s s^T. Exact, no approximation.
    """
    gradient, hessian = np.zeros(5), np.zeros((5, 5))
    for start in range(0, len(x), BATCH):
        rows = x[start : start + BATCH, 0]
        scores, curvatures, resp = _complete(theta, rows)
        row_gradients = np.einsum("jn,jpn->pn", resp, scores)
        gradient += row_gradients.sum(axis=1)
        hessian -= row_gradients @ row_gradients.T
        for j in range(2):
            hessian += curvatures[j] + (scores[j] * resp[j]) @ scores[j].T
    return gradient, hessian


def _complete(theta, rows):
    """Scores (2, 5, n), Hessians (2, 5, 5) summed with the responsibilities, and these (2, n)."""
    weights = np.array([theta[0], 1.0 - theta[0]])
    means, deviations = theta[1:3], theta[3:5]
    u = (rows - means[:, None]) / deviations[:, None]
    joint = (weights / deviations)[:, None] * np.exp(-0.5 * u**2)
    resp = joint / joint.sum(axis=0)
    scores, curvatures = np.zeros((2, 5, len(rows))), np.zeros((2, 5, 5))
    for j, sign in enumerate((1.0, -1.0)):
        mean, deviation, variance = 1 + j, 3 + j, deviations[j] ** 2
        scores[j, 0] = sign / weights[j]
        scores[j, mean] = u[j] / deviations[j]
        scores[j, deviation] = (u[j] ** 2 - 1.0) / deviations[j]
        curvatures[j, 0, 0] = -resp[j].sum() / weights[j] ** 2
        curvatures[j, mean, mean] = -resp[j].sum() / variance
        curvatures[j, mean, deviation] = curvatures[j, deviation, mean] = -2.0 * (resp[j] @ u[j]) / variance
        curvatures[j, deviation, deviation] = (resp[j] @ (1.0 - 3.0 * u[j] ** 2)) / variance
    return scores, curvatures, resp


def standard_errors(hessian):
    """(5,) square roots of the diagonal of the inverse observed information."""
    return np.sqrt(np.diagonal(np.linalg.inv(-hessian)))


def remaining_error(gradient, hessian):
    """(5,) how many standard errors EM stopped short of the maximum: one Newton step from where it is."""
    return np.abs(np.linalg.solve(-hessian, gradient)) / standard_errors(hessian)


def main():
    for n in (1_000, 1_000_000):
        x = draw(n, seed=0)
        model = fit(x, seed=0)
        theta = estimates(model)
        gradient, hessian = derivatives(theta, x)
        errors = standard_errors(hessian)
        print(f"{n:,} rows, {model.n_iter_} passes, log-likelihood {model.lower_bound_:.6f} nats a row")
        print(f"{'':12}{'true':>9}{'estimate':>12}{'std. error':>12}{'off by':>17}")
        for name, true, found, error in zip(NAMES, TRUTH, theta, errors, strict=True):
            off = (found - true) / error
            print(f"{name:12}{true:9.2f}{found:12.5f}{error:12.5f}{off:+8.2f} std. err.")
        left = remaining_error(gradient, hessian).max()
        print(f"EM stopped within {left:.1g} standard errors of the maximum of the likelihood.\n")


if __name__ == "__main__":
    main()
