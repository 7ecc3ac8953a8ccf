"""The scores against other implementations' recorded values, slow and obvious ones written here, and hostile input."""
import functools, gc, itertools, json, math, random, time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlm_tutor.core import RunFolder, VlmError, write_jsonl
from vlm_tutor.metrics import *
from vlm_tutor.metrics import _Reader

DATA = Path(__file__).parent / "data"
DONUT, EDGE, ANLS, MESSY = (json.loads((DATA / f"{n}.json").read_text())
                            for n in ("donut_cases", "donut_edge_cases", "anls_cases", "messy_cases"))
TEA = {"menu": {"nm": "Tea", "price": "5.000"}, "total": {"total_price": "5.000"}}


def nested(depth, kind=dict):
    "A document `depth` levels deep"
    found = "x"
    for _ in range(depth): found = {"a": found} if kind is dict else [found]
    return found


def receipt(seed, items):
    "A receipt of as many items, with random names and prices"
    r = random.Random(seed)
    word = lambda: "".join(r.choice("abcdefghij") for _ in range(r.randint(3, 8)))
    price = lambda: f"{r.randint(1, 99)},000"
    item = lambda: dict(nm=f"{word()} {word()}", cnt=str(r.randint(1, 9)), unitprice=price(), price=price())
    menu = [item() for _ in range(items)]
    return dict(menu=menu, sub_total=dict(subtotal_price=price()), total=dict(total_price=price(), cashprice=price()))


# --- Donut's two scores -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", DONUT, ids=lambda c: c["id"])
def test_donut_values(case):
    pred, gt = case["pred"], case["gt"]
    assert tree_distance(pred, gt) == pytest.approx(case["ted"], abs=1e-9)
    assert tree_distance({}, gt) == pytest.approx(case["ted_gt_size"], abs=1e-9)
    assert nted_accuracy(pred, gt) == pytest.approx(case["acc"], abs=1e-9)
    assert field_f1([pred], [gt]) == pytest.approx(case["f1_single"], abs=1e-9)


def test_donut_f1_over_a_set():
    sizes = [(len(flatten(c["pred"])), len(flatten(c["gt"]))) for c in DONUT]
    right = sum(c["f1_single"]*sum(size)/2 for c, size in zip(DONUT, sizes))  # from the recorded F1 of each pair
    together = field_f1([c["pred"] for c in DONUT], [c["gt"] for c in DONUT])
    assert together == pytest.approx(2*right/sum(map(sum, sizes)), abs=1e-9)
    assert together != pytest.approx(np.mean([c["f1_single"] for c in DONUT]), abs=1e-3)  # not a mean of means


def edge(text):
    "The Python object that an edge case tells of"
    if text.startswith("nested dict"): return nested(int(text.rsplit("_", 1)[1]))
    return eval(text, {"OrderedDict": OrderedDict, "nan": math.nan, "inf": math.inf})


@pytest.mark.parametrize("case", [c for c in EDGE if "pred_repr" in c], ids=lambda c: c["name"])
def test_edge_cases(case):
    pred, gt = edge(case["pred_repr"]), edge(case["gt_repr"])
    acc, f1 = nted_accuracy(pred, gt), field_f1([pred], [gt])
    assert 0 <= acc <= 1 and 0 <= f1 <= 1
    if tree_distance({}, gt) and "acc" in case: assert acc == pytest.approx(case["acc"], abs=1e-9)
    if "f1" in case: assert f1 == pytest.approx(case["f1"], abs=1e-9)
    if not tree_distance({}, gt): assert acc == (tree_distance(pred, gt) == 0)  # the reference gives 0, also when equal
    if "f1_raises" in case and not flatten(gt): assert f1 == 1  # nothing to find, nothing invented


def test_where_the_reference_fails():
    assert nted_accuracy({1: "x"}, {"1": "x"}) == field_f1([{None: "x"}], [{"None": "x"}]) == 1
    with pytest.raises(VlmError, match="1 predictions for 2 truths"): field_f1([TEA], [TEA, TEA])
    with pytest.raises(VlmError, match="nothing to score"): field_f1([], [])
    assert field_f1([TEA, None], [TEA, TEA]) == pytest.approx(2/3)


def test_nesting_thousands_deep():
    deep = nested(5000)
    assert exact_match(deep, deep) and nted_accuracy(deep, deep) == field_f1([deep], [deep]) == 1
    assert nted_accuracy(deep, TEA) == 0 and flatten(deep) == [(".".join("a"*5000), "x")]
    assert nted_accuracy(nested(1900), nested(2000)) == pytest.approx(1 - 2*100/4000)
    assert normalise({"b": nested(5000, list)}) == {}  # lists of lists vanish


def test_tree_distance_of_two_deep_trees():
    assert tree_distance(nested(1500), nested(1200)) == 2*300  # a key and its <subtree> each


def forest(obj):
    "The tree of a document as nested (label, children)"
    done = []
    for label, size in zip(*document_tree(obj)):
        children, left = [], size - 1
        while left:
            children.insert(0, done.pop())
            left -= children[0][2]
        done.append((label, tuple(children), size))
    return tuple(done)


def change_cost(a, b):
    "What Donut's evaluator asks for turning one label into another"
    text = lambda label: label.replace("<leaf>", "")
    if "<leaf>" in a and "<leaf>" in b: return slow_edit_distance(text(a), text(b))
    if "<leaf>" in a or "<leaf>" in b: return 1 + len(text(a if "<leaf>" in a else b))
    return int(a != b)


def slow_tree_distance(a, b):
    "The recurrence of ordered tree edit distance as it stands in the textbook"
    cost = lambda label: len(label.replace("<leaf>", "")) if "<leaf>" in label else 1
    @functools.cache
    def distance(f, g):
        if not f and not g: return 0
        if not g: return distance(f[:-1] + f[-1][1], ()) + cost(f[-1][0])
        if not f: return distance((), g[:-1] + g[-1][1]) + cost(g[-1][0])
        (x, inner_x, _), (y, inner_y, _) = f[-1], g[-1]
        return min(distance(f[:-1] + inner_x, g) + cost(x), distance(f, g[:-1] + inner_y) + cost(y),
                   distance(f[:-1], g[:-1]) + distance(inner_x, inner_y) + change_cost(x, y))
    return distance(forest(a), forest(b))


def slow_edit_distance(a, b, replace=1):
    @functools.cache
    def d(i, j):
        if not i or not j: return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + replace*(a[i - 1] != b[j - 1]))
    return d(len(a), len(b))


words = st.text("ab<é ", max_size=4)
keys = st.sampled_from(["a", "b", "cc", "", "<leaf>", "x.y"])
documents = st.recursive(words | st.integers(0, 9) | st.none(), max_leaves=6, extend=lambda inner:
                         st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(max_examples=150, deadline=None)
@given(documents, documents)
def test_tree_distance_is_the_textbook_one(a, b):
    assert tree_distance(a, b) == tree_distance(b, a) == slow_tree_distance(a, b)
    assert tree_distance(a, a) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("abc\0é😀", max_size=6), max_size=4), st.lists(st.text("abc\0é😀", max_size=6), max_size=4))
def test_edit_table_is_the_textbook_one(a, b):
    for replace in (1, 2):
        assert edit_table(a, b, replace).tolist() == [[slow_edit_distance(x, y, replace) for y in b] for x in a]


def cpu_seconds(f, *args):
    "What a call takes; the garbage collector walks its own objects alone, not those that other tests hold"
    gc.freeze()
    try:
        start = time.process_time()
        f(*args)
        return time.process_time() - start
    finally: gc.unfreeze()


def grows_with_its_input(f, small, large):
    "Four times the input costs about four times the work (a square: sixteen); a busy machine gets three tries."
    return any(cpu_seconds(f, large) < 8*cpu_seconds(f, small) + .02 for _ in range(3))


def test_a_long_loop_costs_no_more_than_its_length():
    loops = [{"menu": [{"nm": "Tea", "price": "5.000"}]*n} for n in (5_000, 20_000)]
    assert nted_accuracy(loops[1], receipt(0, 20)) == 0
    assert grows_with_its_input(lambda loop: nted_accuracy(loop, receipt(0, 20)), *loops)


def test_a_thousand_receipts_are_scored():
    truths = [receipt(i, 1 + i % 8) for i in range(1000)]
    texts = [json.dumps(receipt(i + i % 3, 1 + i % 8)) for i in range(1000)]
    assert 0 < score(texts, truths)["field_f1"] < 1


# --- JSON from text ---------------------------------------------------------------------------------------------------
def same(a, b): return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def test_messy_outputs():
    read = {c["id"]: read_json(c["text"]) for c in MESSY}
    right = [c["id"] for c in MESSY if any(same(read[c["id"]], reading) for reading in c["accept"])]
    assert len(right) >= 0.95*len(MESSY)
    assert not [c["id"] for c in MESSY if c["accept"] == [None] and read[c["id"]] is not None]


@pytest.mark.parametrize("case", MESSY, ids=lambda c: c["id"])
def test_strict_is_json_or_nothing(case):
    found = read_json(case["text"], repair=False)
    try: wanted = json.loads(case["text"])
    except ValueError: wanted = None
    if "Infinity" in case["text"] or not isinstance(wanted, (dict, list)): wanted = None
    assert found == wanted


PAIR = {"nm": "Tea", "price": "5"}
TWO = {"menu": [{"nm": "Tea"}, {"nm": "Ale"}]}


@pytest.mark.parametrize("text", [
    '~~~json\n{"nm": "Tea", "price": "5"}\n~~~', 'Result: ```{"nm": "Tea", "price": "5"}``` as asked',
    '{nm": "Tea", "price": "5"}', '{"nm": "Tea, "price": "5"}', '{"nm": Tea", "price": "5"}',
    '{"nm": "Tea", price": "5"}', '{“nm”： “Tea”，“price”： “5”}', '｛“nm”：“Tea”，“price”：“5”｝',
    '{"nm" => "Tea", "price" -> "5"}', '{nm = "Tea", price = "5"}', '{{"nm": "Tea", "price": "5"}}',
    r'\boxed{{"nm": "Tea", "price": "5"}}', '{"nm": "Tea", # name\n "price": "5"}', '{"nm": "Tea"\n"price": "5"',
    '{&#39;nm&#39;: &#39;Tea&#39;, &#39;price&#39;: &#39;5&#39;}', '{,"nm": "Tea";; "price": "5";}',
    '{"nm": "Tea", "price": "5"}\n\nNote: {price} is in [IDR].', '```json\n{"nm": "Tea", "price": "5\n```',
    '{"nm": "Tea", "price": "5", "cnt',
    '<think>Is it {"nm": "Coffee", "price": "50000000"}?</think>{"nm": "Tea", "price": "5",}'])
def test_more_messy_outputs(text): assert read_json(text) == PAIR


@pytest.mark.parametrize("text, wanted", [
    ('{"menu": [{"nm": "Tea"}, {"nm": "Ale"}, "b": {"c": "5"}}', TWO | {"b": {"c": "5"}}),
    ('{"menu": [{"nm": "Tea"}, {"nm": "Ale"]}, "b": {"c": "5"}}', TWO | {"b": {"c": "5"}}),
    ('{"menu": [{"nm": "Tea"}}, {"nm": "Ale"}], "b": 1}', TWO | {"b": 1}),
    ('{"menu": {"nm": "Tea"}, {"nm": "Ale"}, "b": 1}', TWO | {"b": 1}),
    ('{"menu": [{"nm": "Tea"} {"nm": "Ale"}, ...]}', TWO),
    ('{"a": [1, 2.5, 3,], "b": tru', {"a": [1, 2.5, 3], "b": True}),
    ('{"a": , "b": 5.000,00}', {"a": None, "b": "5.000,00"}),
    ('{"nm": "He said "hi", then left",}', {"nm": 'He said "hi", then left'}),
    ("{'nm': 'It's hot'}", {"nm": "It's hot"}), ('{"nm": "Tea\nHot"}', {"nm": "Tea\nHot"}),
    (f'{{"n": {"9"*5000}}}', {"n": "9"*5000})])
def test_odd_but_readable(text, wanted): assert read_json(text) == wanted


@pytest.mark.parametrize("text", [
    "[unclear]", "{...}", "{unknown}", "N/A", "true", '""', '"menu"', "}{", '{"a"}', "{:}", "[{", "see [1] and [2]",
    "| nm | price |", "<s_nm>Tea</s_nm>", "[" * 100_000, '{"a":' * 100_000])
def test_nothing_to_read(text): assert read_json(text) is None and read_json(text, repair=False) is None


scalars = st.none() | st.booleans() | st.integers(-10**6, 10**6) | st.floats(-1e6, 1e6) | st.text(max_size=12)
json_values = st.recursive(scalars, max_leaves=8, extend=lambda inner:
                           st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3))


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_the_repairing_reader_reads_valid_json_as_json_does(document, ascii, indent):
    text = json.dumps(document, ensure_ascii=ascii, indent=indent)
    assert same(_Reader(text, 0).read(), json.loads(text))


def test_cut_anywhere():
    text = json.dumps(receipt(1, 3))
    whole = set(flatten(json.loads(text)))
    for end in range(len(text)):
        lost = [field for field in flatten(read_json(text[:end])) if field not in whole]
        assert len(lost) <= 1, text[:end]  # only the value that was cut through


def test_any_text_is_taken():
    r, marks = random.Random(0), [*'{}[]":,\'\\a \n1/*“#…', '```', '\\u']
    for _ in range(5000):
        found = read_json("".join(r.choices(marks, k=r.randint(1, 40))))
        assert found is None or isinstance(found, (dict, list))


UNITS = [*'{["\\\'“,: \n', '{}', '{"a', '{"a":1,', '"a":1,', "[],", "1,", "a b c ", '{"a":"b"} ', "/*", "//", "```",
         "<think>", '"a "', '" , ', "<|", "&quot;", '\\"', "a,", "a, b: ", "\\n"]


@pytest.mark.parametrize("before", ["", "{", '{"a": ', '{"a": "', '{"a": [', "{'a': '"])
def test_a_megabyte_of_garbage_costs_no_more_than_its_length(before):
    for unit in UNITS:
        small, large = (before + (unit*n)[:n] for n in (250_000, 10**6))
        assert grows_with_its_input(read_json, small, large), unit


# --- ANLS and tables --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ANLS["anls"], ids=lambda c: c["id"])
def test_anls_by_the_rrc_rule(case):
    assert anls(case["pred"], case["golds"]) == pytest.approx(case["rrc_official_rule"], abs=1e-9)


def subsequence(a, b):
    "Length of the longest common subsequence, by definition"
    return max(n for n in range(len(a) + 1) for part in itertools.combinations(a, n) if is_subsequence(part, b))


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(char in rest for char in part)


def pairings(n, m):
    "All order-keeping matchings of some of n things with as many of m"
    for size in range(1, min(n, m) + 1):
        for x in itertools.combinations(range(n), size):
            for y in itertools.combinations(range(m), size): yield list(zip(x, y))


def exhaustive(a, b):
    "The best sum of cell similarities over all pairs of sub-tables"
    similar = lambda x, y: 2*subsequence(x, y)/(len(x) + len(y)) if x or y else 1
    table = {(i, j, k, l): similar(a[i][k], b[j][l]) for i in range(len(a)) for j in range(len(b))
             for k in range(len(a[0])) for l in range(len(b[0]))}
    columns = list(pairings(len(a[0]), len(b[0])))
    return max(sum(table[i, j, k, l] for i, j in rows for k, l in chosen)
               for rows in pairings(len(a), len(b)) for chosen in columns)


def test_grits_of_any_tables_is_a_lower_bound():
    r, equal = random.Random(0), 0
    table = lambda width: [[r.choice(["", "tea", "tee", "5", "50", "ale"]) for _ in range(width)]
                           for _ in range(r.randint(1, 3))]
    for _ in range(60):
        a, b = table(r.randint(1, 3)), table(r.randint(1, 3))
        cells_a, cells_b = len(a)*len(a[0]), len(b)*len(b[0])
        precision, recall, f = grits_content(a, b)
        found, best = precision*cells_a, exhaustive(a, b)
        assert found == pytest.approx(recall*cells_b) and f == pytest.approx(2*found/(cells_a + cells_b))
        assert 0 <= found <= best + 1e-9  # the factored search finds a pair of sub-tables, perhaps not the best
        assert grits_content(b, a) == pytest.approx((recall, precision, f))
        equal += abs(found - best) < 1e-9
    assert equal >= 50  # even on tables of noise it mostly is


def test_grits_of_a_misread_menu_is_the_exhaustive_one():
    r = random.Random(1)
    misread = lambda text: "".join("7" if r.random() < 0.15 else char for char in text)
    for _ in range(60):
        true = [[r.choice(["tea", "ale", "roti"]) + r.choice("abc"), str(r.randint(1, 99))] for _ in range(3)]
        pred = [["x", "5"]]*r.randint(0, 1) + [list(map(misread, row)) for row in true if r.random() < 0.8]
        if pred: assert grits_content(pred, true)[0]*len(pred)*2 == pytest.approx(exhaustive(pred, true))


@pytest.mark.parametrize("drop", [drop for n in range(4) for drop in itertools.combinations(range(4), n)])
def test_grits_of_a_table_with_rows_left_out(drop):
    rows = [["Nasi Goreng", "24,000", "2", "12,000"], ["Teh", "5,000", "1", ""], ["Kopi", "9,000", "1", "9,000"],
            ["Roti", "7", "", ""]]
    kept = [row for i, row in enumerate(rows) if i not in drop]
    share = len(kept)/4
    assert grits_content(kept, rows) == pytest.approx((1, share, 2*share/(1 + share)))  # precision is of the prediction
    assert grits_content(rows, kept) == pytest.approx((share, 1, 2*share/(1 + share)))


def test_grits_of_empty_tables():
    assert grits_content([], []) == (1, 1, 1) and grits_content([], [["a"]]) == grits_content([["a"]], []) == (0, 0, 0)


# --- intervals --------------------------------------------------------------------------------------------------------
def test_intervals_are_the_bootstrap_done_one_draw_at_a_time():
    truths = [receipt(i, 2) for i in range(30)]
    preds = [receipt(i + (i % 4 == 0), 2) for i in range(30)]
    low, high = score([json.dumps(p) for p in preds], truths)["ci"]["field_f1"]
    r, draws = random.Random(0), []
    for _ in range(1000):
        chosen = r.choices(range(30), k=30)
        draws.append(field_f1([preds[i] for i in chosen], [truths[i] for i in chosen]))
    assert [low, high] == pytest.approx(np.percentile(draws, [2.5, 97.5]).tolist(), abs=0.03)


def test_the_interval_covers():
    "About 95 of 100 samples of a known rate hold it within their interval"
    generator, inside = np.random.default_rng(0), 0
    for seed in range(200):
        values = generator.random(100) < 0.7
        low, high = interval(bootstrap_weights(100, 500, seed) @ values/100)
        inside += low <= 0.7 <= high
    assert 0.90 <= inside/200 <= 0.99


def test_paired_difference():
    truths = [receipt(i, 3) for i in range(40)]
    worse = [None if i % 8 == 0 else t for i, t in enumerate(truths)]
    found = bootstrap_difference(truths, worse, truths)
    assert found["field_f1"] == pytest.approx(1 - field_f1(worse, truths))
    assert 0 < found["ci"][0] < found["ci"][1]
    assert bootstrap_difference(worse, worse, truths) == {"field_f1": 0, "ci": [0, 0]}
    assert found == bootstrap_difference(truths, worse, truths)
    assert (bootstrap_weights(40, seed=0) != bootstrap_weights(40, seed=1)).any()


# --- faults of a published scorer, and the whole score ----------------------------------------------------------------
SUB = {"sub_total": {"subtotal_price": "9.000"}, "total": {"total_price": "9.000"}}


def test_a_missing_field_is_wrong_and_its_key_is_the_truths():
    found = score([json.dumps({"total": SUB["total"]})]*3, [SUB]*3)["fields"]
    assert found["sub_total.subtotal_price"]["f1"] == 0 and found["total.total_price"]["f1"] == 1
    assert list(found) == ["total.total_price", "sub_total.subtotal_price"]


def test_absent_in_both_is_no_hit():
    texts, truths = [json.dumps(TEA)]*2 + [json.dumps(SUB)], [TEA, TEA, SUB]
    found = score(texts, truths)["fields"]["sub_total.subtotal_price"]
    assert (found["n"], found["predicted"], found["absent_in_both"]) == (1, 1, 2)
    wrong = score(texts[:2] + ["{}"], truths)["fields"]["sub_total.subtotal_price"]
    assert (wrong["recall"], wrong["f1"], wrong["absent_in_both"]) == (0, 0, 2)


def test_unparseable_text_is_not_rewarded_and_failed_calls_count():
    bad, none = (score([json.dumps(TEA), text], [TEA, {"total": {"total_price": "1"}}]) for text in ("no idea", None))
    assert bad == none
    assert bad["n"] == 2 and bad["valid_json"] == bad["exact_match"] == bad["nted_accuracy"] == 0.5
    assert bad["field_f1"] == pytest.approx(2*3/(3 + 4))


def test_precision_and_recall_are_not_swapped():
    two = {"nm": ["Tea", "Ale"]}
    found = score([json.dumps({"nm": "Tea"})], [two])["fields"]["nm"]
    assert (found["precision"], found["recall"]) == (1, 0.5)
    found = score([json.dumps(two)], [{"nm": "Tea"}])["fields"]["nm"]
    assert (found["precision"], found["recall"]) == (0.5, 1)


def test_strict_and_repaired_stand_side_by_side():
    found = score([json.dumps(TEA), "Here: " + json.dumps(TEA)], [TEA, TEA])
    assert (found["field_f1"], found["valid_json"], found["exact_match"]) == (1, 1, 1)
    assert found["field_f1_strict"] == pytest.approx(2/3)
    assert found["valid_json_strict"] == found["exact_match_strict"] == found["nted_accuracy_strict"] == 0.5
    assert set(found["ci"]) >= {"field_f1", "field_f1_strict", "nted_accuracy"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(documents, documents), min_size=1, max_size=5))
def test_score_agrees_with_its_parts(pairs):
    preds, truths = [{"doc": p} for p, _ in pairs], [{"doc": t} for _, t in pairs]
    found = score([json.dumps(p) for p in preds], truths)
    assert found["field_f1"] == pytest.approx(field_f1(preds, truths))
    assert found["nted_accuracy"] == pytest.approx(np.mean([nted_accuracy(*pair) for pair in zip(preds, truths)]))
    equal = [normalise(pred) == normalise(truth) for pred, truth in zip(preds, truths)]
    assert found["exact_match"] == pytest.approx(np.mean(equal))
    for name, field in found["fields"].items():
        right, predicted, true = 0, 0, 0
        for pred, truth in zip(preds, truths):
            left = [text for path, text in flatten(truth) if path == name]
            true += len(left)
            for text in (text for path, text in flatten(pred) if path == name):
                predicted += 1
                if text in left: right += left.remove(text) is None
        assert (field["n"], field["predicted"]) == (true, predicted)
        assert field["f1"] == pytest.approx(2*right/(true + predicted))
    assert found["invented"] == sum(path not in found["fields"] for p in preds for path, _ in flatten(p))


# --- evaluate ---------------------------------------------------------------------------------------------------------
def row(id, raw=json.dumps(TEA), **more):
    return dict(id=id, raw=raw, truth=json.dumps(TEA), prompt="Read.", split="test", seconds=0.5, error=None) | more


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"dataset_dir": str(tmp_path / "data"), "dataset": "cord"})
    write_jsonl(folder.predictions("vanilla-model"), [
        row("a"), row("b", "no"), row("c", None, error="timeout"), row("d", '{"menu": {"nm": "Tee"}}'),
        row("a", "{}", split="train")])
    return folder


def test_evaluate_writes_the_contract(run):
    found = evaluate(run.path, "vanilla-model")
    on_file = json.loads(run.metrics("vanilla-model").read_text())
    assert on_file == found and (found["n"], found["failed"], found["seconds"]) == (4, 1, 2.0)
    assert {"n", "field_f1", "nted_accuracy", "exact_match", "valid_json", "seconds", "fields", "ci"} <= set(on_file)
    assert all({"precision", "recall", "f1"} <= set(field) for field in on_file["fields"].values())
    assert all(low <= on_file[name] <= high for name, (low, high) in on_file["ci"].items())
    assert found["valid_json"] == 0.5 and found["field_f1"] == pytest.approx(2*3/(4 + 12))
    assert "vlm compare" in str(found) and "menu.nm" in str(found)
    assert evaluate(run.path, "vanilla-model", "train")["n"] == 1


def test_subsets_come_from_the_data_set(run, tmp_path):
    known = [dict(id=i, split="test", names=n, layouts=n) for i, n in zip("abcd", ["seen", "unseen"]*2)]
    write_jsonl(tmp_path / "data/meta.jsonl", [dict(id="a", split="train"), *known])
    found = evaluate(run.path, "vanilla-model")["subsets"]
    assert {k: v["n"] for k, v in found["names"].items()} == {"seen": 2, "unseen": 2}
    assert set(found["layouts"]) == {"seen", "unseen"}
    assert found["names"]["seen"]["exact_match"] == 0.5 and found["names"]["unseen"]["exact_match"] == 0
    assert evaluate(run.path, "vanilla-model", "train")["subsets"] == {}


def test_bad_predictions(run, tmp_path):
    no_truth = "'a' has no truth"
    for rows, message in (([row("a"), row("a")], "'a' more than once"), ([], "no predictions of split 'test'"),
                          ([row("a", truth="Tea")], no_truth), ([row("a", truth=None)], no_truth)):
        write_jsonl(run.predictions("bad"), rows)
        with pytest.raises(VlmError, match=message): evaluate(run.path, "bad")
    with pytest.raises(VlmError, match="Did you mean 'vanilla-model'"): evaluate(run.path, "vanila-model")
    with pytest.raises(VlmError, match="vlm predict"): evaluate(run.path, "vanilla-model", "validation")
    with pytest.raises(VlmError, match="no run folder"): evaluate(tmp_path / "nowhere")
    write_jsonl(tmp_path / "data/meta.jsonl", [dict(id="z", split="test")])
    with pytest.raises(VlmError, match="hold 'a', which is not in split 'test'"): evaluate(run.path, "vanilla-model")


def test_truths_of_another_schema_are_refused(run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/schema.cord.json").write_text(json.dumps(dict(type="object", required=["invoice"])))
    with pytest.raises(VlmError, match="no truth in the predictions fits the schema of the run's data set: 'a'"):
        evaluate(run.path, "vanilla-model")
    assert not run.metrics("vanilla-model").exists()
    write_jsonl(run.predictions("mixed"), [row("a"), row("b", truth='{"invoice": "1"}')])
    assert evaluate(run.path, "mixed")["n"] == 2
