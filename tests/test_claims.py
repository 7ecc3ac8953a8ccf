"Arms with seeds and claims about them: verdicts by hand, runs that are shared, every experiment in a quick mode."
import json, math, re, subprocess, sys
from pathlib import Path

import pytest
from vlm_tutor.bench import bench
from vlm_tutor.config import CHOICES, config_diff, load_config, parse_overrides
from vlm_tutor.core import RunFolder, VlmError, read_json_file, write_yaml
from vlm_tutor.claims import *
from vlm_tutor.curves import run_of, runs_folder
from vlm_tutor.methods import METHODS
from vlm_tutor.claims import STUDENT

CI = dict(field_f1=[.4, .6])
CLAIMED = [name for name in claim_files() if load_claims(name)["claims"]]
every = pytest.mark.parametrize("name", claim_files())


def group(**more):
    return dict(field_f1=.5, ci=CI, peak_mib=100., seconds_per_step=1., cpu_seconds=9., adapter_mb=1.,
                trainable=10, loss=.1) | more


def record(**groups):
    names = {name.rpartition("_"): g for name, g in groups.items()}
    return dict(arms={arm: {} for arm, _, _ in names}, groups={f"{a} {s}": g for (a, _, s), g in names.items()})


# --- files ------------------------------------------------------------------------------------------------------------
@every
def test_an_arm_differs_in_what_it_names_and_in_its_seed(name):
    experiment = load_claims(name)
    middle = load_config(experiment["preset"], experiment["changes"])
    for point, changes in arm_points(experiment).items():
        arm, _, seed = point.rpartition(" ")
        differs = {row["key"] for row in config_diff(middle, load_config(experiment["preset"], changes))}
        follows = {"learning_rate"} if load_config(experiment["preset"], changes).carried else set()
        assert differs <= {*experiment["arms"][arm], "seed", *follows} and changes["seed"] == int(seed)


def test_methods_holds_every_method_of_the_engine():
    words = {changes.get("finetuning_type", "lora") for changes in load_claims("methods")["arms"].values()}
    assert words == set(CHOICES["finetuning_type"])


def test_budget_holds_each_native_row_by_its_words_alone():
    mine = [m for m in METHODS.values() if m.native and m.family != "experts"]
    rows, found = {m.name: parse_overrides(m.native.split()) for m in mine}, load_claims("budget")["arms"]
    free = {"max_steps", "per_device_train_batch_size"}
    assert found.keys() == rows.keys()
    for name, changes in found.items():
        assert {key: value for key, value in changes.items() if key not in free} == rows[name]


def test_the_page_tells_which_four_do_not_rise_above_the_base():
    record = read_json_file(Path(__file__).parents[1]/"nbs/bench/results/budget.json")
    high = record["vanilla"]["ci"]["field_f1"][1]
    below = {name.rpartition(" ")[0] for name, group in record["groups"].items() if group["field_f1"] <= high}
    assert below == {"prompt", "p_tuning", "full_merger", "full_tower"}


def test_equal_time_shares_runs_with_budget_and_names_no_rate():
    one, two = load_claims("equal_time"), load_claims("budget")
    assert runs_folder("arms", one, "w") == runs_folder("arms", two, "w")
    assert {c.get("finetuning_type") for c in one["arms"].values()} == set(CHOICES["finetuning_type"])
    assert not any("learning_rate" in c for e in (one, two) for c in [e["changes"], *e["arms"].values()])
    one, two = arm_points(one), arm_points(two)
    assert {"lora 42", "pissa 42", "loraplus 42", "rslora 42"} <= {p for p in one if one[p] == two[p]}


@pytest.mark.parametrize("name, shared", [("methods", 9), ("rank", 3), ("rates", 9), ("rounding", 6)])
def test_experiments_share_their_runs(name, shared):
    other, claims = load_claims(name), load_claims("claims")
    assert runs_folder("arms", other, "w") == runs_folder("arms", claims, "w")
    one, two = arm_points(other), arm_points(claims)
    assert sum(one[point] == two[point] for point in one if point in two) >= shared


@pytest.mark.parametrize("name", CLAIMED)
def test_every_claim_has_three_seeds_or_more(name):
    experiment = load_claims(name)
    sides = [claim[side] for claim in experiment["claims"].values() for side in ("more", "less")]
    used = {arm for side in sides for arm in side_arms(side)}
    assert used <= {*experiment["arms"], *arms_along(experiment)} and experiment["claims"]
    assert experiment["seeds"] >= 3 and not experiment["once"]
    methods = [changes.get("finetuning_type", "lora") for changes in experiment["arms"].values()]
    rated = ["learning_rate" in changes or changes == {} for changes in experiment["arms"].values()]
    assert all(rated) or "learning_rate" in experiment["changes"] or set(methods) == {"lora"} or name == "claims"


@pytest.mark.parametrize("given, said", [
    (dict(arm={}), "Did you mean 'arms'?"), (dict(arms={"a": {}}, once=["b"]), "unknown arm under once 'b'"),
    (dict(arms={"a": {}}, claims={"x": dict(measure="speed", more="a", less="a")}), "unknown measure 'speed'"),
    (dict(arms={"a": {}}, claims={"x": dict(measure="loss", more="a")}), "It needs measure, more and less"),
    (dict(arms={"a": {}}, claims={"x": dict(measure="loss", more="a", less="b")}), "unknown arm under less 'b'"),
    (dict(arms={"a": {}}, claims={"x": dict(measure="loss", more=["a", "b"], less="a")}), "unknown arm under more 'b'"),
    (dict(arms={"a": {}}, claims={"x": dict(measure="loss", more="a", less=["a"] * 3)}), "names 3 arms"),
    (dict(arms={"a": {}}, along=2, changes=dict(max_steps=5),
          claims={"x": dict(measure="loss", more="a after 6 steps", less="a")}), "unknown arm under more 'a after 6"),
    (dict(arms={"a": dict(eval_dataset="other")}), "'eval_dataset' cannot be varied"),
    (dict(seeds=0), "seeds in experiment mine is 0"), (dict(seeds=11), "at most 10"),
    (dict(arms={"a": dict(learning_rte=1)}), "Did you mean 'learning_rate'?")], ids=str)
def test_a_wrong_file_is_one_sentence(tmp_path, given, said):
    with pytest.raises(VlmError) as error: bench(str(write_yaml(tmp_path / "mine.yaml", dict(arms={}) | given)))
    assert said in str(error.value)


# --- verdicts ---------------------------------------------------------------------------------------------------------
def test_the_interval_is_students():
    for n, t in STUDENT.items():  # the share of a t distribution with n degrees beyond t, by Simpson's rule
        scale = math.gamma((n + 1) / 2) / math.sqrt(n * math.pi) / math.gamma(n / 2)
        steps, width = 2000, t / 2000
        inside = [scale * (1 + (i * width)**2 / n)**(-(n + 1) / 2) for i in range(steps + 1)]
        area = width / 3 * (inside[0] + inside[-1] + 4 * sum(inside[1:-1:2]) + 2 * sum(inside[2:-1:2]))
        assert 2 * area == pytest.approx(.95, abs=2e-4)
    assert seed_interval([1, 2, 3]) == pytest.approx([2 - 4.303 / 3**.5, 2 + 4.303 / 3**.5])
    assert seed_interval([5]) is None and seed_interval([5, 5, 5]) == [5, 5]


def test_claims_are_judged_seed_by_seed():
    told = record(a_1=group(loss=1.), a_2=group(loss=5.), a_3=group(loss=9.), b_1=group(loss=.5), b_2=group(loss=4.4),
                  b_3=group(loss=8.45), b_4=group(loss=99.))
    found = judge_claim(told, "x", dict(measure="loss", more="a", less="b"))
    assert found["seeds"] == 3 and found["verdict"] == "holds" and found["effect"] == pytest.approx(.55)
    other = judge_claim(told, "x", dict(measure="loss", more="b", less="a"))
    assert other["verdict"] == "the opposite" and other["ci"] == pytest.approx([-v for v in reversed(found["ci"])])
    told["groups"]["b 2"]["loss"] = 6
    assert judge_claim(told, "x", dict(measure="loss", more="a", less="b"))["verdict"] == "inconclusive"
    assert judge_claim(told, "x", dict(measure="kept", more="a", less="b"))["verdict"] == "not measured"
    assert judge_claim(told, "x", dict(measure="trainable", more="a", less="b"))["verdict"] == "inconclusive"


def test_a_gain_is_a_difference_of_two_arms():
    scores = {"short_1": .2, "long_1": .5, "short_2": .3, "long_2": .4, "flat_1": .1, "flat_2": .3, "flat_3": 1.}
    told = record(**{name: group(field_f1=f1) for name, f1 in scores.items()})
    assert side_values(told, ["long", "short"], "field_f1") == pytest.approx({"1": .3, "2": .1})
    found = judge_claim(told, "x", dict(measure="field_f1", more=["long", "short"], less="flat"))
    assert found["means"] == pytest.approx([.2, .2]) and found["effect"] == pytest.approx(0) and found["seeds"] == 2
    told["claims"] = [found]
    row, = claim_rows(told)
    assert row["more"] == "long − short 0.2" and row["less"] == "flat 0.2" and row["verdict"] == "inconclusive"


def test_an_arm_has_a_name_at_each_place_along_its_way():
    places = {"2": dict(field_f1=.1, test_loss=2.), "4": dict(field_f1=.4, test_loss=1.)}
    told = record(a_1=group(along=places), a_2=group(along=places))
    experiment = dict(along=2, changes=dict(max_steps=5), arms={"a": {}, "b": dict(max_steps=1)})
    assert arms_along(experiment) == {"a after 2 steps": ("a", 2), "a after 4 steps": ("a", 4)}
    claim = dict(measure="field_f1", more="a after 4 steps", less="a after 2 steps")
    assert judge_claim(told, "x", claim)["means"] == [.4, .1]
    told |= dict(preset="tiny", changes=dict(per_device_train_batch_size=4, gradient_accumulation_steps=2))
    assert method_lines(told, "along") == {"lora": {16: [.1, .1], 32: [.4, .4]}}


def test_lines_gather_the_seeds_of_a_value(tmp_path):
    told = record(a_1=group(), a_2=group(field_f1=.7), b_1=group(field_f1=.1), c_1=group(field_f1=.9))
    told |= dict(preset="tiny", changes={}, arms=dict(a=dict(lora_rank=4), b=dict(lora_rank=2),
                                                      c=dict(finetuning_type="dora", lora_rank=4)))
    assert method_lines(told, "lora_rank") == {"lora": {2: [.1], 4: [.5, .7]}, "dora": {4: [.9]}}
    axes, = plot_lines(told, "lora_rank", tmp_path / "lines.png").axes
    assert [line.get_ydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2] == [[.1, .6], [.5, .7]]
    assert axes.get_xlabel() == "lora_rank" and (tmp_path / "lines.png").stat().st_size > 5000


def test_minutes_are_those_of_training_and_judging():
    told = record(a_1=group(cpu_seconds=50., judge_seconds=40.), a_2=group(cpu_seconds=30.))
    assert spent_minutes(told) == 2


def test_tables_name_what_is_there(tmp_path):
    told = record(lora_1=group(), lora_2=group(field_f1=.7), full_1=group())
    rows = arm_rows(told)
    assert [row["arm"] for row in rows] == ["lora", "full"] and "kept" not in rows[0]
    assert rows[0]["field F1"] == "0.600 (0.500 to 0.700)" and rows[1]["field F1"] == "0.500"
    told["claims"] = [judge_claim(told, "x", dict(measure=m, more="lora", less="full")) for m in ("loss", "kept")]
    assert [row["verdict"] for row in claim_rows(told)] == ["inconclusive", "not measured"]
    score, cost = plot_arms(told | dict(vanilla=dict(field_f1=.3)), "trainable", tmp_path / "arms.png").axes
    assert (tmp_path / "arms.png").stat().st_size > 5000
    assert [line.get_xdata()[0] for line in score.lines] == [.5, .5, .3], "two arms and the base"
    assert (score.get_xscale(), cost.get_xscale()) == ("linear", "log")


# --- runs -------------------------------------------------------------------------------------------------------------
def test_a_run_on_file_is_not_made_again(tmp_path):
    (tmp_path / "point.json").write_text(json.dumps(group()))
    assert arm_scores(RunFolder(tmp_path), "tiny", {}, tmp_path) == group()


def test_a_run_that_was_stopped_after_training_keeps_its_costs(tmp_path):
    (tmp_path / "told.json").write_text(json.dumps(dict(cpu_seconds=20., peak_mib=500.)))
    assert train_apart(load_config("tiny", dict(output_dir=str(tmp_path)))) == dict(cpu_seconds=20., peak_mib=500.)


def test_a_step_is_timed_by_its_median(tmp_path):
    lines = [dict(event="step", step=i + 1, seconds=s) for i, s in enumerate((9, 10, 11, 30, 31))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert step_seconds(RunFolder(tmp_path)) == 1


def test_a_curve_is_the_mean_of_each_part(tmp_path):
    lines = [dict(event="step", step=i + 1, loss=loss) for i, loss in enumerate((4, 2, 1, 3, 0, 8))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert loss_curve(RunFolder(tmp_path), 3) == [3, 2, 4] and loss_curve(RunFolder(tmp_path)) == [4, 2, 1, 3, 0, 8]


def test_memory_is_that_of_this_process():
    "In a fresh one: here, earlier tests have freed memory that a block may take"
    code = """from vlm_tutor.claims import held_memory
before = held_memory("VmRSS")
block = bytearray(b"1") * (200 * 2**20)
print(before, held_memory("VmRSS"), held_memory("VmHWM"))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, now, most = map(float, said.split())
    assert 190 < now - before < 230 and most >= before + 190


def arms_of(claim):
    "The arms a claim compares, wherever along their way"
    return {arm.partition(" after ")[0] for side in ("more", "less") for arm in side_arms(claim[side])}


def first_arms(whole):
    "The arms of the first claim; without claims, the first two"
    return next(map(arms_of, whole["claims"].values()), {*[*whole["arms"]][:2]})


def quick_of(whole, chosen):
    "An experiment with one step on two receipts, of the chosen arms and the claims about them"
    def early(side): return [re.sub(r"after \d+ steps", "after 1 steps", arm) for arm in side_arms(side)]
    arms = {arm: changes | dict(max_steps=1) for arm, changes in whole["arms"].items() if arm in chosen}
    claims = {text: claim | {side: early(claim[side]) for side in ("more", "less")}
              for text, claim in whole["claims"].items() if arms_of(claim) <= set(chosen)}
    along = dict(along=1) if whole["along"] else {}
    return dict(rows=2, test=2, seeds=1, probes=5, changes=whole["changes"], arms=arms, claims=claims, **along)


def check_methods(by):
    assert by["lora"]["trainable"] == 271360 and by["full"]["adapter_mb"] > by["lora"]["adapter_mb"]
    assert by["prompt"]["trainable"] < by["prefix"]["trainable"] and all(g["peak_mib"] > 0 for g in by.values())


def check_rounding(by):
    for arm in ("qat", "qat_lora"): # what learned with rounding is what it is after it
        assert by[arm]["field_f1_rounded"] == pytest.approx(by[arm]["field_f1"], abs=.02)
    assert set(by["lora"]) == set(by["qat"]) == set(by["full"])


def check_experts(by):
    # PEFT's count by hand: two layers, eight experts of width 64; four matrices of attention, 64 to 64 or 32
    assert by["experts"]["trainable"] == 2*4*8*((64 + 128) + (64 + 64))
    assert by["attention, experts"]["trainable"] == by["attention"]["trainable"] + by["experts"]["trainable"]
    assert by["attention, experts, router"]["trainable"] - by["attention, experts"]["trainable"] == 2*4*(64 + 8)
    assert all(g["test_loss"] == g["along"]["1"]["test_loss"] > 0 for g in by.values())


def check_seen(by):
    assert by["lora"]["along"]["1"]["field_f1"] == pytest.approx(by["lora"]["field_f1"], abs=.02)


CHECKS = dict(methods=check_methods, claims=check_methods, rounding=check_rounding, experts=check_experts,
              seen=check_seen)


@pytest.fixture(scope="module")
def quick_work(tmp_path_factory):
    "Runs that several experiments share"
    return tmp_path_factory.mktemp("quick")


def run_quick(folder, name, chosen):
    "Run an experiment in its quick mode, twice: the second time nothing is left to do"
    file = write_yaml(folder / f"{name}.yaml", quick_of(load_claims(name), chosen))
    told = bench(str(file), work=str(folder))
    assert set(told["groups"]) == {f"{arm} 42" for arm in chosen} and told["commit"] is not None
    assert ("vanilla" in told) == (name != "experts"), "its random bases are not the preset's"
    assert bool(told["claims"]) == (name in CLAIMED)
    assert all(c["seeds"] == 1 and c["verdict"] == "inconclusive" for c in told["claims"])
    assert read_json_file(folder / name / "result.json")["groups"] == told["groups"]
    again = bench(str(file), work=str(folder))
    assert again["groups"] == told["groups"] and again["kept_before"] == told["kept_before"]
    return {arm: told["groups"][f"{arm} 42"] for arm in chosen}


@every
def test_each_experiment_in_its_quick_mode(quick_work, monkeypatch, name):
    monkeypatch.chdir(quick_work)
    chosen = first_arms(load_claims(name))
    told = run_quick(quick_work, name, chosen)
    assert all(0 <= group["field_f1"] <= 1 and group["steps"] == 1 for group in told.values())


@pytest.mark.slow
@every
def test_each_experiment_with_all_its_arms(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    CHECKS.get(name, len)(run_quick(tmp_path, name, load_claims(name)["arms"]))
