"""Chapter 03: the recipe as stated, the trainer's own arithmetic, and every way to mistype a key."""
import re
from pathlib import Path

import pytest
import yaml

from vlm_tutor import config as module
from vlm_tutor.config import (FIELDS, Config, as_dict, choose_rows, config_diff, ineffective_keys, load_config,
                              plan_steps, presets, save_config, to_type)
from vlm_tutor.core import RunFolder, VlmError
from vlm_tutor.methods import METHODS

# Keys that LLaMA-Factory 0.9.5 accepted when it was run with them
ACCEPTED = """model_name_or_path stage do_train finetuning_type lora_target dataset template cutoff_len max_samples
overwrite_cache preprocessing_num_workers output_dir logging_steps save_steps plot_loss overwrite_output_dir
per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs lr_scheduler_type warmup_ratio
bf16 ddp_timeout val_size per_device_eval_batch_size eval_strategy eval_steps""".split()

RECIPE = dict(model_name_or_path="Qwen/Qwen2-VL-2B-Instruct", finetuning_type="lora", lora_target="all",
              cutoff_len=1024, preprocessing_num_workers=16, overwrite_cache=True, per_device_train_batch_size=8,
              gradient_accumulation_steps=8, learning_rate=1e-4, lr_scheduler_type="cosine", warmup_ratio=0.1,
              num_train_epochs=10.0, val_size=0.1, eval_strategy="steps", eval_steps=500, template="qwen2_vl",
              bf16=True)


def test_the_recipe_is_the_one_people_publish():
    written = yaml.safe_load(presets()["cord"].read_text())
    assert set(written) == set(ACCEPTED)
    assert {k: written[k] for k in RECIPE} == RECIPE
    assert {k: getattr(load_config("cord"), k) for k in RECIPE} == RECIPE


@pytest.mark.parametrize("name", ["tiny", "cord", "cord-better"])
def test_a_preset_is_plain_yaml_of_known_keys_in_their_own_types(name):
    for key, value in yaml.safe_load(presets()[name].read_text()).items():
        assert key in FIELDS and value == to_type(key, value) and not isinstance(value, type(None)), key


def test_the_better_recipe_validates_and_saves_every_epoch():
    plan = plan_steps(load_config("cord-better"), 800)
    assert (plan["examples"], plan["evaluations"], plan["checkpoints"]) == (800, 10, 10)


# --- arithmetic, against the trainer itself ---------------------------------------------------------------------------
CASES = [(dict(), 800), (dict(val_size=0), 37), (dict(eval_steps=7, save_steps=11), 333),
         (dict(num_train_epochs=0.3), 500),
         (dict(eval_strategy="epoch", save_strategy="epoch", num_train_epochs=2.5), 300), (dict(max_steps=9), 800),
         (dict(eval_steps=0.25, save_steps=0.1, num_train_epochs=2.0), 410), (dict(max_samples=0.5), 801)]


def train_for_real(config, rows, folder):
    "What transformers' Trainer counts on a one-weight model: steps, evaluations, checkpoints"
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1))
        def forward(self, x, labels=None): return dict(loss=((self.w * x - labels) ** 2).mean(), logits=x)

    class Count(TrainerCallback):
        seen, saved = 0, []
        def on_evaluate(self, *args, **kw): Count.seen += 1
        def on_save(self, args, state, *rest, **kw): Count.saved = [*Count.saved, state.global_step]

    keys = """per_device_train_batch_size gradient_accumulation_steps num_train_epochs max_steps eval_strategy
              eval_steps save_strategy save_steps logging_steps""".split()
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_only_model=True,
                             save_total_limit=1, **{k: getattr(config, k) for k in keys})
    train, validation = choose_rows(config, rows)
    data = lambda ids: [dict(x=torch.ones(1), labels=torch.ones(1)) for _ in ids] or None
    sets = dict(train_dataset=data(train), eval_dataset=data(validation) or data(train))
    trainer = Trainer(Line(), args, **sets, callbacks=[Count()])
    trainer.train()
    return trainer.state.max_steps, Count.seen, len(Count.saved)


@pytest.mark.parametrize("changes, rows", CASES)
def test_steps_are_those_of_the_trainer(changes, rows, tmp_path):
    config = load_config("cord", changes)
    steps, evaluations, checkpoints = train_for_real(config, rows, tmp_path)
    plan = plan_steps(config, rows)
    assert plan["steps"] == steps
    assert evaluations == plan["evaluations"] + missed(plan, config.eval_strategy, config.eval_steps)
    assert checkpoints == plan["checkpoints"] + missed(plan, config.save_strategy, config.save_steps)


def missed(plan, strategy, every):
    "1 when the schedule misses the last step: the trainer then adds one there"
    every = every if every >= 1 else -(-every * plan["steps"] // 1)
    return int(strategy == "steps" and plan["steps"] % every != 0)


def test_rows_are_a_partition_whatever_is_asked():
    for limit in (None, 7, 0.1, 1.0, 10_000):
        for share in (0, 0.1, 3):
            train, validation = choose_rows(Config(max_samples=limit, val_size=share), 100)
            assert not set(train) & set(validation) and set(train) | set(validation) <= set(range(100))
            whole = {None: 100, 7: 7, 0.1: 10, 1.0: 100, 10_000: 100}[limit]
            assert len(train) + len(validation) == whole


def test_a_share_is_seeded_and_spread():
    rows = choose_rows(Config(max_samples=0.1), 1000)[0]
    assert rows == choose_rows(Config(max_samples=0.1), 1000)[0]
    assert rows != choose_rows(Config(max_samples=0.1, seed=1), 1000)[0]
    assert sum(r < 500 for r in rows) in range(30, 70)
    assert choose_rows(Config(max_samples=100), 1000)[0] == list(range(100))


# --- words and types --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, error", [
    ("lr=1e-4", "unknown key 'lr' in the configuration. Did you mean 'learning_rate'?"),
    ("lora_rnak=8", "unknown key 'lora_rnak' in the configuration. Did you mean 'lora_rank'?"),
    ("evaluation_strategy=steps", "Did you mean 'eval_strategy'?"),
    ("image_resolution=100", "Did you mean 'image_max_pixels'?"),
    ("zzz=1", "vlm config shows all keys"), ("learning_rate=fast", "learning_rate must be a number, not 'fast'"),
    ("learning_rate=true", "must be a number"), ("learning_rate=nan", "must be a number"),
    ("learning_rate=null", "must be a number"), ("lora_rank=1.5", "must be a whole number"), ("seed=-1", "seed is -1"),
    ("bf16=maybe", "bf16 must be true or false, not 'maybe'"), ("max_samples=1.5", "max_samples is 1.5"),
    ("max_samples=0", "max_samples is 0"), ("finetuning_type=lor", "Did you mean 'lora'?"),
    ("lora_dropout=1", "from 0 to below 1"), ("val_size=-0.1", "0 or above"), ("learning_rate", "is no key=value"),
    ("image_max_pixels=100", "image_min_pixels is above image_max_pixels"), ("fp16=true", "bf16 and fp16 cannot both"),
    ("num_train_epochs=inf", "must be a number")])
def test_one_sentence_for_each_mistake(text, error):
    with pytest.raises(VlmError) as raised: load_config("cord", [text])
    assert error in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("text, value", [
    ("learning_rate=1e-4", 1e-4), ("learning_rate=3", 3.0), ("num_train_epochs=0.5", 0.5), ("lora_rank=16", 16),
    ("lora_rank=1e1", 10), ("max_samples=0.25", 0.25), ("max_samples=500", 500), ("max_samples=1.0", 1.0),
    ("max_samples=null", None), ("bf16=no", False), ("bf16=True", True), ("eval_strategy=no", "no"),
    ("dataset=007", "007"), ("dataset=yes", "yes"), ("model_name_or_path=a=b:c", "a=b:c"),
    ("eval_steps=0.1", 0.1), ("save_steps=50", 50)])
def test_values_from_the_command_line(text, value):
    found = getattr(load_config("cord", [text]), text.split("=")[0])
    assert found == value and type(found) is type(value)


def test_a_file_is_checked_like_the_command_line(tmp_path):
    wrong = {"lr: 1": "unknown key 'lr'", "- a": "key: value", "a: [": "is not YAML", "1: 2": "key '1'"}
    for line, error in wrong.items():
        (tmp_path / "x.yaml").write_text(line)
        with pytest.raises(VlmError, match=error): load_config(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_text("eval_strategy: no\nlearning_rate: 1e-4\n")
    assert load_config(tmp_path / "x.yaml").learning_rate == 1e-4
    assert load_config(tmp_path / "x.yaml").output_dir == "runs/x"


@pytest.mark.parametrize("name", ["tiny", "cord", "cord-better"])
def test_the_saved_copy_is_the_same_configuration(name, tmp_path):
    config = load_config(name, ["learning_rate=1e-7", "max_samples=0.125", "seed=3"])
    assert load_config(save_config(config, tmp_path / "config.yaml")) == config
    assert load_config(tmp_path) == config and load_config(config) == config
    assert [d["key"] for d in config_diff(config, load_config(name))] == ["max_samples", "learning_rate", "seed"]
    assert set(as_dict(config)) <= set(FIELDS)


def test_rank_doubles_to_alpha_unless_said():
    assert load_config("cord", ["lora_rank=32"]).lora_alpha == 64
    assert load_config("cord-better", ["lora_rank=32"]).lora_alpha == 16
    assert load_config("cord", ["lora_rank=32", "lora_alpha=8"]).lora_alpha == 8


# --- a data set of one's own ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names, preset, expected", [
    (["inv", "inv_validation", "inv_test"], "cord-better", ("inv", "inv_validation", 0.0)),
    (["inv"], "cord-better", ("inv", None, 0.1)), (["inv", "inv_validation"], "cord", ("inv", None, 0.1))])
def test_data_points_at_a_folder(tmp_path, names, preset, expected):
    folder = tmp_path / "invoices"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(str({n: {} for n in names}).replace("'", '"'))
    config = load_config(preset, [f"data={folder}"])
    assert (config.dataset, config.eval_dataset, config.val_size) == expected
    assert Path(config.dataset_dir) == folder and config.output_dir == "runs/invoices"
    assert load_config(preset, [f"data={folder}", "output_dir=runs/x"]).output_dir == "runs/x"


def test_data_that_is_none(tmp_path):
    with pytest.raises(VlmError, match=f"sharegpt-format {tmp_path} --source YOUR_FOLDER"):
        load_config("tiny", [f"data={tmp_path}"])
    (tmp_path / "r-1.png").touch() # the source itself: nothing is to be written into it
    with pytest.raises(VlmError, match=f"sharegpt-format {tmp_path}-sharegpt --source {tmp_path}"):
        load_config("tiny", [f"data={tmp_path}"])
    (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises(VlmError, match="names no data set"): load_config("tiny", {"data": tmp_path})


# --- keys without effect ----------------------------------------------------------------------------------------------
def test_keys_without_effect_are_named_for_the_engine():
    cord = load_config("cord")
    native = dict(ineffective_keys(cord, rows=800, device="cpu"))
    assert {"overwrite_cache", "preprocessing_num_workers", "overwrite_output_dir", "eval_steps"} <= set(native)
    assert ("bf16" in native) != module.cpu_has_bf16()
    assert set(dict(ineffective_keys(cord, "llamafactory"))) == set()
    share = load_config("cord", ["max_samples=0.5"])
    assert "max_samples" in dict(ineffective_keys(share, "llamafactory"))
    assert "max_samples" not in dict(ineffective_keys(share))


def test_no_key_is_dead():
    "Each key is read by another module, or named as one without effect in the native engine"
    package = Path(module.__file__).parent
    used = "\n".join(p.read_text() for p in package.glob("*.py") if p.stem != "config")
    rest = [k for k in FIELDS if not re.search(rf"\b{k}\b", used)]
    values = dict(overwrite_cache=True, preprocessing_num_workers=2, overwrite_output_dir=True, template="other",
                  do_train=True, stage="sft", ddp_timeout=5, report_to="wandb")
    named = dict(ineffective_keys(Config(**values)))
    one_choice = {k for k, allowed in module.CHOICES.items() if len(allowed) == 1}
    here = {"do_train", "max_samples", "val_size", "num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps"}
    # vlm train trains; choose_rows and plan_steps read the others
    assert set(rest) <= set(named) | one_choice | here


# --- a rate for each method -------------------------------------------------------------------------------------------
CORD_RATES = dict(lora=1e-4, rslora=1e-4, dora=1e-4, qlora=1e-4, qat_lora=1e-4, full=2.5e-5, qat=2.5e-5, freeze=5e-5,
                  pissa=2.5e-5, loraplus=1.25e-5, ia3=5e-3, prompt=5e-3, prefix=5e-3, p_tuning=1.25e-4)


def test_the_rates_that_follow_for_a_model_of_two_billion():
    assert {w: load_config("cord", dict(finetuning_type=w)).learning_rate for w in module.MEANING} == CORD_RATES
    assert load_config("tiny", ["finetuning_type=prompt"]).learning_rate == .2


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.native])
def test_the_words_of_a_row_bring_its_own_rate(name):
    found = load_config("cord", METHODS[name].native.split())
    assert found.learning_rate == pytest.approx(1e-4 * METHODS[name].rate)
    assert bool(found.carried) == (METHODS[name].rate != 1)


@pytest.mark.parametrize("word", ["rslora", "dora", "pissa", "loraplus", "qlora"])
def test_a_word_and_its_switch_bring_the_same_rate(word):
    one, two = load_config("cord", dict(finetuning_type=word)), load_config("cord", module.MEANING[word])
    assert one.learning_rate == two.learning_rate
    assert load_config(two, dict(finetuning_type=word)).learning_rate == two.learning_rate


def test_a_given_rate_wins_and_a_resolved_one_stays(tmp_path):
    given = load_config("tiny", ["finetuning_type=full", "learning_rate=0.004"])
    assert given.learning_rate == .004 and not given.carried
    soft = load_config("tiny", ["finetuning_type=prompt"])
    run = RunFolder.create(tmp_path / "run", as_dict(soft))
    copy = save_config(soft, tmp_path / "s.yaml")
    for again in (load_config(run.path), load_config(copy), load_config(soft, dict(seed=1)),
                  load_config(run.path, ["finetuning_type=prompt"])):
        assert again.learning_rate == .2 and not again.carried
    assert load_config(run.path, ["finetuning_type=lora"]).learning_rate == .004
    assert load_config(run.path, ["finetuning_type=p_tuning"]).learning_rate == .005


def test_a_rate_in_a_file_belongs_to_the_method_of_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("finetuning_type: prompt\nlearning_rate: 0.1\n")
    assert load_config(tmp_path / "mine.yaml").learning_rate == .1
    assert load_config(tmp_path / "mine.yaml", ["finetuning_type=full"]).learning_rate == pytest.approx(.1 / 50 / 4)
    (tmp_path / "mine.yaml").write_text("dataset: cord\n")
    assert load_config(tmp_path / "mine.yaml", ["finetuning_type=ia3"]).learning_rate == pytest.approx(50 * 5e-5)


def test_the_rate_that_follows_is_said_once():
    from vlm_tutor.memory import plan
    told = "0.005 is 50 × 0.0001, because the method is prompt in place of lora; learning_rate=VALUE sets your own"
    shown = module.show_config("cord", overrides=["finetuning_type=prompt"])
    assert shown.text.count(told) == 1 and f"learning_rate: {told}" in shown["notes"]
    assert plan("cord", overrides=["finetuning_type=prompt"]).text.count(told) == 1
    for words in (["finetuning_type=dora"], ["finetuning_type=prompt", "learning_rate=0.01"]):
        assert "in place of" not in module.show_config("cord", overrides=words).text
