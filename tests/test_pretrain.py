"Pre-training of the base: what it never shows, guidance that points at the right ink, exact resume."
import json
import re
import pytest
import torch
from vlm_tutor import pretrain
from vlm_tutor.core import VlmError
from vlm_tutor.pretrain import Code, Stage, make_batch, make_task, pretrain_tiny, run_stage
from vlm_tutor.receipts import CORD_SCHEMA, word_is_held_out
from vlm_tutor.tiny import build_processor, build_tiny

TASKS = [make_task(f't{i}') for i in range(400)]


def test_json_answers_are_json_and_never_use_a_key_path_of_the_receipt_schema():
    def paths(o, at=''):
        for k, v in o.items() if isinstance(o, dict) else ():
            yield f'{at}{k}'
            for x in v if isinstance(v, list) else [v]: yield from paths(x, f'{at}{k}.')
    objects = [json.loads(t.answer) for t in TASKS if 'JSON' in t.prompt]
    assert len(objects) > 60
    used = {p for o in objects for p in paths(o)}
    assert not used & (set(CORD_SCHEMA.fields) | {'menu', 'sub_total', 'total', 'void_menu'})


def test_item_names_and_labels_hold_no_held_out_word():
    for t in TASKS:
        for m in re.findall(r'What is (?:the \w+ of )?(.+)\?', t.prompt):
            assert not any(word_is_held_out(w) for w in m.split()), m


def test_guide_points_at_the_token_that_holds_the_character():
    for t in TASKS:
        ink = {}
        for c, token in t.cells: ink.setdefault(token, []).append(c)
        for c, token in zip(t.answer, t.tokens):
            if token is not None: assert c in ink[token]


def test_labels_are_the_answer_and_its_end():
    tok = build_processor().tokenizer
    batch = make_batch(tok, 0, 0, 4)
    for ids, labels in zip(batch['ids'], batch['labels']):
        answer = tok.decode(labels[labels >= 0])
        assert answer.endswith('<|im_end|>\n') and 'assistant' not in answer
        assert tok.decode(ids[labels < 0]).count('<|im_start|>assistant\n') == 1


@pytest.mark.parametrize('stage', ['vision', 'language'])
def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path, monkeypatch, stage):
    tok, plan, step = build_processor().tokenizer, Stage(4, 2, 1e-3), pretrain._train_step

    def start(name):
        (tmp_path / name).mkdir(exist_ok=True)
        model, code = build_tiny(tok, 0), Code()
        run_stage(stage, tmp_path / name, model, code, tok, plan)
        return model.state_dict()

    def stopped(name, stage, at, *rest):
        if at == 2: raise KeyboardInterrupt
        return step(name, stage, at, *rest)
    whole = start('whole')
    monkeypatch.setattr(pretrain, '_train_step', stopped)
    with pytest.raises(KeyboardInterrupt): start('parts')
    monkeypatch.setattr(pretrain, '_train_step', step)
    parts = start('parts')
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())
    untouched = build_tiny(tok, 0).state_dict()
    assert any(not torch.equal(v, untouched[k]) for k, v in whole.items())


@pytest.mark.parametrize('words, kw', [("unknown stage 'tower'", dict(stage='tower')), ('share is 0', dict(share=0)),
                                       ("needs stage 'vision'", dict(stage='joint'))])
def test_bad_input(tmp_path, words, kw):
    with pytest.raises(VlmError, match=words): pretrain_tiny(str(tmp_path), **kw)
