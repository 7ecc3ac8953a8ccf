"""A model as a function: the run's own answers, lazily, from any kind of image; and the star import."""
import json, os, shutil, subprocess, sys
from io import BytesIO
from itertools import count, islice
from pathlib import Path

import pytest
from PIL import Image
from vlm_tutor.cli import VERBS
from vlm_tutor.config import as_dict, load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_jsonl
from vlm_tutor.extract import Extraction, Extractor, vllm_command
from vlm_tutor.metrics import read_json
from vlm_tutor.predict import predict, split_examples
from test_export import write_adapter
from test_house import LIGHT
from test_predict import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    write_adapter(run.adapter)
    return run


@pytest.fixture(scope="module")
def model(run): return Extractor.from_run(run.path)


@pytest.fixture(scope="module")
def pages(run): return [os.path.abspath(e.image) for e in split_examples(load_config(run.config_file), "test")]


def test_a_run_answers_as_predict_does_alone_and_in_batches(run, model, pages):
    predict(str(run.path))
    rows = {row["id"]: row["raw"] for row in read_jsonl(run.predictions("finetuned-model"))}
    wanted = [rows[e.id] for e in split_examples(load_config(run.config_file), "test")]
    found = list(model.many(pages, batch_size=4))
    assert [one.raw for one in found] == wanted and len(set(wanted)) > 1
    assert found == [read_json(text) if isinstance(read_json(text), dict) else {} for text in wanted]
    vanilla = Extractor.from_run(run.path, group="vanilla-model")
    assert vanilla.answer([vanilla.example(pages[0])])[0].raw != wanted[0]


def test_many_is_lazy_in_both_directions(model, pages, monkeypatch):
    taken, answered = [], []
    monkeypatch.setattr(type(model), "answer", lambda self, batch, *_: answered.append(len(batch)) or [{}]*len(batch))
    endless = (taken.append(i) or pages[0] for i in count())
    stream = model.many(endless, batch_size=4)
    assert (taken, answered) == ([], [])
    list(islice(stream, 5))
    assert len(taken) == 8 and answered == [4, 4]


@pytest.mark.parametrize("kind", ["path", "pathlib", "bytes", "pil", "turned"])
def test_any_kind_of_image_is_the_same_document(model, pages, kind):
    image, turned = Image.open(pages[0]), BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: shown turned by 90 degrees
    image.transpose(Image.ROTATE_90).save(turned, "PNG", exif=exif)
    forms = dict(path=pages[0], pathlib=Path(pages[0]), bytes=Path(pages[0]).read_bytes(), pil=image,
                 turned=turned.getvalue())
    wanted = model.answer([model.example(pages[0])])[0].raw
    assert model.answer([model.example(forms[kind])])[0].raw == wanted


def test_one_that_cannot_be_read_costs_one_answer(model, pages, tmp_path):
    (tmp_path/"note.txt").write_text("no image")
    whole = list(model.many([pages[0], tmp_path/"note.txt", b"", "gone.png", pages[1]]))
    assert [bool(one.raw) for one in whole] == [True, False, False, False, True]
    assert "cannot read image" in whole[1].error and "gone.png" in whole[3].error
    assert whole[4].raw == model.answer([model.example(pages[1])])[0].raw
    with pytest.raises(VlmError, match="no image 'gone.png'"): model("gone.png")
    with pytest.raises(VlmError, match="cannot read the image"): model(Path(pages[0]).read_bytes()[:300])


@pytest.mark.parametrize("raw, value, failed", [
    ('{"a": 1}', {"a": 1}, False), ('say {"a": "1",', {"a": "1"}, False), ("[1, 2]", {"items": [1, 2]}, False),
    ("no", {}, True), ("", {}, True)])
def test_what_comes_back_is_a_dict_that_knows_if_it_failed(raw, value, failed):
    found = Extraction(raw)
    assert found == value and bool(found.error) == failed and found.raw == raw and json.dumps(found)


def test_too_long_a_question_is_refused(model, pages):
    with pytest.raises(VlmError, match="4096 together"): model(pages[0], "What? "*4000)


def test_runs_that_cannot_share_a_model_are_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path/"other")
    config = load_config(tmp_path/"other/config.yaml", dict(image_max_pixels=9999))
    atomic_write(tmp_path/"other/config.yaml", json.dumps(as_dict(config)))
    with pytest.raises(VlmError, match="cannot share a model: image_max_pixels is 262144 and 9999"):
        Extractor.from_run(run.path, tmp_path/"other")


def test_learned_words_cannot_share_a_base(run, tmp_path):
    shutil.copytree(run.path, tmp_path/"soft")
    atomic_write(tmp_path/"soft/adapter/adapter_config.json", '{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(VlmError, match="'soft' is no LoRA or IA3 and cannot share a base"):
        Extractor.from_run(run.path, tmp_path/"soft")


def test_two_adapters_over_one_base_answer_as_each_does_alone(run, model, pages, tmp_path):
    shutil.copytree(run.path, tmp_path/"other", ignore=shutil.ignore_patterns("adapter"))
    write_adapter(tmp_path/"other/adapter", seed=1)
    both, other = Extractor.from_run(run.path, tmp_path/"other"), Extractor.from_run(tmp_path/"other")
    def one(m): return m.answer([m.example(pages[0])])[0].raw
    assert [one(both.use(name)) for name in ("run", "other", "run")] == [one(model), one(other), one(model)]
    assert one(model) != one(other)


def test_the_base_answers_any_question(pages):
    base = Extractor.from_model("tiny-receipts", "Read the text.")
    assert base.answer([base.example(pages[0])], 40, until_json=False)[0].raw.isprintable() is False
    with pytest.raises(VlmError, match="no model 'nothing'"): Extractor.from_model("nothing")


def test_the_command_for_vllm_is_one_a_shell_reads():
    import shlex
    words = shlex.split(vllm_command("a b", "n", {"x": "runs/my run/adapter"}, rank=24))
    assert words[:5] == ["vllm", "serve", "a b", "--served-model-name", "n"]
    assert words[words.index("--lora-modules") + 1] == "x=runs/my run/adapter"
    assert words[words.index("--max-lora-rank") + 1] == "32"
    assert json.loads(words[words.index("--override-generation-config") + 1]) == {"temperature": 0}


# --- the star ---------------------------------------------------------------------------------------------------------
def test_every_light_verb_is_in_the_star_and_torch_is_not():
    code = "import sys; from vlm_tutor.all import *; print('torch' in sys.modules, *sorted(dir()))"
    loaded, *names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    wanted = {place.split(":")[1] for place, _ in VERBS.values() if place.split(":")[0] in LIGHT}
    assert loaded == "False" and not wanted - set(names) and {"Extractor", "Example", "contents"} <= set(names)
    assert not {"inspect", "torch", "table"} & set(names), "only what is on the list"


def test_three_lines_in_a_fresh_python(run, pages, model):
    code = ("from vlm_tutor.all import *; m = Extractor.from_run(sys.argv[1])\n"
            "print(json.dumps(next(m.many([sys.argv[2]])).raw))")
    ran = subprocess.run([sys.executable, "-c", "import json, sys\n" + code, run.path, pages[0]], capture_output=True,
                         text=True)
    assert json.loads(ran.stdout) == model.answer([model.example(pages[0])])[0].raw, ran.stderr
