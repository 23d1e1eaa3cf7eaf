"""Ctrl-C while zarr works is heard when it is done; a second one at once; and nowhere is anything else changed."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import zarr
from conftest import write_zarr
from zarr.storage import LocalStore

from streamgmm import GaussianMixture
from streamgmm.errors import SourceError
from streamgmm.prediction import write_rows
from streamgmm.sources import open_zarr, require_reachable, uninterrupted

pytestmark = pytest.mark.usefixtures("heeding_ctrl_c")

ROWS = np.random.default_rng(0).normal(size=(40, 2))


class PressingStore(LocalStore):
    """Ctrl-C is pressed ``times`` times, one after the other, whenever a chunk is read or written.

    done: the keys of chunks that were, to their end, by any copy of the store.
    """

    times, done = 0, []

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        return await self._pressed(key, super().get(key, *arguments, **options))

    async def set(self, key: str, value: Any) -> None:
        await self._pressed(key, super().set(key, value))

    async def _pressed(self, key: str, work: Awaitable[Any]) -> Any:
        done = PressingStore.done
        for _ in range(self.times if key.startswith("c/") else 0):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.sleep(0.5)  # enough for who hears it at once
        found = await work
        done += [key] if key.startswith("c/") else []
        return found


def handler() -> Any:
    return signal.getsignal(signal.SIGINT)


def pressed() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("times", "done"), [(1, ["c/0/0"]), (2, [])])
@pytest.mark.parametrize(
    "work",
    [
        pytest.param(lambda array: GaussianMixture(1).fit(array), id="read"),
        pytest.param(lambda array: write_rows(da.from_array(ROWS, chunks=-1), array), id="written"),
    ],
)
def test_ctrl_c_waits_for_a_chunk_and_pressed_twice_it_does_not(
    work: Callable[[zarr.Array[Any]], Any], times: int, done: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = zarr.open_array(PressingStore(write_zarr(tmp_path, ROWS, len(ROWS))), mode="r+")
    monkeypatch.setattr(PressingStore, "times", times)
    monkeypatch.setattr(PressingStore, "done", [])
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        work(array)
    assert PressingStore.done == done
    assert handler() is signal.default_int_handler


def test_it_is_heard_after_an_error_too(tmp_path: Path) -> None:
    def failing() -> None:
        with uninterrupted():
            pressed()
            open_zarr(tmp_path / "nothing.zarr", None, None)

    with pytest.raises(KeyboardInterrupt, match=r"^$") as caught:
        failing()
    assert isinstance(caught.value.__context__, SourceError)
    assert handler() is signal.default_int_handler


def test_what_is_within_waits_for_the_whole() -> None:
    done = []

    def nested() -> None:
        with uninterrupted():
            with uninterrupted():
                pressed()
            done.append("within")
        done.append("after")

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        nested()
    assert done == ["within"]


@pytest.mark.parametrize("other", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_no_one_handles_it_nothing_changes(other: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, other)
    with uninterrupted():
        assert handler() is other
    assert handler() is other


@pytest.mark.parametrize("heard_within", [[0], [0, 2], [0, 2, 3]])
def test_a_handler_that_does_not_raise_hears_every_press(heard_within: list[int]) -> None:
    heard: list[int] = []

    def own(number: int, frame: Any) -> None:
        heard.append(number)

    signal.signal(signal.SIGINT, own)
    with uninterrupted():
        for n_heard in heard_within:
            pressed()
            assert len(heard) == n_heard
    assert len(heard) == len(heard_within)
    assert handler() is own


def test_a_handler_that_is_set_on_the_way_stays() -> None:
    """Such as that of a first Ctrl-C, which lets a second one kill."""
    signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_IGN))
    with uninterrupted():
        pressed()
        pressed()
        assert handler() is signal.SIG_IGN
    assert handler() is signal.SIG_IGN


def test_other_threads_leave_the_handler_alone(tmp_path: Path) -> None:
    seen = []

    def read() -> None:
        with uninterrupted():
            seen.append(handler())
        require_reachable(zarr.open_array(write_zarr(tmp_path, ROWS, 10), mode="r"), "it")

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
