"""Tests and plans against what they promise: false alarms and power counted in simulations, areas by definition."""
import itertools, math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from vlm_tutor.certainty import *
from vlm_tutor.core import VlmError
from vlm_tutor.metrics import field_f1

TRUTH = {"nm": "Tea", "price": "5"}


def test_mcnemar_by_hand():
    "Eight heads of ten: 2 · (1 + 10 + 45)/1024"
    a, b = [1]*8 + [0]*2 + [1]*5, [0]*8 + [1]*2 + [1]*5
    assert mcnemar(a, b) == dict(only_a=8, only_b=2, p=2*56/1024)
    assert mcnemar(b, a)["p"] == mcnemar(a, b)["p"]
    assert mcnemar([1]*4, [1]*4)["p"] == mcnemar([1, 0], [0, 1])["p"] == 1


def answers(n, wrong, generator):
    "As many answers, of which a share lacks the price"
    return [{"nm": "Tea"} if miss else TRUTH for miss in generator.random(n) < wrong]


def test_the_swap_test_is_the_exact_one():
    "All 2^6 ways to swap, written out"
    a = [TRUTH, TRUTH, TRUTH, TRUTH, {"nm": "Tea"}, TRUTH]
    b = [{"nm": "Tea"}, {}, {"nm": "Tea"}, TRUTH, TRUTH, {"nm": "Ale", "price": "5"}]
    gap = lambda x, y: abs(field_f1(x, [TRUTH]*6) - field_f1(y, [TRUTH]*6))
    gaps = [gap(*zip(*[pair[::-1] if swap else pair for pair, swap in zip(zip(a, b), swaps)]))
            for swaps in itertools.product([0, 1], repeat=6)]
    exact = np.mean([g >= gap(a, b) - 1e-12 for g in gaps])
    assert swap_test(a, b, [TRUTH]*6, draws=20_000) == pytest.approx(exact, abs=.015)
    assert swap_test(a, b, [TRUTH]*6) == swap_test(a, b, [TRUTH]*6)


def test_chance_rarely_looks_like_a_difference():
    generator, alarms, p = np.random.default_rng(0), 0, []
    for _ in range(300):
        a, b = (answers(60, .3, generator) for _ in range(2))
        p.append(swap_test(a, b, [TRUTH]*60, draws=200))
    alarms = np.mean([x < .05 for x in p])
    assert .01 <= alarms <= .09 and .4 < np.mean(p) < .65


@pytest.mark.parametrize("difference, disagree", [(.05, .10), (.10, .20), (.15, .30)])
def test_the_planned_number_of_receipts_sees_the_difference(difference, disagree):
    n, generator = receipts_for_match(difference, disagree), np.random.default_rng(1)
    shares = [(disagree + difference)/2, (disagree - difference)/2, 1 - disagree]
    seen = 0
    for only_a, only_b, same in generator.multinomial(n, shares, 400):
        a, b = [1]*only_a + [0]*only_b + [1]*same, [0]*only_a + [1]*only_b + [1]*same
        seen += mcnemar(a, b)["p"] < .05
    assert .70 <= seen/400 <= .88  # the exact test is a little more careful than the formula


def test_the_planned_number_sees_a_difference_in_f1():
    generator = np.random.default_rng(2)
    first = [answers(80, wrong, generator) for wrong in (.1, .3)]
    true = field_f1(answers(20_000, .1, generator), [TRUTH]*20_000) - field_f1(
        answers(20_000, .3, generator), [TRUTH]*20_000)
    n = receipts_for_f1(*first, [TRUTH]*80, true)
    seen = np.mean([swap_test(answers(n, .1, generator), answers(n, .3, generator), [TRUTH]*n, draws=200) < .05
                    for _ in range(200)])
    assert .6 <= seen <= .95
    assert receipts_for_f1(*first, [TRUTH]*80, true/2) == pytest.approx(4*n, rel=.05)


def test_the_spread_is_the_bootstraps_and_not_a_matter_of_order():
    from vlm_tutor.certainty import _influence
    from vlm_tutor.metrics import _counts, _f1, bootstrap_weights
    generator = np.random.default_rng(5)
    preds, true = answers(60, .3, generator), [TRUTH]*60
    counts = np.array([_counts(*pair) for pair in zip(preds, true)])
    drawn = _f1(*(bootstrap_weights(60) @ counts).T).std()
    assert _influence(counts).std()/60**.5 == pytest.approx(drawn, rel=.1)
    other, order = answers(60, .1, generator), generator.permutation(60)
    turned = [[x[i] for i in order] for x in (preds, other)]
    assert receipts_for_f1(preds, other, true) == receipts_for_f1(*turned, true)


def test_calibration_of_coins_that_say_what_they_are():
    generator = np.random.default_rng(3)
    sure = generator.random(20_000)
    right = generator.random(20_000) < sure
    assert calibration_error(sure, right) < .02
    assert calibration_error(np.sqrt(sure), right) == pytest.approx(np.mean(np.sqrt(sure) - sure), abs=.02)
    rows = reliability(sure[:95], right[:95], 10)
    assert sum(row["n"] for row in rows) == 95 and [r["confidence"] for r in rows] == sorted(
        r["confidence"] for r in rows)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
def test_separation_is_the_share_of_pairs_in_order(rows):
    good, bad = ([value for value, right in rows if right is side] for side in (True, False))
    found = separation(*zip(*rows))
    if not good or not bad: assert found is None
    else: assert found == pytest.approx(np.mean([(g > b) + (g == b)/2 for g in good for b in bad]))


def test_confidence_is_a_probability():
    assert confidence({}) is None and confidence({"logprob": math.log(.25)}) == pytest.approx(.25)
    assert confidence({"logprob": 1e-9}) == 1


def test_what_makes_no_sense_is_refused():
    for call in (lambda: receipts_for_match(.2, .1), lambda: receipts_for_match(0, .1),
                 lambda: receipts_for_match(.1, .2, power=1), lambda: mcnemar([1], []), lambda: reliability([], [])):
        with pytest.raises(VlmError): call()
