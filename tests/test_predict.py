"""Predictions on file: gone on with after a kill, set aside when anything that made them has changed"""
import json, os, shutil, signal, subprocess, sys, time

import pytest
import torch
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_json_file, read_jsonl, write_jsonl
from vlm_tutor.predict import (answer_batch, answer_limit, generate, generate_sure, load_run_model, model_hash, predict,
                               split_examples)
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
from vlm_tutor.sources import load_examples
from vlm_tutor.tiny import build_processor, build_tiny, save_tiny

PREDICT = "from vlm_tutor.predict import predict; predict({!r}, 'vanilla-model', batch_size=1)"


def make_run(folder, **changes):
    "A run folder over six small receipts, with short answers so that predicting them is quick"
    save_cord_dataset_in_sharegpt_format(folder / "data", n=6)
    for file in (folder / "data").glob("cord*.json"):
        rows = read_json_file(file)
        for row in rows: row["messages"][1]["content"] = '{"total":"1"}'
        atomic_write(file, json.dumps(rows))
    config = load_config("tiny", dict(data=folder / "data", output_dir=str(folder / "run")) | changes)
    return RunFolder.create(folder / "run", as_dict(config))


def answers(run, group="vanilla-model"):
    return {row["id"]: row["raw"] for row in read_jsonl(run.predictions(group))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run with all its vanilla predictions"
    run = make_run(tmp_path_factory.mktemp("whole"))
    predict(str(run.path), "vanilla-model")
    return run


@pytest.fixture
def run(whole, tmp_path):
    "A copy of that run, to be changed"
    shutil.copytree(whole.path.parent, tmp_path / "copy")
    run = RunFolder(tmp_path / "copy/run")
    config = load_config(run.config_file, dict(dataset_dir=str(tmp_path / "copy/data")))
    atomic_write(run.config_file, json.dumps(as_dict(config)))
    return run


def test_each_row_holds_what_its_answer_depends_on(whole):
    rows, truth = read_jsonl(whole.predictions("vanilla-model")), {"total": "1"}
    examples = split_examples(load_config(whole.config_file), "test")
    assert sorted(row["id"] for row in rows) == sorted(e.id for e in examples)
    for row in rows:
        assert json.loads(row["truth"]) == truth and row["error"] is None and row["adapter"] is None
        assert row["model"] == f"tiny-receipts@{model_hash('tiny-receipts')}" and row["seconds"] > 0
        assert row["decoding"]["do_sample"] is False and row["decoding"]["max_new_tokens"] == 64


def test_answers_are_those_of_plain_transformers(whole):
    "The stock processor and a greedy loop without cache, one receipt at a time"
    config = load_config(whole.config_file)
    model, preprocess, _ = load_run_model(config)
    example = split_examples(config, "test")[0]
    question, images = preprocess.question(example), example.load_images()
    inputs = preprocess.processor(text=[question], images=images, return_tensors="pt")
    for _ in range(5):
        with torch.no_grad(): token = model(**inputs).logits[:, -1].argmax(-1, keepdim=True)
        zero, one = torch.zeros_like(token), torch.ones_like(token)
        for name, more in (("input_ids", token), ("attention_mask", one), ("mm_token_type_ids", zero)):
            inputs[name] = torch.cat([inputs[name], more], 1)
    expected = preprocess.decode(inputs["input_ids"][0, -5:])
    assert generate(model, preprocess, [preprocess.encode(example, answer=False)], 5) == [expected]


def test_confidence_is_the_mean_log_probability_of_the_tokens(whole):
    "Against one forward pass over question and answer"
    config = load_config(whole.config_file)
    model, preprocess, _ = load_run_model(config)
    examples = split_examples(config, "test")[:2]
    told = generate_sure(model, preprocess, [preprocess.encode(e, answer=False) for e in examples], 12)
    for example, (text, logprob) in zip(examples, told):
        inputs = preprocess.processor(text=[preprocess.question(example)], images=example.load_images(),
                                      return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1]:]
        zero, one = torch.zeros_like(ids), torch.ones_like(ids)
        for name, more in (("input_ids", ids), ("attention_mask", one), ("mm_token_type_ids", zero)):
            inputs[name] = torch.cat([inputs[name], more], 1)
        with torch.no_grad(): logits = model(**inputs).logits[:, -ids.shape[1] - 1:-1]
        wanted = logits.log_softmax(-1).gather(2, ids[..., None]).mean().item()
        assert preprocess.decode(ids[0]) == text and logprob == pytest.approx(wanted, abs=2e-4) and logprob < 0


def test_a_killed_prediction_goes_on(run, whole):
    path = run.predictions("vanilla-model")
    path.unlink()
    process = subprocess.Popen([sys.executable, "-c", PREDICT.format(str(run.path))], stderr=subprocess.DEVNULL)
    while not (path.exists() and len(path.read_bytes().splitlines()) >= 2) and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(path.read_bytes().splitlines())
    result = predict(str(run.path), "vanilla-model")
    assert 2 <= before < 6 and result["reused"] >= before - 1
    assert answers(run) == answers(whole) and len(read_jsonl(path)) == 6


def test_nothing_is_done_twice(run):
    path = run.predictions("vanilla-model")
    before = path.read_bytes()
    assert predict(str(run.path), "vanilla-model")["reused"] == 6
    assert path.read_bytes() == before


@pytest.mark.parametrize("change", ["image", "prompt", "decoding", "model"])
def test_a_change_sets_the_old_file_aside(run, change):
    path = run.predictions("vanilla-model")
    config, data = load_config(run.config_file), run.path.parent / "data"
    if change == "image":
        one, other, *_ = [example.image for example in load_examples(data, "test")]
        shutil.copy(other, one)
    test = data / "cord_test.json"
    if change == "prompt": atomic_write(test, test.read_text().replace("Extract", "Give"))
    if change == "decoding": atomic_write(run.config_file, json.dumps(as_dict(config) | dict(image_max_pixels=10000)))
    if change == "model":
        processor = build_processor()
        save_tiny(build_tiny(processor.tokenizer, seed=1), processor, run.path / "other")
        atomic_write(run.config_file, json.dumps(as_dict(config) | dict(model_name_or_path=str(run.path / "other"))))
    old = path.read_bytes()
    assert predict(str(run.path), "vanilla-model", n=1)["reused"] == 0
    assert path.with_name(path.name + ".stale-1").read_bytes() == old
    assert len(read_jsonl(path)) == 1


def test_a_corrected_truth_is_taken_over_without_asking_again(run):
    data = run.path.parent / "data/cord_test.json"
    before = answers(run)
    atomic_write(data, data.read_text().replace('\\"1\\"', '\\"2\\"'))
    assert predict(str(run.path), "vanilla-model")["reused"] == 6
    assert {row["truth"] for row in read_jsonl(run.predictions("vanilla-model"))} == {'{"total":"2"}'}
    assert answers(run) == before


def test_a_failed_row_is_recorded_and_tried_again(run):
    path = run.predictions("vanilla-model")
    rows = read_jsonl(path)
    write_jsonl(path, [row | (dict(raw="", error="x") if i == 2 else {}) for i, row in enumerate(rows)])
    assert predict(str(run.path), "vanilla-model")["reused"] == 5
    assert answers(run) == {row["id"]: row["raw"] for row in rows}


def test_one_bad_image_costs_one_row(run):
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config)
    examples = split_examples(config, "test")[:3]
    examples[1].images = ["gone.png"]
    found = answer_batch(model, preprocess, examples, 8)
    assert [bool(row["error"]) for row in found] == [False, True, False] and "gone.png" in found[1]["error"]


def test_the_limit_leaves_room_for_the_longest_answer(whole):
    config = load_config(whole.config_file)
    _, preprocess, _ = load_run_model(config)
    examples = split_examples(config, "test")
    examples[0].target = "9" * 300
    assert answer_limit(preprocess, examples) == 384  # 302 tokens and a quarter, rounded up to 64
    examples[0].target = "9" * 3000
    assert answer_limit(preprocess, examples) == config.cutoff_len


def test_bad_input_is_refused(run, tmp_path):
    for words, options in [("needs an adapter", dict(group="mine")),
                           ("has no adapter yet", dict(group="finetuned-model")),
                           ("no adapter in", dict(group="mine", adapter=str(tmp_path))),
                           ("unknown split 'dev'", dict(group="vanilla-model", split="dev")),
                           ("unknown device 'tpu'", dict(group="vanilla-model", device="tpu"))]:
        with pytest.raises(VlmError, match=words): predict(str(run.path), **options)
    with pytest.raises(VlmError, match="no run folder"): predict(str(tmp_path / "none"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(run):
    with pytest.raises(VlmError, match="no GPU"): predict(str(run.path), "vanilla-model", device="cuda")


def test_refusing_needs_no_torch(run):
    code = ("import sys\nfrom vlm_tutor.core import VlmError\nfrom vlm_tutor.predict import predict\n"
            f"try: predict({str(run.path)!r}, 'mine')\nexcept VlmError: sys.exit(3 + ('torch' in sys.modules))")
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 3


def test_a_row_ends_with_its_first_json_value(whole):
    "What is cut off is what stands behind the first balanced value in the answer without the cut"
    config = load_config(whole.config_file)
    model, preprocess, _ = load_run_model(config)
    rows = [preprocess.encode(e, answer=False) for e in split_examples(config, "test")]
    free, cut = (generate(model, preprocess, rows, 300, until_json=stop) for stop in (False, True))
    for text, short in zip(free, cut):
        assert text.startswith(short) and json.loads(short) == json.JSONDecoder().raw_decode(text)[0]


def test_groups_in_one_call_answer_as_they_do_alone(run):
    from vlm_tutor.lora import build_adapter
    from vlm_tutor.tiny import load_model
    config = load_config(run.config_file)
    model = build_adapter(load_model("tiny-receipts"), config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.03)
    model.save_pretrained(run.adapter)
    predict(str(run.path))
    alone = answers(run, "vanilla-model"), answers(run, "finetuned-model")
    for group in ("vanilla-model", "finetuned-model"): run.predictions(group).unlink()
    predict(str(run.path), "finetuned-model,vanilla-model")
    assert (answers(run, "vanilla-model"), answers(run, "finetuned-model")) == alone and alone[0] != alone[1]
    index = [json.loads(line) for file in (run.path / "features").glob("*.jsonl") for line in file.open()]
    assert len({row["image"] for row in index}) == len(index) == 6  # each image was looked at once
    with pytest.raises(VlmError, match="1 folders for 2 groups"): predict(str(run.path), "a,b", adapter="x")
    shutil.copytree(run.adapter, run.path / "copy")
    predict(str(run.path), "a,vanilla-model,b", adapter=f"{run.adapter},{run.path / 'copy'}")
    assert answers(run, "a") == answers(run, "b") == alone[1] and answers(run, "vanilla-model") == alone[0]


def test_answers_can_be_held_to_a_schema(whole, tmp_path):
    pytest.importorskip("xgrammar")
    from vlm_tutor.predict import read_schema
    (tmp_path / "schema.json").write_text(json.dumps(
        dict(type="object", properties=dict(total=dict(type="string", enum=["7", "8"])), required=["total"],
             additionalProperties=False)))
    config = load_config(whole.config_file)
    model, preprocess, _ = load_run_model(config)
    rows = [preprocess.encode(e, answer=False) for e in split_examples(config, "test")[:3]]
    texts = generate(model, preprocess, rows, 40, schema=read_schema(tmp_path / "schema.json"))
    assert all(json.loads(text) in ({"total": "7"}, {"total": "8"}) for text in texts)


def test_a_schema_that_cannot_be_used_is_refused_at_once(whole, tmp_path):
    with pytest.raises(VlmError, match="no file"):
        predict(str(whole.path), "vanilla-model", schema=str(tmp_path / "none"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(VlmError, match="no JSON Schema"):
        predict(str(whole.path), "vanilla-model", schema=str(tmp_path / "list.json"))
