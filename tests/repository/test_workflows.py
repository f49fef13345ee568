"""What GitHub runs and shows: .github."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import peft_m2pt


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name):
    # YAML 1.1 takes the key `on` for true.
    return yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())


def steps(job):
    return job.get("steps", [])


def find(job, text):
    """The one step that runs or uses something."""
    (step,) = [step for step in steps(job) if text in step.get("run", "") + step.get("uses", "")]
    return step


def run(step, folder, **env):
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    command = ["bash", "-e", "-c", step["run"]]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path, **env}, capture_output=True, text=True)


def make_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def test_names():
    assert {path.stem for path in FILES} == {"ci", "daily", "release"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestSafety:
    def test_actions_are_pinned(self, path):
        for line in path.read_text().splitlines():
            if (match := re.match(r"[\s-]*uses:\s*(.*)", line)) and not match[1].startswith("./"):
                assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", match[1]), line

    def test_permissions(self, path):
        workflow = read(path.stem)
        assert workflow["permissions"] == {"contents": "read"}
        more = {
            (name, permission, level)
            for name, job in workflow["jobs"].items()
            for permission, level in job.get("permissions", {}).items()
        }
        allowed = {
            "ci": set(),
            "daily": {("report", "issues", "write")},
            "release": {("publish", "id-token", "write")},
        }
        assert more == allowed[path.stem]

    def test_jobs_that_may_more_run_nothing_of_the_repository(self, path):
        for job in read(path.stem)["jobs"].values():
            if "permissions" in job:
                assert not any("actions/checkout@" in step.get("uses", "") for step in steps(job))

    def test_credentials_are_not_kept(self, path):
        for job in read(path.stem)["jobs"].values():
            for step in steps(job):
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False

    def test_scripts_take_values_from_the_environment_alone(self, path):
        """What is put into the text of a script is run as a part of it."""
        for job in read(path.stem)["jobs"].values():
            assert not any("${{" in step.get("run", "") for step in steps(job))


class TestCI:
    def test_every_change(self):
        triggers = read("ci")[True]
        assert triggers["push"]["branches"] == ["main"] and "pull_request" in triggers

    def test_pythons(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pythons = [match[1] for name in project["classifiers"] if (match := re.search(r":: (\d+\.\d+)$", name))]
        job = read("ci")["jobs"]["test"]
        assert job["strategy"]["matrix"]["python"] == pythons
        assert find(job, "setup-python@")["with"]["python-version"] == "${{ matrix.python }}"

    def test_it_runs_what_must_pass(self):
        assert find(read("ci")["jobs"]["test"], ".ci/run")["run"] == ".ci/run PYTHON=python"

    def test_what_must_pass(self, tmp_path):
        """Arguments reach every `make`."""
        make_program(tmp_path / "make", f'printf "%s " "$@" >> "{tmp_path}/calls"; echo >> "{tmp_path}/calls"')
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run([ROOT / ".ci" / "run", "A=1", "B=2"], env=env, check=True)
        calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
        assert [call[0] for call in calls] == ["lint", "test", "quickstart"]
        assert all(call[-2:] == ["A=1", "B=2"] for call in calls)

    @pytest.mark.parametrize("target, venv", [("lint", ""), ("test", ""), ("quickstart", "-quickstart")])
    def test_the_python_that_is_chosen_is_used(self, target, venv):
        # Without what a `make` around the tests hands down.
        env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "--dry-run", target, "PYTHON=python9.9", "VENV=.venv-9.9"]
        output = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        assert output.startswith(f"python9.9 -m venv .venv-9.9{venv}\n")
        assert all(line.startswith(f".venv-9.9{venv}/bin/") for line in output.splitlines() if "/bin/" in line)


class TestDaily:
    def test_schedule(self):
        triggers = read("daily")[True]
        assert re.fullmatch(r"\d+ \d+ \* \* \*", triggers["schedule"][0]["cron"]) and "workflow_dispatch" in triggers

    def test_targets(self):
        job = read("daily")["jobs"]["test"]
        versions = job["strategy"]["matrix"]["versions"]
        assert versions == ["newest", "main"] and list(job["outputs"]) == versions
        assert find(job, "make ")["run"].startswith('make "test-$VERSIONS"')
        for name in versions:
            subprocess.run(["make", "--dry-run", f"test-{name}"], cwd=ROOT, check=True, capture_output=True)

    @pytest.mark.parametrize("has_environment", [True, False])
    def test_what_a_failure_says(self, tmp_path, has_environment):
        (tmp_path / "output.txt").write_text("collected\nFAILED tests/test_a.py::test_b - it is so\nmake: Error 1\n")
        if has_environment:
            make_program(tmp_path / ".venv-main" / "bin" / "peft-m2pt", '[ "$1" = env ] && echo "transformers 99.0.0"')
        output = tmp_path / "github-output"
        step = find(read("daily")["jobs"]["test"], "GITHUB_OUTPUT")
        assert run(step, tmp_path, VERSIONS="main", GITHUB_OUTPUT=str(output)).returncode == 0
        first, *lines, last = output.read_text().splitlines()
        assert first == f"main<<{last}"
        assert lines[0] == "FAILED tests/test_a.py::test_b - it is so"
        assert lines[-1] == ("transformers 99.0.0" if has_environment else "make: Error 1")

    def test_a_failure_before_anything_ran(self, tmp_path):
        output = tmp_path / "github-output"
        step = find(read("daily")["jobs"]["test"], "GITHUB_OUTPUT")
        assert run(step, tmp_path, VERSIONS="newest", GITHUB_OUTPUT=str(output)).returncode == 0
        assert output.read_text().splitlines()[-2] == "Nothing ran."

    @pytest.mark.parametrize("number", ["", "7"])
    def test_issues(self, tmp_path, number):
        """One is opened, or the open one gets a comment."""
        job = read("daily")["jobs"]["report"]
        step = find(job, "gh issue")
        assert step["env"]["TITLE"] == "The daily make test-${{ matrix.versions }} fails"
        make_program(
            tmp_path / "bin" / "gh",
            f'[ "$2" = list ] && echo "{number}" && exit\nprintf "%s|" "$@" > calls',
        )
        env = {"TITLE": "It fails", "RUN": "where", "REPORT": "FAILED `$(touch harm)`"}
        result = run(step, tmp_path, **env)
        assert result.returncode == 0, result.stderr
        body = "where\n\n```text\nFAILED `$(touch harm)`\n```"
        start = f"issue|comment|{number}|" if number else "issue|create|--title|It fails|"
        assert (tmp_path / "calls").read_text() == f"{start}--body|{body}|"
        assert not (tmp_path / "harm").exists()


class TestRelease:
    def test_trigger(self):
        assert read("release")[True] == {"push": {"tags": ["v*"]}}

    def test_only_what_passes_is_published(self):
        jobs = read("release")["jobs"]
        assert jobs["test"] == {"uses": "./.github/workflows/ci.yml"} and "workflow_call" in read("ci")[True]
        assert jobs["publish"]["needs"] == ["test", "build"]
        assert jobs["publish"]["environment"] == "pypi"
        assert find(jobs["publish"], "pypi-publish@").get("with") is None  # no token

    @pytest.mark.parametrize("tag, code", [(f"v{peft_m2pt.__version__}", 0), ("v99.0", 1)])
    def test_the_tag_is_the_version(self, tmp_path, tag, code):
        step = find(read("release")["jobs"]["build"], "GITHUB_REF_NAME")
        make_program(tmp_path / "bin" / "python", f'cd "{ROOT}"\nexec "{sys.executable}" "$@"')
        assert run(step, tmp_path, GITHUB_REF_NAME=tag).returncode == code


class TestIssueTemplates:
    FOLDER = ROOT / ".github" / "ISSUE_TEMPLATE"

    @pytest.mark.parametrize("name", ["bug_report", "feature_request"])
    def test_forms(self, name):
        form = yaml.safe_load((self.FOLDER / f"{name}.yml").read_text())
        assert form["name"] and form["description"]
        assert {part["type"] for part in form["body"]} <= {"markdown", "textarea"}
        assert any(part.get("validations", {}).get("required") for part in form["body"])

    def test_links_lead_to_files(self):
        text = (self.FOLDER / "bug_report.yml").read_text()
        links = re.findall(r"\(\.\./blob/main/(\S+)\)", text)
        assert links and all((ROOT / link).is_file() for link in links)

    def test_a_bug_report_asks_for_the_environment(self):
        form = yaml.safe_load((self.FOLDER / "bug_report.yml").read_text())
        (part,) = [part for part in form["body"] if part.get("id") == "environment"]
        assert "peft-m2pt env" in part["attributes"]["label"] and part["validations"]["required"]
