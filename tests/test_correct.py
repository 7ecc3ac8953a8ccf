"""Doubts, the page in a browser, and decisions that become a new version; planted wrong labels are the oracle."""
import csv, json, subprocess, sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from cord import shop_heads
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, read_jsonl, write_jsonl
from vlm_tutor.correct import *
from vlm_tutor.correct import _items, _token_losses
from vlm_tutor.crossval import crossval
from vlm_tutor.examples import SCHEMAS
from vlm_tutor.metrics import flatten
from vlm_tutor.predict import load_run_model, split_examples
from vlm_tutor.receipts import make_examples
from vlm_tutor.sharegpt import write_splits
from vlm_tutor.sources import compact_json, load_examples

browsers = pytest.mark.skipif(not CHROMIUM, reason="NO BROWSER: install Debian's chromium to check the review page")


def tree(folder): return {p.relative_to(folder): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def data(tmp_path):
    "Eight training and two test receipts; the third training label has a wrong total, noted with the right text"
    parts = {split: make_examples(n, 0, split, tmp_path / "drawn") for split, n in (("train", 8), ("test", 2))}
    wrong = parts["train"][2]
    right, total = wrong.target, wrong.truth["total"]["total_price"]
    wrong.target = change_value(right, "total.total_price", total, "77,777")
    write_splits(tmp_path / "data", "cord", parts, schema=SCHEMAS["cord"])
    return tmp_path / "data", wrong.id, right, total


@pytest.fixture
def run(data, tmp_path):
    "A run whose two groups read everything right, so that they agree against the wrong label"
    folder, bad, right, _ = data
    found = RunFolder.create(tmp_path / "run", {"model_name_or_path": "tiny-receipts", "dataset": "cord",
                                                "dataset_dir": str(folder), "output_dir": str(tmp_path / "run")})
    rows = [dict(id=e.id, raw=right if e.id == bad else e.target, truth=e.target, split="train", error=None)
            for e in load_examples(folder, "train")]
    for group in ("vanilla-model", "finetuned-model"): write_jsonl(found.predictions(group), rows)
    return found


# --- text -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ['{}', '[]', '"x"', '1.50', '{"a": [{"b": "x:y"}, {"b": "\\"{"}], "c": {"d": ["1"]}}',
                                  ' { "ä" : "}" , "e" : [ "1" ] } '])
def test_spans_are_the_values_of_the_document(text):
    found = [(path, str(json.loads(text[start:end]))) for path, start, end in value_spans(text)]
    assert sorted(found) == sorted(flatten(json.loads(text)))
    assert json.loads(spread_json(text)) == json.loads(text) and compact_json(spread_json(text)) == compact_json(text)


def test_spans_of_drawn_receipts_and_one_change(tmp_path):
    for e in make_examples(20, 3, "train", tmp_path):
        spans = value_spans(e.target)
        assert sorted((p, json.loads(e.target[a:b])) for p, a, b in spans) == sorted(flatten(e.truth))
        new = change_value(e.target, "total.total_price", e.truth["total"]["total_price"], 'a "b"')
        assert json.loads(new) == e.truth | {"total": e.truth["total"] | {"total_price": 'a "b"'}}
    assert change_value('{"a":["1","1"]}', "a", "1", "2") is None and change_value('{"a":1}', "a", "1", "2") is None


def test_the_loss_of_a_value_is_the_highest_of_its_own_tokens():
    text, pieces = '{"a":"12","b":{"c":"3"}}', ["<s>", '{"a', '":"', "12", '","b":{"', 'c":"', "3", '"}}', "<e>"]
    found = value_losses(text, pieces, [9, 9, 9, 2, 9, 9, 1, 9, 9], ["?", "?", "?", "17", "?", "?", "8", "?", "?"])
    assert found == [dict(path="a", label="12", loss=2, likely="17"), dict(path="b.c", label="3", loss=1, likely="8")]
    split = value_losses('{"a":"12"}', ['{"a":"1', '2"}'], [1, 3], ['{"a":"9', '5"}'])
    assert split == [dict(path="a", label="12", loss=3, likely="15")]


def test_the_fence():
    losses = [dict(id=str(i), loss=float(loss)) for i, loss in enumerate([1, 2, 3, 4, 5, 20, 30])]
    assert [s["id"] for s in loss_suspects(losses)] == ["6"]  # quartiles 2.5 and 12.5, fence 27.5
    assert loss_suspects([]) == [] and loss_suspects([dict(id="a", loss=3.)]*5) == []


# --- doubts -----------------------------------------------------------------------------------------------------------
def test_review_finds_the_planted_label_and_knows_the_right_one(run, data):
    _, bad, right, total = data
    found = review(str(run.path))
    read, sums = found["doubts"]
    assert (read["id"], read["path"], read["label"], read["says"]) == (bad, "total.total_price", "77,777", total)
    assert sums["id"] == bad and sums["why"].startswith("total 77777 + change")
    rows = list(csv.DictReader(open(found["list"], encoding="utf-8")))
    assert rows[0] == dict(id=bad, split="train", path="total.total_price", label="77,777", says=total,
                           why="read otherwise by vanilla-model, finetuned-model", correction="")
    assert proposal(right.replace(f'"{total}"', '"77,777"'), found["doubts"]) is not None
    with pytest.raises(VlmError, match="no receipt of split 'test'"): review(str(run.path), split="test")


def test_without_a_split_the_first_that_all_groups_answered_is_taken(run):
    assert review(str(run.path))["split"] == "train"
    for group in ("vanilla-model", "finetuned-model"):
        rows = [row | dict(split=split) for row in read_jsonl(run.predictions(group)) for split in ("test", "train")]
        write_jsonl(run.predictions(group), [row for row in rows if row["split"] == "test" or group[0] == "v"])
    found = review(str(run.path))
    assert found["split"] == "test" and "labels of split test to doubt" in str(found)
    assert review(str(run.path), ["vanilla-model"])["split"] == "train"
    with pytest.raises(VlmError, match="no receipt of split 'train' .*finetuned"): review(str(run.path), split="train")
    with pytest.raises(VlmError, match="unknown split 'tests'"): review(str(run.path), split="tests")


def test_losses_of_labels_by_models_that_did_not_see_them(tmp_path):
    words = [f"data={shop_heads(tmp_path, train=6, test=2)}", f"output_dir={tmp_path}/runs/cv", "eval_dataset=null",
             "val_size=0", "max_steps=1", "per_device_train_batch_size=4", "plot_loss=false", "eval_strategy=no"]
    run = RunFolder.open(crossval("tiny", folds=2, overrides=words)["folder"])
    found = {row["id"]: row for row in label_losses(run)}
    rows = {e.id: e for e in load_examples(tmp_path / "shops", "train")}
    assert set(found) == set(rows)
    assert all(row["path"] == "shop" and row["label"] == rows[name].truth["shop"] for name, row in found.items())
    for one, split in fold_runs(run):
        config = load_config(one.path)
        model, preprocess, _ = load_run_model(config, one.adapter)
        for example in split_examples(config, split):
            batch = preprocess.collate([preprocess.encode(example)])
            losses = _token_losses(model, preprocess, example)[1]
            assert abs(sum(losses)/len(losses) - model(**batch).loss.item()) < 1e-4
            assert found[example.id]["loss"] <= max(losses) + 1e-3
    told = review(str(run.path), losses=True)
    assert told["n"] == len({doubt["id"] for doubt in told["doubts"]}) >= 1
    assert all("seed-42" in doubt["why"] or "loss" in doubt["why"] for doubt in told["doubts"])


# --- the page ---------------------------------------------------------------------------------------------------------
def page_of(run, data):
    doubt = dict(path="total.total_price", label="x", says="</script><script>alert(1)</script>", why="loss 9.0")
    ids = [e.id for e in load_examples(data[0], "train")][:3]
    found = review(str(run.path))
    items = _items(run, "train", {name: [found["doubts"][0] | {}] if name == data[1] else [doubt] for name in ids})
    page = run.report / "page.html"
    page.write_text(review_page("Three", items), encoding="utf-8")
    return page, ids, ids.index(data[1])


def click(browser, what, i=None):
    place = f"#{what}" if i is None else f"#r{i} [data-do={what}]"
    browser.run(f"document.querySelector({json.dumps(place)}).click()")


def state(browser): return browser.run("[...document.querySelectorAll('article')].map(a=>a.dataset.state).join(' ')")


def write(browser, i, text):
    browser.run(f"document.querySelector('#r{i} textarea').value={json.dumps(text)}")


@browsers
@pytest.mark.parametrize("width", [1200, 390])
def test_decide_undo_reload_and_apply(run, data, tmp_path, width):
    page, ids, bad = page_of(run, data)
    others = [i for i in range(3) if i != bad]
    with Browser(tmp_path, width) as browser:
        browser.open(page.as_uri())
        assert state(browser) == "open open open" and browser.run("document.querySelector('#undo').disabled")
        assert browser.run("document.documentElement.scrollWidth") <= width
        click(browser, "accept", others[0])
        click(browser, "take", bad)
        click(browser, "correct", bad)
        write(browser, others[1], '{"menu": ')
        click(browser, "correct", others[1])
        assert "no JSON" in browser.run(f"document.querySelector('#r{others[1]} .wrong').textContent")
        click(browser, "accept", others[1])
        assert "open" not in state(browser) and browser.run("document.querySelector('#count').textContent")[0] == "3"
        click(browser, "undo")
        reload(browser)
        assert state(browser).split()[others[1]] == "open" and state(browser).count("open") == 1
        assert browser.run(f"JSON.parse(document.querySelector('#r{bad} textarea').value).total.total_price") == data[3]
        check_download(browser, data, tmp_path, ids, others[0])
        for _ in range(3): click(browser, "undo")
        assert state(browser) == "open open open" and not browser.errors()


def reload(browser):
    browser.run("window.old=1")
    browser.call("Page.reload")
    while True:
        try: return browser.wait("!window.old && document.readyState=='complete'")
        except RuntimeError: pass  # asked between two documents


def check_download(browser, data, tmp_path, ids, accepted):
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    click(browser, "save")
    file = tmp_path / "decisions.jsonl"
    for _ in range(100):
        if file.exists() and file.stat().st_size: break
        browser.run("new Promise(done=>setTimeout(done,50))")
    rows = {row["id"]: row for row in read_jsonl(file)}
    assert {name: row["decision"] for name, row in rows.items()} == {ids[accepted]: "accept", data[1]: "correct"}
    assert browser.run("lines()") == file.read_text(encoding="utf-8")
    told = correct(str(data[0]), str(file), str(tmp_path / "new"))
    assert (told["accepted"], told["corrected"]) == (1, 1)
    assert {e.id: e for e in load_examples(tmp_path / "new", "train")}[data[1]].target == data[2]


# --- a new version ----------------------------------------------------------------------------------------------------
def decision(data, **more):
    return dict(id=data[1], split="train", decision="correct", answer=spread_json(data[2])) | more


def applied(data, tmp_path, *rows, out="new"):
    return correct(str(data[0]), str(write_jsonl(tmp_path / "decisions.jsonl", rows)), str(tmp_path / out))


def test_only_the_label_changes_and_the_old_version_stays(data, tmp_path):
    before = tree(data[0])
    found = applied(data, tmp_path, decision(data), dict(id="test-00000", decision="accept") | dict(
        id=load_examples(data[0], "test")[0].id))
    assert tree(data[0]) == before and found["corrected"] == 1 and found["accepted"] == 1
    after = tree(tmp_path / "new")
    changed = {str(p) for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed == {"cord.json", "corrections.jsonl"}
    assert [e.target for e in load_examples(tmp_path / "new", "train")] == [
        data[2] if e.id == data[1] else e.target for e in load_examples(data[0], "train")]
    (row,) = read_jsonl(tmp_path / "new/corrections.jsonl")
    assert (row["id"], row["after"]) == (data[1], data[2]) and "77,777" in row["before"]


def test_a_csv_list_does_the_same(run, data, tmp_path):
    sheet = Path(review(str(run.path))["list"])
    rows = list(csv.DictReader(open(sheet, encoding="utf-8")))
    with open(sheet, "w", encoding="utf-8-sig", newline="") as file:
        out = csv.DictWriter(file, rows[0].keys())
        out.writeheader()
        out.writerows(row | dict(correction=data[3] if row["path"] else "") for row in rows)
    assert correct(str(data[0]), str(sheet), str(tmp_path / "new"))["changes"][0]["after"] == data[2]


@pytest.mark.parametrize("change, words", [
    (dict(id="nobody"), "no example 'nobody' in split 'train'"), (dict(split="test"), "in split 'test'"),
    (dict(answer='{"menu": ['), "is no JSON"), (dict(answer='{"strange": 1}'), "does not fit the schema"),
    (dict(answer='"text"'), "does not fit the schema"), (dict(was="0"), "is not the one that was judged"),
    (dict(decision="maybe"), "decision 2 of .* is none"), (dict(answer=None), "decision 2 of .* is none"),
    (dict(), "two decisions about example")])
def test_one_bad_decision_and_nothing_is_written(data, tmp_path, change, words):
    before = tree(data[0])
    good = decision(data) if not change else decision(data, id=load_examples(data[0], "train")[0].id, was=None)
    with pytest.raises(VlmError, match=words): applied(data, tmp_path, good, decision(data, **change))
    assert tree(data[0]) == before and not (tmp_path / "new").exists()


def test_places_and_files_that_will_not_do(data, tmp_path):
    for out in ("data", "drawn"):
        with pytest.raises(VlmError, match="never written over another"):
            applied(data, tmp_path, decision(data), out=out)
    with pytest.raises(VlmError, match="cannot read|no file|not there|does not exist"):
        correct(str(data[0]), str(tmp_path / "none.jsonl"), str(tmp_path / "new"))
    (tmp_path / "bad.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(VlmError, match="is not JSON"):
        correct(str(data[0]), str(tmp_path / "bad.jsonl"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_the_command_line(data, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [decision(data)])
    words = [sys.executable, "-m", "vlm_tutor.cli", "correct", str(data[0]), str(tmp_path / "d.jsonl"),
             "--out", str(tmp_path / "v2")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "1 corrected" in done.stdout, done.stderr
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr
