"""The pages of the site and README: checked as they are, and the check itself checked on planted faults."""
import re, shutil, subprocess, sys

from checkout import *
from conftest import markdown_notebook

PLANTED = {  # what is planted: the words that must be said about it
    "::: {.callout-tip}\nnever closed\n": "unclosed",
    "See @fig-nowhere.\n": "unknown reference: @fig-nowhere",
    "Go to [a chapter](77_gone.ipynb).\n": "broken link: 77_gone.ipynb",
    "![a picture](gone.png)\n": "missing image: gone.png",
    "Go to [a section](#no-such-section).\n": "no such anchor: #no-such-section",
    "Go to [its section](index.ipynb#nor-this).\n": "no such anchor: index.ipynb#nor-this",
    "Go to [the site](https://vlm-tutor.github.io/vlm_tutor/gone.html).\n": "broken link",
    "Three things\n- one\n- two\n": "a list needs an empty line before it",
    "::: \n": "a `:::` that opens or closes nothing",
}


def python(script, cwd):
    "Run a script of tests/ in the checkout at `cwd`; its exit code and everything it said"
    r = subprocess.run([sys.executable, ROOT / "tests" / script], cwd=cwd, capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr


def test_the_check_is_silent_on_clean_pages(small):
    code, said = python("docs_check.py", small)
    assert code == 0 and "docs check: 2 pages, 0 faults" in said, said


def test_the_check_finds_every_planted_fault(small):
    for i, planted in enumerate(PLANTED): markdown_notebook(small / f"nbs/fault{i}.ipynb", f"# Fault {i}", planted)
    markdown_notebook(small / "nbs/directive.ipynb", "# Directive", "#| hide\ntext")
    code, said = python("docs_check.py", small)
    assert code == 1
    for i, words in enumerate(PLANTED.values()): assert re.search(rf"fault{i}\.ipynb: .*{re.escape(words)}", said), said
    assert "directive.ipynb: a `#|` directive" in said
    assert f"{len(PLANTED) + 3} pages, {len(PLANTED) + 1} faults" in said, said


def test_the_check_says_when_no_page_was_made(small):
    hidden = small / ".hidden"
    hidden.mkdir()
    for n in ("pyproject.toml", "_quarto.yml", "nbs"): shutil.move(small / n, hidden / n)
    code, said = python("docs_check.py", hidden)
    assert code == 1 and "no page was made" in said, said


def test_pages_of_this_checkout(whole):
    code, said = python("docs_check.py", whole)
    assert code == 0, said
    pages = [p for p in (whole / "nbs").rglob("*.ipynb")]
    assert f"docs check: {len(pages)} pages, 0 faults" in said


def test_readme_is_fresh(whole):
    code, said = python("readme.py", whole)
    assert code == 0, said
    for n in ("README.md", "nbs/index.ipynb"):
        assert (whole / n).read_text() == (ROOT / n).read_text(), f"{n} is stale: run `make readme`"


def test_readme_shows_what_the_notebook_says():
    text = (ROOT / "README.md").read_text()
    assert re.search(r"(?m)^# vlm_tutor$", text) and re.search(r"(?m)^> \w", text)
    assert not re.search(r"(?m)^:::|\bcell-output\b|\.ipynb\)", text), "leftovers of the page"
    assert all((ROOT / u).is_file() for u in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)]+)\)", text))
