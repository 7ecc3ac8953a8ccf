"Real sweeps on the embedded base: a better rate is found, a killed sweep goes on, workers share one storage."
import json, os, shutil, signal, sqlite3, statistics, subprocess, sys, time
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from cord import shop_heads
from vlm_tutor import sweep as chapter
from vlm_tutor.config import find_config, load_config
from vlm_tutor.core import RunFolder, VlmError, read_json_file, read_jsonl, read_yaml, write_yaml
from vlm_tutor.metrics import field_f1, read_json, read_predictions
from vlm_tutor.sweep import Axis, draw, finished, importance, open_study, read_axis, read_plan, sweep
from vlm_tutor.train import events

COMMAND = [sys.executable, "-m", "vlm_tutor.cli", "sweep"]
RATES = {"from": 5e-4, "to": 2e-2, "log": True}


def write(folder, search=None, trials=4, name="shops", changes=(), **block):
    "A configuration with a block `sweep` in `folder`"
    values = read_yaml(find_config("tiny")) | dict(
        dataset_dir=str(folder / "shops"), dataset="shops", eval_dataset="shops_validation", learning_rate=1e-3,
        per_device_train_batch_size=4, num_train_epochs=4, plot_loss=False, output_dir=str(folder / f"runs/{name}"))
    block = dict(search=search or dict(learning_rate=RATES), trials=trials, seed=1) | block
    return str(write_yaml(folder / f"{name}.yaml", values | dict(changes) | dict(sweep=block)))


def vlm(*words): return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    shop_heads(folder, train=32, validation=8, test=8)
    return folder


def kill_in_second_trial(config, log):
    "Start the verb and end it by force once its second trial has taken a step"
    process = subprocess.Popen([*COMMAND, config], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (log.exists() and '"step"' in log.read_text()): time.sleep(.1)
    process.send_signal(signal.SIGKILL)
    return process.communicate()


@pytest.fixture(scope="module")
def resumed(place):
    "A sweep that was killed in its second trial, and its second half"
    config, trials = write(place), place / "runs/shops-sweep/trials"
    kill_in_second_trial(config, trials / "0001/log.jsonl")
    first = (trials / "0000/log.jsonl").stat().st_mtime_ns
    return config, first, sweep(config)


def test_a_sweep_finds_a_better_rate_than_the_one_it_starts_from(resumed):
    config, _, found = resumed
    rows = {row["trial"]: row for row in found["trials"]}
    assert rows[0]["learning_rate"] == 1e-3 and found["best"]["trial"] != 0
    assert found["best"]["field_f1"] > rows[0]["field_f1"] + .2
    gain = found["test"]["gain"]
    assert gain["ci"][0] > 0 and found["test"][str(found["best"]["trial"])]["n"] == 8
    assert load_config(found["folder"] + "/best.yaml").learning_rate == found["best"]["params"]["learning_rate"]


def test_a_killed_sweep_does_nothing_twice_and_tries_what_it_would_have_tried(resumed, place):
    _, first, found = resumed
    trials = place / "runs/shops-sweep/trials"
    assert (trials / "0000/log.jsonl").stat().st_mtime_ns == first
    assert sorted(path.name for path in trials.iterdir()) == ["0000", "0001", "0002", "0003"]
    tried = {row["trial"]: row["learning_rate"] for row in found["trials"]}
    for number in tried.keys() - {0}:
        fresh = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1000 + number, multivariate=False))
        assert fresh.ask().suggest_float("learning_rate", 5e-4, 2e-2, log=True) == tried[number]


def test_scores_are_those_of_the_answers_on_file(resumed):
    _, _, found = resumed
    for row in found["trials"]:
        rows = read_predictions(f"{found['folder']}/trials/{row['trial']:04}", "finetuned-model", "validation")
        truths = [json.loads(one["truth"]) for one in rows]
        assert row["field_f1"] == pytest.approx(field_f1([read_json(one["raw"]) for one in rows], truths))


def test_each_image_is_looked_at_once_for_all_trials(resumed):
    rows = [row for file in RunFolder(resumed[2]["folder"]).path.glob("features/*.jsonl") for row in read_jsonl(file)]
    assert len(rows) == len({row["image"] for row in rows}) == 48


def test_another_space_is_refused_and_the_same_command_has_nothing_to_do(resumed, place):
    config, _, found = resumed
    assert sweep(config) == found
    other = write(place, dict(learning_rate=RATES | {"to": .1}))
    with pytest.raises(VlmError, match="belongs to another sweep. It differs in: search"): sweep(other)
    write(place)


@pytest.fixture(scope="module")
def shared(place):
    "Two workers, two aims, and a prompt that is searched"
    config = write(place, dict(lora_rank=[2, 4], prompt=[None, "Which shop?"]), 2, "pair", dict(max_steps=2),
                   objective=["field_f1", "memory"])
    done = vlm(config, "--workers", 2, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_workers_share_the_trials(shared):
    assert sum(shared["states"].values()) == shared["states"]["complete"] == 2
    folder, asked = RunFolder(shared["folder"]).path, {None: "Read the name of the shop as JSON."}
    for row in shared["trials"]:
        run = folder / f"trials/{row['trial']:04}"
        assert len(events(RunFolder(run), "start")) == 1 and RunFolder(run).config()["lora_rank"] == row["lora_rank"]
        rows = read_predictions(run, "finetuned-model", "validation")
        assert {one["prompt"] for one in rows} == {asked.get(row["prompt"], row["prompt"])}


@pytest.mark.slow
def test_the_front_holds_what_no_other_trial_beats(shared):
    rows = shared["trials"]
    def beaten(a, b): return (b["field_f1"] >= a["field_f1"] and b["memory"] <= a["memory"]) and a != b
    assert shared["front"] == sorted(a["trial"] for a in rows if not any(beaten(a, b) for b in rows))
    assert all(200 < row["memory"] < 4000 for row in rows)


# --- refused before anything starts -----------------------------------------------------------------------------------
BLOCKS = [(dict(search=dict(learning_rat=[1, 2])), "unknown key 'learning_rat' in sweep.search. Did you mean"),
          (dict(search=dict(lr=[1e-3, 1e-2])), "Did you mean 'learning_rate'?"),
          (dict(search=dict(promt=["a", "b"])), "Did you mean 'prompt'?"),
          (dict(search=dict(lora_rank=[0, 4])), "lora_rank is 0. Allowed: above 0"),
          (dict(search=dict(finetuning_type=["lora", "loar"])), "Did you mean 'lora'?"),
          (dict(search=dict(learning_rate={"from": 0, "to": 1, "log": True})), "from a number above 0"),
          (dict(search=dict(seed=[1, 2])), "a lucky seed"), (dict(objectiv="field_f1"), "Did you mean 'objective'?"),
          (dict(objective="f1"), "unknown score in sweep.objective 'f1'"), (dict(trials=0), "trials is 0"),
          (dict(objective=["field_f1", "minutes", "memory"]), "names 3 aims"), (dict(search=7), "sweep.search is 7")]


@pytest.mark.parametrize("block, said", BLOCKS, ids=lambda x: str(x)[:40])
def test_a_wrong_block_is_one_clear_sentence(tmp_path, block, said):
    with pytest.raises(VlmError) as error: read_plan(write(tmp_path, **block))
    assert said in str(error.value)


def test_the_verb_refuses_a_wrong_key_before_it_writes(tmp_path):
    done = vlm(write(tmp_path, dict(rank=[4, 8])))
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "Did you mean 'lora_rank'?" in done.stderr and not (tmp_path / "runs").exists()


def test_a_storage_in_use_is_refused(place):
    config, file = write(place, name="busy"), place / "busy.db"
    open_study(read_plan(config), f"sqlite:///{file}")
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("begin exclusive")
    for storage in (str(file), f"sqlite:///{file}"):
        began = time.time()
        with pytest.raises(VlmError, match="'busy.db': database is locked. Another program holds it"):
            sweep(config, storage=storage)
        assert time.time() - began < 20
    holder.close()


def test_a_storage_with_something_else_in_it_is_refused(place):
    config = write(place, name="strange")
    (place / "text.db").write_text("no data base, but a text that is long enough to be taken for one" * 20)
    for storage in (place / "text.db", f"sqlite:///{place / 'text.db'}"):
        with pytest.raises(VlmError, match="file is not a database. Choose another --storage"):
            sweep(config, storage=str(storage))
    with pytest.raises(VlmError, match="cannot use storage"): sweep(config, storage=str(place))
    url = f"sqlite:///{place / 'foreign.db'}"
    study = optuna.create_study(storage=url, study_name="strange-sweep")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(VlmError, match="'strange-sweep' in that storage was not made by vlm sweep"):
        sweep(config, storage=str(place / "foreign.db"))
    with pytest.raises(VlmError, match="cannot use storage 'nosuch://x/y'"): sweep(config, storage="nosuch://x/y")


def test_without_optuna_the_extra_is_named(place, monkeypatch):
    monkeypatch.setattr(chapter, "find_spec", lambda name: None)
    with pytest.raises(VlmError, match=r"pip install 'vlm_tutor\[sweep\]'"): sweep(write(place, name="none"))


# --- the budget, and trials that do not come to an end ----------------------------------------------------------------
def tiny(folder, name, **more):
    "A sweep of trials that take one step on four rows"
    changes = dict(max_steps=1, max_samples=4, val_size=0, cutoff_len=512, eval_score_samples=1)
    changes |= more.pop("changes", {})
    return write(folder, dict(learning_rate=RATES), name=name, changes=changes, **more)


def trials_of(config, storage=None):
    "Optuna's trials of a sweep"
    plan = read_plan(config)
    return open_study(plan, storage or f"sqlite:///{plan.folder}/study.db")[0].get_trials()


@pytest.mark.slow
def test_no_trial_begins_after_the_minutes_and_the_same_command_goes_on(place):
    config, budget, begun = tiny(place, "minutes", trials=40), .1, 0
    for _ in range(2):
        start = datetime.now()
        found = sweep(config, minutes=budget)
        new = trials_of(config)[begun:]
        end = start + timedelta(minutes=budget)
        assert 1 <= len(new) < 40 and {t.state.name for t in new} == {"COMPLETE"}, "the running one is finished"
        assert all(t.datetime_start >= start for t in new) and new[-1].datetime_complete >= end
        assert all(t.datetime_start <= end + timedelta(seconds=5) for t in new), "5 s: Optuna is opened meanwhile"
        begun += len(new)
        assert sum(found["states"].values()) == begun
    with pytest.raises(VlmError, match="minutes is 0. Allowed: a number above 0"): sweep(config, minutes=0)


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_given_up_on_its_validation_score(resumed, place):
    copy = place / "copy"
    shutil.copytree(place / "runs", copy / "runs")
    config = write(place, changes=dict(output_dir=str(copy / "runs/shops")))
    plan = read_plan(config)
    open_study(plan, f"sqlite:///{plan.folder}/study.db")[0].enqueue_trial(dict(learning_rate=5e-4))
    found = sweep(config, trials=5)
    *whole, last = trials_of(config)
    write(place) # the file of the other tests again
    assert found["states"] == dict(complete=4, pruned=1) and last.params == dict(learning_rate=5e-4)
    seen = last.intermediate_values
    step = max(seen)
    assert step < 400 and seen[step] < statistics.median(t.intermediate_values[step] for t in whole)
    run = RunFolder(copy / "runs/shops-sweep/trials/0004")
    end, told = step / 100 * 8, max(row["step"] for row in events(run, "step"))
    assert end - load_config(str(run.path)).logging_steps < told <= end and not events(run, "done")
    told = {round(100 * row["epoch"]): row["field_f1"] for row in events(run, "validation")}
    assert told == seen and not run.checkpoints.exists() and not run.adapter.exists()
    assert 4 not in {row["trial"] for row in found["trials"]}


def workers_of(process):
    "Process ids of the workers of a verb"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def has_begun(run): return run.log_file.exists() and '"step"' in run.log_file.read_text()


@pytest.mark.slow
def test_a_worker_killed_in_a_trial_is_told_and_its_trial_goes_on(place):
    config = tiny(place, "force", trials=3, changes=dict(max_steps=3, save_strategy="steps", save_steps=1))
    folder = place / "runs/force-sweep"
    process = subprocess.Popen([*COMMAND, config, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while process.poll() is None and not has_begun(RunFolder(folder / "trials/0000")): time.sleep(.1)
    os.kill(workers_of(process)[0], signal.SIGKILL)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in told, told
    assert told.splitlines()[-1].startswith("vlm: a worker was ended by force; most often memory ran out. The same")
    before = {t.number: t.params for t in trials_of(config)}
    found = sweep(config)
    assert found["states"] == dict(complete=3)
    after = {t.number: t.params for t in trials_of(config)}
    assert before.items() <= after.items() and sorted(after) == [0, 1, 2]
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["0000", "0001", "0002"]


@pytest.mark.slow
def test_two_machines_share_an_address_and_one_takes_up_what_the_other_left(tmp_path):
    "Their folders differ, their study is one; a heart that stopped ten minutes ago is set in the file, not waited for"
    url, machines = f"sqlite:///{tmp_path / 'shared.db'}", [tmp_path / "a", tmp_path / "b"]
    for folder in machines: folder.mkdir(), shop_heads(folder, train=4, validation=2, test=2)
    first, second = (tiny(folder, "both", trials=2) for folder in machines)
    run = RunFolder(machines[0] / "runs/both-sweep/trials/0000")
    process = subprocess.Popen([*COMMAND, first, "--storage", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not has_begun(run): time.sleep(.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    study, kept = open_study(read_plan(second), url)
    optuna.storages.fail_stale_trials(study)
    assert [t.state.name for t in study.trials] == ["RUNNING"], "another machine may still be at it"
    with sqlite3.connect(tmp_path / "shared.db") as base:
        base.execute("update trial_heartbeats set heartbeat = datetime(heartbeat, '-10 minutes')")
    found = sweep(second, storage=url)
    left, taken, other = trials_of(second, url)
    assert [t.state.name for t in (left, taken, other)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert left.params == taken.params == dict(learning_rate=1e-3) != other.params
    assert found["states"] == dict(fail=1, complete=2)
    assert (machines[1] / "runs/both-sweep/trials/0000/adapter").exists()
    assert sweep(first, storage=url)["states"] == found["states"], "nothing is left to do on the first machine either"


# --- proposals --------------------------------------------------------------------------------------------------------
def test_keys_without_effect_are_not_drawn(place):
    words = ["lora", "full", "ia3"]
    plan = read_plan(write(place, dict(lora_rank=[4, 8], use_dora=[True, False], finetuning_type=words)))
    def keys(word): return set(draw(optuna.trial.FixedTrial(dict(
        finetuning_type=word, lora_rank=4, use_dora=True)), plan))
    assert keys("lora") == {"finetuning_type", "lora_rank", "use_dora"}
    assert keys("full") == keys("ia3") == {"finetuning_type"}


def test_alpha_follows_the_rank_unless_the_file_names_it(place):
    from vlm_tutor.sweep import trial_config
    plan = read_plan(write(place, dict(lora_rank=[4, 8])))
    assert trial_config(plan, dict(lora_rank=4)).lora_alpha == 32  # the preset tiny names it
    values = {name: v for name, v in read_yaml(place / "shops.yaml").items() if name != "lora_alpha"}
    plan = read_plan(str(write_yaml(place / "free.yaml", values)))
    assert trial_config(plan, dict(lora_rank=4)).lora_alpha == 8


def test_a_rate_follows_the_method_of_a_trial_unless_it_is_given(place):
    from vlm_tutor.sweep import trial_config
    words = dict(finetuning_type=["lora", "prompt"])
    def rate(plan, **params): return trial_config(plan, params).learning_rate
    plan = read_plan(write(place, words))
    assert (rate(plan, finetuning_type="lora"), rate(plan, finetuning_type="prompt")) == (1e-3, .05)
    assert rate(plan, finetuning_type="prompt", learning_rate=.1) == .1
    plan = read_plan(write(place, words), ["learning_rate=0.002"])
    assert (rate(plan, finetuning_type="lora"), rate(plan, finetuning_type="prompt")) == (.002, .002)


def test_importance_finds_the_key_that_decides():
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=3))
    study.optimize(lambda t: -(t.suggest_float("a", 0, 1) - .7) ** 2 + 0 * t.suggest_float("b", 0, 1), n_trials=60)
    plan = read_plan("tiny")
    plan.axes = [Axis("a", low=0., high=1.), Axis("b", low=0., high=1.)]
    shares = importance(study, plan)
    assert shares["a"] > .7 and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert finished(study)[0].value == max(t.value for t in study.trials)
