"""Chapter 05a against the libraries it stands on: `json`, `csv`, `datasets`, and a hub over HTTP."""
import csv, io, json, os, subprocess, sys

import pytest
from checkout import ROOT
from cord import FILES, make_cord, row, truth
from hypothesis import HealthCheck, given, settings, strategies as st

from vlm_tutor.core import VlmError
from vlm_tutor.tables import check_shards, csv_rows, file_key, json_rows, jsonl_rows, parquet_rows, saved_rows

anywhere = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def cord(tmp_path_factory): return make_cord(tmp_path_factory.mktemp("hub") / "cord")


def python(code, **environment):
    "Run a piece of Python with the package, as a process of its own"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env=clean | {key: str(value) for key, value in environment.items()})


# --- JSON and CSV -----------------------------------------------------------------------------------------------------
@anywhere
@given(rows=st.lists(values, max_size=8), indent=st.sampled_from([None, 0, 1, "\t"]), first=st.integers(0, 9),
       piece=st.integers(1, 40))
def test_a_json_array_read_in_pieces_is_that_of_the_standard_library(tmp_path, rows, indent, first, piece):
    from vlm_tutor.tables import _array_items, _Pieces
    text = json.dumps(rows, indent=indent, ensure_ascii=False)
    assert list(_array_items("x.json", _Pieces(io.StringIO(text), piece), first)) == rows[first:]
    (tmp_path / "x.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    if text.isprintable(): assert list(json_rows(tmp_path / "x.json").start(first)) == rows[first:]


@anywhere
@given(rows=st.lists(values, min_size=1, max_size=4), cut=st.floats(0, 0.99))
def test_an_array_that_is_cut_off_never_passes_for_whole(rows, cut):
    from vlm_tutor.tables import _array_items, _Pieces
    text = json.dumps(rows)
    with pytest.raises(VlmError, match="x.json"):
        list(_array_items("x.json", _Pieces(io.StringIO(text[:int(len(text) * cut)]), 7), 0))


cells = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)


@anywhere
@given(table=st.lists(st.lists(cells, min_size=3, max_size=3), max_size=4), mark=st.sampled_from(",;\t"))
def test_csv_is_that_of_the_csv_module(tmp_path, table, mark):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=mark).writerows([["a", "b", "c"], *table])
    assert list(csv_rows(tmp_path / "x.csv")) == [dict(zip("abc", line)) for line in table]


@pytest.mark.parametrize("name, text, problem", [
    ("x.csv", "a,b\n1,2,3\n", "row 1 of '.*x.csv' has 3 cells for 2 columns"), ("x.csv", "", "is empty"),
    ("x.csv", "a,,b\n", "a column without a name"), ("x.csv", "a,a\n", "the column 'a' twice"),
    ("x.jsonl", '{"a": 1}\n{"a"\n', "line 2 of '.*x.jsonl' is not JSON"),
    ("x.json", '[{"a": 1}, {"a": }]', "'.*x.json' is not JSON: Expecting value in row 2"),
    ("x.json", '[{"a": 1} {"a": 2}]', "no comma behind row 1"), ("x.json", '{"a": 1}', "holds no list of rows"),
    ("x.json", b"[\xff]", "it is not UTF-8 text"), ("x.json", None, "no file '.*x.json'")])
def test_a_bad_file_is_one_error_that_names_it(tmp_path, name, text, problem):
    path, read = tmp_path / name, dict(csv=csv_rows, json=json_rows, jsonl=jsonl_rows)[name.partition(".")[2]]
    if text is not None: path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(VlmError, match=problem): list(read(path))


def test_windows_files_are_read_as_others(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(jsonl_rows(tmp_path / "x.jsonl")) == [{"a": 1}, {"a": 2}]
    assert list(jsonl_rows(tmp_path / "x.jsonl").start(1)) == [{"a": 2}]


def test_a_key_changes_with_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    keys = {file_key([path])}
    path.write_text("22")
    keys.add(file_key([path]))
    os.utime(path, (1, 1))
    assert len(keys | {file_key([path])}) == 3


# --- parquet ----------------------------------------------------------------------------------------------------------
def test_rows_are_those_of_datasets_with_the_bytes_that_went_in(cord):
    from datasets import load_dataset
    for split, rows in saved_rows(cord).items():
        theirs = list(load_dataset(str(cord), split=split, streaming=True).decode(False))
        assert list(rows) == theirs and rows.count == len(theirs)
    told = [json.loads(found["ground_truth"]) for found in saved_rows(cord)["train"]]
    assert [found["gt_parse"] for found in told] == [truth(i) for i in range(5)]
    assert list(saved_rows(cord)["test"]) == [row(7, "test"), row(8, "test")]


@pytest.mark.parametrize("groups", [1, 2, 100])
def test_a_stream_can_start_anywhere(tmp_path, groups):
    import pyarrow as pa, pyarrow.parquet as pq
    files, numbers = [tmp_path / f"{k}.parquet" for k in range(3)], []
    for k, file in enumerate(files):
        part = list(range(k * 5, k * 5 + 5))
        pq.write_table(pa.table(dict(number=part, text=[str(i) for i in part])), file, row_group_size=groups)
        numbers += part
    for first in range(17):
        assert [r["number"] for r in parquet_rows(files, "x").start(first)] == numbers[first:]


def test_pictures_can_be_left_out_and_classes_have_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Image, List, Value
    kinds = ClassLabel(names=["invoice", "letter"])
    columns = Features(image=Image(), pages=List(Image()), kind=kinds, n=Value("int8"))
    made = dict(image=row(1, "")["image"], pages=[row(2, "")["image"]], kind=1, n=7)
    data = Dataset.from_list([made], features=columns)
    data.to_parquet(tmp_path / "x.parquet")
    data.save_to_disk(tmp_path / "disk")
    for place in ("x.parquet", "disk"):
        rows = saved_rows(tmp_path / place)["train"]
        assert list(rows) == [made | dict(kind="letter")] and rows.count == 1
        assert list(rows.start(0, images=False)) == [dict(kind="letter", n=7)]


def test_a_stream_that_is_not_read_to_its_end_lets_python_end(cord):
    "The streams of `datasets` itself abort here: 'terminate called without an active exception'"
    done = python(f"from vlm_tutor.tables import saved_rows\n"
                  f"rows = saved_rows({str(cord)!r})['train'].start()\nnext(rows)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_shard_is_named(cord, tmp_path):
    names = [FILES["train"].format(k, 4) for k in (0, 1, 3)]
    with pytest.raises(VlmError, match="'train-00002-of-00004…' is missing, 3 of 4"): check_shards(names)
    broken = make_cord(tmp_path / "cord")
    (broken / "data" / FILES["train"].format(1, 2)).unlink()
    with pytest.raises(VlmError, match="'train-00001-of-00002…' is missing"): saved_rows(broken)
    (broken / "data" / FILES["train"].format(1, 2)).write_bytes(b"PAR1 half of it")
    with pytest.raises(VlmError, match="cannot read .*cord"): list(saved_rows(broken)["train"])


# --- the hub ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hub(cord):
    "The address of a hub that has CORD"
    with subprocess.Popen([sys.executable, ROOT / "tests/hub.py", cord], stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.terminate()


READ = """from vlm_tutor.tables import hub_rows
import json
parts = hub_rows("naver-clova-ix/cord-v2{}")
told = {{split: [[row["image"]["path"], row["ground_truth"]] for row in rows.start({})]
        for split, rows in parts.items()}}
print(json.dumps(told), *(rows.key for rows in parts.values()), sep="\\n")"""


@pytest.mark.parametrize("version, first", [("", 0), ("@main", 3)])
def test_the_hub_gives_the_rows_of_its_files(cord, hub, tmp_path, version, first):
    done = python(READ.format(version, first), HF_ENDPOINT=hub, HF_HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    told, *keys = done.stdout.splitlines()
    here = {split: [[r["image"]["path"], r["ground_truth"]] for r in rows.start(first)]
            for split, rows in saved_rows(cord).items()}
    assert json.loads(told) == here and done.stderr == ""
    assert keys == [f"naver-clova-ix/cord-v2@7f0115a4b758a71d6473b8d085751692da2fef98 {split}" for split in here]


def said(code, **environment):
    "The text of the `VlmError` that a call ends with"
    done = python(f"from vlm_tutor.core import VlmError\nfrom vlm_tutor.tables import hub_rows\n"
                  f"try: {code}\nexcept VlmError as error: print(error)", **environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_what_the_hub_does_not_have_is_named(hub, tmp_path):
    place = dict(HF_ENDPOINT=hub, HF_HOME=tmp_path)
    assert "the hub shows no data set 'naver-clova-ix/cord-v9'" in said("hub_rows('naver-clova-ix/cord-v9')", **place)
    assert "'a/b/c' cannot be a data set on the hub" in said("hub_rows('a/b/c')", **place)


def test_an_unreachable_hub_says_at_once_which_local_forms_do(tmp_path):
    for place in (dict(HF_ENDPOINT="http://127.0.0.1:9"), dict(HF_HUB_OFFLINE="1")):
        told = said("hub_rows('naver-clova-ix/cord-v2')", HF_HOME=tmp_path, **place)
        assert "the hub is out of reach" in told
        assert "Accepted instead: a folder with its parquet files; a .parquet file; a folder from save_to_disk." in told
        assert "hf download naver-clova-ix/cord-v2 --repo-type dataset --local-dir FOLDER" in told


def test_a_copy_in_the_hubs_cache_does_without_a_connection(cord, hub, tmp_path):
    fetch = ("from huggingface_hub import snapshot_download\n"
             "snapshot_download('naver-clova-ix/cord-v2', repo_type='dataset')")
    fetched = python(fetch, HF_ENDPOINT=hub, HF_HOME=tmp_path)
    assert fetched.returncode == 0, fetched.stderr
    done = python(READ.format("", 0), HF_HUB_OFFLINE=1, HF_HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in [*tmp_path.rglob("train-00001*"), *tmp_path.rglob("trees/*")]: file.unlink()
    told = said("hub_rows('naver-clova-ix/cord-v2')", HF_HUB_OFFLINE=1, HF_HOME=tmp_path)
    assert "out of reach" in told and "is not whole: file 'train-00001-of-00002…' is missing" in told
    assert {split: len(rows) for split, rows in json.loads(done.stdout.splitlines()[0]).items()} == \
        dict(train=5, validation=2, test=2)
