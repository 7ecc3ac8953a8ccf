"""Merged folders against the adapter: through plain transformers, by hand, to a hub, in LLaMA-Factory."""
import base64, json, os, shutil, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from vlm_tutor import export as x
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, atomic_write, read_json_file, read_jsonl
from vlm_tutor.extract import Extractor
from vlm_tutor.metrics import evaluate
from vlm_tutor.predict import BASE_FILE, model_hash, predict, split_examples
from vlm_tutor.tiny import load_model
from test_predict import make_run

LANGUAGE = r".*language_model.*(q_proj|down_proj)"
PLAIN = """
import json, sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, GenerationConfig
folder, rows = sys.argv[1], json.loads(sys.argv[2])
tokenizer, look = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
model, told = AutoModelForImageTextToText.from_pretrained(folder, dtype='auto').eval(), []
for prompt, image in rows:
    seen = look(images=[Image.open(image).convert('RGB')], return_tensors='pt')
    place = '<|vision_start|>' + '<|image_pad|>'*(int(seen['image_grid_thw'].prod())//4) + '<|vision_end|>'
    chat = [dict(role='user', content=place + prompt)]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors='pt')
    kinds = (ids['input_ids'] == model.config.image_token_id).int()
    new = model.generate(**ids, **seen, mm_token_type_ids=kinds, max_new_tokens=60)[0, ids['input_ids'].shape[1]:]
    told.append(tokenizer.decode(new, skip_special_tokens=True))
assert 'vlm_tutor' not in sys.modules and not GenerationConfig.from_pretrained(folder).do_sample
print(json.dumps(told))
"""


def write_adapter(folder, config=None, seed=0):
    "A random adapter of any kind, in PEFT's format, with the base it belongs to"
    torch.manual_seed(seed)
    model = get_peft_model(load_model("tiny-receipts"), config or LoraConfig(r=4, target_modules=LANGUAGE))
    for name, weight in model.named_parameters():
        if "magnitude" in name: weight.data *= 1.1
        elif weight.requires_grad: torch.nn.init.normal_(weight, float("ia3" in name), .4 if "hada" in name else .1)
    model.save_pretrained(folder)
    base = dict(name="tiny-receipts", hash=model_hash("tiny-receipts"))
    atomic_write(Path(folder)/BASE_FILE, json.dumps(base))
    return Path(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A run with an adapter, its answers and their scores, and what it was merged into"
    run = make_run(tmp_path_factory.mktemp("made"))
    write_adapter(run.adapter)
    predict(str(run.path))
    evaluate(run.path)
    return run, x.merge(str(run.path), rows=6)


@pytest.fixture
def run(made, tmp_path):
    "A copy of that run without its merged folder; its data stay where they are"
    shutil.copytree(made[0].path, tmp_path/"run", ignore=shutil.ignore_patterns("merged"))
    return RunFolder(tmp_path/"run")


def left(run): return sorted(path.name for path in run.path.iterdir() if "merged" in path.name)


# --- the same model ---------------------------------------------------------------------------------------------------
def test_plain_transformers_answers_as_the_adapter_does(made):
    run, told = made
    rows = split_examples(load_config(run.config_file), "test")
    asked = json.dumps([(row.prompt, os.path.abspath(row.image)) for row in rows])
    ran = subprocess.run([sys.executable, "-c", PLAIN, told["folder"], asked], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    ours = {row["id"]: row["raw"] for row in read_jsonl(run.predictions("finetuned-model"))}
    plain = dict(zip([row.id for row in rows], json.loads(ran.stdout)))
    assert len(set(plain.values())) > 1 and all(text for text in ours.values())
    for name, text in ours.items(): assert plain[name].startswith(text[:60]) or text.startswith(plain[name])


def test_every_weight_is_base_plus_change(made):
    "By hand: W + alpha/r · B·A; in the folder of the common form the language model keeps its names"
    run, told = made
    merged, base = load_file(Path(told["folder"])/"model.safetensors"), load_model("tiny-receipts").state_dict()
    parts = load_file(run.adapter/"adapter_model.safetensors")
    for name in ("layers.0.self_attn.q_proj", "layers.4.mlp.down_proj", "layers.2.mlp.up_proj"):
        b, a = (parts.get(f"base_model.model.model.language_model.{name}.lora_{side}.weight") for side in "BA")
        wanted = base[f"model.language_model.{name}.weight"] + (8/4*b @ a if a is not None else 0)
        assert torch.allclose(merged[next(k for k in merged if k.endswith(f"{name}.weight"))], wanted, atol=1e-6)


@pytest.mark.parametrize("config", [LoraConfig(r=4, target_modules=LANGUAGE, use_dora=True),
                                    LoHaConfig(r=4, target_modules=LANGUAGE),
                                    IA3Config(target_modules=LANGUAGE, feedforward_modules=".*down_proj")],
                         ids=["dora", "loha", "ia3"])
def test_other_kinds_merge_as_their_own_config_says(run, config):
    shutil.rmtree(run.adapter)
    write_adapter(run.adapter, config)
    told = x.merge(str(run.path), rows=2)
    assert told["checked"]["equal_answers"] == 2 and told["adapters"][0]["kind"] == config.peft_type
    asked = split_examples(load_config(run.config_file), "test")[0]
    mine, its = Extractor.from_run(run.path), Extractor.from_model(told["folder"])
    assert mine.answer([asked])[0].raw == its.answer([asked])[0].raw


def test_qlora_is_merged_into_the_whole_base_and_what_that_changes_is_said(tmp_path):
    run = make_run(tmp_path, finetuning_type="qlora")
    write_adapter(run.adapter)
    told = x.merge(str(run.path), rows=3)
    merged, base = load_file(Path(told["folder"])/"model.safetensors"), load_model("tiny-receipts").state_dict()
    name = next(k for k in merged if k.endswith("layers.0.mlp.up_proj.weight"))
    assert torch.equal(merged[name], base["model.language_model.layers.0.mlp.up_proj.weight"])
    assert told["whole"]["logit_difference"] > 1e-3 > told["checked"]["logit_difference"]
    changed = f"{3 - told['whole']['equal_answers']} of 3 answers differ"
    assert changed in str(told) and changed in (Path(told["folder"])/"README.md").read_text()


def test_a_model_that_was_trained_whole_gets_its_folder_too(run):
    shutil.rmtree(run.adapter)
    model = load_model("tiny-receipts")
    with torch.no_grad(): model.model.language_model.layers[0].mlp.up_proj.weight *= 1.1
    model.save_pretrained(run.model)
    told = x.merge(str(run.path), rows=2)
    mine, its = Extractor.from_run(run.path), Extractor.from_model(told["folder"])
    asked = split_examples(load_config(run.config_file), "test")[0]
    assert told["adapters"][0]["kind"] == "MODEL" and mine.answer([asked])[0].raw == its.answer([asked])[0].raw


def test_sixteen_bits_are_measured_and_said(run):
    told = x.merge(str(run.path), rows=3, dtype="bfloat16")
    assert told["checked"]["logit_difference"] < 1e-3 < told["rounded"]["logit_difference"]
    changed = 3 - told["rounded"]["equal_answers"]
    assert f"warning  in bfloat16 {changed} of 3 answers changed" in str(told)
    assert {str(w.dtype) for w in load_file(Path(told["folder"])/"model.safetensors").values()} == {"torch.bfloat16"}
    assert f"{changed} of 3 answers changed" in (Path(told["folder"])/"README.md").read_text()


def test_a_merge_that_went_wrong_is_not_written(run, monkeypatch):
    real = x.write_model
    def spoil(model, *rest):
        with torch.no_grad(): model.model.language_model.layers[1].mlp.up_proj.weight[3] *= 1.05
        real(model, *rest)
    monkeypatch.setattr(x, "write_model", spoil)
    with pytest.raises(VlmError, match="merged model is not the same.*Nothing was written"):
        x.merge(str(run.path), rows=2)
    assert left(run) == []


# --- sums -------------------------------------------------------------------------------------------------------------
def change(adapters, layer="model.language_model.layers.1.self_attn.q_proj.weight"):
    config = load_config("tiny")
    before = load_model("tiny-receipts").state_dict()[layer]
    return x.load_adapted(config, adapters)[0].merge_and_unload().state_dict()[layer] - before


@pytest.mark.parametrize("rslora", [False, True])
def test_a_weighted_sum_is_the_sum_of_the_changes(tmp_path, rslora):
    a, b = (write_adapter(tmp_path/str(rank), LoraConfig(r=rank, target_modules=LANGUAGE, use_rslora=rslora), rank)
            for rank in (4, 8))
    wanted = .7*change({a: 1.}) - .3*change({b: 1.})
    assert torch.allclose(change({a: .7, b: -.3}), wanted, atol=1e-6) and wanted.abs().max() > .01


def test_peft_still_scales_a_sum_of_rslora_twice(tmp_path):
    "When this fails PEFT has mended it, and `combine` need not"
    a, b = (write_adapter(tmp_path/str(rank), LoraConfig(r=rank, target_modules=LANGUAGE, use_rslora=True), rank)
            for rank in (4, 8))
    model = PeftModel.from_pretrained(load_model("tiny-receipts"), a, "a")
    model.load_adapter(b, "b")
    model.add_weighted_adapter(["a", "b"], [.5, .5], "sum", combination_type="cat")
    layer = model.base_model.model.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling["sum"] == pytest.approx(12**.5)


def test_the_verb_merges_a_sum(run, tmp_path):
    other = write_adapter(tmp_path/"other", seed=5)
    told = x.merge(str(run.path), str(tmp_path/"both"), also=str(other), weights="0.6,0.4", rows=2)
    assert [row["weight"] for row in told["adapters"]] == [.6, .4] and Path(told["folder"]) == tmp_path/"both"


# --- the folder -------------------------------------------------------------------------------------------------------
def test_the_card_tells_what_it_is(made):
    run, told = made
    text = (Path(told["folder"])/"README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0" and head["base_model"] == "tiny-receipts"
    scores = read_json_file(run.metrics("finetuned-model"))
    low, high = scores["ci"]["field_f1"]
    assert f"{scores['field_f1']:.2f} [{low:.2f}, {high:.2f}]" in text and "n = 6" in text
    assert "vllm serve" in text and "(not run)" in text and "commit" in text and model_hash("tiny-receipts") in text
    assert "Apache License" in (Path(told["folder"])/"LICENSE").read_text()
    assert str(run.path) not in text, "no path of this machine"


def test_again_is_done_and_something_else_is_refused(made):
    run, told = made
    before = {path: path.stat().st_mtime_ns for path in Path(told["folder"]).iterdir()}
    assert "done before" in str(x.merge(str(run.path)))
    with pytest.raises(VlmError, match="exists and holds something else"): x.merge(str(run.path), dtype="float16")
    with pytest.raises(VlmError, match="exists and holds something else"):
        x.merge(str(run.path), str(run.path.parent/"data"))
    assert before == {path: path.stat().st_mtime_ns for path in Path(told["folder"]).iterdir()}


def test_bad_input_is_refused_before_the_model_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr(x, "load_model", lambda *_: pytest.fail("the model was loaded"))
    atomic_write(tmp_path/"soft/adapter_config.json", '{"peft_type": "PREFIX_TUNING"}')
    atomic_write(tmp_path/"soft/adapter_model.safetensors", "x")
    for said, options in (("PREFIX_TUNING, which changes no weights", dict(also=str(tmp_path/"soft"))),
                          ("unknown dtype 'int4'", dict(dtype="int4")), ("rows is 0", dict(rows=0)),
                          ("no adapter in 'gone'", dict(also="gone")), ("a weight goes with", dict(weights="0.5")),
                          ("weights 'a,b' for 1", dict(weights="a,b")), ("no name on the hub", dict(push="me")),
                          ("cannot write", dict(out="/sys/none/merged"))):
        with pytest.raises(VlmError, match=said): x.merge(str(run.path), **options)
    with pytest.raises(VlmError, match="no run folder"): x.merge(str(tmp_path/"none"))


def test_an_adapter_of_another_base_is_refused(run):
    atomic_write(run.adapter/BASE_FILE, '{"name": "another", "hash": "0000000000000000"}')
    with pytest.raises(VlmError, match="was trained on another"): x.merge(str(run.path), rows=1)
    assert left(run) == []


# --- the hub ----------------------------------------------------------------------------------------------------------
class Taking(BaseHTTPRequestHandler):
    "As much of the hub as an upload asks for; what came is kept"
    protocol_version, came, refuse = "HTTP/1.1", {}, False

    def log_message(self, *_): pass

    def answer(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        for pair in (("Content-Length", len(body)), ("Content-Type", "application/json")):
            self.send_header(*map(str, pair))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self): self.answer(dict(id="ada/receipts", sha="0"*40, siblings=[], private=True))

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        where = f"http://{self.headers['Host']}/ada/receipts"
        if self.refuse: return self.answer(dict(error="you may not"), 403)
        if "preupload" in self.path:
            files = [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(data)["files"]]
            return self.answer(dict(files=files))
        if "/commit/" in self.path:
            rows = [json.loads(line) for line in data.splitlines() if line]
            self.came.update({r["value"]["path"]: base64.b64decode(r["value"]["content"])
                              for r in rows if r["key"] == "file"})
            return self.answer(dict(commitUrl=f"{where}/commit/{'1'*40}", commitOid="1"*40, success=True))
        if "repos/create" in self.path: self.came["asked"] = json.loads(data)
        self.answer(dict(url=where, name="ada/receipts"))


PUSH = "import sys; from vlm_tutor.export import push_folder; print(push_folder(sys.argv[1], sys.argv[2]))"


def push(folder, address, **more):
    env = os.environ | dict(HF_ENDPOINT=address, HF_TOKEN="hf_test", HF_HUB_DISABLE_TELEMETRY="1") | more
    code = f"from vlm_tutor.core import VlmError\ntry:\n exec({PUSH!r})\nexcept VlmError as e: sys.exit(str(e))"
    return subprocess.run([sys.executable, "-c", "import sys\n" + code, str(folder), "ada/receipts"], env=env,
                          capture_output=True, text=True, timeout=120)


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Taking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(Taking, "came", {})
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_push_brings_every_file_to_a_private_repository(hub, tmp_path):
    atomic_write(tmp_path/"folder/config.json", "{}")
    atomic_write(tmp_path/"folder/README.md", "# A card\n")
    ran = push(tmp_path/"folder", hub)
    assert ran.returncode == 0, ran.stderr[-1500:]
    assert Taking.came["config.json"] == b"{}" and Taking.came["README.md"] == b"# A card\n"
    asked = Taking.came["asked"]
    assert asked.get("private") is True or asked.get("visibility") == "private"


def test_a_push_that_is_refused_is_one_sentence(hub, tmp_path, monkeypatch):
    atomic_write(tmp_path/"folder/config.json", "{}")
    monkeypatch.setattr(Taking, "refuse", True)
    ran = push(tmp_path/"folder", hub)
    assert ran.returncode == 1 and "the hub did not take 'ada/receipts'" in ran.stderr and "Traceback" not in ran.stderr
    ran = push(tmp_path/"folder", hub, HF_TOKEN="", HF_TOKEN_PATH=str(tmp_path/"none"))
    assert "there is no token" in ran.stderr


# --- LLaMA-Factory ----------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_llama_factory_goes_on_from_a_merged_folder(factory, made, tmp_path):
    "Its first loss on the merged folder is ours"
    run, told = made
    config, found = load_config(run.config_file), []
    for engine in ("native", "llamafactory"):
        words = [f"model_name_or_path={told['folder']}", f"output_dir={tmp_path/engine}", "max_steps=1",
                 "logging_steps=1", "eval_strategy=no", "save_strategy=no", f"dataset_dir={config.dataset_dir}",
                 "disable_shuffling=true", "per_device_train_batch_size=4"]
        ran = subprocess.run([sys.executable, "-m", "vlm_tutor.cli", "train", "tiny", "--engine", engine, *words],
                             capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        found.append([row["loss"] for row in read_jsonl(tmp_path/engine/"log.jsonl") if row["event"] == "step"])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
