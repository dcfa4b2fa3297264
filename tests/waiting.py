"""What tests wait for, and how long at most."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(done: Callable[[], Any], most_s: float = 90) -> Any:
    deadline = time.monotonic() + most_s
    while not (result := done()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result
