"""Check the pages of the site without Quarto: `python tests/docs_check.py`, in the root of a checkout.

nbdev makes a page of each notebook, pandoc reads it, and a walk of the tree finds what Quarto lets pass in silence:
unclosed `:::`, unknown references, broken links and anchors, missing images, lists glued to their paragraph.
"""
import json, re, subprocess, sys
from collections import Counter
from pathlib import Path
from posixpath import join, normpath
from urllib.parse import unquote, urlsplit

import pypandoc
from nbdev.config import get_config, nbpath2html
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

CROSSREF = re.compile(r"^(fig|tbl|sec|lst|eq|thm|nte|tip)-")


def text(x):
    "A notebook's text field, which is a string or a list of lines."
    return x if isinstance(x, str) else "".join(x or [])


def fenced(body, language=""):
    "`body` as a code block whose fence is longer than any in it."
    fence = "`" * max([3] + [len(m) + 1 for m in re.findall(r"`{3,}", body)])
    return f"{fence}{language}\n{body.rstrip()}\n{fence}"


def output_markdown(output):
    "One cell output as Markdown; a picture that lies in the notebook itself needs no check."
    if output["output_type"] == "stream": return fenced(text(output["text"]))
    data = output.get("data", {})
    if "text/markdown" in data: return text(data["text/markdown"])
    if "text/html" in data: return fenced(text(data["text/html"]), "{=html}")
    if any(k.startswith("image/") for k in data): return ""
    return fenced(text(data.get("text/plain", "")))


def cell_markdown(cell):
    "One cell of a processed notebook as Markdown, its `#|` directives obeyed."
    source = text(cell.get("source"))
    if cell["cell_type"] != "code": return source
    lines = source.splitlines()
    options = dict(re.match(r"#\|\s*([\w-]+):?\s*(.*)", l).groups() for l in lines if re.match(r"#\|\s*[\w-]+", l))
    if options.get("include") == "false": return ""
    code = "\n".join(l for l in lines if not l.startswith("#|")).strip()
    parts = [fenced(code, "python")] if code and options.get("echo") != "false" else []
    if options.get("output") != "false": parts += [output_markdown(o) for o in cell.get("outputs", [])]
    if "label" in options: parts = [f"::: {{#{options['label']}}}", *parts, ":::"]
    return "\n\n".join(p for p in parts if p)


def page_markdown(notebook):
    "A processed notebook as the one Markdown text that it becomes."
    cells = json.loads(Path(notebook).read_text())["cells"]
    return "\n\n".join(cell_markdown(c) for c in cells) + "\n"


def pandoc(source, *args):
    "What pandoc answers to `source` (str), and its warnings."
    r = subprocess.run([pypandoc.get_pandoc_path(), *args], input=source, capture_output=True, text=True, check=True)
    return r.stdout, [l for l in r.stderr.splitlines() if l.strip()]


def make_pages():
    "Process the notebooks as nbdev does for its site; return the folder of pages."
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(force=True)
    return proc_nbs(force=True, n_workers=2)


def nodes(tree):
    "Every pandoc element below `tree`."
    if isinstance(tree, dict):
        if "t" in tree: yield tree
        tree = tree.get("c", [])
    if isinstance(tree, list):
        for x in tree: yield from nodes(x)


class Page:
    "One page: what it offers (ids) and what it asks for (links, images, references)."
    def __init__(self, path, root):
        self.path, self.name = path, path.relative_to(root).as_posix()
        out, self.faults = pandoc(page_markdown(path), "-f", "markdown", "-t", "json")
        self.ids, self.links, self.images, self.references = set(), [], [], []
        cells = json.loads(path.read_text())["cells"]
        if any(c["cell_type"] == "markdown" and re.search(r"(?m)^#\|", text(c.get("source"))) for c in cells):
            self.faults.append("a `#|` directive in a text cell, where it shows on the page")
        for node in nodes(json.loads(out)["blocks"]): self.read(node)

    def read(self, node):
        "Note what one element offers or asks for."
        kind, c = node["t"], node.get("c")
        if kind == "Header": self.ids.add(c[1][0])
        elif kind in ("Div", "Span", "Code", "CodeBlock", "Figure", "Table", "Image", "Link"): self.ids.add(c[0][0])
        if kind == "Link": self.links.append(c[2][0])
        elif kind == "Image": self.images.append(c[2][0])
        elif kind == "Cite": self.references += [x["citationId"] for x in c[0]]
        elif kind in ("RawBlock", "RawInline") and c[0] == "html": self.read_html(c[1])
        elif kind in ("Para", "Plain"): self.read_paragraph(c)

    def read_html(self, html):
        "The same for HTML written by hand."
        self.ids.update(re.findall(r'\bid="([^"]+)"', html))
        self.links += re.findall(r'<a\b[^>]*\bhref="([^"]+)"', html)
        self.images += re.findall(r'<img\b[^>]*\bsrc="([^"]+)"', html)

    def read_paragraph(self, inlines):
        "Marks that stayed in the text because Markdown did not take them as marks."
        words = [x["c"] if x["t"] == "Str" else None for x in inlines]
        if any(w and w.startswith(":::") for w in words): self.faults.append("a `:::` that opens or closes nothing")
        starts = [b for a, b in zip(inlines, inlines[1:]) if a["t"] == "SoftBreak"]
        if any(b["t"] == "Str" and b["c"] in ("-", "*", "1.") for b in starts):
            self.faults.append("a list needs an empty line before it")


class Site:
    "All pages together: who is linked must be there."
    def __init__(self, root, doc_url):
        self.root, self.doc_url = Path(root), doc_url.rstrip("/") + "/"
        self.pages = {p.relative_to(root).as_posix(): Page(p, root) for p in sorted(Path(root).rglob("*.ipynb"))}
        self.html = {nbpath2html(Path(n)).as_posix(): n for n in self.pages}

    def target(self, page, url):
        "`url` on `page` as (path in the site, anchor), or None when it leads elsewhere."
        if url.startswith(self.doc_url): base, url = "", url[len(self.doc_url):] or "index.html"
        else: base = Path(page.name).parent.as_posix()
        u = urlsplit(url)
        if u.scheme or u.netloc: return None
        path = normpath(join(base, unquote(u.path))) if u.path else page.name
        return self.html.get(path.lower(), path), unquote(u.fragment)

    def link_fault(self, page, url):
        "What is wrong with one link, or None."
        if (found := self.target(page, url)) is None: return None
        path, anchor = found
        if path not in self.pages: return None if (self.root / path).is_file() else f"broken link: {url}"
        if anchor and anchor not in self.pages[path].ids: return f"no such anchor: {url}"

    def image_fault(self, page, url):
        "What is wrong with one image, or None."
        if url.startswith("data:") or (found := self.target(page, url)) is None: return None
        return None if (self.root / found[0]).is_file() else f"missing image: {url}"

    def reference_fault(self, page, key):
        "What is wrong with one `@key`, or None: there is no bibliography, so each must be a label on its page."
        everywhere = {i for p in self.pages.values() for i in p.ids}
        if CROSSREF.match(key) and key in everywhere: return None
        return f"unknown reference: @{key}"

    def faults(self):
        "Every fault as `page: fault`."
        for page in self.pages.values():
            found = list(page.faults)
            found += [self.link_fault(page, u) for u in page.links]
            found += [self.image_fault(page, u) for u in page.images]
            found += [self.reference_fault(page, k) for k in page.references]
            for fault, n in Counter(filter(None, found)).items(): yield f"{page.name}: {fault}"


def main():
    "Make the pages, check them, say what was found; exit 1 when something was."
    config, root = get_config(), make_pages()
    site = Site(root, config.doc_url)
    wanted = {p.relative_to(config.nbs_path).as_posix() for p in config.nbs_path.rglob("*.ipynb")
              if not any(part[0] in "._" for part in p.relative_to(config.nbs_path).parts)}
    faults = [f"{n}: no page was made" for n in sorted(wanted - set(site.pages))] + list(site.faults())
    if not site.pages: faults.append("no page was made at all")
    for f in faults: print(f, file=sys.stderr)
    print(f"docs check: {len(site.pages)} pages, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__": main()
