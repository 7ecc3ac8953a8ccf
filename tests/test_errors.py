"""Errors planted one at a time are found and named; wrong labels rank first; sums of drawn receipts come out."""
import copy, csv, io, json, random
from html.parser import HTMLParser

import pytest

from vlm_tutor.core import RunFolder, VlmError, write_jsonl
from vlm_tutor.errors import *
from vlm_tutor.receipts import make_split_receipt
from vlm_tutor.schema import infer_schema

TRUTH = {"menu": [{"nm": "Nasi Goreng", "cnt": "2", "price": "24,000"}, {"nm": "Es Teh", "cnt": "1", "price": "5,000"}],
         "total": {"total_price": "29,000", "cashprice": "30,000", "changeprice": "1,000"}}


def row(id, doc, truth=TRUTH, **more):
    return dict(id=id, raw=doc if isinstance(doc, str) else json.dumps(doc), truth=json.dumps(truth), split="test",
                error=None) | more


def changed(*steps, value):
    "The truth with one value changed, or taken away where the value is None"
    doc = copy.deepcopy(TRUTH)
    place = doc
    for step in steps[:-1]: place = place[step]
    if value is None: del place[steps[-1]]
    else: place[steps[-1]] = value
    return doc


# --- kinds ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("doc, kinds", [
    (TRUTH, []), (changed("total", "total_price", value="29.000"), ["number format"]),
    (changed("total", "total_price", value="Rp29000"), ["number format"]),
    (changed("total", "total_price", value="28,000"), ["character slip"]),
    (changed("menu", 0, "nm", value="Nasi Gorenq"), ["character slip"]),
    (changed("menu", 0, "nm", value="Mie Ayam"), ["misread"]),
    (changed("menu", 0, "price", value=None), ["missing"]), (changed("menu", 0, value=None), ["missing"]*3),
    (changed("total", "menu_type", value="x"), ["extra"]),
    ({**TRUTH, "menu": TRUTH["menu"] + [{"nm": "Kopi"}]}, ["extra"]),
    ({**TRUTH, "menu": [m | {"price": o["price"]} for m, o in zip(TRUTH["menu"], TRUTH["menu"][::-1])]},
     ["wrong row"]*2),
    ({**TRUTH, "menu": TRUTH["menu"][::-1]}, []),
    ({"menu": TRUTH["menu"], "total": {"subtotal": "29,000", "cashprice": "30,000", "changeprice": "1,000"}},
     ["wrong key"]), ({}, ["missing"]*9)])
def test_a_planted_error_has_its_name(doc, kinds):
    assert sorted(error["kind"] for error in value_errors(doc, TRUTH)) == sorted(kinds)


WHOLE = json.dumps(TRUTH)
ITEM = '{"nm": "Es Teh", "price": "5,000"}, '


@pytest.mark.parametrize("raw, kind", [
    (WHOLE, None), ("Here it is: " + WHOLE, None), ("```json\n" + WHOLE + "\n```", None), ("no idea", "unparseable"),
    ("", "unparseable"), (WHOLE[:-20], "truncated"), ('{"menu": [' + ITEM*30, "repeated loop"),
    ('{"menu": [' + (ITEM*30)[:-13], "repeated loop"), ("0"*300, "repeated loop"),
    ('{"menu": [' + ITEM*4 + '{"nm": "x"}]}', None), (json.dumps({"menu": [{"nm": "Tea"}]*20}), None)])
def test_a_text_as_a_whole(raw, kind): assert text_error(dict(raw=raw)) == kind


def test_a_failed_call_is_one_error_and_every_cut_is_seen():
    assert text_error(dict(raw="", error="timeout")) == "failed call"
    assert [e["kind"] for e in find_errors([row("a", "", error="timeout")])] == ["failed call"]
    for end in range(1, len(WHOLE)): assert text_error(dict(raw=WHOLE[:end])) == "truncated"


def test_long_garbage_is_taken():
    for raw in ("{[" * 500_000, '"a' * 500_000, json.dumps(TRUTH) * 3000): text_error(dict(raw=raw))
    deep = "[" * 5000 + "]" * 5000
    assert [e["kind"] for e in find_errors([row("a", deep)])] == ["repeated loop"]


# --- receipts that check themselves -----------------------------------------------------------------------------------
def test_payments_of_drawn_receipts_come_out_and_changed_ones_do_not():
    seen = 0
    for i in range(60):
        truth = make_split_receipt(i, "train").truth
        assert not [s for s in sums_wrong(truth) if s.startswith("total")], truth
        total = truth.get("total", {})
        if not {"total_price", "cashprice", "changeprice"} <= set(total): continue
        seen += 1
        digits = total["cashprice"]
        wrong = copy.deepcopy(truth)
        wrong["total"]["cashprice"] = digits[:-1] + ("1" if digits[-1] != "1" else "2")
        assert sums_wrong(wrong)
    assert seen > 5


def test_sums_by_hand():
    assert sums_wrong(TRUTH) == [] and sums_wrong(None) == sums_wrong([]) == sums_wrong({"total": "x"}) == []
    assert sums_wrong(TRUTH | {"sub_total": {"subtotal_price": "29.000"}}) == []
    assert sums_wrong(TRUTH | {"sub_total": {"subtotal_price": "28,000"}}) == ["items 29000, subtotal 28000"]
    assert sums_wrong(changed("total", "changeprice", value="2,000")) == ["total 29000 + change 2000, cash 30000"]
    unread = changed("menu", 0, "price", value="24,O00") | {"sub_total": {"subtotal_price": "1"}}
    assert sums_wrong(unread) == []  # a price that is no number says nothing


def test_the_filter_and_what_it_is_worth():
    rows = [row("a", TRUTH, logprob=-.01), row("b", changed("total", "changeprice", value="9,000"), logprob=-.01),
            row("c", changed("menu", 0, "nm", value="Nasi"), logprob=-1.), row("d", "no idea", logprob=-.01),
            row("e", changed("menu", 0, "nm", value="Mie"), logprob=-.01), row("f", TRUTH, logprob=-2.),
            row("g", TRUTH | {"odd": 1}), row("h", "", error="timeout")]
    kept, dropped = filter_bad_predictions(rows, infer_schema([TRUTH]), least=.5)
    assert [r["id"] for r in kept] == ["a", "e"] and all(r["reasons"] for r in dropped)
    found = filter_quality(kept, dropped)
    assert (found["n"], found["wrong"], found["dropped"]) == (8, 6, 6)
    assert (found["precision"], found["recall"], found["wrong_after"]) == (5/6, 5/6, 1/2)
    assert filter_quality([], [])["precision"] is None


# --- labels -----------------------------------------------------------------------------------------------------------
def planted(n=40, wrong=6):
    "Two groups with slips of their own, and labels of which a few are wrong"
    rng, groups, bad = random.Random(0), {"a": [], "b": []}, set()
    for i in range(n):
        truth = make_split_receipt(i, "train").truth
        label = copy.deepcopy(truth)
        if i < wrong:
            label.setdefault("total", {})["total_price"] = "77,777"
            bad.add((f"r{i}", "total.total_price"))
        for rows in groups.values():
            read = copy.deepcopy(truth)
            if rng.random() < .3: read["menu"] = {"nm": f"slip {rng.random()}"}
            rows.append(row(f"r{i}", read, label, logprob=-rng.random()))
    return groups, bad


def test_planted_label_noise_is_ranked_first():
    groups, bad = planted()
    found = suspect_labels(groups)
    assert {(one["id"], one["path"]) for one in found} == bad
    assert [one["sure"] for one in found] == sorted((one["sure"] for one in found), reverse=True)
    assert suspect_labels({"a": groups["a"]}) == []
    read = list(csv.DictReader(io.StringIO(suspects_csv(found))))
    assert [r["id"] for r in read] == [one["id"] for one in found] and read[0]["label"] == "77,777"
    assert read[0]["correction"] == "" and read[0]["groups"] == "a b"


# --- the verb ---------------------------------------------------------------------------------------------------------
class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.links, self.outside = [], [], []

    def handle_starttag(self, name, attributes):
        found = dict(attributes)
        if name == "article": self.ids.append(found["id"])
        if found.get("href", "").startswith("#"): self.links.append(found["href"][1:])
        for key in ("src", "href"):
            if str(found.get(key, "")).startswith(("http", "//", "/")): self.outside.append(found[key])


def test_the_verb_on_a_run(tmp_path):
    run, (groups, bad) = RunFolder.create(tmp_path / "run", {"dataset_dir": str(tmp_path)}), planted()
    groups["a"][7]["raw"] = "<script>alert(1)</script>"
    meta = [dict(id=f"r{i}", split="test", layout="wide" if i % 2 else "narrow") for i in range(40)]
    write_jsonl(tmp_path / "meta.jsonl", meta)
    for name, group in (("vanilla-model", "a"), ("finetuned-model", "b")): write_jsonl(
        run.predictions(name), groups[group])
    found = errors(str(run.path), worst=5)
    assert json.loads((run.report / "errors.json").read_text()) == found
    assert len(found["suspects"]) == len(bad) and {c["fact"] for c in found["clusters"]} >= {"layout", "length"}
    assert sum(c["n"] for c in found["clusters"] if c["fact"] == "layout") == 40
    page, text = Page(), (run.report / "errors.html").read_text()
    page.feed(text)
    assert page.ids and len(set(page.ids)) == len(page.ids) <= 10 and set(page.links) <= set(page.ids)
    assert not page.outside and "<script>alert" not in text
    assert "labels to doubt" in str(found) and (run.report / "errors.png").stat().st_size > 1000
    with pytest.raises(VlmError, match="unknown group"): errors(str(run.path), ["nobody"])


def test_a_run_without_any_error(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    write_jsonl(run.predictions("gpt"), [row("a", TRUTH), row("b", TRUTH)])
    found = errors(str(run.path))
    assert found["counts"] == [] and found["suspects"] == [] and found["filter"]["gpt"]["wrong"] == 0
