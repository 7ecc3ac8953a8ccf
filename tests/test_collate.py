"""Rows and batches: against text typed by hand, sizes of many images, and plain cross-entropy"""
import ast

import pytest
import torch
import torch.nn.functional as F
from checkout import PACKAGE
from hypothesis import given, settings, strategies as st
from PIL import Image
from vlm_tutor.collate import IGNORE, Preprocess, answer_labels
from vlm_tutor.core import Example, VlmError
from vlm_tutor.tiny import build_processor

PROCESSOR = build_processor()
CHAT = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}{}<|im_end|>\n"
        "<|im_start|>assistant\n")  # what the qwen2_vl template of LLaMA-Factory writes
PAGE = "<|vision_start|>{}<|vision_end|>"


def example(folder, *sizes, prompt="Total?", target='{"total":"4.50"}'):
    "An example with one grey image of each size"
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(paths, sizes): Image.new("RGB", size, "grey").save(path)
    return Example("one", paths, prompt, target)


TOY_IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@given(prompt=TOY_IDS, answer=TOY_IDS)
@settings(deadline=None, max_examples=30)
def test_only_answer_tokens_move_the_scores(prompt, answer):
    ids, labels = answer_labels(prompt, answer)
    scores = torch.zeros(len(ids), 10, requires_grad=True)
    F.cross_entropy(scores[:-1], torch.tensor(labels[1:]), ignore_index=IGNORE).backward()
    moved = scores.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == list(range(len(prompt) - 1, len(ids) - 1))
    assert ids == prompt + answer


def test_a_row_is_the_chat_as_typed_by_hand(tmp_path):
    one = example(tmp_path, (64, 32), (32, 48))
    row, tokens = Preprocess(PROCESSOR).encode(one), PROCESSOR.tokenizer
    pages = PAGE.format("<|image_pad|>" * 8) + PAGE.format("<|image_pad|>" * 6)
    question, answer = CHAT.format(pages, one.prompt), one.target + "<|im_end|>\n"
    prompt = tokens(question)["input_ids"]
    assert tokens.decode(row["input_ids"]) == question + answer
    assert row["input_ids"][:len(prompt)] == prompt
    assert row["labels"] == [IGNORE] * len(prompt) + tokens(answer)["input_ids"]
    assert [i == PROCESSOR.image_token_id for i in row["input_ids"]] == [t == 1 for t in row["mm_token_type_ids"]]


@pytest.mark.parametrize("size", [(16, 16), (192, 208), (190, 130), (500, 20), (20, 500), (900, 700), (33, 47)])
@pytest.mark.parametrize("most", [None, 192 * 192])
def test_the_header_tells_the_length(tmp_path, size, most):
    preprocess, one = Preprocess(PROCESSOR, image_max_pixels=most), example(tmp_path, size)
    assert preprocess.length(one) == len(preprocess.encode(one)["input_ids"])


def test_a_turned_photo_is_upright_and_counted_right(tmp_path):
    one, exif = example(tmp_path, (64, 32)), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32), "grey").save(one.image, exif=exif)
    row = Preprocess(PROCESSOR).encode(one)
    assert row["image_grid_thw"].tolist() == [[1, 8, 4]]
    assert Preprocess(PROCESSOR).length(one) == len(row["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_filling_hides_nothing_and_shows_nothing(tmp_path, side):
    preprocess = Preprocess(PROCESSOR)
    rows = [preprocess.encode(example(tmp_path, (64, 32), target=t)) for t in ("4", "45.00", '{"a":"b"}')]
    batch = preprocess.collate(rows, side)
    seen = batch["attention_mask"].bool()
    for i, row in enumerate(rows):
        for name in ("input_ids", "labels", "mm_token_type_ids"): assert batch[name][i][seen[i]].tolist() == row[name]
    assert set(batch["labels"][~seen].tolist()) == {IGNORE}
    assert seen[:, -1 if side == "left" else 0].all()
    assert torch.equal(batch["pixel_values"], torch.cat([row["pixel_values"] for row in rows]))


def test_a_long_row_is_left_out_whole_and_never_cut(tmp_path):
    long = example(tmp_path, (64, 32), target='"' + "9" * 500 + '"')
    preprocess = Preprocess(PROCESSOR, cutoff_len=100)
    kept, left_out = preprocess.fits([long])
    assert kept == [] and left_out[0]["id"] == "one" and left_out[0]["answer"] == len(long.target) + 2
    assert preprocess.decode([t for t in preprocess.encode(long)["labels"] if t != IGNORE]) == long.target


def test_training_and_prediction_share_one_preprocessing(tmp_path):
    "One place in the package makes a `Preprocess`, and its two kinds of row differ by the answer alone"
    made = [p.stem for p in PACKAGE.glob("*.py") for n in ast.walk(ast.parse(p.read_text()))
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Preprocess"]
    assert made == ["predict"]
    preprocess, one = Preprocess(PROCESSOR), example(tmp_path, (64, 32))
    learn, ask = preprocess.encode(one), preprocess.encode(one, answer=False)
    assert learn["input_ids"] == ask["input_ids"] + preprocess.answer_ids(one)
    assert torch.equal(learn["pixel_values"], ask["pixel_values"])


def test_a_broken_image_is_named(tmp_path):
    one = example(tmp_path, (64, 32))
    one.image.write_bytes(one.image.read_bytes()[:20])
    with pytest.raises(VlmError, match="0.png"): Preprocess(PROCESSOR).fits([one])
