"""Servers that run in a process of their own."""

import time
import urllib.request


def wait_for(server, seconds):
    """Waits until a server answers. If it ends first, or takes too long, its log is raised."""
    for _ in range(5 * seconds):
        if server.process.poll() is not None:
            break
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health")
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(server.log.read_text())
