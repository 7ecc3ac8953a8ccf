"""Small and whole copies of the project, to be planted with faults or made afresh."""
import json, shutil, subprocess, sys, warnings

import pytest
from checkout import NBS, ROOT, tracked

CLEAN = """---
title: A page
---

## Here

A [link](index.ipynb), an [anchor](#here), `@code`, and [the other page](index.ipynb#there). As @fig-seen shows.

![](there.png){#fig-seen}

::: {.callout-note}
## Fine
text
:::
"""

def markdown_notebook(path, *texts):
    "Write a notebook of text cells"
    cells = [dict(cell_type="markdown", id=f"c{i}", metadata={}, source=t) for i, t in enumerate(texts)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))


def copy(path, to):
    "Copy a file of the checkout to the same place under `to`"
    target = to / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


@pytest.fixture
def small(tmp_path):
    "A project with two clean pages; a folder whose name begins with a dot would be passed over by nbdev"
    (tmp_path / "nbs").mkdir()
    for n in ("pyproject.toml", "_quarto.yml"): shutil.copy(ROOT / n, tmp_path)
    (tmp_path / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    (tmp_path / "nbs/there.png").write_bytes(b"png")
    markdown_notebook(tmp_path / "nbs/index.ipynb", "# Index", "## There", "text")
    markdown_notebook(tmp_path / "nbs/page.ipynb", CLEAN)
    return tmp_path


@pytest.fixture
def whole(tmp_path):
    "A copy of what the pages are made from, so that the checkout stays as it is"
    for p in tracked():
        if p.is_relative_to(NBS) or p.parent == ROOT: copy(p, tmp_path)
    (tmp_path / "nbs/_quarto.yml").symlink_to("../_quarto.yml")
    return tmp_path


def reachable(folder):
    "Can pip fetch LLaMA-Factory itself?"
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), "llamafactory==0.9.5"]
    return subprocess.run(words, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def factory(tmp_path_factory):
    "LLaMA-Factory's command, in the environment that the doctor makes; kept for the machine"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLM_LLAMAFACTORY", raising=False)
        command = [sys.executable, "-m", "vlm_tutor.cli", "doctor", "--install", "llamafactory", "--json"]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode and not reachable(tmp_path_factory.mktemp("probe")):
            warnings.warn("LLaMA-Factory was NOT tested: its packages cannot be reached")
            pytest.skip("packages cannot be reached: " + made.stderr.strip().splitlines()[-1])
        assert made.returncode == 0, made.stderr
        found = json.loads(made.stdout)["llamafactory"]
        patch.setenv("VLM_LLAMAFACTORY", found["command"])
        assert found["versions"]["llamafactory"] == "0.9.5" and found["versions"]["transformers"] == "5.6.0"
        yield found
