"""The package as others get it: a wheel, installed on its own, used outside the checkout."""
import ast, os, shutil, subprocess, sys, zipfile

import pytest
from checkout import *


def run(*command, **kw):
    "Run a command that must succeed; what it printed"
    r = subprocess.run(command, capture_output=True, text=True, **kw)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of what git tracks, built in a folder of its own: in the checkout, build/ would leak modules long deleted"
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for p in tracked():
        target = source / p.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(p, target)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*wheel, "-w", out, source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "A function that runs Python with the installed wheel, in an empty folder"
    target, cwd = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", target, wheel)
    env = {**os.environ, "PYTHONPATH": str(target)}
    call = lambda *args: run(sys.executable, *args, cwd=cwd, env=env)
    used = call("-c", "import vlm_tutor; print(vlm_tutor.__file__)")
    assert used.startswith(str(target)), "the wheel is what is used"
    return call


def test_the_wheel_holds_modules_assets_and_presets(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if n.startswith("vlm_tutor/")}
    assert inside == {name(p) for p in tracked() if p.is_relative_to(PACKAGE)}
    assert any(n.endswith(".safetensors") for n in inside) and "vlm_tutor/configs/tiny.yaml" in inside


def test_the_command_answers(installed):
    said = installed("-m", "vlm_tutor.cli", "--help")
    assert "quickstart" in said and "train" in said


def test_presets_load(installed):
    code = "from vlm_tutor.config import *; print(sorted(presets())); [load_config(n) for n in presets()]"
    assert {"cord", "cord-better", "tiny"} <= set(ast.literal_eval(installed("-c", code)))


def test_the_base_model_loads(installed):
    code = "from vlm_tutor.tiny import *; print(sum(p.numel() for p in load_model('tiny-receipts').parameters()))"
    assert int(installed("-c", code)) > 1e5


def test_the_quickstart_runs(installed):
    sizes = ("--n-train", "8", "--n-validation", "2", "--n-test", "2")
    result = json.loads(installed("-m", "vlm_tutor.cli", "quickstart", "runs/small", *sizes, "--json"))
    assert set(result["groups"]) == {"vanilla-model", "finetuned-model"}
    assert all(s["n"] == 2 for s in result["groups"].values())
