"Splits against what they promise: nothing moves, groups stay whole, no part is empty, leaks are found."
import json, random, subprocess, sys
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFilter

from vlm_tutor.core import Example, VlmError, read_json_file
from vlm_tutor.receipts import make_examples, synth
from vlm_tutor.sharegpt import save_dataset_in_sharegpt_format
from vlm_tutor.sources import load_splits
from vlm_tutor.splits import (assign_splits, field_value, group_values, join_groups, leaks, make_folds, near_duplicates,
                              place, row_groups, row_keys, split, split_of)

SHARES = dict(validation=.1, test=.2)


@pytest.fixture(scope="module")
def receipts(tmp_path_factory): return make_examples(60, folder=tmp_path_factory.mktemp("drawn"))


def vlm(*words): return subprocess.run([sys.executable, "-m", "vlm_tutor.cli", *map(str, words)],
                                       capture_output=True, text=True)


# --- places -----------------------------------------------------------------------------------------------------------
def test_places_are_uniform_and_depend_on_the_seed():
    tenths = Counter(int(10*place(f"row {i}")) for i in range(20_000))
    assert set(tenths) == set(range(10)) and all(1800 < n < 2200 for n in tenths.values())
    assert place("a") != place("a", seed=1) and place("a") == place("a")


def test_places_are_the_same_on_every_machine():
    "Worked out by sha256sum and bc: the first 53 bits of the digest of '0/a', as a fraction"
    import hashlib
    bits = bin(int(hashlib.sha256(b"0/a").hexdigest(), 16))[2:].zfill(256)[:53]
    assert place("a") == sum(int(b)*2.0**-(i + 1) for i, b in enumerate(bits))


@given(st.sets(st.text(max_size=8), min_size=1), st.floats(0, .4), st.floats(0, .4), st.floats(0, .1))
def test_growing_a_share_takes_from_training_only(keys, validation, test, more):
    for key in keys:
        before = split_of(key, dict(validation=validation, test=test))
        after = split_of(key, dict(validation=validation, test=test + more))
        assert after == before or (before, after) == ("train", "test")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=200, max_size=300, unique=True), st.randoms())
def test_no_row_moves_when_rows_are_added_or_reordered(rows, rng):
    groups = [str(row) for row in rows]
    few = dict(zip(groups[:150], assign_splits(groups[:150], dict(test=.3))))
    rng.shuffle(groups)
    many = dict(zip(groups, assign_splits(groups, dict(test=.3))))
    assert {key: many[key] for key in few} == few


def test_a_renamed_file_keeps_its_place_and_a_copy_shares_it(receipts, tmp_path):
    (tmp_path / "other.png").write_bytes(receipts[0].image.read_bytes())
    assert row_keys([Example("x", [tmp_path / "other.png"], "")]) == row_keys(receipts[:1])
    groups = row_groups([*receipts, Example("x", [tmp_path / "other.png"], "")], "none")
    assert groups[0] == groups[-1] and len(set(groups)) == len(receipts)


# --- groups -----------------------------------------------------------------------------------------------------------
def slow_groups(n, pairs):
    "Groups by walking from row to row"
    groups, left = [], set(range(n))
    while left:
        found, new = set(), {min(left)}
        while new:
            found |= new
            new = {j for i in new for a, b in pairs for j in (a, b) if i in (a, b)} - found
        groups.append(sorted(found))
        left -= found
    return groups


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), *(
    st.lists(st.none() | st.integers(0, 4), min_size=n, max_size=n) for _ in range(2)))))
def test_joined_groups_are_those_of_a_walk(drawn):
    n, one, other = drawn
    pairs = [(i, j) for values in (one, other) for i in range(n) for j in range(n)
             if values[i] is not None and values[i] == values[j]]
    names = join_groups([f"key {i}" for i in range(n)], [v and f"a{v}" for v in map(str_or_none, one)],
                        [v and f"b{v}" for v in map(str_or_none, other)])
    assert [[i for i in range(n) if names[i] == name] for name in dict.fromkeys(names)] == slow_groups(n, pairs)


def str_or_none(value): return None if value is None else str(value)


def test_a_new_row_of_a_known_shop_goes_to_its_shop(receipts):
    shops = [f"shop {i % 9}" for i in range(60)]
    few = assign_splits(join_groups(row_keys(receipts[:40]), shops[:40]), SHARES, seed=1)
    many = assign_splits(join_groups(row_keys(receipts), shops), SHARES, seed=1)
    assert many[:40] == few and len({(s, at) for s, at in zip(shops, many)}) == 9


def test_placed_rows_stay_and_draw_their_group_along():
    found = assign_splits(["a", "a", "b", "c"], {}, placed=["train", None, None, None])
    assert found == ["train"]*4
    groups = [f"g{i}" for i in range(40)] + ["g0"]
    free = assign_splits(groups[:40], SHARES)
    other = "test" if free[0] == "train" else "train"
    assert assign_splits(groups, SHARES, placed=[other] + [None]*40)[-1] == other


def test_values_come_from_meta_from_the_answer_from_functions_and_lists(receipts):
    e = Example("a", [], "", json.dumps(dict(shop=dict(name="Corner"), menu=[dict(nm="Tea"), dict(cnt=2)])), dict(k=0))
    assert [field_value(e, f) for f in ("shop.name", "menu.nm", "k", "shop.street", "shop")] == \
        ["Corner", '["Tea"]', "0", None, '{"name": "Corner"}']
    assert group_values(receipts, lambda e: len(e.target)) == [len(e.target) for e in receipts]
    assert group_values([e, Example("b", [], "", ' {"b":1, "a":2}'), Example("c", [], "", '{"a":2,"b":1}')],
                        "answer")[1:] == ['{"a": 2, "b": 1}']*2
    assert group_values(receipts[:2], [None, "x"]) == [None, "x"]


def test_pictures_that_were_sent_on_are_found_and_others_are_not(receipts, tmp_path):
    sent = []
    for i, e in enumerate(receipts[:20]):
        image = Image.open(e.image).convert("RGB")
        image = image.resize([int(.7*n) for n in image.size]).filter(ImageFilter.GaussianBlur(.5))
        image.save(tmp_path / f"{i}.jpg", quality=40)
        sent.append(Example(f"sent-{i}", [tmp_path / f"{i}.jpg"], ""))
    found = near_duplicates([*receipts, *sent])
    assert all(found[i] and found[i] == found[60 + i] for i in range(20))
    assert found[20:60] == [None]*40 and len(set(found)) == 21


def test_rows_of_several_pages_belong_together_by_one_page(receipts):
    first, second = receipts[:2]
    pair = Example("pair", [receipts[5].image, second.image], "")
    assert near_duplicates([first, second, pair])[0] is None
    assert len(set(near_duplicates([first, second, pair])[1:])) == 1


# --- empty parts ------------------------------------------------------------------------------------------------------
def test_an_empty_split_is_an_error_whose_seed_helps(receipts):
    groups = row_keys(receipts[:6])
    with pytest.raises(VlmError, match=r"is empty: 6 rows form 6 groups, the largest has 1. Seed (\d+)") as error:
        for seed in range(20): assign_splits(groups, SHARES, seed=seed)
    good = int(str(error.value).split("Seed ")[1].split()[0])
    assert set(assign_splits(groups, SHARES, seed=good)) == {"train", "validation", "test"}
    with pytest.raises(VlmError, match="Group by something smaller"): assign_splits(["form"]*9, SHARES)


@pytest.mark.parametrize("shares, said", [(dict(test=1.), "for test is 1.0"), (dict(validation=-.1), "is -0.1"),
                                          (dict(validation=.6, test=.4), "nothing to train on")])
def test_shares_that_cannot_be_are_refused(shares, said):
    with pytest.raises(VlmError, match=said): assign_splits(["a"], shares)


# --- folds ------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=5, max_size=80), st.integers(2, 5))
def test_folds_keep_groups_whole_and_none_is_empty(rows, k):
    groups, labels = [f"g{g}" for g, _ in rows], [label for _, label in rows]
    if len(set(groups)) < k:
        with pytest.raises(VlmError, match="leave a fold empty"): make_folds(groups, labels, k)
        return
    folds = make_folds(groups, labels, k)
    assert set(folds) == set(range(k)) and len(set(zip(groups, folds))) == len(set(groups))
    assert folds == make_folds(groups, labels, k)


def test_folds_of_single_rows_differ_by_one_row_in_each_label():
    rng = random.Random(0)
    labels = [rng.choice("aaaaabbc") for _ in range(203)]
    folds = make_folds([f"r{i}" for i in range(203)], labels, k=5, seed=2)
    for label in "abc":
        counts = Counter(fold for fold, own in zip(folds, labels) if own == label)
        assert max(counts.values()) - min(counts.get(i, 0) for i in range(5)) <= 1


def test_folds_cannot_be_fewer_than_two():
    with pytest.raises(VlmError, match="folds is 1"): make_folds(["a", "b"], k=1)


# --- leaks ------------------------------------------------------------------------------------------------------------
def test_leaks_are_found_by_bytes_by_look_and_by_field(receipts, tmp_path):
    Image.open(receipts[3].image).convert("RGB").save(tmp_path / "sent.jpg", quality=50)
    sent = Example("sent", [tmp_path / "sent.jpg"], "", receipts[3].target)
    parts = dict(train=receipts[:30], test=[receipts[2], sent, *receipts[30:32]])
    found = leaks(parts, "near-duplicates,answer")
    assert [(f["kind"], f["ids"]) for f in found] == [
        ("image", ["train-00002"]*2), ("near-duplicates", ["train-00003", "sent"]), ("answer", ["train-00003", "sent"])]
    assert {f["splits"] for f in found} == {"train, test"}
    assert leaks(dict(train=receipts[:30], test=receipts[30:])) == []


# --- the verb ---------------------------------------------------------------------------------------------------------
def test_the_verb_splits_grows_and_moves_nothing(tmp_path):
    source, data = tmp_path / "docs", tmp_path / "data"
    synth(source, n=40)
    first = split(data, source=source)
    before = {e.id: part for part, rows in load_splits(data).items() for e in rows}
    synth(source, n=55)
    done = vlm("split", data, "--source", source, "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    after = {e.id: part for part, rows in load_splits(data).items() for e in rows}
    assert {key: after[key] for key in before} == before and len(after) == 55
    assert (first["new"], again["new"], again["leaks"], sum(again["rows"].values())) == (40, 15, [], 55)
    text = vlm("split", data, "--folds", 4).stdout
    folds = read_json_file(data / "folds.json")
    assert set(folds["rows"]) == {key for key, part in after.items() if part == "train"}
    assert "leaks  none" in text and set(folds["rows"].values()) == {0, 1, 2, 3}


def test_the_verb_finds_leaks_in_the_data_of_others_and_mends_them(tmp_path):
    rows = make_examples(30, folder=tmp_path / "drawn")
    lines = [dict(image=str(e.image), target=e.target, id=f"{part}-{e.id}", split=part)
             for part, some in (("train", rows), ("test", rows[:3])) for e in some]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    save_dataset_in_sharegpt_format(tmp_path / "theirs", source=tmp_path / "rows.jsonl", name="theirs")
    done = vlm("split", tmp_path / "theirs")
    assert done.returncode == 0 and "leaks  3" in done.stdout and "--merge" in done.stdout
    mended = split(tmp_path / "mended", source=tmp_path / "theirs", merge=True)
    assert mended["leaks"] == [] and sum(mended["rows"].values()) == 33


def test_shares_that_cannot_be_are_named_where_nothing_is_split_either(tmp_path):
    synth(tmp_path / "docs", n=4)
    with pytest.raises(VlmError, match="the share for test is 2"): split(tmp_path / "docs", test=2)


@pytest.mark.parametrize("words, said", [
    (["--group", "shopp"], "no row has a field 'shopp' to group by"), (["--test", "2"], "the share for test is 2.0"),
    (["--folds", "1"], "folds is 1"), (["--stratify", "x"], "needs folds"), (["--seed", "x"], "invalid int value")])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, words, said):
    synth(tmp_path / "docs", n=20)
    done = vlm("split", tmp_path / "data", "--source", tmp_path / "docs", *words)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("vlm: ") and said in done.stderr
    assert not (tmp_path / "data").exists()
