"""The field's own table: values counted by hand, assignments by trying all, menus with rows moved and merged."""
import itertools, json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlm_tutor.core import RunFolder, VlmError, write_jsonl
from vlm_tutor.fields import *
from vlm_tutor.metrics import flatten, grits_content

DONUT = json.loads((Path(__file__).parent / "data/donut_cases.json").read_text())
ROWS = [["Nasi Goreng", "24,000", "2", "12,000"], ["Es Teh", "5,000", "1", ""], ["Kopi", "9,000", "1", "9,000"]]


# --- values -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("a, b, same", [
    ("TOTAL:", "total", True), ("Café", "CAFÉ", True), ("ＴＥＡ", "tea", True), ("Tea", "Teh", False),
    ("straße", "STRASSE", True), ("12,000", "12.000", True), ("10%", "10", True), ("-", "", True)])
def test_case_and_punctuation_do_not_count(a, b, same): assert (plain(a) == plain(b)) is same


@pytest.mark.parametrize("text, locale, wanted", [
    ("12,000", "id", "12000"), ("12.000", "id", "12000"), ("12000", "id", "12000"), ("Rp. 12.000,-", "id", "12000"),
    ("12.000,50", "id", "12000.5"), ("1,5", "id", "1.5"), ("12,000", "en", "12000"), ("12.000", "en", "12"),
    ("1,234,567.89", "en", "1234567.89"), ("12,000", "de", "12"), ("1.234,5", "de", "1234.5"),
    ("1 234,5", "fr", "1234.5"), ("1’234.50", "ch", "1234.5"), ("2 x", "en", "2"), ("x2", "en", "2"),
    ("$5", "en", "5"), ("-5,000", "id", "-5000"), ("1,23,456", "en", None), ("12,00", "en", None),
    ("1.2.3", "en", None), ("Tea 2", "en", None), ("", "en", None), ("12,000,00", "id", None), ("-", "en", None)])
def test_numbers_as_they_are_written_there(text, locale, wanted):
    assert read_number(text, locale) == (None if wanted is None else Decimal(wanted))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(list(LOCALES)))
def test_a_grouped_number_is_read_back(number, locale):
    for mark in LOCALES[locale][0]: assert read_number(f"{number:,}".replace(",", mark), locale) == number
    assert read_number(str(number), locale) == number


def test_what_happened_to_a_field():
    assert field_counts(["a", "b", "x"], ["a", "b"]) == dict(right=2, misread=0, missed=0, made_up=1, predicted=3, n=2)
    assert field_counts([], ["a", "b"])["missed"] == 2 and field_counts(["a"], [])["made_up"] == 1
    assert field_counts(["x", "y"], ["a", "a", "y"]) == dict(right=1, misread=1, missed=1, made_up=0, predicted=2, n=3)


# --- rows -------------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_the_assignment_is_the_best_of_all(n, m, seed):
    gain = np.random.default_rng(seed).integers(-3, 6, (n, m))
    pairs = assign(gain)
    small = min(n, m)
    assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == small
    every = ([*zip(range(n), p)] for p in itertools.permutations(range(m), n)) if n <= m else (
        [*zip(p, range(m))] for p in itertools.permutations(range(n), m))
    assert sum(gain[pair] for pair in pairs) == max(sum(gain[pair] for pair in way) for way in every)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_rows_find_their_partners_in_any_order(order):
    pred = [ROWS[i] for i in order]
    assert match_rows(pred, ROWS) == (list(enumerate(order)), [], [])


def test_rows_put_in_and_left_out():
    other = ["Zzz", "777", "8", ""]
    assert match_rows([ROWS[0], other, ROWS[1]], ROWS) == ([(0, 0), (2, 1)], [1], [2])
    assert match_rows([], ROWS) == ([], [], [0, 1, 2]) and match_rows(ROWS, []) == ([], [0, 1, 2], [])


# --- GriTS of the menu, by hand: f is the similarity of a cell, 2·LCS/(both lengths), 1 for two empty cells ----------
def test_grits_with_a_row_put_in():
    pred = [ROWS[0], ["Zzz", "777", "8", ""], *ROWS[1:]]
    assert grits_content(pred, ROWS) == pytest.approx((12/16, 1, 24/28))


def test_grits_with_two_rows_merged():
    "`ab cd` against `ab`: 2·2/(5 + 2); the price likewise; the other row finds no partner"
    true, pred = [["ab", "12"], ["cd", "34"]], [["ab cd", "12 34"]]
    found = 2*(4/7)
    assert grits_content(pred, true) == pytest.approx((found/2, found/4, 2*found/(2 + 4)))


def test_grits_with_rows_moved():
    "Three rows with nothing in common but order: turned round, one of them is left; moved by one, two"
    rows = [["aa", "11"], ["bb", "22"], ["cc", "33"]]
    assert grits_content(rows[::-1], rows) == pytest.approx((1/3, 1/3, 1/3))
    assert grits_content(rows[1:] + rows[:1], rows) == pytest.approx((2/3, 2/3, 2/3))


def test_table_of_a_document():
    assert table_rows({"menu": {"nm": "Tea", "price": 5, "sub": {"nm": "x"}}}) == [["Tea", "5", "", ""]]
    assert table_rows({"menu": [{"nm": ["a", "b"]}, "odd"]}) == [] and table_rows({"menu": [{"nm": ["a", "b"]}]}) == [
        ["a b", "", "", ""]]
    assert table_rows(None) == table_rows([]) == table_rows({"menu": "Tea"}) == table_rows({"menu": [{"x": 1}]}) == []


def test_table_scores_leave_out_receipts_without_one():
    doc, none = {"menu": [{"nm": "Tea", "price": "5"}]}, {"total": {"total_price": "5"}}
    found = table_scores([doc, None, none], [doc, doc, none])
    assert (found["n"], found["grits"], found["row_f1"], found["missed"]) == (2, .5, pytest.approx(2/3), 1)
    assert table_scores([none], [none]) is None


# --- the table --------------------------------------------------------------------------------------------------------
def test_the_strict_column_is_field_f1_of_each_field():
    preds, truths = [c["pred"] for c in DONUT[:80]], [c["gt"] for c in DONUT[:80]]
    for row in field_scores(preds, truths):
        sides = [[v for p, v in flatten(doc) if p == row["field"]] for docs in (preds, truths) for doc in docs]
        right = sum(sum(min(a.count(v), b.count(v)) for v in set(a)) for a, b in zip(sides[:80], sides[80:]))
        assert row["exact"] == pytest.approx(2*right/sum(map(len, sides)))
        assert row["exact"] <= row["plain"] + 1e-9 and 0 <= row["anls"] <= 1
        assert row["n"] == sum(map(len, sides[80:]))


def test_absent_in_both_is_no_hit_and_none_is_no_reward():
    sub = {"sub_total": {"subtotal_price": "9.000"}}
    row = field_scores([{}, {}, None], [sub, {}, {}])[0]
    assert (row["n"], row["plain"], row["missed"], row["made_up"]) == (1, 0, 1, 0)


def rows(answers, truth):
    return [dict(id=f"r{i}", raw=None if a is None else json.dumps(a), truth=json.dumps(truth), split="test",
                 error="timeout" if a is None else None, logprob=-.1*i) for i, a in enumerate(answers)]


def test_the_verb_on_a_run(tmp_path):
    truth = {"menu": [{"nm": "Tea", "price": "5,000"}]}
    run = RunFolder.create(tmp_path / "run", {})
    write_jsonl(run.predictions("vanilla-model"), rows([truth, None, {}, truth], truth))
    write_jsonl(run.predictions("gpt"), rows([truth]*3, truth))
    found = fields(str(run.path), locale="id")
    assert json.loads((run.report / "fields.json").read_text()) == found
    assert found["left_out"] == {"vanilla-model": 1, "gpt": 0} and list(found["groups"]) == ["vanilla-model", "gpt"]
    vanilla = found["groups"]["vanilla-model"]
    assert (vanilla["n"], vanilla["failed"], vanilla["fields"][0]["n"]) == (3, 1, 3)
    assert found["tests"]["gpt"]["exact_match"]["only_a"] == 2
    assert "1 receipts of vanilla-model are left out" in str(found)
    assert found["groups"]["gpt"]["calibration"]["right"] == 1 and "vlm errors" in str(found)
    with pytest.raises(VlmError, match="unknown locale 'xx'"): fields(str(run.path), locale="xx")
    with pytest.raises(VlmError, match="no predictions of group 'nobody'"): fields(str(run.path), "nobody")
    write_jsonl(run.predictions("other"), rows([truth], dict(invoice="1")))
    with pytest.raises(VlmError, match=r"'r0' has one truth in vanilla-model \(fields menu.nm.*other \(fields invoice"):
        fields(str(run.path), "vanilla-model,other")


def test_objects_nested_thousands_deep_are_scored():
    deep = {"menu": [{"nm": "Tea"}]}
    for _ in range(3000): deep = {"a": deep}
    truth = {"menu": [{"nm": "Tea"}]}
    assert field_scores([deep], [truth])[0]["plain"] == 0 and table_scores([deep], [truth])["missed"] == 1
