"""The rules of the house, so that no reviewer has to check them: direction of imports, lightness, size, docstrings."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

ORDER = ["curation", "training", "evaluation", "jobs", "benchmarks"]  # each may import those before it
MODULES = sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HEAVY = ["torch", "ray", "deepspeed", "open_clip", "transformers", "faiss"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            assert node.module is not None
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    rank = ORDER.index(path.relative_to(ROOT).parts[0])
    assert not imported(path) & {*ORDER[rank + 1 :], "tests"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring at the top"


def test_files_are_short() -> None:
    assert [name_of(p) for p in MODULES + TESTS if p.read_text().count("\n") > 400] == []


def test_the_rules_see_the_whole_house() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests"}
    assert packages == set(ORDER)
    assert len(MODULES) > 60
    assert {"curation", "jobs"} <= imported(ROOT / "jobs" / "demo.py"), "the finder finds imports"


@pytest.mark.parametrize("module", ["curation.config", "curation.pipeline", "jobs.cli", "jobs.launch"])
def test_light_modules_stay_light(module: str) -> None:
    """Help, refusals and finished work must not wait for torch or Ray to load."""
    code = f"import sys, json, {module}; print(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "curation" in loaded
    assert not loaded & set(HEAVY)
