"""
Fresh processes without this package: forked from one that has imported PEFT, which takes longer than most of what such
a process is started for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[2]

# The child leaves the loop and goes on as a script does, with its traceback and exit code.
SERVER = """
import json, os, runpy, sys
import peft

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

job = json.loads(line)
for number, path in enumerate([os.devnull, job["stdout"], job["stderr"]]):
    os.dup2(os.open(path, os.O_RDWR), number)
os.chdir(job["folder"])
os.environ.update(job["environment"])
sys.path[:0] = job["paths"]
sys.argv = job["arguments"]
if job["code"] is None:
    runpy.run_module("peft_m2pt", run_name="__main__", alter_sys=True)
else:
    exec(compile(job["code"], "<code>", "exec"), {"__name__": "__main__"})
"""


class FreshProcesses:
    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )

    def __enter__(self) -> FreshProcesses:
        return self

    def __exit__(self, *exception) -> None:
        self.server.communicate()

    def code(self, code: str, *arguments, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        """What `python -c` does."""
        return self._run(code, ["-c", *arguments], folder, environment)

    def command(self, *arguments, folder: Path = ROOT) -> subprocess.CompletedProcess:
        """What `python -m peft_m2pt` does."""
        return self._run(None, ["peft_m2pt", *arguments], folder, {})

    def _run(self, code, arguments, folder, environment) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as outputs:
            stdout, stderr = Path(outputs, "stdout"), Path(outputs, "stderr")
            stdout.touch()
            stderr.touch()
            job = {
                "code": code,
                "arguments": [os.fspath(argument) for argument in arguments],
                "folder": os.fspath(folder),
                "paths": [os.fspath(ROOT), os.fspath(ROOT / "tests")],
                "environment": environment,
                "stdout": os.fspath(stdout),
                "stderr": os.fspath(stderr),
            }
            print(json.dumps(job), file=self.server.stdin, flush=True)
            exit_code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(arguments, exit_code, stdout.read_text(), stderr.read_text())
