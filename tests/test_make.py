"""The Makefile: the environment is made once, the targets say and return what they should."""
import os, shutil, subprocess, sys

import pytest
from checkout import *
from conftest import markdown_notebook

TARGETS = ["quickstart", "test", "test-all", "docs", "readme", "bench"]


def make(*args, cwd, path=None):
    "Run make; its exit code and everything it said"
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    r = subprocess.run(["make", *args], cwd=cwd, env=env, capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


@pytest.fixture
def bare(tmp_path):
    "What make needs to know what it would do"
    for n in ("Makefile", "pyproject.toml", "constraints.txt"): shutil.copy(ROOT / n, tmp_path)
    return tmp_path


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_makes_the_environment_when_it_is_missing(bare, target):
    code, said = make("-n", target, cwd=bare)
    assert code == 0, said
    assert "-m venv .venv" in said and said.index("install -q -c constraints.txt torch") < said.index("-e '.[dev]'")


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_reuses_the_environment(bare, target):
    for n in (".venv/bin/python", ".venv/installed"):
        (bare / n).parent.mkdir(parents=True, exist_ok=True)
        (bare / n).touch()
    code, said = make("-n", target, cwd=bare)
    assert code == 0 and "venv .venv" not in said and "pip install" not in said, said
    os.utime(bare / "pyproject.toml", (2e9, 2e9))
    assert "pip install" in make("-n", target, cwd=bare)[1], "another pyproject.toml is installed again"


def test_an_old_python_is_refused_in_one_sentence(bare):
    old = bare / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    code, said = make(".venv/bin/python", f"PYTHON={old}", cwd=bare)
    assert code and "Python 3.11 or newer is needed" in said


def test_docs_without_quarto_returns_what_the_check_found(small):
    (small / "tests").mkdir()
    for n in ("Makefile", "tests/docs_check.py"): shutil.copy(ROOT / n, small / n)
    (small / ".venv").symlink_to(sys.prefix)
    without = "/usr/bin:/bin"
    assert not shutil.which("quarto", path=without), "this test needs a PATH without Quarto"
    code, said = make("-o", ".venv/installed", "docs", cwd=small, path=without)
    assert code == 0 and "0 faults" in said and "quarto.org" in said, said
    markdown_notebook(small / "nbs/fault.ipynb", "# Fault", "[gone](gone.ipynb)")
    code, said = make("-o", ".venv/installed", "docs", cwd=small, path=without)
    assert code and "broken link: gone.ipynb" in said and "quarto.org" in said, said


def test_the_same_command_for_people_and_machines():
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("make test")
    assert ".ci/run" in (ROOT / ".github/workflows/test.yaml").read_text()
    assert "make docs" in (ROOT / ".github/workflows/site.yaml").read_text()
