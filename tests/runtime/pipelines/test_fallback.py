from __future__ import annotations

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from attnseg import Volume
from attnseg.runtime.errors import DeviceLostError
from attnseg.runtime.pipelines.cuda import LostBeforeError
from attnseg.runtime.pipelines.fallback import FallbackPipeline


def test_a_volume_that_is_processed_on_the_host_is_segmented_again() -> None:
    """Its network alone ran on the GPU, so nothing of it is lost."""

    class OnHost:
        def submit(self, *given: Any) -> Any:
            raise DeviceLostError("gone")

    class Second:
        def submit(self, staged: Any, *given: Any) -> str:
            return f"segmented {staged}"

    first: Any = OnHost()
    second: Any = Second()
    staged: Any = "volume"
    assert FallbackPipeline(first, lambda: second).submit(staged) == "segmented volume"  # type: ignore[comparison-overlap]


def test_two_threads_that_find_the_loss_open_one_second_pipeline() -> None:
    """`stage` and `submit` run in different threads of `segment_folder`."""
    opened: list[str] = []
    both = threading.Barrier(2)

    class Lost:
        def stage(self, volume: Volume) -> Any:
            both.wait(5)
            raise LostBeforeError("gone")

    class Second:
        def stage(self, volume: Volume) -> str:
            return "staged"

    def open_second() -> Any:
        opened.append("cpu")
        time.sleep(0.05)
        return Second()

    lost: Any = Lost()
    gone = weakref.ref(lost)
    pipeline = FallbackPipeline(lost, open_second)
    del lost
    with ThreadPoolExecutor(2) as pool:
        volume: Any = None
        assert list(pool.map(pipeline.stage, [volume, volume])) == ["staged"] * 2
    assert opened == ["cpu"]
    assert gone() is None, "its memory is released"
