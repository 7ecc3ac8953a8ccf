"""The bench: files that are checked, statistics worked out by hand, losses that must be equal, runs that go on."""
import json, re, subprocess, sys
from pathlib import Path

import pytest
from checkout import PACKAGE

from vlm_tutor import bench as b
from vlm_tutor.core import VlmError, read_jsonl, read_yaml, write_yaml


def run(cpu, wall=None, steps=2, rss=100., **more):
    "A run of `steps` equal steps that takes `cpu` seconds in all"
    marks = [[cpu*i/steps, (wall or cpu)*i/steps] for i in range(steps + 1)]
    return dict(marks=marks, total=marks[-1], memory=dict(rss=rss), import_seconds=1., versions={"torch": "2"},
                losses=[2.]*steps) | more


# --- experiment files -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", b.experiments())
def test_shipped_experiments_are_whole(name):
    experiment = b.load_experiment(name)
    assert experiment["what"].endswith(".") or experiment["what"].endswith("FOLDER.")
    assert b.all_points(experiment) and list(experiment["engines"])[0] == "ours"
    assert set(experiment["targets"]) <= set(b.all_points(experiment))
    assert all(set(aims) <= set(experiment["engines"]) for aims in experiment["targets"].values())
    for engine in experiment["engines"].values(): assert (PACKAGE/f"assets/peers/{engine['worker']}.py").exists()


def test_the_experiments_of_the_house_are_there():
    wanted = {"vs_trainer", "vs_trl", "vs_llama_factory", "ablation", "scaling", "rows", "cord_gpu", "predict", "mini",
              "save", "nted", "equal_lengths"}
    assert set(b.experiments()) == wanted


def test_experiments_are_no_presets():
    from vlm_tutor.config import presets
    assert not set(presets()) & set(b.experiments())


def test_each_trick_stands_alone_and_is_left_out_once():
    engines = b.load_experiment("ablation")["engines"]
    tricks = set(engines["none"]["settings"])
    for trick in tricks:
        assert set(engines[f"only_{trick}"]["settings"]) == tricks - {trick}
        assert engines[f"without_{trick}"]["settings"] == {trick: False}
    assert len(engines) == 2 + 2*len(tricks) and engines["ours"]["settings"] == {}


@pytest.mark.parametrize("text, said", [
    ("engnies: {}", "Did you mean 'engines'?"), ("task: trian", "Did you mean 'train'?"),
    ("engines: {ours: {worker: ours}}", "at least one more"), ("base: {row: 4}", "Did you mean 'rows'?"),
    ("base: {rows: many}", "rows in base is 'many'"), ("base: {rows: 0}", "rows in base is 0. Allowed: above 0"),
    ("engines: {trl: {worker: sft}, ours: {worker: ours}}", "'ours' first"),
    ("engines: {ours: {worker: ours}, trl: {worker: srt}}", "Did you mean 'sft'?"),
    ("engines: {ours: {worker: ours}, trl: {worker: sft, peer: tlr}}", "Did you mean 'trl'?")])
def test_a_mistake_in_a_file_is_named(tmp_path, text, said):
    (tmp_path/"mine.yaml").write_text(text)
    with pytest.raises(VlmError, match=re.escape(said)): b.load_experiment(tmp_path/"mine.yaml")


def test_a_mistake_on_the_command_line_is_named(tmp_path):
    with pytest.raises(VlmError, match="Did you mean 'vs_trl'"): b.bench("vs_tlr")
    with pytest.raises(VlmError, match="unknown key 'epoch' in the changes.*Did you mean 'epochs'"):
        b.bench("mini", overrides=["epoch=1"])
    with pytest.raises(VlmError, match="unknown point 'float16'.*float32"): b.bench("vs_trl", points=["float16"])
    with pytest.raises(VlmError, match="no data set in 'nowhere'"):
        b.make_work(b.SETTINGS | dict(model="tiny-receipts", data="nowhere"), tmp_path)


def test_points_change_the_base_and_one_thing_varies():
    experiment = b.load_experiment("mini", ["rows=6"]) | dict(points={"a": {"rows": 8}, "b": None}, vary={"batch": [1]})
    points = b.all_points(experiment)
    assert [(n, p["rows"], p["batch"]) for n, p in points.items()] == [("a", 8, 2), ("b", 6, 2), ("batch=1", 6, 1)]
    assert list(b.all_points(experiment, ["b"])) == ["b"]


def test_a_gpu_experiment_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(b, "machine", lambda: dict(gpus=[]))
    with pytest.raises(VlmError, match="'cord_gpu' needs a GPU"): b.bench("cord_gpu")


def test_sixteen_bits_that_would_be_thirty_two_are_refused(monkeypatch):
    why = "it computes in 32 bits"
    monkeypatch.setattr(b, "ineffective_keys", lambda config, *_, **__: [("bf16", why)] if config.bf16 else [])
    with pytest.raises(VlmError, match=f"point 'bfloat16' is in bfloat16, but {why}.*--points"):
        b.bench("vs_trl", points=["bfloat16"])


# --- statistics -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, low, high, sure", [(1, 0, 0, 0.), (2, 0, 1, .5), (3, 0, 2, .75), (5, 0, 4, .9375),
                                                (6, 0, 5, .9688), (8, 0, 7, .9922), (9, 1, 7, .9609)])
def test_the_interval_is_that_of_the_binomial_table(n, low, high, sure):
    found = b.middle([float(i) for i in reversed(range(n))])
    assert (found["low"], found["high"], found["coverage"], found["n"]) == (low, high, sure, n)
    assert found["median"] == (n - 1)/2


def test_cost_of_more_and_fewer_epochs_than_ran():
    line = dict(marks=[[2, 4], [6, 12], [8, 16], [9, 18], [10, 20]], total=[11, 22])
    assert [b.cost(line, 2, n) for n in (1, 2, 3, 10)] == [8 + 1, 11, 11 + 2, 11 + 8*2]
    assert b.cost(line, 2, 10, which=1) == 2*b.cost(line, 2, 10)
    assert b.cost(dict(marks=[], total=[7, 9]), 2, 10) == 7


def test_figures_by_hand():
    settings, tokens = dict(rows=4, batch=2, accumulation=2, steps=0), dict(length=[500, 600, 500, 600], answer=[100]*4)
    found = b.figures([run(4., 8., steps=1), run(2., 8., steps=1), run(8., 8., steps=1)], settings, tokens, 1)
    assert found["cpu_seconds"]["median"] == 4 and found["samples"] == 4
    assert [found["samples_per_cpu_second"][k] for k in ("low", "median", "high")] == [.5, 1, 2]
    assert found["tokens_per_second"]["median"] == 2200/8
    assert found["supervised_tokens_per_second"]["median"] == 400/8


def test_ratios_pair_neighbours_and_count_the_better_setting():
    settings = dict(rows=4, batch=2, accumulation=2, steps=0)
    lines = dict(ours=[run(1., rss=50.), run(2., rss=50.), run(4., rss=50.)],
                 slow=[run(6., rss=80.), run(12., rss=80.), run(24., rss=80.)],
                 quick=[run(3., rss=100.), run(6., rss=100.), run(8., rss=100.)])
    found = b.ratios(lines, settings, [2], 0, "rss")
    assert [found["quick"]["speed"]["2"][k] for k in ("low", "median", "high")] == [2, 3, 3]
    assert found["slow"]["speed"]["2"]["low"] == found["slow"]["speed"]["2"]["high"] == 6
    assert found["quick"]["memory"]["median"] == .5
    engines = dict(slow=b.ENGINE | dict(peer="trl"), quick=b.ENGINE | dict(peer="trl"))
    assert b.better(engines, found, 2) == dict(trl="quick")
    assert b.better(engines | dict(slow=b.ENGINE | dict(worker="plain")), found, 2) == dict(trl="quick", plain="slow")


@pytest.mark.parametrize("f, law", [(lambda x: 3 + 2*x, "linear"), (lambda x: 3*x**2, "power"),
                                    (lambda x: 5., "linear"), (lambda x: 2*x - 4, "linear")])
def test_the_right_law_is_found(f, law):
    xs = [1., 2., 4., 8.]
    found = b.fit_law(xs, [f(x) for x in xs])
    assert found["law"] == law and found["r2"] == pytest.approx(1)
    assert b.law_value(found, 16.) == pytest.approx(f(16.))


# --- equal losses -----------------------------------------------------------------------------------------------------
def test_equal_losses_pass_and_unequal_ones_do_not():
    assert b.check_losses(dict(ours=[9., 8.], a=[9., 8.], c=[9., 8.0004]), 1e-4) == pytest.approx(5e-5, rel=1e-3)
    for theirs, said in (([9., 8.01], "step 2: 'ours' 8, 'b' 8.01"), ([9.], "'b' reports 1 losses, 'ours' 2"),
                         ([float("nan"), 8.], "step 1")):
        with pytest.raises(VlmError, match=said): b.check_losses(dict(ours=[9., 8.], b=theirs), 1e-4)
    with pytest.raises(VlmError, match="0 losses"): b.check_losses(dict(ours=[], b=[]), 1e-4)


def test_answers_must_be_the_same():
    assert b.check_answers(dict(ours=list("abcd"), b=list("abcx")), .7) == .75
    for theirs in (list("abxy"), list("abc"), []):
        with pytest.raises(VlmError, match="the same answer"): b.check_answers(dict(ours=list("abcd"), b=theirs), .7)


def test_saved_data_sets_must_hold_the_same():
    ours, loop, jpeg = (dict(engine=n, answers=["{}", "[]"], pixels=["a", "b"]) for n in ("ours", "loop", "jpeg"))
    assert b.check_saved([ours, loop, jpeg | dict(pixels=None)]) == 1
    for other in (dict(answers=["{}", "{}"]), dict(answers=["{}"]), dict(pixels=["a", "c"]), dict(pixels=["a"])):
        with pytest.raises(VlmError, match="the same answer"): b.check_saved([ours, loop | other, jpeg])


def test_the_table_is_the_same_again_and_is_read_by_datasets(tmp_path):
    from datasets import load_dataset
    settings = b.SETTINGS | dict(rows=2, image=[64, 96])
    one, two = b.make_table(settings, tmp_path/"a"), b.make_table(settings, tmp_path/"b")
    rows, other = (list(load_dataset(work["data"], split="train", streaming=True)) for work in (one, two))
    assert [row["image"].size for row in rows] == [(64, 96)]*2 and one["image_mb"] > 0
    assert [row["image"].tobytes() for row in rows] == [row["image"].tobytes() for row in other]
    assert rows[0]["image"].tobytes() != rows[1]["image"].tobytes(), "equal images would be stored once"


def test_pairs_to_score_are_misread_receipts(tmp_path):
    from vlm_tutor.metrics import field_f1, nted_accuracy
    settings = b.SETTINGS | dict(rows=3, items=20)
    one, two = (b.make_pairs(settings, tmp_path/name)["data"] for name in "ab")
    pairs = json.loads(Path(one, "pairs.json").read_text())
    assert json.loads(Path(two, "pairs.json").read_text()) == pairs and len(pairs) == 3
    for read, true in pairs:
        assert (len(read["menu"]), len(true["menu"])) == (19, 20)
        assert .5 < nted_accuracy(read, true) < 1 and .4 < field_f1([read], [true]) < 1


def test_a_real_bench_of_saving(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path/"mine.yaml", read_yaml(b.experiments()["save"]) | dict(points={}, targets={}))
    record = b.bench("mine.yaml", repeats=1, overrides=["rows=4", "image=[64, 96]"])
    at = record["points"]["base"]
    assert at["check"] == 1 and at["better"]["resave"] in at["ratios"] and set(at["ratios"]) == {"loop", "loop_jpeg"}
    for engine in at["engines"].values():
        assert engine["epochs"]["1"]["samples"] == 4 and engine["epochs"]["1"]["samples_per_second"]["n"] == 1
    assert "rows/s" in str(record) and "the same pixels" in str(record)


# --- a bench without its workers --------------------------------------------------------------------------------------
SMALL = """# Small.
engines: {ours: {worker: ours}, one: {worker: sft, peer: trl}, other: {worker: sft, peer: trl, checkpointing: false}}
base: {model: tiny-receipts, image: [64, 96], answer_tokens: 5, rows: 2, batch: 1, accumulation: 1, epochs: 1,
       peer_epochs: 1, repeats: 2, check_steps: 2}
targets: {base: {one: 9.0, other: 2.0}}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    "A bench whose workers answer at once: what each was asked, and how long each says it took"
    (tmp_path/"small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    asked, speed = [], {("ours", None): 1., ("sft", None): 8., ("sft", False): 3.}
    def worker(job, python, folder):
        asked.append(job | dict(python=python))
        if len(asked) == fake.stop_at: raise KeyboardInterrupt
        return run(speed[job["worker"], job["checkpointing"]], losses=fake.losses.get(job["worker"], [3., 2.]))
    fake = type("Fake", (), dict(asked=asked, stop_at=None, losses={}))
    monkeypatch.setattr(b, "run_worker", worker)
    monkeypatch.setenv("VLM_VENVS", "venvs")
    monkeypatch.setattr(b, "make_venv", lambda peer, folder: f"{folder}/{peer}/python")
    return fake


def order(asked): return [(job["ordered"], job["worker"], job["checkpointing"]) for job in asked]


def test_engines_take_turns_after_the_check(fake):
    record = b.bench("small.yaml")
    turn = [("ours", None), ("sft", None), ("sft", False)]
    assert order(fake.asked) == [(True, *e) for e in turn] + 2*[(False, *e) for e in turn]
    assert fake.asked[1]["python"] == "venvs/trl/python" and fake.asked[0]["python"] == sys.executable
    assert fake.asked[0]["max_steps"] == 2 and fake.asked[-1]["max_steps"] == -1
    at = record["points"]["base"]
    assert at["better"] == dict(trl="other") and at["ratios"]["other"]["speed"]["1"]["median"] == 3
    assert "missed" in str(record) and "met" in str(record) and "other (better)" in str(record)


def test_an_interrupted_bench_goes_on(fake, tmp_path):
    fake.stop_at = 6
    with pytest.raises(KeyboardInterrupt): b.bench("small.yaml")
    place = tmp_path/".bench/small"
    assert len(read_jsonl(place/"runs.jsonl")) == 5 and not (place/"result.json").exists()
    fake.stop_at = None
    record = b.bench("small.yaml")
    assert len(fake.asked) == 6 + 4 and json.loads((place/"result.json").read_text()) == record
    b.bench("small.yaml")
    assert len(fake.asked) == 10, "what is on file is not measured again"
    b.bench("small.yaml", overrides=["learning_rate=0.01"])
    assert len(fake.asked) == 19, "another experiment is"


def test_unequal_losses_end_it_before_the_race(fake):
    fake.losses["sft"] = [3., 2.1]
    with pytest.raises(VlmError, match="losses differ at step 2"): b.bench("small.yaml")
    assert all(job["ordered"] for job in fake.asked)


def test_a_result_says_where_it_comes_from(fake, tmp_path):
    (tmp_path/"nbs/bench/results").mkdir(parents=True)
    record = b.bench("small.yaml")
    assert record["command"] == "vlm bench small.yaml" and record["seed"] == 42 and record["n"] == 2
    assert record["hardware"]["cpu"] and record["hardware"]["threads"] == 1 and record["versions"]["torch"]
    assert json.loads((tmp_path/"nbs/bench/results/small.json").read_text()) == record
    changed = b.bench("small.yaml", repeats=1, out="elsewhere.json")
    assert changed["command"] == "vlm bench small.yaml --repeats 1" and (tmp_path/"elsewhere.json").exists()
    b.bench("small.yaml", points=["base"])
    assert json.loads((tmp_path/"nbs/bench/results/small.json").read_text()) == record, "a part is not the whole"


def test_a_page_of_a_recorded_result_and_of_none(fake, tmp_path):
    b.bench("small.yaml", out="mini.json")
    assert "(better)" in b.show_recorded(tmp_path, "mini") and "commit" in b.show_recorded(tmp_path, "mini")
    assert "Not recorded" in b.show_recorded(tmp_path, "cord_gpu")
    assert b.plot_ratios(json.loads((tmp_path/"mini.json").read_text()), "plot.png").stat().st_size > 1000


# --- workers and environments -----------------------------------------------------------------------------------------
def test_jobs_differ_only_where_they_should():
    experiment = b.load_experiment("vs_llama_factory")
    settings, work = b.all_points(experiment)["float32"], dict(model="m", data="d", dataset="x", adapter="a",
                                                              tokens=dict(answer=[100]))
    jobs = {n: b.make_job(experiment, settings, work, n, "race") for n in experiment["engines"]}
    differ = {k for k in jobs["ours"] for n in jobs if jobs[n][k] != jobs["ours"][k]}
    assert differ == {"worker", "checkpointing", "epochs"} and jobs["ours"]["accumulation"] == 2
    assert b.make_job(experiment, settings, work, "ours", "check")["accumulation"] == 1
    config = b.own_config(jobs["ours"] | dict(settings=dict(cache_features=False)), "out")
    assert config["cache_features"] is False and config["adapter_name_or_path"] == "a"


def test_every_key_for_our_engine_exists():
    from vlm_tutor.config import FIELDS
    settings, work = b.SETTINGS, dict(model="m", data="d", dataset="x", adapter="a", tokens=dict(answer=[9]))
    for name in b.experiments():
        experiment = b.load_experiment(name)
        for engine in [n for n, e in experiment["engines"].items() if e["worker"] == "ours"]:
            job = b.make_job(experiment, settings, work, engine, "race")
            assert set(b.own_config(job, "out")) <= set(FIELDS)


def test_a_failing_worker_is_one_sentence(tmp_path):
    job = dict(worker="ours", threads=1, model="m", device="cpu") | {k: 1 for k in b.JOB_KEYS} | \
        dict(adapter="a", dataset="x", data="d", max_steps=1, epochs=1, dtype="float32", checkpointing=None,
             ordered=True, settings={})
    (tmp_path/"python").write_text("#!/bin/sh\necho first >&2\necho 'ValueError: no' >&2\nexit 3\n")
    (tmp_path/"python").chmod(0o755)
    with pytest.raises(VlmError, match=r"worker 'ours' failed: ValueError: no\. Read .*log.txt"):
        b.run_worker(job, str(tmp_path/"python"), tmp_path/"run")
    assert read_yaml(tmp_path/"run/config.yaml")["adapter_name_or_path"] == "a"


def test_work_is_made_once_and_is_the_same_again(tmp_path):
    settings = b.SETTINGS | dict(model="embedded-size", vocabulary=320, rows=2, image=[64, 96], answer_tokens=20)
    one, two = b.make_work(settings, tmp_path/"a"), b.make_work(settings, tmp_path/"b")
    def content(work, name): return b.content_hash(next((tmp_path/work).glob(f"*/{name}")))
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors", "data/bench.json"):
        assert content("a", name) == content("b", name)
    assert one["tokens"] == two["tokens"] and one["tokens"]["image"] == [(64//16)*(96//16)]*2
    assert all(10 <= n for n in one["tokens"]["answer"])


def test_the_scaled_model_has_the_proportions_of_the_2b():
    ids = {f"<|{w}|>": i for i, w in enumerate("endoftext im_end vision_start vision_end image_pad video_pad".split())}
    config = b.scaled_config(9496, ids)
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size) == (384, 7, 2240, 9496)
    assert (text.num_attention_heads, text.num_key_value_heads) == (6, 2)
    assert (vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size) == (8, 320, 5, 384)


@pytest.mark.slow
def test_a_real_bench_of_ours_and_a_plain_trainer(tmp_path):
    words = [sys.executable, "-m", "vlm_tutor.cli", "bench", "mini", "--json"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=None)
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout)
    at = record["points"]["embedded-base"]
    assert at["check"] <= 1e-4 and at["better"] == dict(plain="trainer")
    for engine in at["engines"].values():
        assert engine["measured_epochs"] == 2 and engine["peak_mib"]["rss"]["median"] > 0
        assert engine["epochs"]["2"]["cpu_seconds"]["median"] > 0 and engine["versions"]["transformers"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vs_trl", "vs_llama_factory"])
def test_peers_in_environments_of_their_own(tmp_path, name):
    write_yaml(tmp_path/"peer.yaml", read_yaml(b.experiments()[name]) | dict(points={}, targets={}, report_epochs=[]))
    small = ["model=embedded-size", "vocabulary=320", "image=[128, 192]", "rows=4", "answer_tokens=40", "epochs=1",
             "peer_epochs=1", "check_steps=2", "check_accumulation=1"]
    at = b.bench(str(tmp_path/"peer.yaml"), repeats=1, work=str(tmp_path), overrides=small)["points"]
    assert at["base"]["check"] <= 1e-4 and len(at["base"]["ratios"]) == 2


def test_a_mistyped_experiment_names_those_of_every_kind():
    with pytest.raises(VlmError, match="hyperparameters.*claims.*serve. Did you mean 'claims'?"): b.bench("claimz")
