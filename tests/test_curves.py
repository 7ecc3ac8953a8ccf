"The experiment that moves one key at a time: its file, its points, its record."
import json

import pytest
from vlm_tutor.bench import bench
from vlm_tutor.config import FIELDS, config_diff, load_config
from vlm_tutor.core import VlmError, read_json_file, write_yaml
from vlm_tutor.curves import curve_files, curve_of, curve_points, load_curves, middle_scores, plot_curves

GROUP = dict(n=2, field_f1=.5, nted_accuracy=.5, valid_json=1., ci=dict(field_f1=[.4, .6]), loss=.1, steps=3, rows=4,
             samples=24, seconds=9.)


@pytest.mark.parametrize("name", curve_files())
def test_a_point_differs_from_the_middle_in_what_it_names(name):
    experiment = load_curves(name)
    middle = load_config(experiment["preset"], experiment["changes"])
    for point, changes in curve_points(experiment).items():
        differs = {row["key"] for row in config_diff(middle, load_config(experiment["preset"], changes))}
        if "=" in point: assert differs <= {point.split("=")[0]} | ({"lora_alpha"} if "rank" in point else set())
        assert differs <= set(FIELDS)
    for key, values in experiment["vary"].items(): assert getattr(middle, key) not in values, "it is the middle"


def test_names_of_points_are_apart():
    experiment = load_curves("hyperparameters")
    counted = experiment["seeds"] + len(experiment["points"]) + sum(map(len, experiment["vary"].values()))
    assert len(curve_points(experiment)) == counted


def record(groups):
    return dict(preset="tiny", changes={}, vary=dict(learning_rate=[1e-3, 1e-2], lr_scheduler_type=["linear"]),
                groups=groups)


def test_a_curve_holds_the_middle_and_leaves_out_what_was_not_measured(tmp_path):
    groups = {"seed=42": GROUP, "seed=43": GROUP | dict(field_f1=.6), "learning_rate=0.01": GROUP}
    assert [value for value, _ in curve_of(record(groups), "learning_rate")] == [4e-3, 1e-2]
    assert [value for value, _ in curve_of(record(groups), "lr_scheduler_type")] == ["cosine"]
    assert middle_scores(record(groups)) == [.5, .6]
    plot_curves(record(groups), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_bench_names_it_and_refuses_what_it_cannot_do(tmp_path):
    assert "hyperparameters" in bench()
    with pytest.raises(VlmError, match="unknown point 'learning_rate=7'"):
        bench("hyperparameters", points=["learning_rate=7"], work=str(tmp_path))
    with pytest.raises(VlmError, match="'rows=3' does not go with experiment 'hyperparameters'"):
        bench("hyperparameters", overrides=["rows=3"], work=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, said", [(dict(rows=0), "rows in experiment mine is 0"), (dict(row=3), "Did you mean"),
                                         (dict(vary=[1]), "vary in experiment mine is"), (dict(vary=dict(
                                             learning_rte=[1])), "Did you mean 'learning_rate'?")], ids=str)
def test_a_wrong_file_is_one_sentence(tmp_path, given, said):
    with pytest.raises(VlmError) as error: curve_points(load_curves(write_yaml(tmp_path / "mine.yaml", given)))
    assert said in str(error.value)


def test_a_point_on_file_is_not_measured_again(tmp_path):
    from vlm_tutor.core import RunFolder
    from vlm_tutor.curves import point_scores
    (tmp_path / "point.json").write_text(json.dumps(GROUP))
    assert point_scores(RunFolder(tmp_path), "tiny", {}, tmp_path) == GROUP == read_json_file(tmp_path / "point.json")


def test_runs_of_other_receipts_or_other_code_are_not_taken_for_these(tmp_path, monkeypatch):
    from vlm_tutor import curves
    asked = dict(preset="tiny", rows=4, test=2, seed=42)
    first = curves.runs_folder("curves", asked, tmp_path)
    assert first == curves.runs_folder("curves", asked | dict(what="another title"), tmp_path)
    for key, value in dict(preset="cord", rows=5, test=3, seed=43).items():
        assert curves.runs_folder("curves", asked | {key: value}, tmp_path) != first
    one, other = (curves.run_of(first, "a", dict(learning_rate=rate)).path for rate in (.1, .2))
    assert one != other and one.parent == other.parent == first
    (tmp_path / "train.py").write_text("changed")
    monkeypatch.setattr(curves, "PACKAGE", tmp_path)
    assert curves.runs_folder("curves", asked, tmp_path) != first
