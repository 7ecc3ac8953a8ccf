"""Every method by one word on the embedded base: built, trained, saved, loaded, merged, asked, gone on with"""
import shutil

import pytest
import torch
from cord import short_receipts
from vlm_tutor.config import CHOICES, LORA, MEANING, QAT, SOFT, WEIGHTS, load_config
from vlm_tutor.core import RunFolder, VlmError, read_json_file, read_jsonl
from vlm_tutor.lean import why_not_lean
from vlm_tutor.lora import count_trainable
from vlm_tutor.memory import LEAN, method_of
from vlm_tutor.predict import adapter_hash, generate, load_run_model, predict, split_examples
from vlm_tutor.soft import BUILDERS, build_method, load_adapter
from vlm_tutor.tiny import load_model
from vlm_tutor.train import events, train, trained_folder

WIDTH, LAYERS, KEYS, MLP, WORDS = 192, 5, 64, 512, 20  # of the embedded base; learned tokens
every = pytest.mark.parametrize("word", MEANING)
quick = {"qlora", "pissa", "full", "prefix", "p_tuning", "qat_lora"}  # each goes on in a way of its own
some = pytest.mark.parametrize("word", [word if word in quick else pytest.param(word, marks=pytest.mark.slow)
                                        for word in MEANING])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "Four receipts a split with short answers"
    return short_receipts(tmp_path_factory.mktemp("data"), 4)


def options(data, path, word):
    "One word changes the method; the rate follows from it"
    return dict(data=str(data), output_dir=str(path), finetuning_type=word, max_steps=24, logging_steps=1,
                per_device_train_batch_size=2, save_strategy="steps", save_steps=16, save_total_limit=2, warmup_ratio=0,
                lora_rank=8, lora_alpha=16, eval_strategy="no")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    "A run of each method, made when first asked for"
    made = {}
    def run(word):
        if word not in made:
            path = tmp_path_factory.mktemp(word) / "run"
            train("tiny", overrides=options(data, path, word))
            made[word] = RunFolder(path)
        return made[word]
    return run


def losses(run): return [row["loss"] for row in events(run, "step")]


def expected_count(word):
    "Numbers that learn, from the widths of the layers"
    linear = [(WIDTH, WIDTH), (WIDTH, KEYS), (WIDTH, KEYS), (WIDTH, WIDTH), (WIDTH, MLP), (WIDTH, MLP), (MLP, WIDTH)]
    layer = sum(a * b for a, b in linear) + WIDTH + 2 * KEYS + 2 * WIDTH
    rows = load_model("tiny-receipts").get_input_embeddings().num_embeddings
    whole = LAYERS * layer + WIDTH + rows * WIDTH
    known = dict(ia3=LAYERS * (2 * KEYS + MLP), full=whole, qat=whole, freeze=2 * layer,
                 prompt=WORDS * WIDTH, prefix=WORDS * LAYERS * 2 * KEYS,
                 p_tuning=WORDS * WIDTH + 3 * (WIDTH * WIDTH + WIDTH))
    return known.get(word, LAYERS * sum(8 * (a + b) + (b if word == "dora" else 0) for a, b in linear))


def test_one_function_for_each_word():
    assert set(BUILDERS) == set(CHOICES["finetuning_type"]) == set(MEANING) == {*LORA, *SOFT, *WEIGHTS, *QAT, "ia3"}


@every
def test_as_many_numbers_learn_as_the_widths_say(runs, word):
    assert events(runs(word), "start")[0]["trainable"] == expected_count(word)


@pytest.mark.parametrize("word", [word for word in MEANING if word not in (*WEIGHTS, "qlora", "qat")])
def test_peft_counts_the_same(word):
    model = build_method(load_model("tiny-receipts"), load_config("tiny", dict(finetuning_type=word)))
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == count_trainable(model)["trainable"] and count_trainable(model)["total"] <= total


@every
def test_the_planner_knows_who_goes_the_short_way(word):
    config = load_config("tiny", dict(finetuning_type=word))
    model, _, _ = load_run_model(config)
    assert (method_of(config).name in LEAN) == (why_not_lean(build_method(model, config)) is None)


@every
def test_two_dozen_steps_lower_the_loss(runs, word):
    found = losses(runs(word))
    assert len(found) == 24 and sum(found[-4:]) < .6 * sum(found[:4])


@every
def test_what_was_saved_is_what_was_trained(runs, word):
    "The last validation, by the model in memory and kept features, against the loaded one, pixels and single rows"
    run = runs(word)
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, trained_folder(run))
    total = count = 0
    for example in split_examples(config, "validation"):
        answer = len(preprocess.answer_ids(example))
        with torch.no_grad(): loss = model(**preprocess.collate([preprocess.encode(example)])).loss
        total, count = total + loss.item() * answer, count + answer
    assert total / count == pytest.approx(events(run, "validation")[-1]["loss"], abs=2e-4)


@pytest.mark.parametrize("word", [*LORA, "ia3", "qat_lora"])
def test_merged_into_the_base_it_says_the_same(runs, word):
    "QLoRA's adapter goes into the base in 32 bits; after QAT the merged sum is rounded"
    run = runs(word)
    config = load_config(run.config_file, dict(finetuning_type="lora"))
    _, preprocess, _ = load_run_model(config)
    batch = preprocess.collate([preprocess.encode(e) for e in split_examples(config, "validation")])
    beside = load_adapter(load_model("tiny-receipts"), run.adapter).eval()
    with torch.no_grad():
        apart = beside(**batch).logits
        merged = beside.merge_and_unload()(**batch).logits
    assert (merged - apart).abs().max() < 1e-3


@every
def test_it_answers(runs, word):
    run = runs(word)
    result = predict(str(run.path), "vanilla-model,finetuned-model")
    groups = {name: read_jsonl(run.predictions(name)) for name in ("vanilla-model", "finetuned-model")}
    assert result["n"] == 4 and result["errors"] == 0
    assert groups["vanilla-model"][0]["adapter"] is None
    assert groups["finetuned-model"][0]["adapter"] == adapter_hash(trained_folder(run))
    config = load_config(run.config_file)
    model, preprocess, _ = load_run_model(config, trained_folder(run))
    example = split_examples(config, "test")[0]
    alone = generate(model, preprocess, [preprocess.encode(example, answer=False)], 8)[0]
    said = next(row["raw"] for row in groups["finetuned-model"] if row["id"] == example.id)
    assert said.startswith(alone[:4]) and predict(str(run.path))["reused"] == 4


@some
def test_a_stopped_run_ends_as_one_that_was_not(data, runs, tmp_path, word):
    whole, run = runs(word), RunFolder(tmp_path / "run")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(trained_folder(run))
    shutil.rmtree(run.checkpoints / "checkpoint-24")
    train("tiny", overrides=options(data, run.path, word))
    assert losses(run) == losses(whole)
    assert adapter_hash(trained_folder(run)) == adapter_hash(trained_folder(whole))


def test_a_finished_model_is_left_alone(data, runs):
    run = runs("full")
    before = adapter_hash(run.model)
    result = train("tiny", overrides=options(data, run.path, "full"))
    assert str(result).startswith("done before") and result["model"] == str(run.model)
    assert adapter_hash(run.model) == before and not run.adapter.exists()


def test_a_trained_model_is_a_base_like_any_other(data, runs, tmp_path):
    "Its folder trains on, and every program can load it: tokenizer and processor lie beside the weights"
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    folder = runs("freeze").model
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|im_end|>"
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_vl"
    more = options(data, tmp_path / "run", "lora") | dict(model_name_or_path=str(folder), max_steps=1)
    assert train("tiny", overrides=more)["loss"] < losses(runs("freeze"))[0] / 2


def test_training_goes_on_from_an_adapter_of_its_kind_only(data, runs, tmp_path):
    for word in ("ia3", "prompt", "prefix", "pissa"):
        more = options(data, tmp_path / word, word) | dict(adapter_name_or_path=str(runs(word).adapter), max_steps=1)
        assert train("tiny", overrides=more)["loss"] < .6 * losses(runs(word))[0]
    wrong = options(data, tmp_path / "wrong", "lora") | dict(adapter_name_or_path=str(runs("prompt").adapter))
    with pytest.raises(VlmError, match="cannot go on from the PROMPT_TUNING adapter"): train("tiny", overrides=wrong)


def test_vision_that_learned_is_looked_at_again(data, tmp_path):
    "The tower of a full fine-tune is not that of the base, so its features are not taken from the store"
    more = options(data, tmp_path / "run", "full") | dict(freeze_vision_tower=False, max_steps=4)
    train("tiny", overrides=more)
    run = RunFolder(tmp_path / "run")
    assert read_json_file(run.model / "base.json")["parts"] == ["language", "vision"]
    config = load_config(run.config_file)
    predict(str(run.path), "vanilla-model,finetuned-model")
    model, preprocess, _ = load_run_model(config, run.model)
    for row in read_jsonl(run.predictions("finetuned-model")):
        example = next(e for e in split_examples(config, "test") if e.id == row["id"])
        assert row["raw"].startswith(generate(model, preprocess, [preprocess.encode(example, answer=False)], 6)[0][:4])


@pytest.mark.parametrize("given, said", [
    (dict(finetuning_type="full", quantization_bit=4), "finetuning_type=full and quantization_bit=4 contradict"),
    (dict(finetuning_type="dora", use_dora=False), "finetuning_type=dora and use_dora=false contradict"),
    (dict(finetuning_type="prefix", use_rslora=True), "finetuning_type=prefix and use_rslora=true contradict"),
    (dict(finetuning_type="pissa", quantization_bit=8), "pissa_init and quantization_bit contradict"),
    (dict(finetuning_type="freeze", freeze_language_model=True, freeze_vision_tower=False),
     "finetuning_type=freeze and freeze_language_model=true contradict"),
    (dict(finetuning_type="prompt", torch_compile=True), "torch_compile does not go with finetuning_type=prompt"),
    (dict(finetuning_type="full", fsdp=True), "fsdp shares frozen layers"),
    (dict(quantization_bit=3), "quantization_bit is 3. Allowed: 4, 8"), (dict(num_virtual_tokens=0), "above 0"),
    (dict(finetuning_type="lora_plus"), "Did you mean 'loraplus'")])
def test_what_contradicts_is_named(given, said):
    with pytest.raises(VlmError) as raised: load_config("tiny", given)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_one_word_brings_its_rate_says_so_and_goes_on(data, tmp_path, capfd):
    "The run folder holds the rate that came about; it is not multiplied again"
    words = [f"{key}={value}" for key, value in dict(data=data, output_dir=tmp_path / "run", finetuning_type="prompt",
                                                     max_steps=1, eval_strategy="no", warmup_ratio=0).items()]
    train("tiny", overrides=words)
    assert "learning_rate: 0.2 is 50 × 0.004, because the method is prompt in place of lora" in capfd.readouterr().out
    run = RunFolder(tmp_path / "run")
    assert load_config(run.path).learning_rate == events(run, "step")[0]["learning_rate"] == .2
    for again in (train("tiny", overrides=words), train(str(run.path))): assert again["steps"] == 1
    assert "in place of" not in capfd.readouterr().out
    assert predict(str(run.path), n=1)["n"] == 1
    with pytest.raises(VlmError, match="learning_rate"): train("tiny", overrides=[*words, "learning_rate=0.1"])
