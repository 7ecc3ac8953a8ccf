"""LLaMA-Factory as an engine: what it is given, what is refused, what comes home; and the real one."""
import json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vlm_tutor import factory as f
from vlm_tutor.collate import Preprocess
from vlm_tutor.config import Config, load_config
from vlm_tutor.core import (ASSETS, CONFIGS, Example, RunFolder, VlmError, read_json_file,
                            read_jsonl, read_yaml, write_yaml)
from vlm_tutor.methods import METHODS
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
    ((200, 208), "RGB", 1), ((640, 960), "RGB", 1), ((300, 326), "L", 1), ((640, 480), "RGB", 6),
    ((200, 120), "RGB", 6), ((28, 30), "RGB", 1), ((313, 313), "CMYK", 1), ((1300, 40), "RGBA", 1)])
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
    for name, side in (("small", 160), ("large", 900)): Image.new("RGB", (side, side)).save(tmp_path/f"{name}.png")
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
    ours = split_examples(config, "validation")
    assert {row["images"][0] for row in held} <= {os.path.realpath(e.image) for e in ours}
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
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
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
    (dict(fsdp=True), "fsdp=true is a switch of our own"), (dict(freeze_vision_tower=False), "wider vision tower"),
    (dict(flash_attn="fa2"), "flash_attn=fa2 needs a GPU"), (dict(cutoff_len=40), "no row fits into cutoff_len 40"),
    (dict(adapter_name_or_path="nowhere"), "no adapter in 'nowhere'")])
def test_what_it_cannot_do_is_said_before_it_starts(player, data, more, said):
    with pytest.raises(VlmError, match=re.escape(said)): theirs(data, **more)
    assert not (player/"asked.jsonl").exists()


def test_soft_prompts_name_the_native_engine():
    config = Config()
    config.finetuning_type = "prompt"
    with pytest.raises(VlmError, match="no finetuning_type 'prompt'. Allowed there: lora, rslora.*--engine native"):
        f.check_factory(config)


@pytest.mark.parametrize("word, wanted", [
    ("lora", dict(finetuning_type="lora")), ("dora", dict(finetuning_type="lora", use_dora=True)),
    ("rslora", dict(finetuning_type="lora", use_rslora=True)), ("full", dict(finetuning_type="full")),
    ("loraplus", dict(finetuning_type="lora", loraplus_lr_ratio=16.)),
    ("qlora", dict(finetuning_type="lora", quantization_bit=4)), ("freeze", dict(finetuning_type="freeze")),
    ("pissa", dict(finetuning_type="lora", pissa_init=True, pissa_convert=True))])
def test_our_words_become_its_own(tmp_path, word, wanted):
    config = load_config("tiny", dict(finetuning_type=word, use_cpu=False))
    f.check_factory(config)
    keys = f.factory_keys(config, tmp_path, "model", False, ("cpu", "torch.float32"))
    others = {"use_dora", "use_rslora", "pissa_init", "pissa_convert", "loraplus_lr_ratio", "quantization_bit"}
    assert {k: keys[k] for k in wanted} == wanted and not others & set(keys) - set(wanted)
    assert keys["learning_rate"] == pytest.approx(.004 * METHODS[word].rate)
    assert not {"num_virtual_tokens", "encoder_hidden_size", "prompt_tuning_init_text"} & set(keys)


def test_few_bits_need_a_gpu_there():
    with pytest.raises(VlmError, match="LLaMA-Factory needs a GPU for 4 bits"):
        f.check_factory(load_config("tiny", dict(finetuning_type="qlora")))


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
    for example, said in ((Example("a", good.images, "Is <video> here?", "no"), "'<video>' stands in .* row 'a'"),
                          (Example("b", [str(tmp_path/"broken.png")], "?", "{}"), "cannot read image .*broken.png"),
                          (Example("c", [str(tmp_path/"gone.png")], "?", "{}"), "no image .*gone.png")):
        with pytest.raises(VlmError, match=said): f.write_rows(tmp_path/"rows", "train", [example], preprocess)
    assert not (tmp_path/"rows/train.json").exists()


@pytest.mark.parametrize("words, said", [
    (["--engine", "lamafactory"], "Did you mean 'llamafactory'?"), (["--engine", "llamafactory"], "vlm doctor --inst"),
    (["--predict"], "Use vlm predict RUN afterwards"), (["--engine", "llamafactory", "fsdp=true"], "fsdp=true")])
def test_a_mistake_on_the_command_line_is_one_sentence(data, tmp_path, words, said):
    ran = vlm("train", "tiny", f"data={data}", *words, cwd=tmp_path, VLM_LLAMAFACTORY=str(tmp_path))
    assert ran.returncode == 2 and said in ran.stderr and ran.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


# --- the real one -----------------------------------------------------------------------------------------------------
PROBE = """
import json, sys, torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor
from PIL import Image
torch.manual_seed(0)
told = {}
for name in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
    image, grid = model.config.image_token_id, torch.tensor([[1, 8, 12]])
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    ids = torch.tensor([[5, 6, start] + [image]*24 + [end] + list(range(40, 70))])
    pixels = torch.sin(torch.arange(96*3*2*8*8.)).view(96, -1)
    with torch.no_grad():
        told[name] = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids), image_grid_thw=grid,
                           pixel_values=pixels, mm_token_type_ids=(ids == image).int()).loss.item()
print(json.dumps(told))
"""
ANSWERS = """
import json, sys, torch
from PIL import Image
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
base, adapter, rows = sys.argv[1:]
tokenizer, look = AutoTokenizer.from_pretrained(base), AutoImageProcessor.from_pretrained(base)
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
model, told = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval(), []
for row in json.load(open(rows)):
    seen = look(images=[Image.open(row['images'][0]).convert('RGB')], return_tensors='pt')
    image = '<|vision_start|>' + '<|image_pad|>'*(int(seen['image_grid_thw'].prod())//4) + '<|vision_end|>'
    chat = [dict(role='user', content=row['messages'][0]['content'].replace('<image>', image))]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors='pt')
    kinds = (ids['input_ids'] == model.config.image_token_id).int()
    answers = [model.generate(**ids, **seen, **more, max_new_tokens=384, do_sample=False)
               for more in ({}, dict(mm_token_type_ids=kinds))]
    new = [answer[0, ids['input_ids'].shape[1]:] for answer in answers]
    told.append([text.rstrip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)])
print(json.dumps(told))
"""
CORD = SMALL | dict(model_name_or_path="tiny-receipts", use_cpu=True, preprocessing_num_workers=2, val_size=.2,
                    learning_rate=1e-3, disable_shuffling=True, gradient_accumulation_steps=1, max_samples=None)


def cli(factory, *words, cwd):
    "`llamafactory-cli` as a person types it"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run([factory["command"], *words], cwd=cwd, capture_output=True, text=True,
                         env=env | dict(HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(cwd/"cache")))
    assert ran.returncode == 0, ran.stderr[-2000:]


def write_json(path, value): path.write_text(json.dumps(value))


def losses(run): return [row["loss"] for row in events(RunFolder(run), "step")]


def raw(run, group="finetuned-model"): return {row["id"]: row["raw"] for row in read_jsonl(run.predictions(group))}


@pytest.fixture(scope="module")
def both(factory, data, tmp_path_factory):
    "The preset `cord` on eight receipts, by both engines; the folders of the runs"
    place = tmp_path_factory.mktemp("both")
    words = [f"{key}={value}".lower() if isinstance(value, bool) else f"{key}={value}" for key, value in
             (CORD | dict(data=data, max_samples="null")).items()]
    for name, more in dict(ours=[], theirs=["--engine", "llamafactory", "--predict"]).items():
        ran = vlm("train", "cord", *words, f"output_dir={place/name}", *more, cwd=place)
        assert ran.returncode == 0, ran.stderr
    return RunFolder(place/"ours"), RunFolder(place/"theirs")


@pytest.mark.slow
def test_both_engines_report_the_same_losses_on_the_same_batches(both):
    ours, theirs = map(lambda run: losses(run.path), both)
    assert len(ours) == len(theirs) == 2 and abs(ours[0] - theirs[0]) < 1e-3
    assert ours == pytest.approx(theirs, rel=1e-4), "same order, same first adapter"
    for name in ("grad_norm", "learning_rate"):
        a, b = ([row[name] for row in events(run, "step")] for run in both)
        assert a == pytest.approx(b, rel=1e-3)
    start = [events(run, "start")[0] for run in both]
    assert all(start[0][name] == start[1][name] for name in ("rows", "validation", "trainable", "total", "data set"))


@pytest.mark.slow
def test_its_adapter_answers_as_ours_does_and_its_answers_are_a_group(both):
    ours, theirs = both
    for run in both: predict(str(run.path), "finetuned-model")
    mine, other = map(raw, both)
    assert sum(mine[name] == other[name] for name in mine) >= 7, "two steps with the same losses, the same answers"
    group = read_jsonl(theirs.predictions(f.FACTORY_GROUP))
    assert [row["id"] for row in group] == [e.id for e in split_examples(load_config(str(theirs.path)), "test")]
    assert all(row["raw"] and row["decoding"]["engine"] == "llamafactory" for row in group)
    for run in both:
        for name in ("finetuned-model", f.FACTORY_GROUP)[:1 + (run is theirs)]:
            assert vlm("evaluate", run.path, "--group", name).returncode == 0
        assert vlm("compare", run.path).returncode == 0


@pytest.mark.slow
def test_what_it_answers_by_itself_has_plain_positions(factory, both):
    "In its own environment: not told which tokens are image, generate writes its answers; told so, it writes ours"
    theirs = both[1]
    place = theirs.path/"llamafactory"
    words = [factory["python"], "-c", ANSWERS, place/"base", theirs.adapter, place/"test.json"]
    plain, told = zip(*json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout))
    predict(str(theirs.path), "finetuned-model")
    ours, alone = raw(theirs), list(raw(theirs, f.FACTORY_GROUP).values())
    mine = [ours[e.id] for e in split_examples(load_config(str(theirs.path)), "test")]
    assert sum(map(str.__eq__, plain, alone)) >= 7
    assert sum(a.startswith(b) for a, b in zip(told, mine)) >= 7, "ours stops at whole JSON"
    assert sum(map(str.__eq__, alone, mine)) <= 1, "answered right by itself? Then the note of --predict can go"


def hub_form(folder, goal):
    "The same model as the hub has a Qwen2-VL: one flat config, rope_scaling of type mrope"
    from safetensors.torch import save_file
    config = read_json_file(folder/"config.json")
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    for name in ("layer_types", "model_type", "bos_token_id"): text.pop(name)
    vision = {name: vision[name] for name in vision if name not in ("rope_parameters", "model_type", "in_channels")}
    scaling = dict(type="mrope", mrope_section=rope["mrope_section"])
    flat = text | config | dict(vision_config=vision | dict(in_chans=3), rope_theta=rope["rope_theta"],
                                torch_dtype="float32", rope_scaling=scaling)
    goal.mkdir()
    write_json(goal/"config.json", {name: value for name, value in flat.items() if name != "dtype"})
    save_file(load_file(folder/"model.safetensors"), goal/"model.safetensors", metadata=dict(format="pt"))
    return goal


@pytest.mark.slow
def test_every_transformers_computes_the_same_from_the_common_form(factory, tmp_path):
    "And from the hub's form of a Qwen2-VL; from the embedded base as it lies, the older one computes something else"
    from vlm_tutor.bench import SETTINGS, make_work
    settings = SETTINGS | dict(model="embedded-size", vocabulary=320, rows=1, image=[64, 96], answer_tokens=20)
    small, lies = Path(make_work(settings, tmp_path)["model"]), ASSETS/"tiny-receipts"
    common = save_common_form("tiny-receipts", tmp_path/"common")
    alike = small, hub_form(small, tmp_path/"hub"), common
    words = ["-c", PROBE, *map(str, (*alike, lies))]
    here, there = (json.loads(subprocess.run([python, *words], capture_output=True, text=True, check=True).stdout)
                   for python in (sys.executable, factory["python"]))
    for folder in alike: assert there[str(folder)] == pytest.approx(here[str(folder)], abs=1e-5), folder
    assert here[str(common)] == pytest.approx(here[str(lies)], abs=1e-5)
    assert abs(there[str(lies)] - here[str(lies)]) > 1e-3, "read right by itself? Then the common form can go"


@pytest.mark.slow
def test_the_hand_typed_path(factory, both, tmp_path):
    "Save, edit dataset_info.json, edit cord.yaml, llamafactory-cli train, export; then predict with what came out"
    assert vlm("save-cord-dataset-in-sharegpt-format", "receipts", "--n", "8", cwd=tmp_path).returncode == 0
    info = tmp_path/"LLaMA-Factory/data/dataset_info.json"
    info.parent.mkdir(parents=True)
    write_json(info, dict(identity=dict(file_name="identity.json")))
    write_json(info, read_json_file(info) | dict(cord=dataset_entry(str(tmp_path/"receipts/cord.json"))))
    save_common_form("tiny-receipts", tmp_path/"base", 589824, 1024)
    rows = read_json_file(tmp_path/"receipts/cord.json")
    theirs = read_json_file(both[1].path/"llamafactory/train.json")
    order = [row["messages"] for row in rows]
    rows = [rows[order.index(row["messages"])] for row in theirs] # the rows that val_size left, so that losses compare
    write_json(tmp_path/"receipts/cord.json", rows)
    keys = read_yaml(CONFIGS/"cord.yaml") | {k: v for k, v in CORD.items() if v is not None} | dict(
        model_name_or_path=str(tmp_path/"base"), media_dir=str(tmp_path/"receipts"), output_dir="saves/cord",
        val_size=0., eval_strategy="no")
    write_yaml(tmp_path/"LLaMA-Factory/cord.yaml", keys)
    cli(factory, "train", "cord.yaml", cwd=tmp_path/"LLaMA-Factory")
    told = read_json_file(tmp_path/"LLaMA-Factory/saves/cord/trainer_state.json")["log_history"]
    assert [row["loss"] for row in told if "loss" in row] == pytest.approx(losses(both[1].path), abs=1e-5)


@pytest.mark.slow
def test_what_it_exports_answers_as_the_adapter_does(factory, both, data, tmp_path):
    theirs = both[1]
    write_yaml(tmp_path/"export.yaml", dict(
        model_name_or_path=str(theirs.path/"llamafactory/base"), adapter_name_or_path=str(theirs.adapter),
        template="qwen2_vl", export_dir=str(tmp_path/"merged"), export_device="cpu"))
    cli(factory, "export", "export.yaml", cwd=tmp_path)
    write_yaml(tmp_path/"run/config.yaml", theirs.config() | dict(model_name_or_path=str(tmp_path/"merged")))
    predict(str(theirs.path), "finetuned-model")
    predict(str(tmp_path/"run"), "vanilla-model")
    merged, adapted = raw(RunFolder(tmp_path/"run"), "vanilla-model"), raw(theirs)
    assert sum(merged[name] == adapted[name] for name in merged) >= 7


@pytest.mark.slow
def test_an_interrupted_run_of_the_real_one_ends_as_one_that_was_not(factory, data, tmp_path):
    steps = CORD | dict(data=str(data), max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="no",
                        lora_dropout=0., val_size=0.)
    f.train("cord", "llamafactory", overrides=steps | dict(output_dir=str(tmp_path/"whole")))
    command = [sys.executable, "-m", "vlm_tutor.cli", "train", "cord", "--engine", "llamafactory",
               *(f"{key}={'null' if value is None else value}" for key, value in steps.items()), "output_dir=half"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path/"half/llamafactory/output/checkpoint-2/trainer_state.json").exists() and process.poll() is None:
        time.sleep(.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and not (tmp_path/"half/adapter").exists()
    f.train("cord", "llamafactory", overrides=steps | dict(output_dir=str(tmp_path/"half")))
    assert losses(tmp_path/"half") == pytest.approx(losses(tmp_path/"whole"), abs=1e-5)
    assert "Resuming training from" in (tmp_path/"half/llamafactory/train.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("best", [True, False])
def test_the_real_one_stops_early_and_the_log_says_which_step_is_kept(factory, data, tmp_path, best):
    "A rate that spoils the model soon: the loss of validation rows, and not field F1, ends the run after two of them"
    keys = CORD | dict(data=str(data), output_dir=str(tmp_path/"run"), max_steps=9, eval_strategy="steps", eval_steps=1,
                       save_strategy="epoch", learning_rate=.05, lr_scheduler_type="constant", warmup_ratio=0,
                       lora_dropout=0., early_stopping_patience=2, load_best_model_at_end=best,
                       metric_for_best_model="field_f1")
    found, run = f.train("cord", "llamafactory", overrides=keys), RunFolder(tmp_path/"run")
    asked = read_yaml(run.path/"llamafactory/train.yaml")
    assert asked["early_stopping_steps"] == 2 and asked["metric_for_best_model"] == "loss"
    state = read_json_file(run.path/"llamafactory/output/trainer_state.json")
    told = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert [row["loss"] for row in events(run, "validation")][:len(told)] == told
    least = told.index(min(told))
    assert len(told) == least + 3 < 9 and state["global_step"] == len(told), "two without a better one end it"
    assert found["steps"] == len(told) and found["stopped_early"] and found["best_step"] == least + 1
    assert found["kept_step"] == (least + 1 if best else len(told))
    assert f"stopped early; step {found['kept_step']} is kept" in str(found)
    kept = load_file(run.adapter/"adapter_model.safetensors")
    if best:
        there = load_file(run.path/f"llamafactory/output/checkpoint-{least + 1}/adapter_model.safetensors")
        assert kept.keys() == there.keys() and all((kept[name] == there[name]).all() for name in kept)
