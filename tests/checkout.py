"""What the tests of structure and style read: notebooks, generated modules and tracked files of this checkout."""
import ast, json, re, subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vlm_tutor"
NBS = ROOT / "nbs"


@dataclass
class Cell:
    "One notebook cell: its text without directives, its directives, its outputs"
    kind: str
    source: str
    directives: dict = field(default_factory=dict)
    outputs: list = field(default_factory=list)

    @property
    def exports(self): return bool({"export", "exports", "exporti"} & set(self.directives))

    @property
    def runs(self): return self.kind == "code" and self.directives.get("eval") != "false"

    @property
    def tree(self):
        "The code as a syntax tree; shell and magic lines count as nothing"
        lines = ["pass" if l.startswith(("!", "%")) else l for l in self.source.splitlines()]
        return ast.parse("\n".join(lines))


def read_cell(raw):
    "A `Cell` from a notebook's JSON"
    source = "".join(raw["source"])
    found = re.findall(r"(?m)^#\|\s*([\w-]+):?[ \t]*(.*)$", source) if raw["cell_type"] == "code" else []
    code = re.sub(r"(?m)^#\|.*\n?", "", source) if found else source
    return Cell(raw["cell_type"], code.strip("\n"), dict(found), raw.get("outputs", []))


@cache
def notebook(path):
    "The cells of the notebook at `path`"
    return [read_cell(c) for c in json.loads(Path(path).read_text())["cells"]]


def chapters():
    "Paths of the numbered notebooks, in order"
    return sorted(NBS.glob("[0-9][0-9]*_*.ipynb"), key=lambda p: number(p.stem))


def pages():
    "Paths of all notebooks of the site: index, chapters, recipes"
    return sorted(p for folder in (NBS, NBS / "recipes") for p in folder.glob("[0-9a-z]*.ipynb"))


def number(stem):
    "`12a_pretrain` as a sort key, (12, 'a')"
    digits, letter = re.match(r"(\d+)([a-z]?)_", stem).groups()
    return int(digits), letter


def modules():
    "Module name to its number, for every chapter"
    return {p.stem.split("_", 1)[1]: number(p.stem) for p in chapters()}


@cache
def module_tree(name):
    "The syntax tree of a generated module"
    return ast.parse((PACKAGE / f"{name}.py").read_text())


def functions(tree):
    "Every function in `tree`, methods and inner ones too"
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(node):
    "Lines from the first to the last, both counted"
    return node.end_lineno - node.lineno + 1


@cache
def tracked():
    "Every file that git tracks or would track, as paths under the root"
    out = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True,
                         capture_output=True, check=True).stdout
    return [p for n in sorted(set(out.split("\0"))) if n and (p := ROOT / n).is_file() and not p.is_symlink()]


def text_files():
    "The tracked files that are text, with their text"
    for path in tracked():
        try: yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError: pass


def name(path):
    "`path` as a reader of the repository names it"
    return Path(path).relative_to(ROOT).as_posix()
