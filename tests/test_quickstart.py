"The whole job by the command itself, in a small size, on whatever base lies in the package."
import json, os, random, signal, subprocess, sys, time

import pytest

from vlm_tutor.core import RunFolder, VlmError, asset, read_jsonl
from vlm_tutor.receipts import HELD_OUT_LAYOUT, LAYOUTS
from vlm_tutor.quickstart import Steps, character_error_rate, check_settings, count_parameters, quickstart

SMALL = ["--n-train", "8", "--n-validation", "2", "--n-test", "4"]
STEPS = ["receipts", "base", "vanilla", "train", "finetuned"]


def vlm(folder, *words):
    "Run the command in a folder, without a terminal"
    return subprocess.run([sys.executable, "-m", "vlm_tutor.cli", *words], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=900)


def lines(text):
    "The five step lines, as {step: line}"
    return {line.split()[1]: line for line in text.splitlines() if line[:3].strip().isdigit()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    return folder, vlm(folder, "quickstart", "runs/q", *SMALL)


def test_five_lines_then_the_field_table_and_where_things_lie(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    found = lines(done.stdout)
    assert list(found) == STEPS and not any("done" in line for line in found.values())
    assert "8 train · 2 validation · 4 test" in found["receipts"]
    assert "4/4 predicted" in found["vanilla"] and "field F1 0." in found["finetuned"]
    assert "menu.nm" in done.stdout and done.stdout.index("report  runs/q/report/index.html") > 0
    for name in ("index.html", "fields.png", "scores.png"): assert (folder/"runs/q/report"/name).stat().st_size > 5000


def test_both_groups_answered_the_same_test_receipts(finished):
    run = RunFolder.open(finished[0]/"runs/q")
    groups = {g: {r["id"]: r for r in read_jsonl(run.predictions(g))} for g in ("vanilla-model", "finetuned-model")}
    vanilla, tuned = groups.values()
    assert set(vanilla) == set(tuned) and len(vanilla) == 4
    assert all(vanilla[i]["truth"] == tuned[i]["truth"] and vanilla[i]["prompt"] == tuned[i]["prompt"] for i in vanilla)
    assert {r["adapter"] for r in vanilla.values()} == {None} and None not in {r["adapter"] for r in tuned.values()}


def test_again_does_nothing_twice_and_json_is_one_object(finished):
    folder, _ = finished
    kept = [folder/"runs/q"/name for name in ("adapter/adapter_model.safetensors", "predictions/finetuned-model.jsonl")]
    before = [path.stat().st_mtime_ns for path in kept]
    done = vlm(folder, "quickstart", "runs/q", *SMALL, "--json")
    result = json.loads(done.stdout)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert all("done" in line for line in lines(done.stderr).values()) and list(lines(done.stderr)) == STEPS
    assert (result["seed"], result["n_train"], result["n_test"]) == (0, 8, 4)
    assert list(result["groups"]) == ["vanilla-model", "finetuned-model"] and set(result["seconds"]) == set(STEPS)
    for scores in result["groups"].values():
        assert set(scores["subsets"]["names"]) == {"seen", "unseen"} and scores["ci"]["field_f1"]
        assert sum(s["n"] for s in scores["subsets"]["names"].values()) == 4
    assert result["hardware"]["cpu"] and result["versions"]["torch"] and result["base_cer"] >= 0
    assert set(result["base_cer_by_layout"]) <= {*LAYOUTS, HELD_OUT_LAYOUT}
    assert result["command"] == f"vlm quickstart runs/q {' '.join(SMALL)} --seed 0"


@pytest.mark.parametrize("change, says", [(["--n-test", "5"], "n_test (there 4, now 5)"),
                                          (["--seed", "1"], "seed (there 0, now 1)")])
def test_another_quickstart_in_the_folder_is_refused(finished, change, says):
    done = vlm(finished[0], "quickstart", "runs/q", *SMALL, *change)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_bad_input_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VlmError, match="n_test is 0"): quickstart("a", n_test=0)
    with pytest.raises(VlmError, match="cannot write"): quickstart("/sys/vlm-quickstart")
    RunFolder.create("mine", {"learning_rate": 1e-4})
    with pytest.raises(VlmError, match="not made by a quickstart"): quickstart("mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failed_step_is_not_done_and_its_time_counts(tmp_path):
    def fail():
        time.sleep(0.2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Steps(tmp_path, {}).do("a", fail)
    steps = Steps(tmp_path, {})
    assert "a" not in steps.facts and steps.seconds["a"] >= 0.2
    steps.do("a", lambda: dict(said="x", found="y"))
    assert "a" in Steps(tmp_path, {}).facts


def edits(a, b):
    "Levenshtein distance, by the textbook's recursion over prefixes"
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1): above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


def test_character_error_rate_by_the_textbook():
    rng = random.Random(0)
    texts, truths = ([''.join(rng.choices("ab \n€", k=rng.randint(0, 12))) for _ in range(50)] for _ in range(2))
    wanted = sum(map(edits, texts, truths))/sum(map(len, truths))
    assert character_error_rate(texts, truths) == pytest.approx(wanted)


def test_parameters_as_safetensors_counts_them():
    from safetensors import safe_open
    with safe_open(asset("tiny-receipts")/"model.safetensors", "pt") as file:
        assert count_parameters(asset("tiny-receipts")) == sum(file.get_tensor(k).numel() for k in file.keys())


def test_the_base_is_named_by_its_content():
    assert check_settings({"train": 1}, 3) == {"n_train": 1, "seed": 3, "base": check_settings({"train": 2}, 0)["base"]}


@pytest.mark.slow
def test_an_interrupted_quickstart_goes_on(tmp_path, finished):
    words = [sys.executable, "-u", "-m", "vlm_tutor.cli", "quickstart", "runs/q", *SMALL]
    job = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    log = tmp_path/"runs/q/log.jsonl"
    while job.poll() is None and not (log.exists() and '"start"' in log.read_text()): time.sleep(.05)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=300)
    assert job.returncode == 130 and "Traceback" not in said
    again = vlm(tmp_path, "quickstart", "runs/q", *SMALL)
    assert again.returncode == 0, again.stderr
    found = lines(again.stdout)
    assert ["done" in found[step] for step in STEPS] == [True, True, True, False, False]
    answers = [{r["id"]: r["raw"] for r in read_jsonl(RunFolder(folder/"runs/q").predictions("vanilla-model"))}
               for folder in (tmp_path, finished[0])]
    assert answers[0] == answers[1]
