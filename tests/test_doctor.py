"""The doctor: what it reads off a machine, environments made once, imports that pass where a package is half there."""
import json, os, re, subprocess, sys
from pathlib import Path

import pytest

from vlm_tutor import doctor as d
from vlm_tutor.core import VlmError, asset, find_llamafactory, package_version

TORCHVISION = "import torch\nfrom . import ops\nready = True\n"
OPS = "import torch\nfor name in ('nms', 'roi_align'): torch.library.register_fake(f'torchvision::{name}')(print)\n"


def vlm(*words, cwd=None, **env):
    command = [sys.executable, "-m", "vlm_tutor.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | env)


def a_factory(folder, script="#!/bin/sh\n"):
    "A folder with an executable `llamafactory-cli`"
    folder.mkdir(parents=True)
    (folder/"llamafactory-cli").write_text(script)
    (folder/"llamafactory-cli").chmod(0o755)
    return str(folder/"llamafactory-cli")


# --- environments -----------------------------------------------------------------------------------------------------
def test_an_environment_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(d.ENVIRONMENTS, "trl", [["--no-index", "no-such-package-here==0.0"]])
    with pytest.raises(VlmError, match="cannot make the environment of 'trl'.*the same command again"):
        d.make_venv("trl", tmp_path)
    assert not (tmp_path/"trl/installed.json").exists()


def test_a_made_environment_is_kept_until_its_list_changes(tmp_path, monkeypatch):
    monkeypatch.setitem(d.ENVIRONMENTS, "trl", [])
    made = d.make_venv("trl", tmp_path)
    (tmp_path/"trl/mark").touch()
    assert d.make_venv("trl", tmp_path) == made and (tmp_path/"trl/mark").exists()
    monkeypatch.setitem(d.ENVIRONMENTS, "trl", [["--version"]])
    with pytest.raises(VlmError): d.make_venv("trl", tmp_path)
    assert not (tmp_path/"trl/mark").exists()


def test_environments_are_pinned_where_it_matters():
    donut = d.ENVIRONMENTS["donut"]  # scores only, and holds no torch
    assert all("==" in word for step in donut for word in step if word[0] != "-")
    for steps in (steps for name, steps in d.ENVIRONMENTS.items() if name != "donut"):
        words = [word for step in steps for word in step]
        assert steps[0] == ["torch==2.13.0"], "torch first, so that nothing later chooses a build of it"
        for name in ("transformers", "peft", "accelerate", "datasets", "trl"):
            assert any(re.fullmatch(rf"{name}==[\d.]+", word) for word in words)


def test_environments_lie_in_one_folder_for_the_machine(tmp_path, monkeypatch):
    from vlm_tutor.core import venvs_folder
    for name in ("VLM_VENVS", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    assert venvs_folder() == Path.home()/".cache/vlm_tutor/venvs"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert venvs_folder() == tmp_path/"vlm_tutor/venvs"
    monkeypatch.setenv("VLM_VENVS", "here")
    assert venvs_folder() == Path("here")


# --- imports that pass ------------------------------------------------------------------------------------------------
def test_a_torchvision_without_its_operators_imports_and_a_missing_torchaudio_too(tmp_path):
    "The scaffold in an environment of its own, whose torchvision fails as the real one does on a CPU"
    packages = tmp_path/"lib/python3.11/site-packages"
    (packages/"torchvision").mkdir(parents=True)
    (packages/"torchvision/__init__.py").write_text(TORCHVISION)
    (packages/"torchvision/ops.py").write_text(OPS)
    code = "import torchvision, torchaudio, torch; print(torchvision.ready, torch.ops.torchvision.nms)"
    env = os.environ | dict(PYTHONPATH=str(packages))
    plain = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "operator torchvision::nms does not exist" in plain.stderr
    d.put_scaffold(tmp_path)
    passed = subprocess.run([sys.executable, "-c", "import vlm_scaffold\n" + code], env=env, capture_output=True,
                            text=True)
    assert passed.stdout.startswith("True torchvision.nms"), passed.stderr


def test_another_fault_of_torchvision_is_not_hidden(tmp_path):
    (tmp_path/"torchvision.py").write_text("raise RuntimeError('something else')")
    code = f"import sys; sys.path[:0] = [{str(asset('peers'))!r}, {str(tmp_path)!r}]; import scaffold, torchvision"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode and "something else" in ran.stderr


# --- the second engine ------------------------------------------------------------------------------------------------
def test_llama_factory_is_found_in_three_places_in_this_order(tmp_path, monkeypatch):
    monkeypatch.delenv("VLM_LLAMAFACTORY", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("VLM_VENVS", str(tmp_path/"venvs"))
    assert find_llamafactory() is None
    installed = a_factory(tmp_path/"venvs/llama_factory/bin")
    assert find_llamafactory() == installed
    on_path = a_factory(tmp_path/"tools")
    monkeypatch.setenv("PATH", str(tmp_path/"tools"), prepend=os.pathsep)
    assert find_llamafactory() == on_path
    named = a_factory(tmp_path/"named/bin")
    for value in (tmp_path/"named", named):
        monkeypatch.setenv("VLM_LLAMAFACTORY", str(value))
        assert find_llamafactory() == named
    monkeypatch.setenv("VLM_LLAMAFACTORY", str(tmp_path/"gone"))
    assert find_llamafactory() is None


def test_versions_are_asked_of_the_python_beside_the_command(tmp_path):
    command = a_factory(tmp_path/"bin")
    assert d.factory_facts(command) == dict(command=command, python=None, versions={})
    (tmp_path/"bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path/"bin/python").chmod(0o755)
    os.symlink(command, tmp_path/"link")
    found = d.factory_facts(str(tmp_path/"link"))
    assert found["versions"]["torch"] == package_version("torch") and found["versions"]["llamafactory"] is None


def test_the_verb_says_what_is_here_and_what_to_install(tmp_path):
    told = vlm("doctor", cwd=tmp_path, VLM_LLAMAFACTORY=str(tmp_path))
    assert told.returncode == 0 and d.INSTALL in told.stdout
    report = json.loads(vlm("doctor", "--json", cwd=tmp_path, VLM_LLAMAFACTORY=str(tmp_path)).stdout)
    assert report["llamafactory"] is None and report["kernels"]["attention"] and report["machine"]["cores"]
    assert report["problems"] == []


@pytest.mark.parametrize("words, said", [
    (["--install", "llamafac"], "Allowed: llamafactory. Did you mean 'llamafactory'?"),
    (["--instal", "llamafactory"], "Did you mean '--install'?"), (["llamafactory"], "unrecognized arguments")])
def test_a_mistake_is_one_sentence(tmp_path, words, said):
    ran = vlm("doctor", *words, cwd=tmp_path, VLM_VENVS=str(tmp_path))
    assert ran.returncode == 2 and said in ran.stderr and not any(tmp_path.iterdir())


def test_what_to_mend_is_a_command(monkeypatch):
    monkeypatch.setattr(d, "PACKAGES", ("torch", "no-such-package"))
    report = d.doctor()
    assert report["problems"][0] == "pip install 'no-such-package'"
    assert "mend  pip install 'no-such-package'" in str(report) and "not ready" in str(report)


@pytest.mark.parametrize("gpus, says", [([], "32 bits"), ([dict(bf16=True)], "in bf16"), ([dict(bf16=False)], "fp16")])
def test_numbers_follow_the_hardware(gpus, says): assert says in d.kernels(dict(gpus=gpus))["numbers"]


def test_a_factory_whose_torch_sees_no_gpu_is_mended():
    made = dict.fromkeys(d.FACTORY_EXTRAS) | dict(llamafactory="0.9.5", torch="2.13.0+cpu", transformers="5.6.0")
    facts = dict(command="x", python="x/python", versions=made)
    assert d._factory_line(facts, [])[1] == [] and "x/python -m pip" in d._factory_line(facts, [dict(bf16=True)])[1][0]
