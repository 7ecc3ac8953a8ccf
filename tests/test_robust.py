"The label test with the real base, and the study in its smallest size, by the command itself."
import json, subprocess, sys

import pytest

from vlm_tutor.augment import AUGMENTATIONS, MOST
from vlm_tutor.core import read_json_file, read_jsonl
from vlm_tutor.metrics import read_json, read_predictions, field_f1
from vlm_tutor.receipts import make_receipt
from vlm_tutor.robust import BROKEN, gains, known_pages, label_test, ways_to_test

PAGES = [make_receipt(i, level=1).image for i in range(2)]
SMALL = ["--n-train", "4", "--n-test", "2", "--epochs", "1", "--seeds", "2"]


def vlm(*words, cwd=None): return subprocess.run([sys.executable, "-m", "vlm_tutor.cli", *map(str, words)],
                                                 capture_output=True, text=True, cwd=cwd)


def test_the_base_reads_what_is_allowed_and_not_what_is_refused():
    pages = known_pages(10)
    found = {row["name"]: row for row in label_test(pages, ways_to_test(list(AUGMENTATIONS), MOST))}
    assert {name for name, row in found.items() if row["broken"]} == {"flip", "rotation_90"}
    assert found["untouched"]["misread"] < .15 and found["flip"]["misread"] > .7


def test_the_label_test_counts_characters():
    pages = [(PAGES[0], "abcd"), (PAGES[1], "efgh")]
    found = label_test(pages, {"half": lambda image, seed: image}, read=lambda images: ["abcd", "xxxx"])
    assert found == [dict(name="half", misread=.5, broken=False)] and BROKEN == .5


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return folder, vlm("robust", "runs/r", *SMALL, "--json", cwd=folder)


def test_the_record_holds_every_run_and_says_where_it_comes_from(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == read_json_file(folder / "runs/r/robust.json")
    assert record["command"] == "vlm robust runs/r " + " ".join(SMALL) + " --strength 1 --seed 0"
    assert len(record["groups"]) == 8 and len(record["differences"]) == 4
    assert {name for row in record["reading"]["1.5"] for name in [row["name"]]} == \
        {"untouched", *AUGMENTATIONS, "flip", "rotation_90"}


def test_scores_are_those_of_the_answers_on_file(finished):
    folder, done = finished
    groups = json.loads(done.stdout)["groups"]
    for way in ("plain", "augmented"):
        rows = read_predictions(folder / f"runs/r/{way}-1-epochs-seed-1", "finetuned-model")
        for kind in ("clean", "disturbed"):
            own = [row for row in rows if row["id"].endswith("-form0") == (kind == "disturbed")]
            found = field_f1([read_json(row["raw"]) for row in own], [json.loads(row["truth"]) for row in own])
            assert groups[f"{way}, 1 epochs, {kind}, seed 1"]["field_f1"] == pytest.approx(found)


def test_only_the_augmented_way_disturbs_and_the_test_rows_are_the_same_for_both(finished):
    folder, _ = finished
    plain, augmented = (folder / f"runs/r/{way}-1-epochs-seed-0" for way in ("plain", "augmented"))
    text = [(path / "config.yaml").read_text() for path in (plain, augmented)]
    assert ["augmentation:" in one for one in text] == [False, True]
    ids = [[row["id"] for row in read_jsonl(path / "predictions/finetuned-model.jsonl")] for path in (plain, augmented)]
    assert sorted(ids[0]) == sorted(ids[1]) and len(ids[0]) == 4


def test_again_trains_nothing(finished):
    folder, done = finished
    kept = sorted(folder.glob("runs/r/*/adapter/adapter_model.safetensors"))
    before = [path.stat().st_mtime_ns for path in kept]
    again = vlm("robust", "runs/r", *SMALL, cwd=folder)
    assert again.returncode == 0 and [path.stat().st_mtime_ns for path in kept] == before and len(kept) == 4
    assert "misread at 1.5" in again.stdout and "result  runs/r/robust.json" in again.stdout


def test_a_gain_is_the_difference_of_both_scores():
    truths = [dict(total="4"), dict(total="5")]
    right, half = (['{"total":"4"}', '{"total":"5"}'], truths), (['{"total":"4"}', '{"total":"9"}'], truths)
    found = gains(dict(clean=half), dict(clean=right))["clean"]
    assert found["field_f1"] == pytest.approx(.5) and found["ci"][0] >= 0


@pytest.mark.parametrize("words, said", [
    (["--epochs", "6;15"], "epochs is '6;15'"), (["--epochs", "0"], "epochs is '0'"),
    (["--seeds", "0"], "seeds is 0"), (["--strength", "2"], "up to 1.5")])
def test_a_mistake_is_one_line_and_nothing_is_drawn(tmp_path, words, said):
    done = vlm("robust", "runs/r", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
