"""Values that each thread has for itself, since several threads may call one model at once."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """
    A value of each thread, `None` at first.

    It is there before anybody reads it, in every thread: for torch.compile, an attribute that comes into being while a
    function is compiled is a change that makes the compiled code invalid.
    """

    def __init__(self) -> None:
        self.value: Any = None
