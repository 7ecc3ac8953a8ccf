"""Variants of LoRA against their formulas, weights in few bits, and what full fine-tuning moves and keeps"""
import json

import pytest
import torch
from vlm_tutor import config as config_module
from vlm_tutor.collate import Preprocess
from vlm_tutor.config import Config, check_kernels, load_config
from vlm_tutor.core import VlmError
from vlm_tutor.engine import Engine, rate_groups
from vlm_tutor.lora import (build_adapter, build_full, count_trainable, model_part, numbers, quantisation, quantised,
                            save_adapter_files)
from vlm_tutor.receipts import make_examples
from vlm_tutor.soft import build_method, can_merge, load_adapter
from vlm_tutor.tiny import load_model, load_processor

LAYER = "model.language_model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def preprocess(): return Preprocess(load_processor("tiny-receipts"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return make_examples(4, seed=1, split="train", folder=tmp_path_factory.mktemp("receipts"))


@pytest.fixture(scope="module")
def rows(preprocess, examples): return [preprocess.encode(example) for example in examples]


def tiny(word, **more): return load_config("tiny", dict(finetuning_type=word, max_steps=8, warmup_ratio=0) | more)


def few_bits(config): return quantised(load_model("tiny-receipts", quantisation=quantisation(config, torch.float32)))


def logits(model, preprocess, rows):
    with torch.no_grad(): return model(**preprocess.collate(rows)).logits


def steps(model, preprocess, config, rows, n=6):
    engine = Engine(model, preprocess, config, n=4)
    return engine, [engine.step(rows)["loss"] for _ in range(n)]


# --- variants ---------------------------------------------------------------------------------------------------------
def test_rslora_divides_by_the_root_of_the_rank():
    model = build_adapter(load_model("tiny-receipts"), tiny("rslora", lora_rank=16, lora_alpha=8))
    assert model.get_base_model().get_submodule(LAYER).scaling["default"] == 8 / 16**.5


def test_b_of_lora_plus_takes_steps_as_many_times_longer(preprocess, rows):
    "Adam's first step is as long as the rate, in each number whose gradient is not tiny"
    for word, times in (("lora", 1), ("loraplus", 16)):
        config = tiny(word, learning_rate=1e-4, lr_scheduler_type="constant")
        model = build_adapter(load_model("tiny-receipts"), config)
        steps(model, preprocess, config, rows, 1)
        moved = model.get_base_model().get_submodule(LAYER).lora_B["default"].weight.abs()
        assert moved.max().item() == pytest.approx(times * 1e-4, rel=.01)
    named = dict(model.named_parameters())
    assert sum(len(group["params"]) for group in rate_groups(named, config)) == len(named)


def test_pissa_takes_the_strongest_directions_out_of_the_weight():
    base, config = load_model("tiny-receipts"), tiny("pissa", pissa_iter=-1, lora_rank=8, lora_alpha=8)
    weight = base.get_submodule(LAYER).weight.detach().clone()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    layer = build_adapter(base, config).get_base_model().get_submodule(LAYER)
    strongest = u[:, :8] * s[:8] @ v[:8]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert (product - strongest).abs().max() < 1e-4
    assert (layer.base_layer.weight - (weight - strongest)).abs().max() < 1e-4


@pytest.mark.parametrize("more", [{}, dict(use_rslora=True), dict(use_dora=True)], ids=str)
def test_pissa_on_file_is_lora_for_the_base_as_it_came(preprocess, rows, tmp_path, more):
    config = tiny("pissa", lora_rank=4, lora_alpha=12, **more)
    model = build_adapter(load_model("tiny-receipts"), config)
    engine, found = steps(model, preprocess, config, rows)
    save_adapter_files(model, tmp_path, engine.adapter())
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["r"] == 8 and about["init_lora_weights"] is True and found[-1] < found[0]
    loaded = load_adapter(load_model("tiny-receipts"), tmp_path).eval()
    assert (logits(loaded, preprocess, rows) - logits(model.eval(), preprocess, rows)).abs().max() < 2e-3


def test_a_rank_above_a_width_is_refused():
    with pytest.raises(VlmError, match="lora_rank 80 is above the width of 'model.language_model.layers.0.*k_proj"):
        build_adapter(load_model("tiny-receipts"), tiny("lora", lora_rank=80))
    build_adapter(load_model("tiny-receipts"), tiny("lora", lora_rank=80, lora_target="gate_proj,up_proj"))


# --- few bits ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [{}, dict(double_quantization=False), dict(quantization_bit=8)], ids=str)
def test_only_the_layers_of_the_language_model_have_few_bits(more):
    model, whole = few_bits(tiny("qlora", **more)), load_model("tiny-receipts")
    kind = "Linear8bitLt" if more.get("quantization_bit") == 8 else "Linear4bit"
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            assert type(layer).__name__ == (kind if model_part(name) == "language" else "Linear"), name
    assert count_trainable(model)["total"] == count_trainable(whole)["total"]
    held = sum(p.numel() * p.element_size() for p in model.get_submodule(LAYER).parameters())
    assert held == 192 * 512 // (1 if "quantization_bit" in more else 2)


def test_the_sixteen_values_are_those_of_the_paper():
    "NF4: each block of 64 weights is a scale times one of 16 values from -1 to 1, zero among them"
    from bitsandbytes.functional import dequantize_4bit
    model, whole = few_bits(tiny("qlora", double_quantization=False)), load_model("tiny-receipts")
    layer = model.get_submodule(LAYER)
    held = dequantize_4bit(layer.weight.data, layer.weight.quant_state).view(-1, 64)
    blocks = whole.get_submodule(LAYER).weight.detach().view(-1, 64)
    values = (held / blocks.abs().amax(1, keepdim=True)).mul(1e4).round().div(1e4).unique()
    assert len(values) == 16 and values[0] == -1 and values[-1] == 1 and 0 in values
    nearest = (blocks / blocks.abs().amax(1, keepdim=True)).unsqueeze(-1).sub(values).abs().min(-1).values
    assert (held - blocks).abs().div(blocks.abs().amax(1, keepdim=True)).sub(nearest).abs().max() < 1e-3


@pytest.mark.parametrize("word, bits", [("qlora", 4), ("qlora", 8), ("dora", 4)])
def test_an_answer_between_two_steps_changes_nothing(preprocess, rows, word, bits):
    "CPUs repack 4-bit weights in the first answer, after which training stops and merging is wrong"
    config = tiny(word, quantization_bit=bits)
    losses = []
    for ask in (False, True):
        torch.manual_seed(0)
        model = build_method(few_bits(config), config)
        engine, first = steps(model, preprocess, config, rows[:2], 2)
        if ask:
            model.eval()
            logits(model, preprocess, rows[:2])
        losses.append([*first, *(engine.step(rows[:2])["loss"] for _ in range(3))])
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] and not can_merge(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_adapter_goes_into_the_base_in_32_bits(preprocess, rows, tmp_path, bits):
    "By hand: W + alpha/r · BA, from the files, after the model in few bits has trained and answered"
    from safetensors.torch import load_file
    config = tiny("qlora", quantization_bit=bits)
    model = build_method(few_bits(config), config)
    engine, _ = steps(model, preprocess, config, rows, 8)
    logits(model.eval(), preprocess, rows)
    save_adapter_files(model, tmp_path, engine.adapter())
    merged = load_adapter(load_model("tiny-receipts"), tmp_path).merge_and_unload()
    parts, start = load_file(tmp_path / "adapter_model.safetensors"), f"base_model.model.{LAYER}.lora_"
    change = 2 * parts[f"{start}B.weight"] @ parts[f"{start}A.weight"]
    wanted = load_model("tiny-receipts").get_submodule(LAYER).weight + change
    assert (merged.get_submodule(LAYER).weight - wanted).abs().max() < 1e-5
    loss = {}
    for name, one in dict(base=load_model("tiny-receipts"), merged=merged, trained=model).items():
        with torch.no_grad(): loss[name] = one.eval()(**preprocess.collate(rows)).loss.item()
    assert loss["merged"] < loss["trained"] + .3*(loss["base"] - loss["trained"]), "what was learned holds there, too"


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    with pytest.raises(VlmError, match="4 bits need the package 'bitsandbytes'. pip install bitsandbytes"):
        check_kernels(tiny("qlora"), "cpu")
    check_kernels(tiny("lora"), "cpu")


def test_a_tower_in_few_bits_is_noticed():
    from transformers import BitsAndBytesConfig
    wrong = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["visual", "lm_head"])
    with pytest.raises(VlmError, match="'model.visual.* was quantised, which belongs to the vision part"):
        quantised(load_model("tiny-receipts", quantisation=wrong))


# --- the weights themselves -------------------------------------------------------------------------------------------
def test_full_fine_tuning_is_adamw_on_the_open_weights(preprocess, rows):
    "Against plain torch: the model's own loss, all labels, pixels"
    config = tiny("full", learning_rate=1e-3, lr_scheduler_type="constant")
    _, ours = steps(build_full(load_model("tiny-receipts"), config), preprocess, config, rows, 3)
    model, theirs = load_model("tiny-receipts").train(), []
    model.model.visual.requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-3, weight_decay=0)
    for _ in range(3):
        loss = model(**preprocess.collate(rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1)
        optimiser.step()
        optimiser.zero_grad()
        theirs.append(loss.item())
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_small_steps_are_not_lost_in_half_numbers(preprocess, rows):
    "A step of 1e-5 is below the gap of 16-bit numbers near 1, where the norms' weights lie"
    config = tiny("full", learning_rate=1e-5, lr_scheduler_type="constant")
    model = build_full(load_model("tiny-receipts", dtype=torch.bfloat16), config)
    norm = model.model.language_model.norm.weight
    before = norm.detach().clone()
    _, losses = steps(model, preprocess, config, rows, 2)
    assert norm.dtype == torch.float32 and numbers(model) == torch.bfloat16
    assert 1e-6 < (norm - before).abs().max() < 3e-5
    full = logits(load_model("tiny-receipts"), preprocess, rows)
    assert losses[0] == pytest.approx(steps(build_full(load_model("tiny-receipts"), config), preprocess, config,
                                            rows, 1)[1][0], rel=.03) and full.dtype == torch.float32
