"""Which room of the package may import which: downwards only, and without circles. The tests have the same rooms."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_m2pt


PACKAGE = Path(peft_m2pt.__file__).parent
TESTS = Path(__file__).parent

# From the ground up. Modules and rooms of one floor may import each other, as long as there is no circle.
FLOORS = (
    ("adapted", "errors", "per_thread", "register", "tested", "upstream", "version"),
    ("adapter_files", "config", "saved_config"),
    ("anatomy",),
    ("attention",),
    ("layers",),
    ("hooks", "saving", "stacking"),
    ("plan",),
    ("model",),
    ("bundles", "convert", "optimizer", "processing"),
    ("__init__",),
    ("integrations", "tools"),
    ("__main__",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line number and name, such as "layers.base", of each module of the package that a file imports."""
    package = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.level == 0 and node.module.split(".")[0] != "peft_m2pt"):
            continue
        if node.level == 0:
            base = node.module.split(".")[1:]
        else:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        base = [part for part in base if part]
        for alias in node.names:
            is_module = (PACKAGE.joinpath(*base, alias.name).with_suffix(".py")).exists()
            yield node.lineno, ".".join([*base, alias.name] if is_module else base) or "__init__"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_import_runs_upwards(path):
    own_floor = FLOOR_OF[module_name(path).split(".")[0]]
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, name in imports_of(path):
        floor = FLOOR_OF[name.split(".")[0]]
        assert floor <= own_floor, f"{path}:{number} imports upwards: {lines[number - 1].strip()}"


def test_there_is_no_circle():
    graph = {module_name(path): {name for _, name in imports_of(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"Imports run in a circle: {' <- '.join(error.args[1])}") from None


def test_every_room_says_what_lives_in_it():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring."


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_the_path_of_a_test_says_what_it_tests(room):
    for path in (TESTS / room).glob("test_*.py"):
        tested = PACKAGE / room / path.name.removeprefix("test_")
        assert tested.exists(), f"{path.relative_to(TESTS.parent)} tests nothing: there is no {tested.name} in {room}."


def test_no_test_imports_another():
    """What several tests need is in tests/helpers."""
    for path in TESTS.rglob("*.py"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not re.match(r"\s*(from|import) test_", line), f"{path}:{number} imports a test: {line.strip()}"
