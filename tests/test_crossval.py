"Cross-validation for real on the embedded base: every row answered once, by a model that had not seen it."
import json, os, signal, statistics, subprocess, sys, time

import pytest
from cord import shop_heads
from vlm_tutor.config import load_config
from vlm_tutor.core import RunFolder, VlmError, read_json_file, read_jsonl
from vlm_tutor.crossval import crossval, fold_config, fold_plan, spreads, write_folds
from vlm_tutor.metrics import field_f1, read_json
from vlm_tutor.predict import split_examples
from vlm_tutor.sources import load_examples
from vlm_tutor.train import events

COMMAND = [sys.executable, "-m", "vlm_tutor.cli"]


def words(folder, name="cv"):
    return [f"data={folder / 'shops'}", f"output_dir={folder}/runs/{name}", "eval_dataset=null", "val_size=0",
            "max_steps=2", "per_device_train_batch_size=4", "plot_loss=false", "save_steps=1"]


def vlm(*given): return subprocess.run([*COMMAND, *map(str, given)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crossval")
    shop_heads(folder, train=7, test=2)
    return folder


@pytest.fixture(scope="module")
def done(place):
    "Two folds and two seeds, killed by force in the second run, then gone on with"
    log = place / "runs/cv-crossval/seed-42/fold-1/log.jsonl"
    process = subprocess.Popen([*COMMAND, "crossval", "tiny", *words(place), "--folds", "2", "--seeds", "2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (log.exists() and '"step"' in log.read_text()): time.sleep(.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = os.stat(log.parent.parent / "fold-0/log.jsonl").st_mtime_ns
    return first, crossval("tiny", folds=2, seeds=2, overrides=words(place))


def test_every_row_is_answered_once_by_a_model_that_had_not_seen_it(done, place):
    rows = {e.id: e for e in load_examples(place / "shops", "train")}
    for seed in (42, 43):
        told = read_jsonl(place / f"runs/cv-crossval/predictions/seed-{seed}.jsonl")
        assert sorted(row["id"] for row in told) == sorted(rows)
        assert all(row["truth"] == rows[row["id"]].target and row["split"] == "train" for row in told)
        for fold in (0, 1):
            run = RunFolder(place / f"runs/cv-crossval/seed-{seed}/fold-{fold}")
            config = load_config(run.path)
            learned = {e.target + e.id for e in split_examples(config, "train")}
            answered = read_jsonl(run.predictions("finetuned-model"))
            assert events(run, "start")[0]["rows"] == len(learned) == 7 - len(answered)
            assert not learned & {row["truth"] + row["id"] for row in answered}


def test_scores_are_those_of_the_answers(done, place):
    for seed, found in done[1]["seeds"].items():
        rows = read_jsonl(place / f"runs/cv-crossval/predictions/seed-{seed}.jsonl")
        truths = [json.loads(row["truth"]) for row in rows]
        assert found["pooled"]["field_f1"] == pytest.approx(field_f1([read_json(r["raw"]) for r in rows], truths))
        assert found["pooled"]["n"] == 7 == sum(one["n"] for one in found["folds"])
        low, high = found["pooled"]["ci"]["nted_accuracy"]
        assert low <= found["pooled"]["nted_accuracy"] <= high


def test_a_killed_one_goes_on_and_a_finished_one_has_nothing_to_do(done, place):
    first, found = done
    assert os.stat(place / "runs/cv-crossval/seed-42/fold-0/log.jsonl").st_mtime_ns == first
    before = {path: path.stat().st_mtime_ns for path in (place / "runs").rglob("adapter_model.safetensors")}
    assert len(before) == 4 and crossval("tiny", folds=2, seeds=2, overrides=words(place)) == found
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_errors_takes_the_answers(done, place):
    told = vlm("errors", place / "runs/cv-crossval", "--split", "train", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["n"] == 7
    assert (place / "runs/cv-crossval/report/suspects.csv").exists()


def test_each_image_is_looked_at_once(done, place):
    rows = [row for file in (place / "runs/cv-crossval/features").glob("*.jsonl") for row in read_jsonl(file)]
    assert len(rows) == len({row["image"] for row in rows}) == 7


def test_groups_stay_whole_and_validation_rows_stay_what_they_are(tmp_path):
    shop_heads(tmp_path, train=12, validation=3)
    config = load_config("tiny", [f"data={tmp_path / 'shops'}", f"output_dir={tmp_path}/runs/x"])
    plan = fold_plan(config, 3, group="shop")
    shops = {}
    for example, fold in zip(plan[0], plan[2]): shops.setdefault(example.truth["shop"], set()).add(fold)
    assert all(len(folds) == 1 for folds in shops.values())
    write_folds(tmp_path / "cv", config, plan)
    one = fold_config(tmp_path / "cv", config, 1, 7, bool(plan[1]))
    assert [e.target for e in split_examples(one, "validation")] == [e.target for e in plan[1]]
    assert len(split_examples(one, "train")) + len(split_examples(one, "test")) == 12 and one.seed == 7


def test_spreads_are_standard_deviations():
    scores = [[.2, .5, .6], [.3, .4, .9]]
    found = spreads(scores)
    assert found["folds"] ** 2 == pytest.approx(statistics.mean(statistics.stdev(row) ** 2 for row in scores))
    assert found["seeds"] ** 2 == pytest.approx(statistics.mean((a - b) ** 2 / 2 for a, b in zip(*scores)))
    assert spreads(scores[:1])["seeds"] is None


@pytest.mark.parametrize("options, said", [(["--folds", 9], "9 folds of 7 groups leave a fold empty"),
                                           (["--folds", 1], "folds is 1"), (["--seeds", 0], "seeds is 0"),
                                           (["--group", "shap"], "Did you mean 'shop'?"),
                                           (["--workers", 0], "workers is 0")], ids=str)
def test_wrong_words_are_refused_before_anything_is_written(place, options, said):
    told = vlm("crossval", "tiny", *words(place, "none"), *options)
    assert told.returncode == 2 and said in told.stderr and len(told.stderr.splitlines()) == 1
    assert not (place / "runs/none-crossval").exists()


def test_another_cut_needs_another_folder(done, place):
    with pytest.raises(VlmError, match="holds another cross-validation. It differs in: k"):
        crossval("tiny", folds=3, overrides=words(place))


@pytest.mark.slow
def test_workers_find_what_one_process_finds(done, place):
    told = vlm("crossval", "tiny", *words(place, "two"), "--folds", 2, "--seeds", 2, "--workers", 2, "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["seeds"] == done[1]["seeds"]
    assert read_json_file(place / "runs/two-crossval/folds.json")["k"] == 2
