"The comparison: numbers worked out by hand, and the page read back by a parser and by a browser."
import base64, html, json, re, shutil, subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from browser import Browser
from vlm_tutor.compare import (beside, compare, field_differences, marked, mixed_names, receipt_errors, side_by_side,
                               time_and_cost)
from vlm_tutor.core import RunFolder, VlmError, append_jsonl, read_json_file, write_jsonl
from vlm_tutor.fields import fields as score_fields
from vlm_tutor.metrics import bootstrap_difference, read_json

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
    plots = compare(str(run.path))["plots"]
    assert set(plots) == {"fields", "scores", "differences", "radar", "names"}
    for name, path in plots.items():
        with Image.open(path) as image:
            assert image.format == "PNG"
            colours = {c for n, c in image.convert("RGB").getcolors(1 << 20) if n > 50}
        both = {(0x9a, 0xa0, 0xa6), (0x1a, 0x73, 0xe8)}
        if name in ("fields", "scores", "radar"): assert both <= colours


def test_large_photographs_are_shrunk(run, tmp_path):
    path = tmp_path/"data"/"images"/"r1.png"
    Image.effect_noise((2000, 3000), 90).save(path)
    compare(str(run.path))
    assert path.stat().st_size > 3e6 and len(page_of(run)) < 2e6


def test_scores_of_the_other_verbs_are_shown_and_written(run):
    result, told = compare(str(run.path), locale="en"), score_fields(str(run.path), locale="en")
    for group, scores in result["scores"].items():
        ours, on_file = told["groups"][group], read_json_file(run.metrics(group))
        assert scores["details"] == ours["fields"] and scores["table"] == ours["table"] and on_file == scores
        assert scores["grits"] == pytest.approx(ours["table"]["grits"])
        assert scores["missed"] == sum(f["missed"] for f in ours["fields"])
        assert scores["seconds_each"] == pytest.approx(.1)
        for key in ("grits", "anls", "plain", "number", "single"):
            assert scores["ci"][key][0] <= scores[key] <= scores["ci"][key][1]
    assert result["scores"]["vanilla-model"]["made_up"] == 1  # the value under a key of its own
    ours, theirs = result["difference"]["finetuned-model"], told["tests"]["finetuned-model"]
    assert ours == theirs
    for words in ("GriTS", "ANLS", "as written", "made up", "finetuned-model, numbers"): assert words in str(result)


def test_single_values_by_hand(run):
    "r1 and r3 right and r2 unreadable; then right, right and 1.00 for 9.00"
    scores = compare(str(run.path))["scores"]
    assert [scores[g]["single"] for g in ANSWERS] == [pytest.approx(2/3)]*2
    assert [scores[g]["anls"] for g in ANSWERS] == [pytest.approx(3/9), pytest.approx((7 + 2*.75)/9)]


def test_time_and_money():
    rows = [dict(seconds=s, cost=c) for s, c in ((1, .1), (2, None), (6, .3))]
    assert time_and_cost(rows) == dict(seconds_each=3, seconds_slow=2, cost_each=.2, cost=.4)
    assert set(time_and_cost([dict(seconds=None)]).values()) == {None}


def test_the_difference_of_a_field_is_that_of_a_document_with_this_field_alone(run):
    rows = {g: [row(id, raw) for id, raw in answers.items()] for g, answers in ANSWERS.items()}
    gap = field_differences(rows, ["total.total_price"])[0]
    def only(doc): return {"total": doc["total"]} if doc and "total" in doc else None
    docs = [[only(read_json(r["raw"])) for r in rows[g]] for g in ("finetuned-model", "vanilla-model")]
    expected = bootstrap_difference(*docs, [only(t) for t in TRUTHS.values()])
    assert gap["f1"] == pytest.approx(expected["field_f1"]) and gap["ci"] == pytest.approx(expected["ci"])


def test_where_lost_values_stand(run):
    names = compare(str(run.path))["names"]["vanilla-model"]
    lost = [dict(truth=f"menu.{key}", answer=None, n=2) for key in ("nm", "price")]
    assert names[:2] == lost and dict(truth="menu.nm", answer="menu.name", n=1) in names
    assert mixed_names({"menu": {"name": "tea"}}, TRUTHS["r1"])[:1] == [("menu.nm", "menu.name")]
    twice = dict(menu=[dict(nm="a"), dict(nm="a")])
    assert mixed_names(dict(x="a"), twice) == [("menu.nm", "x"), ("menu.nm", None)]


@pytest.mark.parametrize("truth, value, shown", [
    ("12,000", "12,500", "<span>12,</span><u>5</u><span>00</span>"), ("tea", "teas", "<span>tea</span><u>s</u>"),
    ("4.00", "8.00", "<u>8</u><span>.00</span>"), ("Teh", "Te", '<span>Te</span><del title="missing: h"></del>'),
    ("abc", "xyz", "<u>xyz</u>"), ("a<b", "a<c", "<span>a&lt;</span><u>c</u>")])
def test_characters_that_differ_are_marked(truth, value, shown): assert marked(truth, value) == shown


def test_kinds_of_error(run):
    kinds = [receipt_errors({}, read_json(raw), TRUTHS[id]) for id, raw in ANSWERS["vanilla-model"].items()]
    assert kinds == [[("under another name", "menu.nm"), ("missing", "menu.nm"), ("made up", "menu.name")],
                     [("no JSON", "")], []]
    assert receipt_errors(dict(error="timeout"), None, TRUTHS["r3"]) == [("failed call", "")]
    assert receipt_errors({}, {"total": {"total_price": "1"}}, TRUTHS["r3"]) == [("misread", "total.total_price")]


def test_strict_refuses_and_other_truths_do(run, tmp_path):
    write_jsonl(run.predictions("short"), [row("r1", "{}")])
    with pytest.raises(VlmError, match="only some have 2 of vanilla-model, 2 of finetuned-model"):
        compare(str(run.path), strict=True)
    assert compare(str(run.path), ["vanilla-model", "finetuned-model"], strict=True)["n"] == 3
    write_jsonl(run.predictions("short"), [row("r1", "{}", truth='{"name": "tea"}')])
    with pytest.raises(VlmError, match=r"'r1' has one truth .*menu.nm.* and another in short \(fields name\)"):
        compare(str(run.path), ["vanilla-model", "short"])


def test_truths_of_another_schema_are_refused(run, tmp_path):
    from vlm_tutor.schema import infer_schema
    atomic = infer_schema([dict(invoice="1", date="2")])
    (tmp_path/"data"/"schema.cord.json").write_text(json.dumps(atomic.json_schema))
    info = tmp_path/"data"/"dataset_info.json"
    with pytest.raises(VlmError, match="no truth in the predictions fits the schema"): compare(str(run.path))
    assert info.exists()


def test_a_report_folder_in_use_is_refused(run, tmp_path):
    other = tmp_path/"other"
    assert compare(str(run.path), report=str(other))["report"] == str(other/"index.html")
    with pytest.raises(VlmError, match="exists and is not empty"): compare(str(run.path), report=str(other))
    compare(str(run.path)), compare(str(run.path))  # its own one is written anew


def test_runs_side_by_side_and_by_size(run, tmp_path):
    small = tmp_path/"small"
    shutil.copytree(run.path, small)
    for place, n in ((run.path, 400), (small, 50)): append_jsonl(place/"log.jsonl", dict(event="start", rows=n))
    result = compare(str(run.path), runs=[str(small)])
    assert result["groups"] == ["vanilla-model", "finetuned-model", "small"] and "sizes" in result["plots"]
    assert result["training_rows"] == {"finetuned-model": 400, "small": 50}
    assert result["scores"]["small"]["field_f1"] == result["scores"]["finetuned-model"]["field_f1"]
    with pytest.raises(VlmError, match="named twice"): compare(str(run.path), runs=[str(small)]*3)
    shutil.rmtree(small/"predictions")
    with pytest.raises(VlmError, match="has no predictions of its finetuned-model"):
        compare(str(run.path), runs=[str(small)])


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
    assert (found["count"], found["wide"], found["broken"], found["images"]) == ("3 of 3 receipts", 0, 0, 8)
    assert found["title"] == "vanilla-model and finetuned-model on 3 receipts"
    assert console == [] and chromium(tmp_path, run.report/"index.html")[1] == []


SHOWN = "[...document.querySelectorAll('article')].filter(a=>!a.hidden).map(a=>a.id.slice(2)).join(' ')"


def choose(browser, **lists):
    "Set the page's lists and tell which receipts are shown, in their order"
    for name, value in lists.items():
        browser.run(f"{name}.value='{value}';{name}.dispatchEvent(new Event('change'))")
    return browser.run(SHOWN)


def press(browser, key):
    "Press a key and tell where the focus is"
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")
    return browser.run("document.activeElement.id")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the comparison page in one")
@pytest.mark.parametrize("width, dark", [(360, True), (1200, False)])
def test_filters_orders_and_keys_in_a_browser(run, tmp_path, width, dark):
    compare(str(run.path))
    with Browser(tmp_path, width, dark) as browser:
        browser.open((run.report/"index.html").as_uri())
        assert choose(browser, kind="1") == "r2" and choose(browser, kind="4", field="total.total_price") == "r3"
        assert choose(browser, field="menu.price") == "r2" and choose(browser, kind="all", field="all") == "r1 r2 r3"
        assert choose(browser, order="wrong") == "r1 r2 r3" and choose(browser, order="1") == "r3 r2 r1"
        assert choose(browser, order="file") == "r1 r2 r3"
        assert [press(browser, key) for key in "jjkjjj/"] == ["r-r1", "r-r2", "r-r1", "r-r2", "r-r3", "r-r3", "who"]
        choose(browser, kind="1")
        browser.run("location.hash='r-r1'")
        browser.wait("kind.value=='all'")
        back = browser.run("getComputedStyle(document.body).backgroundColor")
        assert back == ("rgb(23, 24, 26)" if dark else "rgb(255, 255, 255)")
        assert browser.run("document.documentElement.scrollWidth<=innerWidth") and not browser.errors()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the comparison page in one")
def test_a_thousand_receipts_stay_light(run, tmp_path):
    Image.effect_noise((600, 900), 90).save(tmp_path/"data"/"images"/"r1.png")
    from vlm_tutor.compare import page, receipt_html
    from vlm_tutor.report import image_data_url
    compare(str(run.path))
    scores = {g: read_json_file(run.metrics(g)) for g in ANSWERS}
    picture = image_data_url(tmp_path/"data"/"images"/"r1.png", limit=30_000, side=480)
    def one(i): return receipt_html({g: row("r1", ANSWERS[g]["r1"]) | dict(id=f"n{i}") for g in ANSWERS}, [picture])
    (tmp_path/"many.html").write_text(page("Many", [], scores, [], [one(i) for i in range(1000)]))
    with Browser(tmp_path, 360) as browser:
        browser.open((tmp_path/"many.html").as_uri())
        assert choose(browser, who="1").count(" ") == 999 and choose(browser, who="0") == ""
        assert browser.run("[...document.images].every(i=>i.loading=='lazy'&&i.decoding=='async')")
        drawn = "[...document.querySelectorAll('article')].filter(a=>a.checkVisibility({contentVisibilityAuto:true}))"
        assert choose(browser, who="all") and browser.run(f"{drawn}.length") <= 1000 and not browser.errors()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the comparison page in one")
def test_the_browser_check_sees_an_error(tmp_path):
    (tmp_path/"bad.html").write_text("<!doctype html><script>missing()</script>")
    assert chromium(tmp_path, tmp_path/"bad.html")[1]
