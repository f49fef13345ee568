"""`python -m peft_m2pt run`: other programs can load M2PT adapters."""

import subprocess
import sys

import pytest
from helpers.models import adapt, make_llava

import peft_m2pt.tools.running
from peft_m2pt.tools.cli import main


LOADING = """
import sys
from peft import PeftConfig
print(sys.argv[1:], type(PeftConfig.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    adapt(make_llava()).save_pretrained(folder)
    return str(folder)


def run(*arguments, **kwargs):
    command = [sys.executable, "-m", "peft_m2pt", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def test_a_script_that_knows_nothing_of_the_package(tmp_path, adapter, fresh):
    script = tmp_path / "script.py"
    script.write_text(LOADING)
    alone = fresh.code(LOADING, adapter)
    assert alone.returncode != 0 and "KeyError: 'M2PT'" in alone.stderr
    result = run(str(script), adapter, "--option", "-m")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{[adapter, '--option', '-m']} M2PTConfig"


def test_a_module(tmp_path, adapter):
    (tmp_path / "tool.py").write_text(LOADING)
    result = run("tool", adapter, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("M2PTConfig\n")


def test_a_console_script(fresh):
    result = fresh.command("run", "pytest", "--version")
    assert result.returncode == 0, result.stderr
    assert "pytest" in result.stdout


def test_exit_codes(tmp_path, fresh):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(3)")
    assert fresh.command("run", script).returncode == 3
    script.write_text("raise ValueError('broken')")
    result = fresh.command("run", script)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ValueError: broken" in result.stderr


@pytest.mark.parametrize("result, code", [(None, None), (2, 2), ("it failed", "it failed")])
def test_what_console_scripts_return(monkeypatch, result, code):
    class Script:
        def load(self):
            return lambda: result

    monkeypatch.setattr(peft_m2pt.tools.running, "entry_points", lambda **kwargs: [Script()])
    with pytest.raises(SystemExit) as exit:
        main(["run", "tool"])
    assert exit.value.code == code


@pytest.mark.parametrize(
    "program, message",
    [
        ("nowhere.py", "'nowhere.py' is not a file."),
        ("no_such_tool", "'no_such_tool' is neither an installed console script, nor a module, nor a file"),
        ("no.such.tool", "'no.such.tool' is neither"),
    ],
)
def test_no_such_program(capsys, program, message):
    assert main(["run", program]) == 1
    assert message in capsys.readouterr().err
