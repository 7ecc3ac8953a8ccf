"""Training runs: stopped, resumed and refused as told; loss, schedule and labels against plain torch"""
import json, math, os, shutil, signal, subprocess, sys, time

import pytest
import torch
from cord import short_receipts
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_json_file
from vlm_tutor.predict import adapter_hash, generate, load_run_model, model_hash, predict, split_examples
from vlm_tutor.tiny import build_processor, build_tiny, save_tiny
from vlm_tutor.engine import last_checkpoint
from vlm_tutor.train import Rows, events, train

SMALL = dict(num_train_epochs=2, per_device_train_batch_size=4, logging_steps=1, save_strategy="steps", save_steps=100,
             eval_strategy="no")
TRAIN = "import json, sys; from vlm_tutor.train import train; train('tiny', overrides=json.loads(sys.argv[1]))"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Eight receipts a split with short answers"
    return short_receipts(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    "A run of four steps that nothing disturbed"
    path = tmp_path_factory.mktemp("plain") / "run"
    train("tiny", overrides=SMALL | dict(data=str(data), output_dir=str(path)))
    return RunFolder(path)


def options(data, path, **more): return SMALL | dict(data=str(data), output_dir=str(path)) | more


def column(run, name, kind="step"): return [row[name] for row in events(run, kind)]


def test_the_first_loss_is_that_of_the_base_on_the_answers(data, tmp_path):
    "All rows in one batch: the mean over answer tokens of what the base gives them, one by one, all logits computed"
    all_at_once = options(data, tmp_path / "run", per_device_train_batch_size=8, max_steps=1)
    result = train("tiny", overrides=all_at_once)
    config = load_config("tiny", all_at_once)
    model, preprocess, _ = load_run_model(config)
    total = count = 0
    for example in split_examples(config, "train"):
        row = preprocess.collate([preprocess.encode(example)])
        answer = len(preprocess.answer_ids(example))
        del row["labels"]
        with torch.no_grad(): scores = model(**row).logits[0, -answer - 1:-1].log_softmax(-1)
        total -= scores.gather(1, row["input_ids"][0, -answer:, None]).sum().item()
        count += answer
    assert result["loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_rate_rises_and_falls_as_the_formula_says(data, tmp_path):
    run = RunFolder(tmp_path / "run")
    train("tiny", overrides=options(data, run.path, warmup_ratio=.25, num_train_epochs=4, learning_rate=.001))
    steps, warm = 8, 2
    rates = [.001 * (t / warm if t < warm else .5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm))))
             for t in range(steps)]
    assert column(run, "learning_rate") == pytest.approx(rates, abs=1e-9)


def test_two_halves_make_the_same_steps(data, plain, tmp_path):
    halves = options(data, tmp_path / "run", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    train("tiny", overrides=halves)
    run = RunFolder(tmp_path / "run")
    assert column(run, "loss") == pytest.approx(column(plain, "loss"), abs=1e-4)
    assert column(run, "grad_norm") == pytest.approx(column(plain, "grad_norm"), rel=1e-3)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(data, plain, tmp_path):
    hashes = []
    for seed in (42, 43):
        train("tiny", overrides=options(data, tmp_path / str(seed), seed=seed))
        hashes.append(adapter_hash(tmp_path / str(seed) / "adapter"))
    assert hashes[0] == adapter_hash(plain.adapter) != hashes[1]


def test_ctrl_c_saves_and_the_same_command_goes_on(data, plain, tmp_path):
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", TRAIN, json.dumps(options(data, run.path))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not column(run, "step") and process.poll() is None: time.sleep(.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode != 0 and "the same command goes on from there" in out
    assert 1 <= int(last_checkpoint(run).name[11:]) < 4 and not run.adapter.exists()
    train("tiny", overrides=options(data, run.path))
    assert adapter_hash(run.adapter) == adapter_hash(plain.adapter)
    assert column(run, "loss") == column(plain, "loss")


def test_a_half_saved_checkpoint_does_not_count(data, plain, tmp_path):
    run = RunFolder(tmp_path / "run")
    shutil.copytree(plain.path, run.path)
    half = run.checkpoints / "checkpoint-7"
    shutil.copytree(last_checkpoint(plain), half)
    (half / "trainer_state.json").unlink()
    assert last_checkpoint(run).name == "checkpoint-4"


def test_a_finished_run_is_left_alone(data, plain):
    before = {p: p.stat().st_mtime_ns for p in plain.path.rglob("*")}
    result = train("tiny", overrides=options(data, plain.path))
    assert str(result).startswith("done before   4 steps") and result["steps"] == 4
    assert {p: p.stat().st_mtime_ns for p in plain.path.rglob("*")} == before


def test_validation_has_loss_and_score(data, tmp_path):
    run = RunFolder(tmp_path / "run")
    result = train("tiny", overrides=options(data, run.path, eval_strategy="epoch"))
    judged = events(run, "validation")
    assert [row["step"] for row in judged] == [2, 4] and {row["n"] for row in judged} == {8}
    assert all(row["loss"] > 0 and 0 <= row["field_f1"] <= 1 for row in judged)
    assert result["validation_loss"] == judged[-1]["loss"] and (run.report / "loss.png").stat().st_size > 5000


def test_a_share_for_validation_is_kept_apart_and_stays_the_same(data):
    config = load_config("tiny", dict(data=str(data), eval_dataset=None, val_size=.25))
    parts = [{e.id for e in split_examples(config, split)} for split in ("train", "validation")]
    assert [len(part) for part in parts] == [6, 2] and not parts[0] & parts[1]
    assert parts == [{e.id for e in split_examples(config, split)} for split in ("train", "validation")]


def test_long_rows_are_listed_and_left_out(data, tmp_path, capsys):
    run, everything = RunFolder(tmp_path / "run"), load_config("tiny", dict(data=str(data)))
    _, preprocess, _ = load_run_model(everything)
    lengths = {e.id: preprocess.length(e) for e in split_examples(everything, "train")}
    cutoff = sorted(lengths.values())[5]
    long = {id for id, length in lengths.items() if length > cutoff}
    result = train("tiny", overrides=options(data, run.path, cutoff_len=cutoff))
    assert set(column(run, "id", "left_out")) == long and long
    assert (result["rows"], result["left_out"]) == (8 - len(long), len(long))
    assert all(f"left out  {id}: {lengths[id]} tokens" in capsys.readouterr().out for id in list(long)[:1])


def test_rows_are_kept_while_there_is_room(data):
    config = load_config("tiny", dict(data=str(data)))
    _, preprocess, _ = load_run_model(config)
    examples = split_examples(config, "train")
    size = preprocess.encode(examples[0])["pixel_values"].nbytes
    rows = Rows(examples[:1] * 3, preprocess, room=2.5 * size)
    for i in range(3): rows[i]
    assert [rows[i] is rows[i] for i in range(3)] == [True, True, False]


def test_the_adapter_names_its_base_and_refuses_another(data, plain, tmp_path):
    assert read_json_file(plain.adapter / "base.json") == dict(name="tiny-receipts", hash=model_hash("tiny-receipts"))
    processor = build_processor()
    save_tiny(build_tiny(processor.tokenizer, seed=1), processor, tmp_path / "other")
    config = load_config("tiny", dict(data=str(data), model_name_or_path=str(tmp_path / "other")))
    run = RunFolder.create(tmp_path / "run", as_dict(config))
    with pytest.raises(VlmError, match="was trained on tiny-receipts"):
        predict(str(run.path), "borrowed", adapter=str(plain.adapter))


def test_only_the_language_model_learns(plain):
    from safetensors import safe_open
    with safe_open(plain.adapter / "adapter_model.safetensors", "pt") as file: names = list(file.keys())
    assert len(names) == 5 * 7 * 2 and all("language_model.layers" in name for name in names)


def test_prediction_merges_the_adapter_without_changing_an_answer(plain):
    from peft import PeftModel
    config = load_config(plain.config_file)
    merged, preprocess, _ = load_run_model(config, plain.adapter)
    beside = PeftModel.from_pretrained(load_run_model(config)[0], plain.adapter)
    rows = [preprocess.encode(e, answer=False) for e in split_examples(config, "test")[:3]]
    assert not isinstance(merged, PeftModel)
    assert generate(merged, preprocess, rows, 16) == generate(beside, preprocess, rows, 16)


def test_a_run_of_something_else_is_refused(data, plain, tmp_path):
    with pytest.raises(VlmError, match="learning_rate"):
        train("tiny", overrides=options(data, plain.path, learning_rate=.1))
    other, copy = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, other)
    shutil.copytree(plain.path, copy)
    atomic_write(other / "cord.json", json.dumps(read_json_file(other / "cord.json")[1:]))
    atomic_write(copy / "config.yaml", json.dumps(RunFolder(copy).config() | dict(dataset_dir=str(other))))
    with pytest.raises(VlmError, match="another data set"): train("tiny", overrides=options(other, copy))


@pytest.mark.parametrize("given, words", [
    ("tinny", "Did you mean 'tiny'"), (["lr=1"], "Did you mean 'learning_rate'"),
    (["data=none"], "no data set in 'none'"),
    (["dataset_dir=none"], "'none'"), (["data=DATA", "eval_dataset=corn"], "unknown data set 'corn'")])
def test_bad_input_is_refused_before_torch_is_imported(data, given, words):
    call = f"train({given!r})" if isinstance(given, str) else f"train('tiny', overrides={given!r})"
    code = ("import sys\nfrom vlm_tutor.core import VlmError\nfrom vlm_tutor.train import train\n"
            f"try: {call.replace('DATA', str(data))}\n"
            "except VlmError as error: print(error, 'torch' in sys.modules, sep='|')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    message, loaded = done.stdout.rsplit("|", 1)
    assert words in message and loaded.strip() == "False"


def test_a_folder_without_permission_is_refused(data):
    with pytest.raises(VlmError, match="cannot write '/sys/run"): train("tiny", overrides=options(data, "/sys/run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(data, tmp_path):
    given = options(data, tmp_path / "run")
    with pytest.raises(VlmError, match="no GPU"): train("tiny", device="cuda", overrides=given)


def test_half_precision_on_a_cpu_is_used_or_announced(data, tmp_path, capsys):
    from vlm_tutor.config import cpu_has_bf16
    result = train("tiny", overrides=options(data, tmp_path / "run", bf16=True, max_steps=1))
    assert ("bf16 has no effect" in capsys.readouterr().out) != cpu_has_bf16()
    full = train("tiny", overrides=options(data, tmp_path / "full", max_steps=1))
    assert result["loss"] == pytest.approx(full["loss"], rel=.05)
    train("tiny", overrides=options(data, tmp_path / "fp16", fp16=True, max_steps=1))
    assert "fp16 has no effect" in capsys.readouterr().out
