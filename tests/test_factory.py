"""LLaMA-Factory as an engine: what it is given, what is refused, what comes home; and for real, where it can be made."""
import json, math, os, re, signal, subprocess, sys, time, warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm_tutor import factory as f
from vlm_tutor.collate import Preprocess
from vlm_tutor.config import Config, load_config
from vlm_tutor.core import (ASSETS, CONFIGS, Example, RunFolder, VlmError, find_llamafactory, read_json_file,
                            read_jsonl, read_yaml, write_yaml)
from vlm_tutor.predict import adapter_hash, predict, split_examples
from vlm_tutor.sharegpt import dataset_entry, save_cord_dataset_in_sharegpt_format
from vlm_tutor.tiny import load_processor, save_common_form
from vlm_tutor.train import events, train as train_natively

SMALL = dict(num_train_epochs=1, max_samples=8, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
             lora_rank=8, lora_alpha=16, bf16=False)
PLAYER = """#!{python}
# Plays LLaMA-Factory: reads its YAML, prints what the real one prints, writes what the real one writes
import json, os, pathlib, shutil, sys, time, yaml
keys = yaml.safe_load(open(sys.argv[2]))
here, home = pathlib.Path(keys['output_dir']), pathlib.Path({home!r})
(home/'asked.jsonl').open('a').write(json.dumps(keys) + chr(10))
rows = json.load(open(os.path.join(keys['dataset_dir'], 'test.json' if 'do_predict' in keys else 'train.json')))
here.mkdir(parents=True, exist_ok=True)
if 'do_predict' in keys:
    with open(here/'generated_predictions.jsonl', 'w') as file:
        for row in rows: print(json.dumps(dict(predict=row['messages'][1]['content'] + chr(10))), file=file)
    sys.exit()
print('trainable params: 135,680 || all params: 5,093,440 || trainable%: 2.66')
print('  Total optimization steps = 2', flush=True)
if (home/'slow').exists():
    (here/'checkpoint-1').mkdir(exist_ok=True)
    (home/'pid').write_text(str(os.getpid()))
    time.sleep(60)
history = [dict(step=n, epoch=n/2, loss=1/n, grad_norm=1., learning_rate=.1) for n in (1, 2)]
for row in history: print(f"{{50*row['step']:3}}%|##| {{row['step']}}/2 [00:01<00:01]", end=chr(13), flush=True)
json.dump(dict(global_step=2, log_history=history), open(here/'trainer_state.json', 'w'))
json.dump(dict(epoch=1., eval_loss=.5), open(here/'eval_results.json', 'w'))
for path in (home/'adapter').iterdir(): shutil.copy(path, here)
"""


def vlm(*words, cwd=None, **env):
    command = [sys.executable, "-m", "vlm_tutor.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | env)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Eight receipts a split"
    folder = tmp_path_factory.mktemp("data")
    save_cord_dataset_in_sharegpt_format(folder, n=8)
    return folder


@pytest.fixture(scope="module")
def ours(data, tmp_path_factory):
    "A run of our own engine"
    path = tmp_path_factory.mktemp("ours")/"run"
    train_natively("tiny", overrides=SMALL | dict(data=str(data), output_dir=str(path)))
    return RunFolder(path)


@pytest.fixture
def player(ours, tmp_path, monkeypatch):
    "A program that plays LLaMA-Factory, found as the real one is; its folder"
    home = tmp_path/"home"
    (home/"adapter").mkdir(parents=True)
    for name in f.ADAPTER_FILES: (home/"adapter"/name).write_bytes((ours.adapter/name).read_bytes())
    command = home/"llamafactory-cli"
    command.write_text(PLAYER.format(python=sys.executable, home=str(home)))
    command.chmod(0o755)
    monkeypatch.setenv("VLM_LLAMAFACTORY", str(command))
    monkeypatch.chdir(tmp_path)
    return home


def options(data, path="runs/theirs", **more): return SMALL | dict(data=str(data), output_dir=str(path)) | more


def theirs(data, **more): return f.train("tiny", engine="llamafactory", overrides=options(data, **more))


# --- what it is given -------------------------------------------------------------------------------------------------
def as_llama_factory_sees(path, processor, most, least):
    "Pixels by LLaMA-Factory's own rule (its mm_plugin.py): no look at EXIF, shrunk in proportion, then the processor"
    image = Image.open(path)
    for wrong, limit in ((lambda: image.width*image.height > most, most),
                         (lambda: image.width*image.height < least, least)):
        if wrong():
            share = math.sqrt(limit/(image.width*image.height))
            image = image.resize((int(image.width*share), int(image.height*share)))
    return processor.image_processor([image.convert("RGB")], return_tensors="pt")


@pytest.mark.parametrize("size, mode, side", [
    ((200, 208), "RGB", 1), ((640, 960), "RGB", 1), ((300, 326), "L", 1), ((640, 480), "RGB", 6), ((200, 120), "RGB", 6),
    ((28, 30), "RGB", 1), ((313, 313), "CMYK", 1), ((1300, 40), "RGBA", 1)])
def test_both_engines_see_the_same_pixels(tmp_path, size, mode, side):
    torch.manual_seed(0)
    noise = Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8).numpy()).convert(mode)
    exif = Image.Exif()
    exif[f.SIDEWAYS] = side
    path = tmp_path/("photo.jpg" if mode in ("RGB", "CMYK", "L") else "photo.png")
    noise.save(path, exif=exif)
    processor = load_processor("tiny-receipts")
    preprocess = Preprocess(processor, image_max_pixels=98304, image_min_pixels=1024)
    mine = preprocess.look_at(Example("x", [str(path)], "?"))
    ready = f.ready_image(path, preprocess, tmp_path/"copies")
    found = as_llama_factory_sees(ready, processor, 98304, 1024)
    assert torch.equal(found["image_grid_thw"], mine["image_grid_thw"])
    assert torch.equal(found["pixel_values"], mine["pixel_values"])
    assert (ready == os.path.realpath(path)) or ready.startswith(str(tmp_path/"copies"))


def test_a_page_within_the_limits_is_used_where_it_lies_and_a_copy_is_made_once(tmp_path):
    for name, size in (("small", (160, 160)), ("large", (900, 900))): Image.new("RGB", size).save(tmp_path/f"{name}.png")
    preprocess, copies = Preprocess(load_processor("tiny-receipts"), image_max_pixels=98304), tmp_path/"copies"
    assert f.ready_image(tmp_path/"small.png", preprocess, copies) == str((tmp_path/"small.png").resolve())
    assert not copies.exists()
    copy = Path(f.ready_image(tmp_path/"large.png", preprocess, copies))
    stamp = copy.stat().st_mtime_ns
    assert f.ready_image(tmp_path/"large.png", preprocess, copies) == str(copy) and copy.stat().st_mtime_ns == stamp
    assert [path.name for path in copies.iterdir()] == [copy.name]


def test_it_gets_the_rows_our_engine_takes_and_none_that_would_be_cut(player, data):
    lengths = Preprocess(load_processor("tiny-receipts"), image_max_pixels=262144)
    rows = split_examples(load_config("tiny", dict(data=str(data))), "train")
    limit = sorted(map(lengths.length, rows))[5]
    theirs(data, max_samples=None, eval_dataset=None, val_size=.25, seed=7, cutoff_len=limit)
    given = read_json_file("runs/theirs/llamafactory/train.json")
    config = load_config("runs/theirs")
    wanted = [e for e in split_examples(config, "train") if lengths.length(e) <= limit]
    assert [row["messages"][1]["content"] for row in given] == [e.target for e in wanted] and 0 < len(given) < 6
    held = read_json_file("runs/theirs/llamafactory/validation.json")
    assert {row["images"][0] for row in held} <= {os.path.realpath(e.image) for e in split_examples(config, "validation")}
    assert events(RunFolder("runs/theirs"), "left_out")[0]["cutoff_len"] == limit


def test_the_yaml_keeps_what_was_asked_and_drops_what_it_does_not_know(player, data):
    theirs(data, learning_rate=3e-4, warmup_ratio=.2, preprocessing_num_workers=64, cache_features=False)
    asked = read_jsonl(player/"asked.jsonl")[0]
    assert asked["learning_rate"] == 3e-4 and asked["lora_rank"] == 8 and asked["lora_alpha"] == 16
    assert asked["warmup_steps"] == .2 and "warmup_ratio" not in asked
    assert 1 <= asked["preprocessing_num_workers"] <= os.cpu_count()
    assert asked["do_train"] and asked["logging_first_step"] and asked["use_cpu"] and not asked["bf16"]
    assert not set(asked) & {"cache_features", "lean_forward", "max_samples", "val_size", "fsdp", "group_by_length"}
    assert asked["eval_dataset"] == "validation" and asked["do_eval"] and asked["overwrite_output_dir"]
    assert not read_yaml("runs/theirs/config.yaml")["cache_features"], "the run folder says what you asked"


# --- what comes home --------------------------------------------------------------------------------------------------
def test_the_run_folder_does_not_tell_who_trained(player, ours, data):
    told = theirs(data)
    run = RunFolder("runs/theirs")
    assert told["steps"] == 2 and told["loss"] == .5 and told["validation_loss"] == .5
    assert told["validation_field_f1"] is None and told["trainable"] == 135680
    assert told["share"] == pytest.approx(135680/(135680 + 3036608))
    assert [row["loss"] for row in events(run, "step")] == [1, .5]
    assert adapter_hash(run.adapter) != adapter_hash(ours.adapter), "another base name"
    assert read_json_file(run.adapter/f.BASE_FILE) == read_json_file(ours.adapter/f.BASE_FILE)
    assert read_json_file(run.adapter/"adapter_config.json")["base_model_name_or_path"] == "tiny-receipts"
    assert predict("runs/theirs", n=2)["n"] == predict(str(ours.path), n=2)["n"] == 2
    def raw(run): return [row["raw"] for row in read_jsonl(run.predictions("finetuned-model"))]
    assert raw(run) == raw(ours)


def test_a_finished_run_is_done_and_its_answers_are_asked_once(player, data):
    for _ in range(2): told = f.train("tiny", "llamafactory", predict=True, overrides=options(data))
    assert "done before" in str(told) and "vlm evaluate runs/theirs --group llamafactory-model" in str(told)
    assert ["do_predict" in asked for asked in read_jsonl(player/"asked.jsonl")] == [False, True]
    rows = read_jsonl(RunFolder("runs/theirs").predictions(f.FACTORY_GROUP))
    assert len(rows) == 8 and all(row["raw"] == row["truth"] and row["error"] is None for row in rows)
    asked = read_jsonl(player/"asked.jsonl")[1]
    assert asked["do_sample"] is False and asked["max_new_tokens"] == 384 and asked["eval_dataset"] == "test"
    scored = vlm("evaluate", "runs/theirs", "--group", f.FACTORY_GROUP, "--json")
    assert json.loads(scored.stdout)["field_f1"] == 1


def test_an_interrupted_run_stops_all_its_processes_and_goes_on(player, data):
    (player/"slow").touch()
    command = [sys.executable, "-m", "vlm_tutor.cli", "train", "tiny", "--engine", "llamafactory",
               *(f"{key}={value}" for key, value in options(data).items())]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (player/"pid").exists() and process.poll() is None: time.sleep(.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "goes on from here" in said, said
    with pytest.raises(ProcessLookupError): os.kill(int((player/"pid").read_text()), 0)
    assert not RunFolder("runs/theirs").adapter.exists()
    (player/"slow").unlink()
    told = theirs(data)
    asked = read_jsonl(player/"asked.jsonl")
    assert [keys["overwrite_output_dir"] for keys in asked] == [True, False], "it goes on from the checkpoint"
    stopped = events(RunFolder("runs/theirs"), "start")[0]["before"]
    assert stopped > 0 and told["seconds"] > stopped


def test_a_failing_run_is_one_sentence_with_the_place_of_its_log(player, data):
    (player/"llamafactory-cli").write_text(f"#!{sys.executable}\nprint('x'*10)\nraise KeyError('messages')")
    with pytest.raises(VlmError, match=r"LLaMA-Factory failed: KeyError: 'messages'\. Read .*train\.log"): theirs(data)
    (player/"llamafactory-cli").write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(VlmError, match="killed, most likely because memory was short"): theirs(data)
    (player/"llamafactory-cli").write_text("#!/bin/sh\nmkdir -p $(dirname $2)/output\nexit 0\n")
    with pytest.raises(VlmError, match="no file .*trainer_state.json"): theirs(data)


@pytest.mark.parametrize("line, step, loss", [
    (" 50%|█████     | 2/4 [00:03<00:02,  1.48s/it]", 2, None), ("{'loss': 0.5, 'epoch': 1}", 0, .5),
    ("{'loss': '1.2e-05', 'epoch': '1'}", 0, 1.2e-5), (" 67%|██████▋   | 2/3 [00:00<00:00,  2.34it/s]", 0, None),
    ("Running tokenizer on dataset: 100%|██████████| 4/4 [00:01<00:00]", 0, None), ("{'eval_loss': '0.7'}", 0, None)])
def test_only_steps_of_the_run_are_counted(line, step, loss):
    log = f.FactoryLog()
    log.read("[INFO|trainer.py:1478] 2026-11-25 03:58:28,890 >>   Total optimization steps = 4")
    log.read(line)
    assert (log.step, log.loss) == (step, loss)


def test_a_loss_that_is_no_number_is_read_too():
    log = f.FactoryLog()
    log.read("{'loss': 'nan', 'grad_norm': 'inf'}")
    assert math.isnan(log.loss)


# --- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more, said", [
    (dict(fsdp=True), "fsdp=true is a switch of our own engine"), (dict(freeze_vision_tower=False), "wider vision tower"),
    (dict(cutoff_len=40), "no row fits into cutoff_len 40"),
    (dict(adapter_name_or_path="nowhere"), "no adapter in 'nowhere'")])
def test_what_it_cannot_do_is_said_before_it_starts(player, data, more, said):
    with pytest.raises(VlmError, match=re.escape(said)): theirs(data, **more)
    assert not (player/"asked.jsonl").exists()


def test_soft_prompts_name_the_native_engine():
    config = Config()
    config.finetuning_type = "prompt"
    with pytest.raises(VlmError, match="no finetuning_type 'prompt'. Allowed there: lora, oft.*--engine native"):
        f.check_factory(config)


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VlmError, match="not under torchrun"): f.check_factory(Config())


def test_one_engine_does_not_go_on_with_the_run_of_the_other(player, ours, data):
    with pytest.raises(VlmError, match="was begun with --engine native"): theirs(data, path=ours.path)
    theirs(data)
    with pytest.raises(VlmError, match="was begun with --engine llamafactory"):
        f.train("tiny", overrides=options(data))


def test_rows_it_would_stumble_over_are_named(player, data, tmp_path):
    preprocess = Preprocess(load_processor("tiny-receipts"))
    (tmp_path/"broken.png").write_bytes((ASSETS/"tiny-receipts/config.json").read_bytes())
    good = split_examples(load_config("tiny", dict(data=str(data))), "train")[0]
    for example, said in ((Example("a", good.images, "Is <video> here?", "no"), "'<video>' stands in the text of row 'a'"),
                          (Example("b", [str(tmp_path/"broken.png")], "?", "{}"), "cannot read image .*broken.png"),
                          (Example("c", [str(tmp_path/"gone.png")], "?", "{}"), "no image .*gone.png")):
        with pytest.raises(VlmError, match=said): f.write_rows(tmp_path/"rows", "train", [example], preprocess)
    assert not (tmp_path/"rows/train.json").exists()


@pytest.mark.parametrize("words, said", [
    (["--engine", "lamafactory"], "Did you mean 'llamafactory'?"), (["--engine", "llamafactory"], "vlm doctor --install"),
    (["--predict"], "Use vlm predict RUN afterwards"), (["--engine", "llamafactory", "fsdp=true"], "fsdp=true")])
def test_a_mistake_on_the_command_line_is_one_sentence(data, tmp_path, words, said):
    ran = vlm("train", "tiny", f"data={data}", *words, cwd=tmp_path, VLM_LLAMAFACTORY=str(tmp_path))
    assert ran.returncode == 2 and said in ran.stderr and ran.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())
