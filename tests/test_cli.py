"""The command as a person or a script meets it: in a process of its own."""
import ast, json, subprocess, sys
from pathlib import Path

import pytest

import vlm_tutor
from vlm_tutor.cli import VERBS

PACKAGE = Path(vlm_tutor.__file__).parent
HEAVY = ["torch", "transformers", "peft", "datasets", "matplotlib", "numpy", "PIL", "yaml", "fastcore"]


def vlm(*words, cwd=None):
    command = [sys.executable, "-m", "vlm_tutor.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def python(code): return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def run_verb_of_our_own(folder, body, *words):
    "A process in which `vlm own` runs `body`"
    lines = ["import os, signal, sys, time", "import vlm_tutor.core as core", "from vlm_tutor.cli import VERBS, main",
             "def own():", "    'Own'", *(f"    {line}" for line in body), "core.own = own",
             "VERBS['own'] = ('core:own', 'Own')", f"sys.exit(main({['own', *words]}))"]
    (folder / "own.py").write_text("\n".join(lines))
    return subprocess.run([sys.executable, folder / "own.py"], capture_output=True, text=True)


@pytest.fixture(scope="module")
def front(): return vlm("--help")


def test_the_front_page_lists_the_verbs_in_order_one_line_each(front):
    lines = [line for line in front.stdout.splitlines() if line.startswith("  ")]
    assert front.returncode == 0 and front.stderr == ""
    assert [line.split()[0] for line in lines] == list(VERBS)
    assert all(len(line) <= 132 for line in front.stdout.splitlines())
    assert vlm().stdout == vlm("-h").stdout == front.stdout


def test_the_front_page_imports_nothing_heavy():
    out = python("import sys\nfrom vlm_tutor.cli import main\nassert main(['--help']) == 0\n"
                 f"print('loaded', sorted(set({HEAVY}) & set(sys.modules)))")
    assert out.stdout.splitlines()[-1] == "loaded []", out.stderr


def test_bad_input_to_a_light_verb_does_not_wait_for_torch():
    for words in (["config", "tinny"], ["evaluate", "runs/none"], ["compare", "runs/none"], ["predict", "runs/none"]):
        out = python(f"import sys\nfrom vlm_tutor.cli import main\ncode = main({words})\n"
                     "print(code, sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))")
        assert out.stdout.splitlines()[-1] == "2 []", (words, out.stdout, out.stderr)


@pytest.mark.parametrize("verb", VERBS)
def test_a_summary_is_the_first_line_of_the_docstring(verb):
    target, summary = VERBS[verb]
    module, name = target.split(":")
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    assert ast.get_docstring(function).splitlines()[0].rstrip(".") == summary


def test_every_verb_explains_each_of_its_options():
    out = python("from vlm_tutor.cli import *\nfrom vlm_tutor.cli import verb_parser, load_verb\n"
                 "for verb in VERBS:\n    parser = verb_parser(verb, load_verb(verb))\n    parser.format_help()\n"
                 "    hidden = ('pdb', 'xtra')\n"
                 "    print(verb, [a.dest for a in parser._actions if a.dest not in hidden and not a.help])")
    assert out.stdout.splitlines() == [f"{verb} []" for verb in VERBS], out.stderr


# --- mistakes: exit code 2, one line, nothing on standard output ------------------------------------------------------
@pytest.mark.parametrize("words, said", [
    (["tarin", "tiny"], "unknown verb 'tarin'. Did you mean 'train'?"), (["xyz"], "unknown verb 'xyz'"),
    (["config", "tinny"], "no preset or file 'tinny'. Presets: tiny, cord, cord-better. Did you mean 'tiny'?"),
    (["config", "cord", "lr=1e-4"], "unknown key 'lr' in the configuration. Did you mean 'learning_rate'?"),
    (["config", "cord", "learning_rate=fast"], "learning_rate must be a number"),
    (["config", "cord", "--agianst", "tiny"], "Did you mean '--against'?"),
    (["config", "cord", "--rows", "many"], "invalid int value: 'many'"), (["evaluate"], "required: run"),
    (["config", "cord", "--engine", "natvie"], "Did you mean 'native'?"), (["--version=3"], "unknown verb")])
def test_a_mistake_is_one_line(words, said):
    out = vlm(*words)
    assert (out.returncode, out.stdout) == (2, "")
    assert len(out.stderr.splitlines()) == 1 and out.stderr.startswith("vlm: ") and said in out.stderr


def test_debug_shows_where():
    out = vlm("config", "tinny", "--debug")
    assert out.returncode != 0 and "Traceback" in out.stderr and "VlmError" in out.stderr


def test_json_is_one_object_and_nothing_else(tmp_path):
    out = vlm("config", "tiny", "seed=7", "--json", "--rows", 300)
    assert out.returncode == 0 and json.loads(out.stdout)["config"]["seed"] == 7
    body = ["core.say('on the way')", "print('from afar')", "return core.Result({'n': 1, 'é': core.Path('x')}, 'text')"]
    out = run_verb_of_our_own(tmp_path, body, "--json")
    assert json.loads(out.stdout) == {"n": 1, "é": "x"} and out.stderr.split("\n")[:2] == ["on the way", "from afar"]
    assert run_verb_of_our_own(tmp_path, body).stdout == "on the way\nfrom afar\ntext\n"


# --- other ends -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("body, code, said", [
    (["signal.signal(signal.SIGINT, signal.default_int_handler)", # a shell lets its background jobs ignore it
      "os.kill(os.getpid(), signal.SIGINT)", "time.sleep(5)"], 130, "vlm: stopped."),
    (["1/0"], 1, "vlm: ZeroDivisionError: division by zero."), (["raise SystemExit(3)"], 3, ""),
    (["raise core.VlmError('a', ['b'], 'c')"], 2, "vlm: a. Allowed: b. c.")])
def test_other_ends_have_their_exit_code_and_no_traceback(tmp_path, body, code, said):
    out = run_verb_of_our_own(tmp_path, body)
    assert out.returncode == code and out.stderr.startswith(said) and "Traceback" not in out.stderr


def test_a_reader_that_leaves_early_is_no_error():
    command = f'"{sys.executable}" -m vlm_tutor.cli config cord --against tiny | head -1'
    out = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert "Traceback" not in out.stderr and "vlm:" not in out.stderr


def test_the_version_is_the_packages():
    assert vlm("--version").stdout.strip() == f"vlm_tutor {vlm_tutor.__version__}"


def test_the_command_runs_from_any_folder(tmp_path):
    assert vlm("config", cwd=tmp_path).returncode == 0
