"The embedded base: architecture, ids, files, loading."
import json
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLForConditionalGeneration
from vlm_tutor.core import ASSETS, VlmError
from vlm_tutor.receipts import make_receipt
from vlm_tutor.tiny import (TINY, ask, common_form, head_places, load_model, load_processor, misread, model_family,
                            resolve_model, save_common_form)

FOLDER = ASSETS / TINY


def test_package_stays_small():
    assert (FOLDER / 'model.safetensors').stat().st_size <= 10 * 2**20


def test_plain_from_pretrained_gives_the_true_class_and_our_loader_the_same_weights():
    plain = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32)
    assert type(plain) is Qwen2VLForConditionalGeneration
    ours = load_model(TINY).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in plain.state_dict().items())


def test_a_model_the_hub_does_not_give_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VlmError, match="no model 'someone/nothing-vl' on the hub, or the hub is out of reach"):
        model_family("someone/nothing-vl")


def test_files_declare_the_stock_processor():
    assert json.loads((FOLDER / 'processor_config.json').read_text())['processor_class'] == 'Qwen2VLProcessor'


def test_stock_auto_processor_where_torchvision_works():
    pytest.importorskip('torchvision', reason='the stock processor needs torchvision', exc_type=ImportError)
    from transformers import AutoProcessor
    image, text = make_receipt(0).image, '<|vision_start|><|image_pad|><|vision_end|>Read the text.'
    stock = AutoProcessor.from_pretrained(FOLDER)(text=[text], images=[image], return_tensors='pt')
    ours = load_processor(TINY)(text=[text], images=[image], return_tensors='pt')
    assert torch.equal(stock['input_ids'], ours['input_ids'])
    assert (stock['pixel_values'] - ours['pixel_values']).abs().max() < .02


def test_template_gives_the_text_that_llama_factory_writes_for_qwen2_vl():
    "The format of its `qwen2_vl` template: default system, image before text, each turn closed by <|im_end|> and \\n."
    expected = ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n'
                '<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Extract it.<|im_end|>\n'
                '<|im_start|>assistant\n{"a":"1"}<|im_end|>\n')
    tok = AutoTokenizer.from_pretrained(FOLDER)
    chat = [dict(role='user', content=[dict(type='image'), dict(type='text', text='Extract it.')]),
            dict(role='assistant', content='{"a":"1"}')]
    assert tok.apply_chat_template(chat, tokenize=False) == expected
    answer = expected.index('{')  # LLaMA-Factory encodes prompt and answer apart
    pieces = [expected[:answer], expected[answer:]]
    assert tok(expected).input_ids == [i for p in pieces for i in tok(p).input_ids]


def test_special_tokens_are_single_and_are_the_ones_the_config_names():
    tok, config = AutoTokenizer.from_pretrained(FOLDER), load_model(TINY).config
    for name in ('image_pad', 'video_pad', 'vision_start', 'vision_end'):
        assert tok(f'<|{name}|>').input_ids == [getattr(config, name.replace('_pad', '') + '_token_id')]
    assert tok(tok.eos_token).input_ids == [config.text_config.eos_token_id] and tok.eos_token == '<|im_end|>'


@pytest.mark.parametrize('text', ['{"menu":[{"nm":"a \\"b\\"","price":"1,000"}]}', 'é€漢字 \t\n x',
                                  '"}]},{"":""', "it's <|im_end|>"])
def test_any_text_survives_the_tokenizer(text):
    tok = AutoTokenizer.from_pretrained(FOLDER)
    assert tok.decode(tok(text).input_ids) == text


def test_a_batch_answers_as_one_by_one():
    model, processor = load_model(TINY), load_processor(TINY)
    images = [make_receipt(s).image for s in (1, 2, 3)]
    prompts = ['Read the text.', 'Read line 1.', 'What is Total?']
    alone = [ask(model, processor, [i], [p], 12)[0] for i, p in zip(images, prompts)]
    assert ask(model, processor, images, prompts, 12) == alone


@pytest.mark.parametrize('name', ['tiny-recepts', './nowhere', 'a/b/c'])
def test_bad_names(name):
    with pytest.raises(VlmError, match='no model'): resolve_model(name)


def test_a_missing_folder_beside_others_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / 'runs/one').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlmError, match="no model 'runs/two'"): resolve_model('runs/two')
    assert resolve_model('Qwen/Qwen2-VL-2B-Instruct') == 'Qwen/Qwen2-VL-2B-Instruct'


@pytest.mark.skipif(torch.cuda.is_available(), reason='a CUDA GPU is here')
def test_cuda_asked_for_and_absent():
    with pytest.raises(VlmError, match='cuda'): load_model(TINY, 'cuda')


# --- a form that every transformers 5 reads alike ---------------------------------------------------------------------
def older_axes(sections):
    "Which axis turns each channel of a head, by transformers 5.6: the doubled list of sections, dealt out in turn"
    return [i % 3 for i, n in enumerate(sections*2) for _ in range(n)]


def newer_axes(sections):
    "The same by transformers 5.23: the list once, then both halves alike"
    half = [i % 3 for i, n in enumerate(sections) for _ in range(n)]
    return half*2


def test_both_versions_deal_out_the_axes_of_the_common_form_alike():
    own, common = [1]*16, common_form(load_model(TINY)).config.text_config.rope_parameters["mrope_section"]
    assert older_axes(own) != newer_axes(own)
    assert older_axes(common) == newer_axes(common) == newer_axes(own)


def test_the_common_form_keeps_the_frequencies_of_every_head():
    "Angles of each channel: what 5.6 makes at its fixed base, at the places where the old channels went"
    width, heads = 128, 4
    def angles(base, channels): # of one axis and one half of a head
        return [base**-(i/channels) for i in range(channels)]*2
    old, new = angles(100., 8)*2, angles(1e4, 16)*2
    places = head_places(heads, width).view(heads, 32)
    for head, found in enumerate(places):
        assert [new[p - 64*head] for p in found.tolist()] == pytest.approx(old)
    assert len(set(places.flatten().tolist())) == width


@pytest.mark.parametrize("size", [(64, 96), (208, 192), (480, 160)])
def test_the_common_form_is_the_same_function(size):
    processor, model = load_processor(TINY), load_model(TINY)
    torch.manual_seed(1)
    for weight in model.model.visual.parameters(): weight.data += .02*torch.randn_like(weight) # zeros would hide faults
    pixels = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).numpy()
    chat = [dict(role="user", content=[dict(type="image"), dict(type="text", text="Read the text.")])]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = processor(text=[text], images=[pixels], return_tensors="pt")
    with torch.no_grad(): a, b = model(**batch).logits, common_form(model)(**batch).logits
    assert torch.allclose(a, b, atol=1e-4)


def test_what_others_have_is_not_misread(tmp_path):
    hub = dict(model_type="qwen2_vl", vision_config=dict(depth=32), rope_scaling=dict(mrope_section=[16, 24, 24]))
    assert misread(hub) == [] and misread(dict(model_type="llava")) == []
    assert len(misread(json.loads((ASSETS / TINY / "config.json").read_text()))) == 2
    folder = save_common_form(TINY, tmp_path / "common")
    assert misread(json.loads((folder / "config.json").read_text())) == []
    again = common_form(load_model(str(folder)))
    assert again.config.vision_config.embed_dim == 256, "it is its own common form"
