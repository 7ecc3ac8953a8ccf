"Receipts: truth by construction, held-out parts, readable text."
import json
import pytest
from vlm_tutor.core import VlmError
from vlm_tutor.receipts import (CORD_SCHEMA, HELD_OUT_LAYOUT, LAYOUTS, LEVELS, Style, make_examples, make_receipt,
                                make_split_receipt, word_is_held_out)


def leaves(obj):
    for o in obj.values() if isinstance(obj, dict) else obj:
        if isinstance(o, str): yield o
        else: yield from leaves(o)


def amount(text): return int(''.join(c for c in text if c.isdigit()))


@pytest.mark.parametrize('level', LEVELS)
def test_every_true_value_is_printed_and_every_receipt_fits_its_page(level):
    for seed in range(80):
        r = make_receipt(seed, level)
        assert [v for v in leaves(r.truth) if v not in r.text] == []
        assert CORD_SCHEMA.check(r.truth) == []
        assert all(0 <= x <= r.image.width and 0 <= y <= r.image.height for row in r.places for _, x, y in row)


def test_sums_are_arithmetic():
    for seed in range(200):
        t = make_receipt(seed, 1).truth
        if 'subtotal_price' in t.get('sub_total', {}):
            assert sum(amount(m['price']) for m in t['menu']) == amount(t['sub_total']['subtotal_price'])
        if 'changeprice' in t['total']:
            total = {k: amount(v) for k, v in t['total'].items()}
            assert total['total_price'] + total['changeprice'] == total['cashprice']


def test_left_and_right_text_do_not_touch():
    for seed in range(200):
        for row in make_receipt(seed, 1).places:
            xs = [x for _, x, _ in row]
            assert xs == sorted(xs), seed


def test_fields_are_absent_in_some_receipts_and_present_in_others():
    truths = [make_receipt(s, 1).truth for s in range(100)]
    for group, key in [('sub_total', 'subtotal_price'), ('sub_total', 'tax_price'), ('total', 'cashprice')]:
        assert 10 < sum(key in t.get(group, {}) for t in truths) < 95


def test_training_never_sees_held_out_words_or_layout():
    for i in range(150):
        for split in ('train', 'validation'):
            r = make_split_receipt(i, split)
            assert r.meta['layout'] in LAYOUTS
            assert not any(word_is_held_out(w) for m in r.truth['menu'] for w in m['nm'].split())
    tests = [make_split_receipt(i, 'test') for i in range(100)]
    unseen = [r for r in tests if r.meta['names'] == 'unseen']
    assert len(unseen) == 60 and sum(r.meta['layout'] == HELD_OUT_LAYOUT for r in tests) == 25
    assert all(word_is_held_out(w) for r in unseen for m in r.truth['menu'] for w in m['nm'].split())


def test_at_least_half_of_the_test_names_are_unseen():
    receipts = [make_split_receipt(i, 'test') for i in range(100)]
    names = [(m['nm'], r.meta['names']) for r in receipts for m in r.truth['menu']]
    assert sum(kind == 'unseen' for _, kind in names) / len(names) >= .5


def test_item_names_come_from_an_open_vocabulary():
    names = [m['nm'].lower() for i in range(300) for m in make_split_receipt(i, 'train').truth['menu']]
    assert len(set(names)) / len(names) > .9


def test_same_seed_same_bytes_and_more_receipts_change_nothing(tmp_path):
    few, many = make_examples(3, 7, 'train', tmp_path / 'a'), make_examples(5, 7, 'train', tmp_path / 'b')
    for a, b in zip(few, many):
        assert a.image.read_bytes() == b.image.read_bytes() and a.target == b.target
    assert json.loads(few[0].target) == few[0].truth


def test_easiest_level_is_one_clear_style():
    assert make_receipt(1, 0).meta['font'] == Style().font == 'mono'


@pytest.mark.parametrize('call, words', [(lambda: make_receipt(0, 9), 'level 9'),
                                         (lambda: make_split_receipt(0, 'dev'), "'dev'"),
                                         (lambda: make_examples(1, level='hard'), "'hard'")])
def test_bad_input(call, words):
    with pytest.raises(VlmError, match=words): call()
