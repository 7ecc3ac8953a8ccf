"""The same code path for small models of each family that trains: losses, steps, save and load, answers, resume."""
import dataclasses, json, re, shutil

import pytest
import torch
from cord import short_receipts
from families import build
from vlm_tutor.check import TokenCounter
from vlm_tutor.collate import Preprocess, image_size
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, read_jsonl
from vlm_tutor.engine import choose_loss, rest_tower
from vlm_tutor.export import merge
from vlm_tutor.features import Features, why_not_kept
from vlm_tutor.lean import answer_only, why_not_lean
from vlm_tutor.lora import build_adapter, count_trainable, linear_layers
from vlm_tutor.memory import find_shape, measure_rows
from vlm_tutor.models import FAMILIES, find_family
from vlm_tutor.predict import adapter_hash, generate, load_run_model, predict, split_examples
from vlm_tutor.soft import build_method
from vlm_tutor.tiny import load_model, load_processor
from vlm_tutor.train import events, train, trained_folder

LEAN = {"qwen2_vl", "qwen2_5_vl"}  # whose layers the short way knows
KEPT = LEAN | {"qwen3_5", "qwen3_5_moe"}  # whose image features can be kept
TILED = {"smolvlm", "idefics3"}  # whose images are cut
STATES = {"qwen3_5", "qwen3_5_moe"}  # with layers that keep a state instead of keys
KINDS = [f.name for f in FAMILIES.values() if f.trains]
each = pytest.mark.parametrize("kind", KINDS)
FOUR, THREE = [(64, 64), (64, 32), (64, 32), (64, 64)], [(64, 128), (64, 128), (128, 64)]  # attention, MLP
STATE = [(64, 192), (64, 64), (64, 8), (64, 8), (64, 64)]  # Qwen3.5's first layer instead of attention
GATED = STATE + [(64, 128), *FOUR[1:]]  # the query of its second layer brings a gate
LAYERS = dict(qwen3_vl_moe=2*FOUR, qwen3_5=GATED + 2*THREE, qwen3_5_moe=GATED + 6*[(64, 64)])  # a shared expert a layer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Four receipts a split with short answers"
    return short_receipts(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The folder of a small model, made when first asked for"
    made = {}
    def of(kind):
        if kind not in made: made[kind] = build(kind, tmp_path_factory.mktemp(kind))
        return made[kind]
    return of


def options(data, base, path, **more):
    return dict(data=str(data), output_dir=str(path), model_name_or_path=str(base), max_steps=24, logging_steps=1,
                per_device_train_batch_size=2, save_strategy="steps", save_steps=16, save_total_limit=2, warmup_ratio=0,
                lora_rank=8, lora_alpha=16, eval_strategy="no", learning_rate=1e-2, image_max_pixels=24000) | more


@pytest.fixture(scope="module")
def runs(data, folder, tmp_path_factory):
    "A run on each family, made when first asked for"
    made = {}
    def run(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp(kind)/"run"
            train("tiny", overrides=options(data, folder(kind), path))
            made[kind] = RunFolder(path)
        return made[kind]
    return run


@pytest.fixture
def at_hand(data, folder):
    "Configuration, model and preprocessing of a family, and its encoded rows"
    def of(kind, **more):
        config = load_config("tiny", options(data, folder(kind), "runs/none", **more))
        model, preprocess, _ = load_run_model(config)
        examples = split_examples(config, "train")
        examples[0].prompt += " All of it, please."  # rows of unlike length
        return config, model, preprocess, [preprocess.encode(example) for example in examples]
    return of


def plain_loss(model, preprocess, rows):
    "The summed loss of transformers alone, one row after the other, over all scores"
    count = lambda row: sum(label != -100 for label in row["labels"][1:])
    return sum(model(**preprocess.collate([row])).loss*count(row) for row in rows)


# --- what a row is ----------------------------------------------------------------------------------------------------
@each
def test_rows_are_as_long_as_they_were_counted(at_hand, data, kind):
    config, _, preprocess, _ = at_hand(kind)
    for example in split_examples(config, "train"):
        row = preprocess.encode(example)
        assert preprocess.length(example) == len(row["input_ids"])
        assert preprocess.decode([label for label in row["labels"] if label != -100]) == example.target


@each
def test_the_question_and_answer_read_as_the_chat_template_writes_them(at_hand, kind):
    "What is learned from, joined again, is the template's own text of the finished chat"
    config, _, preprocess, _ = at_hand(kind)
    example = split_examples(config, "train")[0]
    chat = [dict(role="user", content=[dict(type="image"), dict(type="text", text=example.prompt)]),
            dict(role="assistant", content=[dict(type="text", text=example.target)])]
    whole = preprocess.processor.apply_chat_template(chat)
    assert preprocess.question(example) + preprocess.opening + example.target + preprocess.closing == whole


@each
def test_filling_and_empty_tiles_change_no_loss(at_hand, kind):
    _, model, preprocess, rows = at_hand(kind)
    if kind in TILED:  # one row with fewer tiles
        small = Preprocess(preprocess.processor, 4096, image_max_pixels=64*64)
        rows[1] = small.encode(split_examples(at_hand(kind)[0], "train")[1])
        assert len({row["pixel_values"].shape[1] for row in rows}) > 1
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    with torch.no_grad():
        alone = plain_loss(model, preprocess, rows)/count
        together = model(**preprocess.collate(rows)).loss
        sparse = model(**answer_only(preprocess.collate(rows))).loss
    assert together.item() == pytest.approx(alone.item(), abs=1e-5) == sparse.item()


# --- the engine's loss and gradients are those of plain transformers --------------------------------------------------
@each
@pytest.mark.parametrize("memory", ["keep", "layers"])
def test_the_engine_learns_what_plain_transformers_would(at_hand, kind, memory):
    config, model, preprocess, rows = at_hand(kind)
    model = build_adapter(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, .05)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted = plain_loss(model, preprocess, rows)
    truth = torch.autograd.grad(wanted, list(learned.values()))
    rest_tower(model)
    loss, reason = choose_loss(model, preprocess, config)
    assert (reason is None) == (kind in LEAN)
    while memory == "layers" and loss.save_memory(): pass
    model.train()
    found = loss(rows)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, ours, theirs in zip(learned, torch.autograd.grad(found, list(learned.values())), truth):
        assert (ours - theirs).abs().max() <= 1e-4*theirs.abs().max() + 1e-5, name


@each
def test_who_cannot_go_the_short_way_says_why(at_hand, kind):
    config, model, *_ = at_hand(kind)
    later = "a tower that speaks to later layers ({})".format
    reasons = dict(qwen3_vl=later(kind), qwen3_vl_moe=later(kind),
                   **dict.fromkeys(TILED, f"another architecture ({kind})"),
                   **dict.fromkeys(STATES, "it does not know the layer part linear_attn"))
    kept = dict.fromkeys(["qwen3_vl", "qwen3_vl_moe"], "the tower speaks to later layers too")
    assert why_not_kept(model) == (kept | dict.fromkeys(TILED, "its images are looked at in tiles")).get(kind)
    assert why_not_lean(build_adapter(model, config)) == reasons.get(kind)


@pytest.mark.parametrize("kind", sorted(KEPT))
def test_kept_features_are_those_of_the_pixels(at_hand, kind):
    config, model, preprocess, rows = at_hand(kind)
    store = Features(model, preprocess)
    for example, row in zip(split_examples(config, "train")[1:], rows[1:]):
        with torch.no_grad():
            kept = model(**preprocess.collate([preprocess.encode(example, features=store)])).loss
            assert kept.item() == pytest.approx(model(**preprocess.collate([row])).loss.item(), abs=1e-5)


@each
def test_the_run_says_so(runs, data, folder, tmp_path, capsys, kind):
    train("tiny", overrides=options(data, folder(kind), tmp_path/"run", max_steps=1))
    said = capsys.readouterr().out
    assert ("lean_forward has no effect" in said) == (kind not in LEAN)
    assert ("image features are not kept" in said) == (kind not in KEPT)


# --- train, save, load, answer, go on ---------------------------------------------------------------------------------
@each
def test_lora_goes_beside_the_layers_of_the_row(at_hand, kind):
    config, model, *_ = at_hand(kind)
    model = build_adapter(model, config)
    beside = {name.removesuffix(".lora_A.default") for name, _ in model.base_model.model.named_modules()
              if name.endswith("lora_A.default")}
    wanted = {name for name in linear_layers(load_model(config.model_name_or_path))
              if re.fullmatch(find_family(kind).targets, name)}
    assert beside == wanted
    assert count_trainable(model)["trainable"] == sum(8*(a + b) for a, b in LAYERS.get(kind, 2*(FOUR + THREE)))


@each
def test_two_dozen_steps_lower_the_loss(runs, kind):
    found = [row["loss"] for row in events(runs(kind), "step")]
    assert len(found) == 24 and sum(found[-4:]) < .6*sum(found[:4])


@each
def test_what_was_saved_is_what_was_trained(runs, kind):
    "The last validation of the run against the loaded adapter, merged, row by row from pixels"
    run = runs(kind)
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, trained_folder(run))
    rows = [preprocess.encode(example) for example in split_examples(config, "validation")]
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    with torch.no_grad(): loss = plain_loss(model, preprocess, rows).item()/count
    assert loss == pytest.approx(events(run, "validation")[-1]["loss"], abs=2e-4)


@each
def test_it_answers_the_same_in_a_batch_and_alone(runs, kind):
    run = runs(kind)
    result = predict(str(run.path), "vanilla-model,finetuned-model", n=3)
    assert result["n"] == 3 and result["errors"] == 0
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, run.adapter)
    by_id = {example.id: example for example in split_examples(config, "test")}
    for row in read_jsonl(run.predictions("finetuned-model")):
        question = preprocess.encode(by_id[row["id"]], answer=False)
        alone = generate(model, preprocess, [question], 8)[0]
        assert alone and row["raw"].startswith(alone[:6]) and row["raw"].startswith('{"t')
    assert predict(str(run.path), n=3)["reused"] == 3


@each
def test_a_stopped_run_ends_as_one_that_was_not(data, folder, runs, tmp_path, kind):
    whole, run = runs(kind), RunFolder(tmp_path/"run")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints/"checkpoint-24")
    train("tiny", overrides=options(data, folder(kind), run.path))
    assert [row["loss"] for row in events(run, "step")] == [row["loss"] for row in events(whole, "step")]
    assert adapter_hash(run.adapter) == adapter_hash(whole.adapter)


RATES = dict(full=1e-3, freeze=2e-3, ia3=.2, prompt=.3, prefix=.2, p_tuning=5e-3)
HELD = {("smolvlm", "full"), ("smolvlm", "prefix"), ("qwen3_vl", "prompt"), ("qwen2_5_vl", "qlora")}
WEAK = {"prompt": 1, "p_tuning": 1}  # a base that knows nothing is hardly led by words in front
WORDS = [pytest.param(kind, word, marks=[] if (kind, word) in HELD else pytest.mark.slow) for kind in KINDS[1:]
         for word in ("qlora", "dora", "ia3", "full", "freeze", "prompt", "prefix", "p_tuning")
         if not (kind in STATES and word == "prefix")]


@pytest.mark.parametrize("kind, word", WORDS)
def test_other_methods_train_and_load_too(data, folder, tmp_path, kind, word):
    more = dict(finetuning_type=word, learning_rate=RATES.get(word, 1e-2))
    run = RunFolder(tmp_path/"run")
    train("tiny", overrides=options(data, folder(kind), run.path, **more))
    found = [row["loss"] for row in events(run, "step")]
    assert sum(found[-4:]) < WEAK.get(word, .9)*sum(found[:4])
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, trained_folder(run))
    rows = [preprocess.encode(example) for example in split_examples(config, "validation")]
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    with torch.no_grad(): loss = plain_loss(model, preprocess, rows).item()/count
    assert loss == pytest.approx(events(run, "validation")[-1]["loss"], abs=3e-4)
    assert predict(str(run.path), n=2)["errors"] == 0


@each
def test_learned_tokens_are_tokens_put_before(at_hand, folder, kind):
    "A prompt that begins as words has the loss of a row that begins with these words"
    text = dict(finetuning_type="prompt", num_virtual_tokens=6, prompt_tuning_init_text="Read it")
    config, model, preprocess, rows = at_hand(kind, **text)
    ids = (preprocess.tokenizer("Read it", add_special_tokens=False)["input_ids"]*6)[:6]
    longer = [row | dict(input_ids=ids + row["input_ids"], labels=[-100]*6 + row["labels"]) for row in rows]
    for row in longer:
        if "mm_token_type_ids" in row: row["mm_token_type_ids"] = [0]*6 + row["mm_token_type_ids"]
    with torch.no_grad(): wanted = model(**preprocess.collate(longer)).loss.item()
    soft = build_method(model, config)
    with torch.no_grad(): assert soft(**preprocess.collate(rows)).loss.item() == pytest.approx(wanted, abs=1e-5)


@each
def test_the_planner_and_the_checks_count_the_same_tokens(at_hand, kind):
    "By header and rule alone, as 04 and 08 do it, against the rows that training makes"
    config, _, preprocess, _ = at_hand(kind)
    plan = measure_rows(config, find_shape(config.model_name_or_path))
    examples, counter = split_examples(config, "train"), TokenCounter(config)
    counts = counter.lengths(examples, [[image_size(path)[::-1] for path in e.images] for e in examples])
    exact = [preprocess.lengths(example) for example in examples]
    for example, told, truth in zip(examples, counts, exact):
        assert truth["length"] == len(preprocess.encode(example)["input_ids"])
        assert 0 <= truth["length"] - told["length"] <= 1 + (kind in TILED) # a blank before the answer, two breaks
    assert plan["image"] == pytest.approx(sum(one["image"] for one in exact)/len(exact), abs=2)


# --- what cannot be trained -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, said", [("paligemma", "whose pictures the native engine cannot prepare"),
                                        ("qwen9_vl", "unknown family 'qwen9_vl'")])
def test_a_family_that_is_not_known_is_refused_at_once(data, tmp_path, kind, said):
    base = tmp_path/"base"
    base.mkdir()
    (base/"config.json").write_text('{"model_type": "%s"}' % kind)
    with pytest.raises(VlmError, match=said) as raised: train("tiny", overrides=options(data, base, tmp_path/"run"))
    assert "\n" not in str(raised.value) and "qwen3_vl" in str(raised.value)


@pytest.mark.parametrize("kind", sorted(STATES))
def test_a_prefix_needs_keys_in_every_layer(data, folder, tmp_path, kind):
    more = options(data, folder(kind), tmp_path/"run", finetuning_type="prefix")
    with pytest.raises(VlmError, match="1 layers, from layer 0 on, keep a state"): train("tiny", overrides=more)


def test_a_family_without_a_test_is_announced(data, folder, tmp_path, capsys, monkeypatch):
    import vlm_tutor.models as models
    row = dataclasses.replace(FAMILIES["qwen2_vl"], trains=False)
    monkeypatch.setitem(models.FAMILIES, "qwen2_vl", row)
    train("tiny", overrides=options(data, folder("qwen2_vl"), tmp_path/"run", max_steps=1))
    assert "no small Qwen2-VL is in our tests" in capsys.readouterr().out


@each
def test_merged_it_is_a_folder_like_any_other(runs, kind):
    "The merge checks its own answers; here its folder is loaded with nothing of ours but the processor"
    run = runs(kind)
    merge(str(run.path), out=str(run.path/"whole"))
    assert json.loads((run.path/"whole/config.json").read_text())["model_type"] == kind
    from transformers import AutoModelForImageTextToText
    config = load_config(run.config_file)
    beside, preprocess, _ = load_run_model(config, run.adapter)
    whole = AutoModelForImageTextToText.from_pretrained(run.path/"whole").eval()
    again = Preprocess(load_processor(str(run.path/"whole")))
    examples = split_examples(config, "validation")
    with torch.no_grad():
        wanted = plain_loss(beside, preprocess, [preprocess.encode(e) for e in examples])
        found = plain_loss(whole, again, [again.encode(e) for e in examples])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_and_router_get_adapters_by_name(at_hand, kind):
    "Four experts of 64 × 128 (gate and up) and 64 × 64 (down), and a router of 4 × 64, in each of two layers"
    config, model, *_ = at_hand(kind, lora_target="experts,router", lora_rank=4)
    trained = {name: p for name, p in build_adapter(model, config).named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2*4*(4*(64 + 128) + 4*(64 + 64) + (4 + 64))
