"Probes before and after: scores by hand, shares of an adapter against PEFT's own arithmetic, answers asked once."
import json, shutil

import pytest
import torch
from cord import short_receipts
from hypothesis import given, settings, strategies as st
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, read_json_file, read_jsonl
from vlm_tutor.forgetting import *
from vlm_tutor.predict import generate, load_run_model
from vlm_tutor.sources import load_examples
from vlm_tutor.tiny import load_model
from vlm_tutor.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of four long steps on receipts with short answers"
    place = tmp_path_factory.mktemp("forgetting")
    data, path = short_receipts(place / "data", 8), place / "run"
    train("tiny", overrides=dict(data=str(data), output_dir=str(path), num_train_epochs=2, eval_strategy="no",
                                 per_device_train_batch_size=4, save_strategy="no"))
    return RunFolder(path)


# --- probes -----------------------------------------------------------------------------------------------------------
def test_probes_are_shared_between_the_skills_and_stay_the_same(tmp_path):
    probes, again = (make_probes(7, tmp_path / name) for name in ("one", "two"))
    assert [p.meta["skill"] for p in probes] == [*SKILLS, *SKILLS[:2]] and len({p.id for p in probes}) == 7
    assert [(p.prompt, p.target, p.image.read_bytes()) for p in probes] == [
        (p.prompt, p.target, p.image.read_bytes()) for p in again]
    assert not {p.target for p in make_probes(7, tmp_path / "other", seed=1)} & {p.target for p in probes}
    assert all(p.target and p.prompt for p in probes)
    assert "{" in probes[3].target and any("\n" in p.target for p in probes)


def test_rehearsal_never_shows_a_probe(tmp_path):
    folder = save_rehearsal(tmp_path / "other", 10)
    rows = load_examples(folder, split="train")
    assert len(rows) == 10 and not (folder / "drawn").exists()
    assert not {r.target for r in rows} & {p.target for p in make_probes(10, tmp_path / "probes")}


def test_probes_of_ones_own(run, tmp_path):
    found = find_probes(str(run.path.parent / "data"), 5, tmp_path)
    assert len(found) == 5 and {p.meta["skill"] for p in found} == {"your probes"} and not list(tmp_path.iterdir())
    with pytest.raises(VlmError, match="n is 4. Allowed: 5 or more"): make_probes(4, tmp_path)


# --- scores -----------------------------------------------------------------------------------------------------------
def edits(a, b):
    "Levenshtein's distance, row by row"
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1): last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


@settings(max_examples=100, deadline=None)
@given(st.text("ab c", max_size=12), st.text("ab c", max_size=12))
def test_likeness_is_edits_by_length(a, b):
    x, y = a.strip(), b.strip()
    assert likeness(a, b) == pytest.approx(1 - edits(x, y) / max(len(x), len(y), 1)) == likeness(b, a)


def answers(texts): return [dict(id=str(i), raw=text, truth="abcd", error=None) for i, text in enumerate(texts)]


def test_changes_by_hand():
    rows = dict(base=answers(["abcd", "abcd", "abxx", "abcd"]), a=answers(["abcd", "xxxx", "abcd", "abcd"]))
    found = {r["skill"]: r for r in probe_table(rows, ["x", "x", "y", "y"])}
    assert [found[s]["before"] for s in "xy"] == [1, .75] and [found[s]["after"] for s in "xy"] == [.5, 1]
    assert found["all"]["change"] == pytest.approx(-.125) and found["all"]["n"] == 4
    assert found["x"]["ci"] == [-1, 0] and found["y"]["ci"] == [0, .5]
    same = probe_table(dict(base=rows["a"], a=rows["a"]), ["x"] * 4)
    assert all(r["change"] == 0 and r["ci"] == [0, 0] for r in same)


def test_habits_by_hand():
    rows = [dict(raw=raw, truth=truth) for raw, truth in (
        ('{"menu": 1}', "a page"), ('{"menu": 2}', "two"), ("a page", "a page"), ('{"a": 1}', '{"a": 1}'))]
    assert habits(rows) == dict(trained_form=2 / 3, same_start=.5)
    assert habits(rows[3:])["trained_form"] is None and habits([dict(raw=None, truth="x")])["trained_form"] == 0


@pytest.mark.parametrize("change, ci, word", [
    (-.3, [-.4, -.1], "forgot"), (-.01, [-.015, -.005], "kept"), (.1, [.05, .2], "gained"), (0, [-.05, .05], "kept"),
    (-.1, [-.3, .05], "not settled"), (.01, [-.2, .2], "not settled")])
def test_verdicts(change, ci, word):
    assert verdict(change, ci, 5) == word and verdict(change, ci, 4) == "too few"


def test_remedies_only_when_something_is_gone():
    config, row = load_config("tiny"), dict(skill="list", change=-.5, ci=[-.6, -.4], n=9)
    assert remedies(config, [row | dict(change=0, ci=[-.01, .01])], "r") == []
    told = "\n".join(remedies(config, [row], "r"))
    for words in ("rehearsal=", "--curve", "learning_rate below 0.004", "lora_rank below 16"): assert words in told
    whole = remedies(load_config("tiny", dict(finetuning_type="full", learning_rate=1e-4)), [row], "r")
    assert "lora_rank" not in "\n".join(whole)


# --- a weaker adapter -------------------------------------------------------------------------------------------------
def weights_added(folder):
    "What an adapter adds to one layer's weights, by PEFT"
    from peft import PeftModel
    model = PeftModel.from_pretrained(load_model("tiny-receipts"), folder)
    return model.base_model.model.model.language_model.layers[2].mlp.up_proj.get_delta_weight("default")


@pytest.mark.parametrize("share", [.25, .5, 1.5])
def test_a_share_of_an_adapter_adds_that_share(run, tmp_path, share):
    scaled = scale_adapter(run.adapter, share, tmp_path / "scaled")
    whole = weights_added(run.adapter)
    assert whole.abs().max() > 0 and torch.allclose(weights_added(scaled), share * whole, atol=1e-6)
    assert read_json_file(scaled / "base.json") == read_json_file(run.adapter / "base.json")


def test_what_has_no_shares_is_refused(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run.adapter, other)
    about = read_json_file(other / "adapter_config.json")
    for change, words in ((dict(use_dora=True), "DoRA"), (dict(peft_type="IA3"), "IA3")):
        (other / "adapter_config.json").write_text(json.dumps(about | change))
        with pytest.raises(VlmError, match=f"a share of the {words} adapter"): scale_adapter(other, .5, tmp_path / "no")
    (other / "config.json").write_text("{}")
    with pytest.raises(VlmError, match="is a whole model"): scale_adapter(other, .5, tmp_path / "no")


@pytest.mark.slow
def test_the_curve_goes_from_the_base_to_the_trained_model(run, tmp_path):
    config, probes = load_config(run.config_file), make_probes(5, tmp_path)
    tasks = load_examples(run.path.parent / "data", split="test")[:2]
    curve = trade_off(run, config, run.adapter, probes, tasks)
    rows = ask_all(run, config, {"vanilla-model": None, "finetuned-model": run.adapter}, probes)
    ends = probe_table(rows, [p.meta["skill"] for p in probes])[-1]
    assert [r["share"] for r in curve] == [0, .25, .5, .75, 1] and curve[0]["folder"] is None
    assert (curve[0]["probes"], curve[-1]["probes"]) == pytest.approx((ends["before"], ends["after"]))
    assert best_share([dict(task=.2, probes=.9), dict(task=.8, probes=.7)])["task"] == .8


# --- the verb ---------------------------------------------------------------------------------------------------------
def test_answers_are_those_of_the_models_and_asked_once(run):
    result = forgetting(str(run.path), n=5)
    files = {g: run.path / "forgetting" / f"{g}.jsonl" for g in ("vanilla-model", "finetuned-model")}
    rows, before = {g: read_jsonl(f) for g, f in files.items()}, {g: f.read_text() for g, f in files.items()}
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, run.adapter)
    probes = {p.id: p for p in make_probes(5, run.path / "again")}
    asked = [preprocess.encode(probes[r["id"]], answer=False) for r in rows["finetuned-model"]]
    limit = rows["finetuned-model"][0]["decoding"]["max_new_tokens"]
    assert generate(model, preprocess, asked, limit) == [r["raw"] for r in rows["finetuned-model"]]
    assert json.loads((run.report / "forgetting.json").read_text()) == result and result["n"] == 5
    assert result["habits"]["vanilla-model"]["trained_form"] <= result["habits"]["finetuned-model"]["trained_form"]
    assert forgetting(str(run.path), n=5)["skills"] == result["skills"]
    assert {g: f.read_text() for g, f in files.items()} == before
    assert (run.report / "forgetting.png").stat().st_size > 5000


def test_other_adapters_join_in_and_a_changed_one_is_asked_again(run, tmp_path, capsys):
    half = scale_adapter(run.adapter, .5, tmp_path / "half")
    result = forgetting(str(run.path), adapters=[str(half)], n=5)
    assert {r["group"] for r in result["skills"]} == {"finetuned-model", "half"}
    scale_adapter(run.adapter, .25, half)
    forgetting(str(run.path), adapters=[str(half)], n=5)
    assert "half.jsonl: the adapter changed" in capsys.readouterr().out
    with pytest.raises(VlmError, match="would be called 'half'"): forgetting(str(run.path), adapters=[str(half)] * 2)


def test_bad_input_is_refused_first(run, tmp_path):
    with pytest.raises(VlmError, match="no run folder"): forgetting(str(tmp_path / "none"))
    with pytest.raises(VlmError, match="exists. Name a new folder"): forgetting(str(run.path), rehearsal=str(tmp_path))
    with pytest.raises(VlmError): forgetting(str(run.path), probes=str(tmp_path / "none"))
    empty = RunFolder.create(tmp_path / "empty", run.config())
    with pytest.raises(VlmError, match="has no adapter yet"): forgetting(str(empty.path))
