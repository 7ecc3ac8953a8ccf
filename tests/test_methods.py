"""The survey: every recorded count is counted again on empty weights, by PEFT; what is called native is accepted."""
import json, re

import pytest

import vlm_tutor.config as config
from vlm_tutor.core import VlmError
from vlm_tutor.memory import plan
from vlm_tutor.methods import MATRICES, METHODS, PAPERS, TOTALS, find_method, methods, state_bytes

LAYERS = r".*language_model\.layers\.\d+\."
MATRIX = LAYERS + r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def empty(family, text, vision, **more):
    "A model of true size without weights"
    import torch, transformers
    values = dict(text_config=text, vision_config=vision, **more)
    with torch.device("meta"):
        known = getattr(transformers, f"{family}Config")(**values)
        return getattr(transformers, f"{family}ForConditionalGeneration")(known)


def qwen2_vl_2b():
    "The numbers of Qwen/Qwen2-VL-2B-Instruct's config.json"
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    text = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True, rope_parameters=rope)
    vision = dict(depth=32, embed_dim=1280, num_heads=16, hidden_size=1536, mlp_ratio=4, patch_size=14)
    return empty("Qwen2VL", text, vision, tie_word_embeddings=True)


def qwen3_vl_30b():
    "The numbers of Qwen/Qwen3-VL-30B-A3B-Instruct's config.json"
    rope = dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20])
    text = dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
                num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128,
                num_local_experts=128, num_experts_per_tok=8, vocab_size=151936, rope_parameters=rope)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=2048,
                  patch_size=16, deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304)
    return empty("Qwen3VLMoe", text, vision, tie_word_embeddings=False)


MODELS = {"Qwen2-VL-2B": qwen2_vl_2b, "Qwen3-VL-30B-A3B": qwen3_vl_30b}


def peft_config(name):
    "What PEFT is told for a method that adds something"
    import peft
    lora = lambda targets=MATRIX, **more: peft.LoraConfig(r=8, target_modules=targets, **more)
    qkvo = LAYERS + r"self_attn\.(q|k|v|o)_proj"
    soft = dict(task_type="CAUSAL_LM", num_virtual_tokens=20, num_layers=28)
    wide = soft | dict(token_dim=1536, num_attention_heads=12)
    makers = dict(
        lora_qv=lambda: lora(LAYERS + r"self_attn\.(q|v)_proj"), lora_all=lambda: lora("all-linear"),
        rslora=lambda: lora(use_rslora=True), dora=lambda: lora(use_dora=True),
        adalora=lambda: peft.AdaLoraConfig(init_r=12, target_r=8, total_step=100, target_modules=MATRIX),
        vera=lambda: peft.VeraConfig(r=256, target_modules=LAYERS + r"self_attn\.(q|v)_proj"),
        oft=lambda: peft.OFTConfig(oft_block_size=32, target_modules=MATRIX),
        loha=lambda: peft.LoHaConfig(r=8, target_modules=MATRIX),
        lokr=lambda: peft.LoKrConfig(r=8, target_modules=MATRIX),
        ia3=lambda: peft.IA3Config(target_modules=LAYERS + r"(self_attn\.(k|v)_proj|mlp\.down_proj)",
                                   feedforward_modules=LAYERS + r"mlp\.down_proj"),
        ln_tuning=lambda: peft.LNTuningConfig(target_modules=r".*language_model\..*norm.*"),
        prompt=lambda: peft.PromptTuningConfig(**wide),
        prefix=lambda: peft.PrefixTuningConfig(**soft, token_dim=256, num_attention_heads=2),
        p_tuning=lambda: peft.PromptEncoderConfig(**wide, encoder_hidden_size=1536),
        moe_attention=lambda: lora(qkvo), moe_experts=lambda: lora([], target_parameters=EXPERTS),
        moe_attention_experts=lambda: lora(qkvo, target_parameters=EXPERTS),
        moe_all=lambda: lora(qkvo, target_parameters=[*EXPERTS, "mlp.gate.weight"]))
    return makers.get(name, lora)() # pissa, loraplus, qlora and others begin or store otherwise, and count as lora


PARTS = dict(full="language_model", qat="language_model", full_all="", full_tower=r"visual\.(?!merger)",
             full_merger=r"visual\.merger", freeze=r"language_model\.layers\.2[67]\.")


@pytest.mark.parametrize("name", METHODS)
def test_the_recorded_count_is_the_true_one(name):
    method = METHODS[name]
    model = MODELS[method.counted_on]()
    assert sum(p.numel() for p in model.parameters()) == TOTALS[method.counted_on]
    if name in PARTS: found = sum(p.numel() for n, p in model.named_parameters() if re.search(PARTS[name], n))
    else:
        import peft
        adapted = peft.get_peft_model(model, peft_config(name))
        found = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert adapted.get_nb_trainable_parameters()[0] == found
    assert found == method.trainable


def test_the_matrices_that_are_quantised_are_counted():
    import torch
    linear = [m for n, m in qwen2_vl_2b().named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    assert sum(m.weight.numel() for m in linear) == MATRICES["Qwen2-VL-2B"]


# --- what runs --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.native])
def test_the_words_of_a_native_method_are_a_configuration(name):
    assert config.load_config("cord", METHODS[name].native.split())


def test_what_the_engine_takes_and_what_the_survey_calls_native_are_the_same():
    told = {word.partition("=")[2] for m in METHODS.values() for word in m.native.split()
            if word.startswith("finetuning_type=")}
    assert told == set(config.CHOICES["finetuning_type"])


def test_llamafactory_is_told_one_of_its_four_types():
    for m in METHODS.values():
        assert not m.factory or re.match(r"finetuning_type=(lora|oft|freeze|full)\b", m.factory)


# --- what is told -----------------------------------------------------------------------------------------------------
def test_a_row_is_whole():
    for name, m in METHODS.items():
        assert name == m.name and re.fullmatch(r"\d{4}\.\d{5}", m.arxiv) and re.search(r", (19|20)\d\d$", m.paper), name
        assert all([m.title, m.idea, m.trains, m.cost, m.fits, m.avoid]) and m.idea.endswith("."), name
        assert 0 < m.share <= 1 and m.bits in (4, 8, 16), name
        assert m.facts()["paper read in"] == PAPERS[m.arxiv][1] and PAPERS[m.arxiv][0] in m.facts()["paper"]
    assert set(PAPERS) == {m.arxiv for m in METHODS.values()}
    assert {m.family for m in METHODS.values()} == {"full", "lora", "other adapters", "soft prompts", "quantised",
                                                    "experts"}


def test_a_rate_says_where_it_is_from():
    for name, m in METHODS.items():
        assert m.rate > 0 and (m.rate == 1 or m.native), name
        assert ("learning rate" in m.facts()) == bool(m.native), name
        if m.native: assert m.facts()["learning rate"].startswith(f"{m.rate:g} × LoRA's, from "), name


def test_state_by_hand():
    assert state_bytes(METHODS["full"]) == 2*665271296 + 16*1543714304
    assert state_bytes(METHODS["lora"]) == 2*2208985600 + 16*9232384
    packed = 28*46792704
    by_hand = 2*(2208985600 - packed) + packed/2 + packed/64 + packed/64/256*4 + 16*9232384
    assert abs(state_bytes(METHODS["qlora"]) - by_hand) < 1


@pytest.mark.parametrize("name", [m.name for m in METHODS.values() if m.native])
def test_what_a_method_offers_next_is_a_plan_that_can_be_asked_for(name):
    words = methods(name).text.splitlines()[-1].removeprefix("next  vlm plan ").split()
    assert plan(words[0], overrides=words[1:]).text


def test_the_verb_tells_all_or_one():
    everything, one = methods(), methods("qlora")
    assert [row["name"] for row in everything["methods"]] == list(METHODS)
    assert one["trainable"] == 9232384 and "arXiv:2305.14314" in one.text and json.dumps(everything)
    assert all(name in everything.text for name in METHODS)


def test_an_unknown_method_is_one_error():
    with pytest.raises(VlmError, match="unknown method 'qlroa'.*Did you mean 'qlora'"): find_method("qlroa")
