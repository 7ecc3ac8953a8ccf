"""The structure of the house: which module may import what, and that two tellings of one fact agree."""
import ast, configparser, re, subprocess, sys, tomllib
from importlib.util import find_spec

import pytest
from checkout import *

# The torch wall: a chapter is on one side of it. Light modules never import HEAVY, not even through another module.
LIGHT = """core doctor report methods models config memory schema receipts tables pages examples sources sharegpt check
    splits augment metrics certainty fields endpoint predict factory sweep crossval compare robust curves claims errors
    extract correct forgetting serve bench quickstart cli all""".split()
FREE = "tiny pretrain collate features lora lean qat soft moe engine train export".split()
HEAVY = ["torch", "transformers", "peft", "datasets", "matplotlib"]

# Published numbers: links and habits hang on them. A new chapter gets a new number or a letter.
NUMBERS = dict(core="00", methods="01", models="02", config="03", memory="04", receipts="05", sources="06",
               sharegpt="07", check="08", splits="09", augment="10", metrics="11", tiny="12", collate="13",
               lora="14", soft="15", moe="16", predict="17", train="18", factory="19", sweep="20", compare="21",
               errors="22", export="23", serve="24", bench="25", quickstart="26", cli="27")
GENERATED = {"__init__", "_modidx"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def requirement_names(lines):
    "The names in requirement lines, as pip compares them"
    return {re.split(r"[^\w.-]", l.strip())[0].lower().replace("_", "-") for l in lines}


def own_imports(tree):
    "Modules of this package that `tree` imports, in functions too, or names in a string"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level or node.module == "vlm_tutor":
                yield from ([node.module.split(".")[0]] if node.level and node.module else [a.name for a in node.names])
            elif node.module.startswith("vlm_tutor."): yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("vlm_tutor."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if m := re.fullmatch(r"vlm_tutor\.(\w+)(:\w+)?", node.value): yield m[1]


def outside_imports(tree):
    "First names of everything else that `tree` imports"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module.split(".")[0]


# --- the two laws -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_lower_numbers(module):
    numbers = modules()
    for other in set(own_imports(module_tree(module))) - {"__version__"}:
        assert other in numbers, f"{module} imports vlm_tutor.{other}, which has no chapter"
        assert numbers[other] < numbers[module], f"{module} imports {other}, which comes later"


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_a_notebook_imports_only_lower_numbers(path):
    numbers = modules()
    found = {o for c in notebook(path) if c.kind == "code" for o in own_imports(c.tree)} - {path.stem.split("_", 1)[1]}
    late = {o for o in found & set(numbers) if numbers[o] > number(path.stem)}
    assert not late, f"{path.name} uses chapters that come later: {late}"


def test_the_laws_see_what_they_forbid():
    tree = ast.parse("def f():\n    from vlm_tutor.cli import main\n    from .train import x\n"
                     "    import vlm_tutor.lora\n"
                     "    from vlm_tutor import tiny\n    import_module('vlm_tutor.compare')")
    assert set(own_imports(tree)) == {"cli", "train", "lora", "tiny", "compare"}


@pytest.mark.parametrize("module", [m for m in modules() if m in LIGHT])
def test_the_torch_wall(module):
    code = f"import sys, vlm_tutor.{module}; print([m for m in {HEAVY} if m in sys.modules])"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr
    assert r.stdout.strip() == "[]", f"import vlm_tutor.{module} loads {r.stdout.strip()}"


def test_every_module_stands_on_one_side_of_the_wall():
    assert not set(LIGHT) & set(FREE)
    assert set(modules()) <= set(LIGHT) | set(FREE)


# --- chapters and modules ---------------------------------------------------------------------------------------------
def test_a_chapter_is_a_module_of_its_name():
    files = {p.stem for p in PACKAGE.glob("*.py")} - GENERATED
    assert files == set(modules())


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_a_chapter_exports_to_the_module_of_its_name(path):
    first = notebook(path)[0]
    assert first.directives == {"default_exp": path.stem.split("_", 1)[1]} and not first.source


def test_published_chapters_keep_their_numbers():
    for p in chapters():
        digits, module = p.stem.split("_", 1)
        assert NUMBERS.get(module, digits) == digits
        assert module in NUMBERS or re.fullmatch(r"\d\d[a-z]", digits), f"{p.name}: an insert takes a letter"


def test_modules_are_generated():
    for p in PACKAGE.glob("*.py"):
        if p.stem not in GENERATED: assert "# AUTOGENERATED! DO NOT EDIT!" in p.read_text(), name(p)


def test_only_numbered_chapters_export():
    for p in NBS.rglob("*.ipynb"):
        if p not in chapters() and not any(part[0] in "._" for part in p.relative_to(NBS).parts):
            assert not any(c.exports or "default_exp" in c.directives for c in notebook(p)), name(p)


# --- two tellings of one fact -----------------------------------------------------------------------------------------
def test_settings_ini_mirrors_pyproject():
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini")
    s, nbdev = ini["DEFAULT"], PYPROJECT["tool"]["nbdev"]
    assert s["lib_name"] == s["repo"] == PROJECT["name"]
    assert s["version"] == re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text())[1]
    assert f">={s['min_python']}" == PROJECT["requires-python"]
    assert s["description"] == PROJECT["description"] and s["author"] == PROJECT["authors"][0]["name"]
    assert s["keywords"].split(", ") == PROJECT["keywords"]
    assert [s[k] for k in ("nbs_path", "lib_path", "doc_path", "branch", "tst_flags")] == \
           [nbdev[k] for k in ("nbs_path", "lib_path", "doc_path", "branch", "tst_flags")]
    assert s["console_scripts"].split() == [f"{k}={v}" for k, v in PROJECT["scripts"].items()]
    assert s["requirements"].split() == PROJECT["dependencies"]
    assert s["dev_requirements"].split() == PROJECT["optional-dependencies"]["dev"]
    assert s["git_url"] == PROJECT["urls"]["Repository"] and s["git_url"].endswith(f"/{s['user']}/{s['repo']}")
    assert s["doc_host"] + s["doc_baseurl"] == PROJECT["urls"]["Documentation"]


def test_citation_agrees():
    import yaml
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    from vlm_tutor import __version__
    assert cff["version"] == __version__ and cff["license"] == PROJECT["license"]
    assert cff["repository-code"] == PROJECT["urls"]["Repository"] and cff["url"] == PROJECT["urls"]["Documentation"]


def test_addresses_come_from_project_urls():
    repo, docs = PROJECT["urls"]["Repository"], PROJECT["urls"]["Documentation"]
    slug = repo.removeprefix("https://github.com/")
    for path, text in text_files():
        for found in re.findall(r"(?:github\.com|research\.google\.com/github)/([\w-]+/vlm_tutor)\b", text):
            assert found == slug, f"{name(path)} names {found}"
        for found in re.findall(r"https://[\w-]+\.github\.io/vlm_tutor", text):
            assert found == docs.rstrip("/"), f"{name(path)} names {found}"


def test_constraints_pin_every_requirement_exactly():
    lines = [l for l in (ROOT / "constraints.txt").read_text().splitlines() if l and l[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", l) for l in lines), "one exact version a line, no local build tag"
    wanted = requirement_names(PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"])
    assert wanted <= requirement_names(lines)


def test_imports_are_declared():
    places = {"PIL": "pillow", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    extras = [line for name, lines in PROJECT["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = requirement_names(PROJECT["dependencies"] + extras)
    for module in modules():
        for found in set(outside_imports(module_tree(module))) - {"vlm_tutor"} - sys.stdlib_module_names:
            package = places.get(found, found.replace("_", "-"))
            assert package in declared, f"{module} imports {found}: not in pyproject.toml"


def test_licence_and_site_are_in_place():
    import nbdev.config
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert (NBS / "_quarto.yml").is_symlink() and (NBS / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    assert nbdev.config.get_config(ROOT).doc_url == PROJECT["urls"]["Documentation"]
    assert "nbs/nbdev.yml" in map(name, tracked())
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.parametrize("path", sorted((NBS / "bench/results").glob("*.json")), ids=lambda p: p.stem)
def test_a_recorded_result_says_where_it_comes_from(path):
    record = json.loads(path.read_text())
    assert record["command"].startswith("vlm ") and re.fullmatch(r"[0-9a-f]{7,40}", record["commit"])
    assert isinstance(record["seed"], int) and record["versions"]["torch"] and record["hardware"]["cpu"]
    kinds = [record.get(kind) for kind in ("groups", "points", "tests")]
    assert any(kinds), "scores of groups, points of a bench, or tests of a server"
    for row in record.get("tests", {}).values():
        assert row["requests"] == row["answered"] + row["refused"] + row["lost"] and row["p50"] <= row["p99"]
    for group in record.get("groups", {}).values():
        low, high = group["ci"]["field_f1"]
        assert group["n"] >= 2 and low <= group["field_f1"] <= high
    for point in record.get("points", {}).values():
        for engine in point["engines"].values():
            lengths = [length["samples_per_cpu_second"] for length in engine["epochs"].values()]
            for figure in [engine["startup_seconds"], *lengths]:
                assert figure["n"] >= 2 and figure["low"] <= figure["median"] <= figure["high"]


# --- what must not be in the repository -------------------------------------------------------------------------------
def test_no_path_of_one_machine():
    bad = re.compile(r"(?:^|[^A-Za-z0-9_.])/(?:work|root|farm|home|tmp|opt|Users)/[A-Za-z0-9_.-]+", re.M)
    for path, text in text_files():
        assert not (m := bad.search(text)), f"{name(path)}: {m[0]}"


def test_no_package_registry():
    bad = re.compile(r"pypi\.org|pythonhosted\.org|conda\.anaconda\.org|registry\.npmjs\.org|index-url|find-links",
                     re.I)
    cpu, may = re.compile(r"download\.pytorch\.org"), {"README.md", "nbs/index.ipynb"}
    for path, text in text_files():
        where = name(path)
        if where in may or where.startswith(".github/"):
            text = re.sub(r"--extra-index-url https://download\S+", "", text)
        elif where != "tests/test_house.py": assert not cpu.search(text), f"{where} names PyTorch's index"
        if where != "tests/test_house.py": assert not (m := bad.search(text)), f"{where}: {m[0]}"


def test_no_folder_that_the_house_does_not_have():
    assert not {"docs", "examples", "scripts", "benchmarks"} & {name(p).split("/")[0] for p in tracked()}


def test_nothing_large_is_tracked():
    sizes = {name(p): p.stat().st_size for p in tracked()}
    assert not {n for n, s in sizes.items() if s > 3e6 and not n.endswith(".safetensors")}
    assert sum(s for n, s in sizes.items() if n.endswith(".safetensors")) <= 10e6
    assert sum(s for n, s in sizes.items() if n.endswith(".ipynb")) < 15e6


def test_a_heavy_name_exists_to_be_walled_off():
    assert all(find_spec(m) for m in HEAVY), "the wall means nothing where these are not installed"
