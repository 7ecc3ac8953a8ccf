"""The habits of the project that a program can see, one test each. An exception stands on a list, with its reason."""
import ast, re, statistics

import pytest
from checkout import *

LONG = {}  # "module.function": why it has more than 25 lines

everywhere = pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
recipes = pytest.mark.parametrize("path", sorted((NBS / "recipes").glob("*.ipynb")), ids=lambda p: p.stem)
every_module = pytest.mark.parametrize("module", modules())


def code_cells(path): return [c for c in notebook(path) if c.kind == "code" and c.source]


def text_cells(path): return [c for c in notebook(path) if c.kind == "markdown"]


def words(cell):
    "Words of running text: no code blocks, no tables, no HTML tags, no targets of links"
    text = re.sub(r"(?s)```.*?```|<[^>]+>|\]\([^)]*\)|\$\$.*?\$\$", " ", cell.source)
    return len([w for l in text.splitlines() if not l.lstrip().startswith("|") for w in l.split()])


def prose(cell): return cell.kind == "markdown" and not cell.source.startswith("#")


def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))


def public(tree):
    "Public functions and classes at the top of `tree`"
    return [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"]


def arguments(f):
    "The parameters of `f` that a caller gives"
    found = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
    return [a for a in found if a.arg not in ("self", "cls")]


# --- the template of a chapter ----------------------------------------------------------------------------------------
@everywhere
def test_title_and_subtitle_come_first(path):
    first = text_cells(path)[0].source
    assert re.fullmatch(r"# .+\n\n> .+", first), "the first text cell is an H1, an empty line, a `>` subtitle"
    assert sum(bool(re.match(r"# ", c.source)) for c in text_cells(path)) == 1


@everywhere
def test_headings_stand_alone_and_not_deeper_than_h4(path):
    for c in text_cells(path)[1:]:
        text = re.sub(r"(?s)```.*?```|<details>.*?</details>|^:::.*?^:::", "", c.source)
        if re.search(r"(?m)^#", text):
            assert re.fullmatch(r"#{2,4} .+", c.source.strip()), f"a heading with company: {c.source[:60]!r}"


@everywhere
def test_head_says_what_for_and_how_long(path):
    head = "\n".join(c.source for c in notebook(path)[:6])
    assert re.search(r"\*Time: .+ · Hardware: .+ · Needs: .+\*", head)
    assert "After this you can" in head and len(re.findall(r"(?m)^[*-] ", head)) == 3


@everywhere
def test_badge_opens_this_notebook(path):
    import tomllib
    repo = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"].split("github.com/")[1]
    url = f"https://colab.research.google.com/github/{repo}/blob/main/{name(path)}"
    assert sum(f"]({url})" in c.source for c in text_cells(path)) == 1
    install = next(c for c in code_cells(path) if not is_import(c.tree.body[0]))
    assert "pip install" in install.source and {"eval", "hide"} <= set(install.directives) and not install.runs


@everywhere
def test_sections_that_every_chapter_has(path):
    headings = [c.source.strip() for c in text_cells(path) if c.source.startswith("## ")]
    assert [h for h in headings if h in ("## What goes wrong", "## Recap", "## Exercises", "## Next")] == \
        ["## What goes wrong", "## Recap", "## Exercises", "## Next"]


@everywhere
def test_exercises_have_folded_solutions(path):
    text = "\n".join(c.source for c in text_cells(path)).split("## Exercises")[1].split("## Next")[0]
    n = len(re.findall(r"(?m)^\*\*\d+\.", text))
    assert 2 <= n <= 3 and text.count("<details>") == text.count("</details>") == n


@recipes
def test_a_recipe_has_the_head_of_a_chapter_and_exports_nothing(path):
    test_title_and_subtitle_come_first(path)
    test_head_says_what_for_and_how_long(path)
    test_badge_opens_this_notebook(path)
    test_headings_stand_alone_and_not_deeper_than_h4(path)
    test_a_text_cell_has_at_most_60_words(path)
    test_no_exclamation_marks(path)
    test_import_cells_hold_only_imports(path)
    test_code_lines_have_at_most_120_columns(path)
    assert not any(c.exports or "default_exp" in c.directives for c in notebook(path))


# --- prose ------------------------------------------------------------------------------------------------------------
@everywhere
def test_a_text_cell_has_at_most_60_words(path):
    for c in text_cells(path):
        if "<details>" not in c.source and not c.source.startswith("After this"):
            parts = re.split(r"(?m)^After this you can$", c.source)
            assert words(Cell("markdown", parts[0])) <= 60, f"{words(c)} words: {c.source[:60]!r}"


@everywhere
def test_prose_and_code_are_in_balance(path):
    said = sum(words(c) for c in notebook(path) if prose(c))
    code = sum(len(re.sub(r"#.*", "", l).split()) for c in code_cells(path) for l in c.source.splitlines())
    most = 2.0 if 13 <= number(path.stem)[0] <= 16 else 1.0
    assert 0.25 <= said / code <= most, f"{said} words of prose to {code} of code"


@everywhere
def test_no_exclamation_marks(path):
    for c in text_cells(path):
        text = re.sub(r"(?s)```.*?```|`[^`]*`|<!--.*?-->|!\[|\[!\[", "", c.source)
        assert not re.search(r"\w!(\s|$)", text), c.source[:60]


# --- cells ------------------------------------------------------------------------------------------------------------
@everywhere
def test_import_cells_hold_only_imports(path):
    for c in code_cells(path):
        body = c.tree.body
        if c.runs and any(map(is_import, body)):
            assert all(map(is_import, body)), f"imports with company: {c.source[:60]!r}"


@everywhere
def test_every_import_is_used(path):
    cells = [c for c in code_cells(path) if c.runs]
    used = {n.id for c in cells for n in ast.walk(c.tree) if isinstance(n, ast.Name)}
    used |= {w for c in cells for l in c.source.splitlines() if l.startswith(("!", "%")) for w in re.findall(r"\w+", l)}
    for c in cells:
        for node in filter(is_import, c.tree.body):
            names = {(a.asname or a.name).split(".")[0] for a in node.names} - {"*"}
            assert names <= used, f"imported and not used: {sorted(names - used)}"


@everywhere
def test_a_lesson_ends_in_a_value(path):
    for c in code_cells(path):
        last = c.tree.body[-1] if c.tree.body else None
        call = getattr(getattr(last, "value", None), "func", None)
        assert c.exports or getattr(call, "id", "") != "print", f"show the value, do not print it: {c.source[-60:]!r}"


@everywhere
def test_exported_cells_have_at_most_25_lines(path):
    for c in code_cells(path):
        assert not c.exports or len(c.source.splitlines()) <= 25, f"{len(c.source.splitlines())}: {c.source[:60]!r}"


@everywhere
def test_definitions_are_followed_by_a_demonstration(path):
    cells, shown, missing = code_cells(path), 0, []
    for i, c in enumerate(cells):
        if not c.exports: continue
        until = next((j for j in range(i + 1, len(cells)) if cells[j].exports), len(cells))
        after = "\n".join(d.source for d in cells[i + 1:until] if not all(map(is_import, d.tree.body)))
        for n in public(c.tree):
            if re.search(rf"\b{n.name}\b", after): shown += 1
            else: missing.append(n.name)
    assert shown >= 0.8 * (shown + len(missing)), f"{shown} shown, not shown: {missing}"


@everywhere
def test_an_error_that_is_raised_is_shown(path):
    source = "\n".join(c.source for c in code_cells(path))
    if "raise VlmError" in source: assert "expect_fail(VlmError" in source


def idle_expectations(tree):
    "Calls of `expect_fail` that stand in no `with`: they run nothing and can not fail"
    calls = {n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "expect_fail"}
    return calls - {i.context_expr for n in ast.walk(tree) if isinstance(n, ast.With) for i in n.items}


@everywhere
def test_every_expected_error_is_waited_for(path):
    for c in code_cells(path): assert not idle_expectations(c.tree), f"with expect_fail(...): {c.source[:60]!r}"


def test_idle_expectations_are_seen():
    assert len(idle_expectations(ast.parse("expect_fail(lambda: 1)\nwith expect_fail(ValueError): f()"))) == 1


# --- code -------------------------------------------------------------------------------------------------------------
@every_module
def test_functions_have_at_most_25_lines(module):
    for f in functions(module_tree(module)):
        assert length(f) <= 25 or f"{module}.{f.name}" in LONG, f"{f.name} has {length(f)} lines"


def test_the_list_of_long_functions_is_current():
    long = {f"{m}.{f.name}" for m in modules() for f in functions(module_tree(m)) if length(f) > 25}
    assert set(LONG) == long


def test_most_functions_are_short():
    lengths = [length(f) for m in modules() for f in functions(module_tree(m))]
    assert statistics.median(lengths) <= 8


def test_tests_are_short_too():
    for p in (ROOT / "tests").glob("*.py"):
        for f in functions(ast.parse(p.read_text())):
            assert length(f) <= 25, f"{p.name}: {f.name} has {length(f)} lines"


@every_module
def test_docstrings_have_one_line(module):
    for n in ast.walk(module_tree(module)):
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_" and n in public(module_tree(module)):
            doc = ast.get_docstring(n)
            assert doc, f"{n.name} has no docstring"
            assert "\n" not in doc, f"{n.name}: one line; the rest is prose in the chapter"


@every_module
def test_parameters_are_explained_beside_them(module):
    lines = (PACKAGE / f"{module}.py").read_text().splitlines()
    tree = module_tree(module)
    members = [f for c in public(tree) if isinstance(c, ast.ClassDef) for f in c.body]
    inits = [f for f in members if getattr(f, "name", "") == "__init__"]
    for f in [n for n in public(tree) if isinstance(n, ast.FunctionDef)] + inits:
        if len(arguments(f)) < 2: continue
        bare = [a.arg for a in arguments(f) if not re.search(r"#\s*\S", lines[a.lineno - 1][a.end_col_offset:])]
        assert not bare, f"{f.name}: no word about {bare}"
        rows = [a.lineno for a in arguments(f)]
        assert len(set(rows)) == len(rows), f"{f.name}: one parameter a line"


@every_module
def test_no_opaque_keyword_arguments(module):
    tree = module_tree(module)
    assert not [f.name for f in public(tree) if isinstance(f, ast.FunctionDef) and f.args.kwarg]


@every_module
def test_no_code_that_is_commented_out(module):
    for line in (PACKAGE / f"{module}.py").read_text().splitlines():
        if m := re.match(r"\s*#\s*(?![%|])(.+)", line):
            try: body = ast.parse(m[1]).body
            except SyntaxError: continue
            assert not any(isinstance(n, (ast.Assign, ast.Import, ast.Return, ast.AugAssign)) for n in body), line


@everywhere
def test_code_lines_have_at_most_120_columns(path):
    for c in code_cells(path):
        for line in c.source.splitlines(): assert len(line) <= 120, line


def test_test_lines_have_at_most_120_columns():
    for p in (ROOT / "tests").glob("*.py"):
        for i, line in enumerate(p.read_text().splitlines(), 1): assert len(line) <= 120, f"{p.name}:{i}"


# --- what is stored ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", pages(), ids=lambda p: p.stem)
def test_outputs_are_stored_and_clean(path):
    ran = [c for c in code_cells(path) if c.runs]
    assert any(c.outputs for c in ran), "store the outputs: a reader sees them before running anything"
    text = json.dumps([o for c in ran for o in c.outputs])
    assert not re.search(r"/(home|root|tmp|work|Users)/|\.venv/|site-packages", text), "an output shows where it ran"
    assert '"output_type": "error"' not in text, "a stored error"
    assert "Warning:" not in text, "a stored warning"


@pytest.mark.parametrize("path", pages(), ids=lambda p: p.stem)
def test_pictures_are_local(path):
    for c in text_cells(path):
        for url in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", c.source):
            assert "://" not in url or url == "https://colab.research.google.com/assets/colab-badge.svg", url
