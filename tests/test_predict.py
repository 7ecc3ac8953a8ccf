"""Predictions on file: gone on with after a kill, set aside when anything that made them has changed"""
import json, os, shutil, signal, subprocess, sys, time

import pytest
import torch
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_json_file, read_jsonl, write_jsonl
from vlm_tutor.predict import answer_batch, answer_limit, generate, load_run_model, model_hash, predict, split_examples
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
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
    if change == "image": shutil.copy(data / "images/test-00001.png", data / "images/test-00000.png")
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
    assert [bool(error) for _, error in found] == [False, True, False] and "gone.png" in found[1][1]


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
