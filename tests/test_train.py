"""Training runs: stopped, resumed and refused as told; loss, schedule and labels against plain torch"""
import json, math, os, shutil, signal, subprocess, sys, time

import pytest
import torch
from cord import short_receipts
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_json_file
from vlm_tutor.metrics import score
from vlm_tutor.predict import (adapter_hash, generate, load_run_model, model_hash, predict, split_examples,
                               training_splits)
from vlm_tutor.tiny import build_processor, build_tiny, save_tiny
from vlm_tutor.engine import last_checkpoint
from vlm_tutor.train import Rows, best_validation, events, overfitting, train

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


# --- the best evaluation ----------------------------------------------------------------------------------------------
UNSTABLE = dict(learning_rate=.03, lr_scheduler_type="constant", per_device_train_batch_size=2, eval_strategy="steps",
                eval_steps=1, save_steps=1, load_best_model_at_end=True, eval_score_samples=1)


@pytest.fixture(scope="module")
def unstable(data, tmp_path_factory):
    "A run of eight steps that are too long, so that the last is not the best"
    path = tmp_path_factory.mktemp("unstable") / "run"
    result = train("tiny", overrides=options(data, path, **UNSTABLE))
    return RunFolder(path), result


def test_the_weights_of_the_best_evaluation_are_kept(data, unstable, tmp_path):
    "They are those of a run that ends there: with a constant rate the steps before it are the same"
    run, result = unstable
    losses = column(run, "loss", "validation")
    best = losses.index(min(losses)) + 1
    assert len(losses) == 8 and best < 8 and result["best_step"] == result["kept_step"] == best
    assert result["validation_loss"] == min(losses) and not result["stopped_early"]
    ends_there = UNSTABLE | dict(load_best_model_at_end=False, max_steps=best)
    train("tiny", overrides=options(data, tmp_path / "run", **ends_there))
    assert adapter_hash(run.adapter) == adapter_hash(tmp_path / "run" / "adapter")


def killed(run, copy, step):
    "The folder of a run as it was when the power failed after `step`, with the weights that were best at the end"
    shutil.copytree(run.path, copy)
    shutil.rmtree(copy / "adapter")
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        if int(path.name[11:]) > step: shutil.rmtree(path)
    return RunFolder(copy)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_resumed_run_keeps_the_same_best(data, unstable, tmp_path, step):
    run, again = unstable[0], killed(unstable[0], tmp_path / "run", step)
    train("tiny", overrides=options(data, again.path, **UNSTABLE))
    assert adapter_hash(again.adapter) == adapter_hash(run.adapter)
    for name in ("loss", "field_f1", "train_field_f1"):
        assert column(again, name, "validation") == column(run, name, "validation")


def test_a_run_ends_early_and_a_resumed_one_at_the_same_step(data, unstable, tmp_path):
    losses = column(unstable[0], "loss", "validation")
    ends = next(i for i in range(1, 8) if losses[i] >= min(losses[:i])) + 1
    given, run = UNSTABLE | dict(early_stopping_patience=1), RunFolder(tmp_path / "run")
    result = train("tiny", overrides=options(data, run.path, **given))
    assert ends < 8 and result["steps"] == ends and result["stopped_early"] and "stopped early" in str(result)
    assert column(run, "loss", "validation") == losses[:ends]
    for step in (1, ends):
        again = killed(run, tmp_path / f"again-{step}", step)
        assert train("tiny", overrides=options(data, again.path, **given))["steps"] == ends
        assert adapter_hash(again.adapter) == adapter_hash(run.adapter)


def test_the_scores_of_the_log_are_those_of_the_answers(data, plain, tmp_path):
    run = RunFolder(tmp_path / "run")
    train("tiny", overrides=options(data, run.path, eval_strategy="epoch", eval_score_samples=3))
    last, config = events(run, "validation")[-1], load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, run.adapter)
    for split, start in (("validation", ""), ("train", "train_")):
        examples = split_examples(config, split)[:3]
        rows = [preprocess.encode(e, answer=False) for e in examples]
        found = score(generate(model, preprocess, rows, 64), [e.truth for e in examples])
        for name in ("field_f1", "nted_accuracy", "exact_match"):
            assert last[start + name] == pytest.approx(found[name])
    assert last["n"] == 3 and adapter_hash(run.adapter) == adapter_hash(plain.adapter)


@pytest.mark.parametrize("given, words", [
    (dict(eval_strategy="no"), "needs evaluations. Set eval_strategy"),

    (dict(early_stopping_patience=0), "patience is 0. Allowed: above"),
    (dict(metric_for_best_model="f1"), "metric_for_best_model cannot be 'f1'"),
    (dict(metric_for_best_model="eval_field_f1", eval_score_samples=0), "needs eval_score_samples above 0")])
def test_a_best_that_cannot_be_found_is_refused(given, words):
    with pytest.raises(VlmError, match=words): load_config("tiny", dict(load_best_model_at_end=True) | given)


def test_the_best_of_a_share_held_back_and_of_nothing(data, tmp_path):
    given = dict(eval_dataset=None, val_size=.25, max_steps=1, eval_strategy="epoch", load_best_model_at_end=True)
    assert train("tiny", overrides=options(data, tmp_path / "run", **given))["best_step"] == 1
    with pytest.raises(VlmError, match="load_best_model_at_end needs validation rows, and there are none"):
        train("tiny", overrides=options(data, tmp_path / "none", **given | dict(val_size=0.)))


def test_what_the_evaluations_tell():
    def rows(losses, scores): return [dict(step=i, loss=a, field_f1=b, train_field_f1=b, n=8)
                                      for i, (a, b) in enumerate(zip(losses, scores))]
    assert overfitting(rows([.5, .4, .41], [.1, .2, .2])) == []
    assert "rose from 0.4 at step 1 to 0.6" in overfitting(rows([.5, .4, .6], [.1, .2, .1]))[0]
    assert len(overfitting(rows([.5, .4, .6], [.1, .2, .3]))) == 2
    known = rows([.5, .4], [.1, .5])
    known[-1]["train_field_f1"] = .9
    assert "0.40 higher on 8 training rows" in overfitting(known)[0]
    assert best_validation([dict(step=1, loss=1)], "field_f1") is None  # as LLaMA-Factory logs it


def test_rehearsal_rows_join_in_by_their_share(data, tmp_path):
    other = short_receipts(tmp_path / "other", 6)
    given = dict(data=str(data), rehearsal=str(other), rehearsal_share=.2)
    kept, validation, there = training_splits(load_config("tiny", given))
    added = [e for e in kept if e.id.startswith("rehearsal/")]
    assert (len(kept), len(added), len(validation), there) == (10, 2, 8, 8) and len({e.id for e in kept}) == 10
    assert [e.id for e in training_splits(load_config("tiny", given))[0]] == [e.id for e in kept]
    assert len(training_splits(load_config("tiny", given | dict(rehearsal_share=.9)))[0]) == 8 + 6
    assert len(split_examples(load_config("tiny", given), "train")) == 8
    run = RunFolder(tmp_path / "run")
    result = train("tiny", overrides=options(data, run.path, max_steps=1) | given)
    assert result["rows"] == 10
    with pytest.raises(VlmError, match="nowhere"):
        train("tiny", overrides=options(data, tmp_path / "no", rehearsal=str(tmp_path / "nowhere")))


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
