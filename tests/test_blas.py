"""One BLAS thread while blocks run, and nothing left changed: neither BLAS nor dask's configuration."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import distributed  # noqa: F401  (importing it adds its own defaults to dask's configuration)
import numpy as np
import pytest
import threadpoolctl
from threadpoolctl import threadpool_info, threadpool_limits

from streamgmm import GaussianMixture
from streamgmm.errors import DataError, ParameterError
from streamgmm.executors import single_blas_thread
from streamgmm.history import Log

N = 600_000  # several blocks of two features


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.fixture(params=["free", "held by the caller"])
def three_blas_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Three: neither one nor this machine's own number, so that giving back the wrong one shows.

    From threadpoolctl 3.8 on, a thread that has set a limit keeps others from setting one; here with and without.
    """
    with threadpool_limits(3, user_api="blas"):
        clear = getattr(threadpoolctl.OpenBLASController, "clear_controlling_thread", None)
        if request.param == "free" and clear:
            clear(force=True)
        assert blas_threads() == {3}
        yield


@pytest.mark.usefixtures("three_blas_threads")
class TestGuard:
    def test_one_thread_inside_and_the_old_number_after(self):
        with single_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {3}

    def test_nested(self):
        with single_blas_thread():
            with single_blas_thread(), single_blas_thread():
                assert blas_threads() == {1}
            assert blas_threads() == {1}
        assert blas_threads() == {3}

    def test_given_back_after_an_exception(self):
        with pytest.raises(KeyError, match="out"), single_blas_thread():
            raise KeyError("out")
        assert blas_threads() == {3}

    def test_the_first_to_enter_may_leave_first(self):
        first, second = single_blas_thread(), single_blas_thread()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == {3}

    def test_entered_in_another_thread(self):
        def visit() -> set[int]:
            with single_blas_thread():
                return blas_threads()

        assert in_another_thread(visit) == {1}
        assert blas_threads() == {3}
        with single_blas_thread():
            assert blas_threads() == {1}
        assert in_another_thread(visit) == {1}
        assert blas_threads() == {3}

    def test_entered_in_one_thread_and_left_last_in_another(self):
        """The first thread is still alive when the second one gives back what was."""
        entered, may_leave = threading.Event(), threading.Event()

        def first_to_come() -> None:
            with single_blas_thread():
                entered.set()
                may_leave.wait(60)

        with ThreadPoolExecutor(1) as pool:
            visit = pool.submit(first_to_come)
            assert entered.wait(60)
            with single_blas_thread():
                may_leave.set()
                visit.result()
                assert blas_threads() == {1}
            assert blas_threads() == {3}

    def test_from_several_threads(self):
        """The first in takes, the last out gives back, in whatever order they come and go."""
        wrong: list[set[int]] = []

        def visit() -> None:
            for _ in range(25):
                with single_blas_thread():
                    if (found := blas_threads()) != {1}:
                        wrong.append(found)

        threads = [threading.Thread(target=visit) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert blas_threads() == {3}


def call_quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 2))


@pytest.mark.usefixtures("three_blas_threads")
@pytest.mark.parametrize("call", [lambda f: f(), in_another_thread], ids=["caller's thread", "another thread"])
def test_a_fit_leaves_dask_and_blas_as_they_were(rows, call, monkeypatch):
    inside = []  # the number of BLAS threads at every pass
    monkeypatch.setattr(Log, "report", lambda log, record: inside.append(blas_threads()))
    with dask.config.set(num_workers=2):
        config = copy.deepcopy(dask.config.config)
        model = GaussianMixture(2, solver="em", max_iter=2)
        call_quietly(lambda: call(lambda: model.fit(rows)))
        model.predict(rows)
        model.score(rows)
        assert dask.config.config == config
    assert inside == [{1}, {1}]
    assert blas_threads() == {3}


@pytest.mark.usefixtures("three_blas_threads")
def test_an_exception_leaves_dask_and_blas_as_they_were(rows):
    spoiled = rows.copy()
    spoiled[-1, 1] = np.nan
    config = copy.deepcopy(dask.config.config)
    with pytest.raises(DataError, match=f"Input contains NaN in row {N - 1}, column 1"):
        GaussianMixture(2, max_iter=2).fit(spoiled)
    with pytest.raises(ParameterError, match="weights_init must have the shape"):
        GaussianMixture(2, weights_init=[1.0]).fit(rows[:100])
    with pytest.raises(DataError, match="Input contains NaN"):
        call_quietly(lambda: GaussianMixture(2, max_iter=2).fit(rows[:1000])).predict(spoiled)
    assert dask.config.config == config
    assert blas_threads() == {3}
