"""Learned tokens against the oracle: ordinary tokens put before each row give the same loss, gradient and answers"""
import copy

import pytest
import torch
from vlm_tutor.collate import Preprocess
from vlm_tutor.config import Config
from vlm_tutor.core import Example, VlmError
from vlm_tutor.receipts import make_examples
from vlm_tutor.soft import begin_as, build_soft, first_words, has_prefix, load_adapter, soft_config
from vlm_tutor.tiny import load_model, load_processor

WORDS = torch.tensor([65, 70, 72, 81, 66])
both = pytest.mark.parametrize("method", ["prompt", "prefix"])


@pytest.fixture(scope="module")
def base(): return load_model("tiny-receipts")


@pytest.fixture(scope="module")
def preprocess(): return Preprocess(load_processor("tiny-receipts"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    "Receipts of several sizes, one with two pictures, one without any"
    found = make_examples(4, seed=3, split="train", folder=tmp_path_factory.mktemp("receipts"))
    two = Example(images=[found[0].image, found[1].image], prompt="Read the text.", target=found[0].target[:30], id="2")
    return [*found[:3], two, Example(images=[], prompt="Say it.", target="yes, that", id="none")]


def soft_model(base, method, words=WORDS):
    "A model whose learned tokens are those of real words"
    model = build_soft(copy.deepcopy(base), Config(finetuning_type=method, num_virtual_tokens=len(words)))
    model.soft.remove()
    begin_as(model, words)
    model.soft.attach()
    return model.eval()


def literal(rows):
    more = dict(input_ids=WORDS.tolist(), labels=[-100] * len(WORDS), mm_token_type_ids=[0] * len(WORDS))
    return [row | {name: values + row[name] for name, values in more.items()} for row in rows]


def loss(model, preprocess, rows): return model(**preprocess.collate(rows)).loss


def answers(model, preprocess, rows, **more):
    batch = preprocess.collate(rows, side="left")
    del batch["labels"]
    keys = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    with torch.inference_mode(): out = model.generate(**batch, **keys | more)
    return out.sequences[:, batch["input_ids"].shape[1]:], torch.stack(out.logits, 1)


@both
@pytest.mark.parametrize("chosen", [(0,), (0, 1, 2), (3,), (2, 3), (4,)], ids=str)
def test_the_loss_is_that_of_real_words(base, preprocess, examples, method, chosen):
    rows = [preprocess.encode(examples[i]) for i in chosen]
    with torch.no_grad():
        wanted = loss(base, preprocess, literal(rows)).item()
        found = loss(soft_model(base, method), preprocess, rows).item()
        assert found == pytest.approx(wanted, abs=2e-6)
        assert abs(wanted - loss(base, preprocess, rows).item()) > 1e-4, "the words make a difference"


@both
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("chosen", [(0,), (0, 1, 2), (2, 3), (4,)], ids=str)
def test_answers_are_those_with_real_words(base, preprocess, examples, method, chosen, beams):
    "Step by step through the cache, filled up on the left, beams that change places"
    rows = [preprocess.encode(examples[i], answer=False) for i in chosen]
    wanted, scores = answers(base, preprocess, literal(rows), num_beams=beams)
    found, ours = answers(soft_model(base, method), preprocess, rows, num_beams=beams)
    assert found.tolist() == wanted.tolist()
    assert (ours - scores).abs().max() < 2e-4


@both
def test_what_happened_before_does_not_matter(base, preprocess, examples, method):
    "The model keeps positions of its last answer; neither training nor another batch may see them"
    model = soft_model(base, method)
    rows = [preprocess.encode(example) for example in examples[:2]]
    asked = [preprocess.encode(example, answer=False) for example in examples[:3]]
    with torch.no_grad(): before = loss(model, preprocess, rows).item()
    first = answers(model, preprocess, asked)[0]
    with torch.no_grad(): assert loss(model, preprocess, rows).item() == before
    model.train()
    loss(model, preprocess, rows).backward()
    assert answers(model.eval(), preprocess, asked)[0].tolist() == first.tolist()
    text = preprocess.encode(examples[4])
    with torch.no_grad():
        assert loss(model, preprocess, [text]).item() == pytest.approx(
            loss(base, preprocess, literal([text])).item(), abs=2e-6)


def test_the_gradient_is_that_of_the_words_vectors(base, preprocess, examples):
    "By hand: a model whose embedding learns, words that stand nowhere else, gradients of their rows"
    rows, whole = [preprocess.encode(example) for example in examples[:2]], copy.deepcopy(base)
    used = {id for row in rows for id in row["input_ids"]}
    words = torch.tensor([id for id in range(60, 280) if id not in used][:5])
    more = dict(input_ids=words.tolist(), labels=[-100] * 5, mm_token_type_ids=[0] * 5)
    whole.requires_grad_(False)
    vectors = torch.nn.Embedding.from_pretrained(base.get_input_embeddings().weight.detach().clone(), freeze=False)
    whole.set_input_embeddings(vectors) # the head keeps its own
    loss(whole, preprocess, [row | {n: v + row[n] for n, v in more.items()} for row in rows]).backward()
    model = soft_model(base, "prompt", words)
    loss(model, preprocess, rows).backward()
    ours = model.prompt_encoder["default"].embedding.weight.grad
    assert (ours - vectors.weight.grad[words]).abs().max() < 1e-6 and ours.abs().max() > 1e-5
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["prompt_encoder.default.embedding.weight"]


def test_p_tuning_is_a_prompt_that_a_network_makes(base, preprocess, examples):
    rows = [preprocess.encode(example) for example in examples[:2]]
    model = build_soft(copy.deepcopy(base), Config(finetuning_type="p_tuning", num_virtual_tokens=5)).eval()
    encoder = model.prompt_encoder["default"]
    prompt = soft_model(base, "prompt")
    prompt.prompt_encoder["default"].embedding.weight.data = encoder.mlp_head(encoder.embedding.weight).detach()
    with torch.no_grad(): assert loss(model, preprocess, rows) == loss(prompt, preprocess, rows)


def test_as_many_tokens_as_a_row_may_have_are_refused():
    Config(finetuning_type="prompt", num_virtual_tokens=1023, cutoff_len=1024)
    with pytest.raises(VlmError, match="num_virtual_tokens 1024 leaves no room below cutoff_len 1024"):
        Config(finetuning_type="prompt", num_virtual_tokens=1024, cutoff_len=1024)


@pytest.mark.parametrize("method", ["prompt", "prefix", "p_tuning"])
def test_files_are_pefts_own(base, preprocess, examples, tmp_path, method):
    "What PEFT makes of the folder holds the same numbers"
    from peft import PeftModel
    from safetensors.torch import load_file
    model = build_soft(copy.deepcopy(base), Config(finetuning_type=method, num_virtual_tokens=5)).eval()
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    pair = [m.prompt_encoder["default"].embedding.weight for m in (theirs, ours)]
    assert torch.equal(*pair) and not any(p.requires_grad for p in ours.parameters())
    rows = [preprocess.encode(example) for example in examples[:2]]
    with torch.no_grad(): assert loss(ours, preprocess, rows) == loss(model, preprocess, rows)


def test_half_numbers_stay_close(base, preprocess, examples):
    rows = [preprocess.encode(example) for example in examples[:2]]
    for method in ("prompt", "prefix"):
        half = soft_model(copy.deepcopy(base).to(torch.bfloat16), method)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert loss(half, preprocess, rows).item() == pytest.approx(
                loss(soft_model(base, method), preprocess, rows).item(), rel=.05)


def test_removed_it_is_the_base(base, preprocess, examples):
    rows, model = [preprocess.encode(examples[0])], soft_model(base, "prefix")
    model.soft.remove()
    with torch.no_grad(): assert loss(model.get_base_model(), preprocess, rows) == loss(base, preprocess, rows)


def test_tokens_begin_as_the_text_that_is_given(base):
    config = Config(model_name_or_path="tiny-receipts", finetuning_type="prompt", num_virtual_tokens=7,
                    prompt_tuning_init_text="abc")
    ids = load_processor("tiny-receipts").tokenizer("abc")["input_ids"]
    assert first_words(base, config).tolist() == (ids * 3)[:7]
    weight = build_soft(copy.deepcopy(base), config).prompt_encoder["default"].embedding.weight
    assert torch.equal(weight, base.get_input_embeddings().weight[(ids * 3)[:7]])


def test_what_cannot_be_right_is_refused(base, preprocess, examples):
    rows = [preprocess.encode(examples[0])]
    model = soft_model(base, "prefix").train()
    model.get_base_model().gradient_checkpointing_enable()
    with pytest.raises(VlmError, match="gradient checkpointing throws away"): loss(model, preprocess, rows)
    asked = [preprocess.encode(examples[0], answer=False)]
    with pytest.raises(VlmError, match="cache of fixed size"):
        answers(soft_model(base, "prompt"), preprocess, asked, cache_implementation="static", disable_compile=True)


def test_a_prompt_goes_with_checkpointing(base, preprocess, examples):
    rows, model = [preprocess.encode(examples[0])], soft_model(base, "prompt").train()
    plain = loss(model, preprocess, rows)
    model.get_base_model().gradient_checkpointing_enable(dict(use_reentrant=False))
    again = loss(model, preprocess, rows)
    again.backward()
    assert again.item() == pytest.approx(plain.item(), abs=1e-6) and not has_prefix(model)
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_sizes_for_qwen2_vl_2b():
    "As PEFT counts them on the architecture of the published model, without its weights"
    from accelerate import init_empty_weights
    from peft import PeftModel
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    text = dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, vocab_size=1000,
                intermediate_size=64,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(depth=1, embed_dim=64, num_heads=2, hidden_size=1536)
    counts = {}
    for method in ("prompt", "prefix", "p_tuning"):
        with init_empty_weights():
            model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
            soft = PeftModel(model, soft_config(Config(finetuning_type=method)))
        counts[method] = sum(p.numel() for p in soft.prompt_encoder.parameters())
    assert counts == dict(prompt=30_720, prefix=286_720, p_tuning=7_113_216)
