"""A value per thread, since several threads may call a model at once."""

from __future__ import annotations

import threading
from typing import Any


class PerThread(threading.local):
    """
    A value per thread, `None` at first.

    `__init__` sets it in every thread before it is read: an attribute that appears while torch.compile traces a
    function would invalidate the compiled code.
    """

    def __init__(self) -> None:
        self.value: Any = None
