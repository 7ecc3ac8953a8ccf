"Pre-training of the base: what it never shows, guidance that points at the right ink, exact resume."
import json
import os
import re
import subprocess
import sys
import pytest
import torch
from vlm_tutor import pretrain
from vlm_tutor.core import VlmError
from vlm_tutor.pretrain import Code, Stage, make_batches, make_task, pretrain_tiny, run_stage
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


def test_sources_point_at_the_ink_or_at_the_prompt():
    from_prompt = 0
    for t in TASKS:
        ink = dict((place, c) for c, place in t.cells)
        for c, source in zip(t.answer, t.sources, strict=True):
            if source is None: continue
            shown = ink[source] if source >= 0 else t.prompt[-1 - source]
            from_prompt += source < 0
            assert c in (shown, shown.lower())
    assert from_prompt > 1000


def test_a_batch_guides_each_copied_token_to_its_source():
    tok = build_processor().tokenizer
    for b in make_batches(tok, 0, 0, 8) + make_batches(tok, 0, 1, 8):
        n = b['slots'].shape[1]
        for ids, guide, nth, slots in zip(b['ids'], b['guide'], b['nth'], b['slots']):
            for p in (guide >= 0).nonzero()[:, 0].tolist():
                c, at = tok.decode(ids[p]), int(guide[p])
                if nth[p] < 0: assert at >= b['before'] + n and tok.decode(ids[at]) == c
                else: assert pretrain.CHARACTERS[slots[at - b['before'], nth[p]] - 1] in (c, c.upper())


def test_labels_are_the_answer_and_its_end():
    tok = build_processor().tokenizer
    batches = make_batches(tok, 0, 0, 8)
    for ids, labels in ((i, l) for b in batches for i, l in zip(b['ids'], b['labels'])):
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


RANKS = '''
import sys, torch
from vlm_tutor import pretrain as p
tok = p.build_processor().tokenizer
model, code = p.build_tiny(tok, 0), p.Code()
p._rank()
p._train_step('joint', p.Stage(2, 4, 1e-3), 0, model, code, p._optimisers('joint', p.Stage(2, 4, 1e-3), model, code),
              tok, 0)
torch.save(model.state_dict(), f'{sys.argv[1]}/{p._rank()[0]}.pt')
'''


def test_two_processes_see_other_pages_and_stay_equal(tmp_path):
    (tmp_path / 'ranks.py').write_text(RANKS)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
                           str(tmp_path / 'ranks.py'), str(tmp_path)], capture_output=True, text=True,
                          env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    tok = build_processor().tokenizer
    pages = [make_batches(tok, '0-joint', 0, 2, rank=i)[0] for i in range(2)]
    assert pages[0]['grid'] == pages[1]['grid'] and not torch.equal(pages[0]['pixels'], pages[1]['pixels'])


def test_low_pages_come_first_when_a_stage_grows():
    stage = Stage(100, 4, 1e-3, grow=.5)
    reach = [pretrain._tallest(stage, i) for i in range(100)]
    assert reach[0] == pretrain.HEIGHTS[0] and set(reach[50:]) == {pretrain.HEIGHTS[-1]} and reach == sorted(reach)


def test_a_step_is_two_batches_of_one_height_shorter_rows_first():
    tok = build_processor().tokenizer
    for step in range(6):
        short, long = make_batches(tok, 0, step, 8)
        assert short['grid'] == long['grid'] and short['ids'].shape[1] <= long['ids'].shape[1]
        assert abs((len(short['ids']) + len(long['ids'])) * short['grid'][0] - 80) < 20
