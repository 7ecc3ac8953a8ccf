"""Chapter 04a: schemas against the library `jsonschema`, against generated answers, and by hand."""
import json
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jsonschema import Draft202012Validator

from vlm_tutor.core import VlmError
from vlm_tutor.metrics import flatten
from vlm_tutor.receipts import CORD_SCHEMA, make_receipt
from vlm_tutor.schema import (Schema, exact_text, exact_value, field_prompt, infer_schema, read_schema_file,
                              rule_fields, schema_from_rules, schema_text)

names = st.text("abcxyz", min_size=1, max_size=3)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
                      max_leaves=8)
answers = st.lists(st.dictionaries(names, values, max_size=4), min_size=1, max_size=4)


def paths(value, at=""):
    "Every dotted path, found another way than the library does"
    if isinstance(value, list): return {p for item in value for p in paths(item, at)}
    if not isinstance(value, dict): return set()
    return {p for k, v in value.items() for p in {(at + "." + k).lstrip("."), *paths(v, (at + "." + k).lstrip("."))}}


@settings(suppress_health_check=[HealthCheck.too_slow]) # of making the first input, on a busy machine
@given(made=answers)
def test_all_answers_fit_the_schema_inferred_from_them(made):
    found = infer_schema(iter(made))
    Draft202012Validator.check_schema(found.rules)
    for answer in made:
        assert found.check(answer) == [] and Draft202012Validator(found.rules).is_valid(answer)
    assert {p for a in made for p in paths(a)} == {".".join(f.split(".")[:i + 1]) for f in found.fields
                                                   for i in range(f.count(".") + 1)}


@given(made=answers, other=st.dictionaries(names, values, max_size=4))
def test_check_finds_something_exactly_when_jsonschema_does(made, other):
    found = infer_schema(made)
    assert bool(found.check(other)) == (not Draft202012Validator(found.rules).is_valid(other))


@settings(suppress_health_check=[HealthCheck.too_slow]) # of making the first input, on a busy machine
@given(made=answers)
def test_written_and_read_it_is_the_same_schema(tmp_path_factory, made):
    found, path = infer_schema(made, "mine", "What?"), tmp_path_factory.mktemp("s") / "x.json"
    path.write_text(schema_text(found))
    again = read_schema_file(path)
    assert (again.name, again.fields, again.prompt) == ("mine", found.fields, "What?")
    assert schema_text(again) == schema_text(found)


fields = st.lists(st.lists(names, min_size=1, max_size=3).map(".".join), min_size=1, max_size=5)


@given(fields=fields, answer=st.dictionaries(names, values, max_size=3))
def test_whatever_the_json_schema_of_fields_allows_passes_the_check(fields, answer):
    schema = Schema("x", tuple(fields), "")
    Draft202012Validator.check_schema(schema.json_schema)
    if Draft202012Validator(schema.json_schema).is_valid(answer): assert schema.check(answer) == []
    if schema.check(answer): assert not Draft202012Validator(schema.json_schema).is_valid(answer)


def test_receipts_fit_cord_both_ways():
    rules, seen = Draft202012Validator(CORD_SCHEMA.json_schema), set()
    for seed in range(60):
        truth = make_receipt(seed, seed % 4).truth
        assert CORD_SCHEMA.check(truth) == [] and rules.is_valid(truth)
        assert CORD_SCHEMA.target(truth) == json.dumps(truth, ensure_ascii=False, separators=(",", ":")), "same order"
        seen |= {path for path, _ in flatten(truth)}
    assert seen <= set(CORD_SCHEMA.fields), "the score names fields as the schema does"
    assert rules.is_valid(dict(menu=dict(nm=["a", "b"], sub=dict(nm="c")))), "as CORD has it: one item, two lines"
    assert not rules.is_valid(dict(menu=[dict(name="a")]))


# --- targets ----------------------------------------------------------------------------------------------------------
@given(value=values)
def test_exact_text_is_json_without_blanks(value):
    assert exact_text(value) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@given(digits=st.from_regex(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True))
def test_no_digit_is_touched(digits):
    text = '{"a":[' + digits + ',"1.10"]}'
    assert exact_text(exact_value(text)) == text and Decimal(exact_value(text)["a"][0]) == Decimal(digits)


@given(made=answers, answer=st.dictionaries(names, values, max_size=4))
def test_a_target_is_the_same_answer_in_the_order_of_the_fields(made, answer):
    schema = infer_schema(made)
    text = schema.target(answer)
    assert json.loads(text) == json.loads(json.dumps(answer)) and schema.target(text) == text
    order = list(dict.fromkeys(field.partition(".")[0] for field in schema.fields))
    known = [key for key in json.loads(text) if key in order]
    assert known == sorted(known, key=order.index) and list(json.loads(text))[:len(known)] == known


# --- JSON Schema ------------------------------------------------------------------------------------------------------
RULES = {"type": "object", "title": "Invoice", "required": ["number"], "properties": {
    "number": {"type": "string"}, "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
    "total": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/money"}]}, "more": {"type": "object"}},
    "$defs": {"line": {"allOf": [{"properties": {"text": {}}}, {"properties": {"amount": {"$ref": "#/$defs/money"}}}]},
              "money": {"type": "object", "properties": {"value": {"type": "number"}, "unit": True}}}}


def test_fields_are_found_through_lists_references_and_alternatives():
    schema = schema_from_rules(RULES)
    assert schema.fields == ("number", "lines.text", "lines.amount.value", "lines.amount.unit", "total.value",
                             "total.unit", "more.*")
    assert schema.prompt == ("Extract the invoice as JSON with number, lines (text, amount.value, amount.unit), "
                             "total (value, unit) and more.")
    assert schema.check(dict(number="1", total="4", more=dict(any=[1]))) == []
    assert schema.check(dict(total=4, tax=1))[0] == "unknown field 'tax'"
    assert "'number' is a required property" in schema.check(dict(total="4"))


def test_a_schema_that_holds_itself_ends():
    tree = {"$ref": "#/$defs/node", "$defs": {"node": {"properties": {
        "name": {}, "parts": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}}}
    assert rule_fields(tree) == ["name", "parts"]


def test_a_pydantic_model_is_a_schema():
    pydantic = pytest.importorskip("pydantic")
    line = pydantic.create_model("Line", text=(str, ...), amount=(float | None, None))
    model = pydantic.create_model("Bill", number=(str, ...), lines=(list[line], []))
    schema = schema_from_rules(model.model_json_schema())
    assert (schema.name, schema.fields) == ("Bill", ("number", "lines.text", "lines.amount"))
    assert schema.check(dict(number="1", lines=[dict(text="a", amount=None)])) == []
    assert schema.check(dict(number=1)) == ["number: 1 is not of type 'string'"]


@pytest.mark.parametrize("rules, problem", [
    ({"type": "objekt"}, "is no JSON Schema: 'objekt'"), ({"$ref": "http://x.org/a.json"}, "Only references within"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "'#/$defs/b', which is not in it"), ([], "it holds no object")])
def test_a_bad_schema_file_is_one_error(tmp_path, rules, problem):
    (tmp_path / "bad.json").write_text(json.dumps(rules))
    with pytest.raises(VlmError) as error: read_schema_file(tmp_path / "bad.json")
    assert problem in str(error.value)


@pytest.mark.parametrize("fields, prompt", [
    (["a"], "Extract the document as JSON with a."), (["a", "b"], "Extract the document as JSON with a and b."),
    (["a.b", "c", "a.d.e"], "Extract the document as JSON with a (b, d.e) and c."),
    (["*"], "Extract the document as JSON."), (["a.*", "*"], "Extract the document as JSON with a.")])
def test_prompts_by_hand(fields, prompt): assert field_prompt(fields) == prompt


def test_keys_keep_the_order_of_the_documents():
    orders = [["shop", "total"], ["shop", "tax", "total", "card"], ["date", "shop"], ["tip"], ["tax", "service"]]
    found = infer_schema(dict.fromkeys(order, "x") for order in orders)
    assert found.fields == ("date", "shop", "tax", "service", "total", "card", "tip")
