"The comparison: numbers worked out by hand, and the page read back by a parser and by a browser."
import base64, html, json, re, shutil, subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlm_tutor.compare import beside, compare, side_by_side
from vlm_tutor.core import RunFolder, VlmError, write_jsonl

TRUTHS = {
    "r1": {"menu": [{"nm": "tea", "price": "2.00"}], "total": {"total_price": "2.00"}},
    "r2": {"menu": [{"nm": "jam", "price": "3.00"}, {"nm": "rice", "price": "4.00"}], "total": {"total_price": "7.00"}},
    "r3": {"total": {"total_price": "9.00"}},
}
ANSWERS = {
    "vanilla-model": {
        "r1": '{"menu": [{"name": "tea", "price": "2.00"}], "total": {"total_price": "2.00"}}',  # a key of its own
        "r2": "I see <b>jam</b> & <script>document.title='broken'</script>",  # no JSON
        "r3": '{"total": {"total_price": "9.00"}}',
    },
    "finetuned-model": {
        "r1": json.dumps(TRUTHS["r1"]),
        "r2": json.dumps(TRUTHS["r2"]).replace("4.00", "8.00"),
        "r3": '{"total": {"total_price": "1.00"}}',
    },
}


def row(id, raw, **more):
    return dict(id=id, raw=raw, truth=json.dumps(TRUTHS[id]), prompt="Read.", split="test", seconds=0.1, model="m",
                adapter=None, error=None) | more


@pytest.fixture
def run(tmp_path):
    "A data set of three receipts and a run with two groups of predictions"
    data, talks = tmp_path/"data", []
    (data/"images").mkdir(parents=True)
    for i, (id, truth) in enumerate(TRUTHS.items()):
        Image.new("RGB", (40, 60), (i, 0, 0)).save(data/"images"/f"{id}.png")
        messages = [dict(role="user", content="<image>Read."), dict(role="assistant", content=json.dumps(truth))]
        talks.append(dict(messages=messages, images=[f"images/{id}.png"]))
    tags = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    entry = dict(formatting="sharegpt", columns=dict(messages="messages", images="images"), tags=tags)
    info = {"cord": entry | dict(file_name="cord.json"), "cord_test": entry | dict(file_name="cord_test.json")}
    for name, content in {"cord": talks, "cord_test": talks, "dataset_info": info}.items():
        (data/f"{name}.json").write_text(json.dumps(content))
    folder = RunFolder.create(tmp_path/"run", {"dataset_dir": str(data), "dataset": "cord"})
    for group, answers in ANSWERS.items():
        write_jsonl(folder.predictions(group), [row(id, raw) for id, raw in answers.items()])
    return folder


class Page(HTMLParser):
    "What a reader finds in the page: articles, links, sources, texts of wrong cells."

    def __init__(self, text):
        super().__init__()
        self.articles, self.refs, self.images, self.bad, self.tags, self._in_bad = {}, [], [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append(tag)
        if tag == "article": self.articles[a["id"]] = a["data-right"].split()
        if tag == "img": self.images.append((a["alt"], a["src"], a.get("loading")))
        if tag == "td": self._in_bad = a.get("class") == "bad"
        self.refs += [a[k] for k in ("src", "href", "srcset", "action") if a.get(k)]
        if self._in_bad and tag == "td": self.bad.append("")

    def handle_endtag(self, tag):
        if tag == "td": self._in_bad = False

    def handle_data(self, data):
        if self._in_bad: self.bad[-1] += data


def page_of(run):
    return (run.report/"index.html").read_text()


def test_field_f1_by_hand(run):
    result = compare(str(run.path))
    f1 = {f["field"]: (f["n"], f["vanilla-model"], f["finetuned-model"]) for f in result["fields"]}
    assert f1["menu.nm"] == (3, 0, 1)
    assert f1["menu.price"] == (3, pytest.approx(2*1/(1 + 3)), pytest.approx(2*2/(3 + 3)))
    assert f1["total.total_price"] == (3, pytest.approx(2*2/(2 + 3)), pytest.approx(2*2/(3 + 3)))
    assert result["scores"]["vanilla-model"]["field_f1"] == pytest.approx(2*3/(4 + 9))
    assert result["scores"]["finetuned-model"]["field_f1"] == pytest.approx(2*7/(9 + 9))
    assert result["difference"]["finetuned-model"]["field_f1"] == pytest.approx(14/18 - 6/13)
    low, high = result["difference"]["finetuned-model"]["ci"]
    assert low <= 14/18 - 6/13 <= high


def test_vanilla_and_finetuned_come_first_then_names(run):
    for other in ("zeta", "alpha"): shutil.copy(run.predictions("finetuned-model"), run.predictions(other))
    assert compare(str(run.path))["groups"] == ["vanilla-model", "finetuned-model", "alpha", "zeta"]
    assert compare(str(run.path), ["zeta", "vanilla-model"])["groups"] == ["vanilla-model", "zeta"]


def test_missing_and_outdated_metrics_are_made(run):
    assert not run.metrics("finetuned-model").exists()
    before = compare(str(run.path))["scores"]["finetuned-model"]["field_f1"]
    assert json.loads(run.metrics("finetuned-model").read_text())["field_f1"] == before
    write_jsonl(run.predictions("finetuned-model"), [row(id, json.dumps(t)) for id, t in TRUTHS.items()])
    assert compare(str(run.path))["scores"]["finetuned-model"]["field_f1"] == 1


def test_only_common_receipts_count(run):
    write_jsonl(run.predictions("finetuned-model"), [row(id, ANSWERS["finetuned-model"][id]) for id in ("r1", "r3")])
    result = compare(str(run.path))
    assert (result["n"], result["left_out"]) == (2, {"vanilla-model": 1, "finetuned-model": 0})
    assert result["scores"]["vanilla-model"]["field_f1"] == pytest.approx(2*3/(4 + 4))
    assert "left out: 1 of vanilla-model" in str(result)
    write_jsonl(run.predictions("finetuned-model"), [row("r1", "{}") | dict(id="other")])
    with pytest.raises(VlmError, match="no receipt of split 'test' was answered by all"): compare(str(run.path))


def test_clear_errors(run, tmp_path):
    with pytest.raises(VlmError, match="Did you mean 'finetuned-model'"): compare(str(run.path), "finetuned-modle")
    with pytest.raises(VlmError, match="no run folder"): compare(str(tmp_path/"nowhere"))
    shutil.rmtree(run.path/"predictions")
    with pytest.raises(VlmError, match="no predictions in"): compare(str(run.path))


def test_page_is_self_contained_and_complete(run, tmp_path):
    compare(str(run.path))
    page = Page(page_of(run))
    assert page.articles == {"r-r1": ["1"], "r-r2": [], "r-r3": ["0"]}
    assert all(r.startswith(("data:", "#r-")) for r in page.refs)
    assert not re.search(r"https?://", page_of(run))
    for alt, src, loading in page.images:
        if alt not in TRUTHS: continue
        assert loading == "lazy"
        assert base64.b64decode(src.split(",", 1)[1]) == (tmp_path/"data"/"images"/f"{alt}.png").read_bytes()
    assert sorted(a for a, *_ in page.images if a in TRUTHS) == ["r1", "r2", "r3"]


def test_page_marks_what_differs_and_nothing_else(run):
    compare(str(run.path))
    bad = sorted(Page(page_of(run)).bad)
    missing = ["✗ missing"]*(1 + 5)  # the name in r1, all five values of r2
    assert bad == sorted(missing + ["✗ tea", "✗ 8.00", "✗ 1.00"])


def test_model_text_stays_text(run):
    compare(str(run.path))
    assert Page(page_of(run)).tags.count("script") == 1
    assert html.escape(ANSWERS["vanilla-model"]["r2"]) in page_of(run)


def test_a_missing_image_is_told_not_fatal(run, tmp_path):
    (tmp_path/"data"/"images"/"r1.png").unlink()
    compare(str(run.path))
    assert page_of(run).count("image not found") == 1
    shutil.rmtree(tmp_path/"data")
    assert "images are left out: no file" in str(compare(str(run.path)))
    assert page_of(run).count("image not found") == 3


def test_failed_calls_count_as_wrong_and_are_told(run):
    write_jsonl(run.predictions("vanilla-model"), [row(id, "", error="out of memory") for id in TRUTHS])
    assert compare(str(run.path))["scores"]["vanilla-model"]["field_f1"] == 0
    assert page_of(run).count("vanilla-model: failed, out of memory") == 3


def test_one_group_alone(run):
    result = compare(str(run.path), "finetuned-model")
    assert result["difference"] == {} and result["groups"] == ["finetuned-model"]


def test_plots_are_png_with_the_two_colours(run):
    result = compare(str(run.path))
    for path in result["plots"].values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            colours = {c for n, c in image.convert("RGB").getcolors(1 << 20) if n > 50}
        assert {(0x9a, 0xa0, 0xa6), (0x1a, 0x73, 0xe8)} <= colours


def test_large_photographs_are_shrunk(run, tmp_path):
    path = tmp_path/"data"/"images"/"r1.png"
    Image.effect_noise((2000, 3000), 90).save(path)
    compare(str(run.path))
    assert path.stat().st_size > 3e6 and len(page_of(run)) < 2e6


@pytest.mark.parametrize("truth, pred, expected", [
    (["a", "b"], ["a", "b"], (["a", "b"], [])),
    (["a", "b"], ["b"], ([None, "b"], [])),
    (["a", "b", "c"], ["c", "x"], (["x", None, "c"], [])),
    (["a"], ["a", "a", "z"], (["a"], ["a", "z"])),
    ([], ["z"], ([], ["z"])),
])
def test_beside(truth, pred, expected):
    assert beside(truth, pred) == expected


def test_side_by_side_hits_equal_the_true_positives():
    rows = side_by_side(TRUTHS["r2"], {"g": {"menu": [{"nm": "rice"}, {"nm": "jam", "price": "9"}], "x": {"y": "1"}}})
    assert [r["path"] for r in rows] == ["menu.nm", "menu.price", "menu.nm", "menu.price", "total.total_price", "x.y"]
    assert sum(r["truth"] == r["g"] for r in rows) == 2


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """<!doctype html><meta charset="utf-8"><iframe id="f" width="WIDTH" height="800" srcdoc="PAGE"></iframe>
<pre id="out"></pre><script>
const f=document.getElementById('f');
f.onload=()=>{
  const d=f.contentDocument,e=d.documentElement,who=d.getElementById('who'),seen={};
  for(const o of [...who.options,who.options[0]]){
    who.value=o.value;who.dispatchEvent(new Event('change'));
    seen[o.value]=[...d.querySelectorAll('article')].filter(a=>!a.hidden).map(a=>a.id);
  }
  const count=d.getElementById('count').textContent,wide=e.scrollWidth-e.clientWidth;
  for(const i of d.images)i.loading='eager';
  setTimeout(()=>{
    const broken=[...d.images].filter(i=>!i.complete||!i.naturalWidth).length,images=d.images.length;
    document.getElementById('out').textContent=JSON.stringify({seen,count,wide,title:d.title,broken,images});
  },2000);
}</script>"""


def chromium(folder, page):
    "The page's DOM after its script ran, and what the console said"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=4000"]
    done = subprocess.run([CHROMIUM, *flags, f"--user-data-dir={folder/'profile'}", "--dump-dom", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the comparison page in one")
@pytest.mark.parametrize("width", [360, 1200])
def test_page_in_a_browser(run, tmp_path, width):
    compare(str(run.path))
    probe = tmp_path/"probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("PAGE", html.escape(page_of(run))))
    dom, console = chromium(tmp_path, probe)
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.S)[1]))
    everyone = ["r-r1", "r-r2", "r-r3"]
    assert found["seen"] == {"all": everyone, "every": [], "0": ["r-r3"], "1": ["r-r1"], "none": ["r-r2"]}
    assert (found["count"], found["wide"], found["broken"], found["images"]) == ("3 of 3 receipts", 0, 0, 5)
    assert found["title"] == "vanilla-model and finetuned-model on 3 receipts"
    assert console == [] and chromium(tmp_path, run.report/"index.html")[1] == []


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the comparison page in one")
def test_the_browser_check_sees_an_error(tmp_path):
    (tmp_path/"bad.html").write_text("<!doctype html><script>missing()</script>")
    assert chromium(tmp_path, tmp_path/"bad.html")[1]
