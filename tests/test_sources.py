"""Chapter 06 where a notebook cannot go: damaged pictures of each kind, odd rows, the command's one-line errors."""
import json, shutil, subprocess, sys

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from vlm_tutor.cli import main
from vlm_tutor.core import VlmError, load_image, write_jsonl
from vlm_tutor.receipts import CORD_PROMPT, CORD_SCHEMA
from vlm_tutor.sources import (DEFAULT_PROMPT, check_image, compact_json, data_sets, field_names, load_examples,
                               load_splits, show)

ANSWER = {"total": {"total_price": "4.50"}}
KINDS = ["png", "jpg", "webp", "bmp", "tif"]


def picture(path, size=(60, 40), **options):
    "A picture with enough in it that cutting it matters"
    image = Image.effect_noise(size, 90).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def vlm(*words, cwd=None):
    command = [sys.executable, "-m", "vlm_tutor.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def talk(question="<image>Read.", answer="4.50", images=("a.png",)):
    "A ShareGPT record"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": list(images)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The working directory, with one picture and its answer"
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "docs/a.png")
    (tmp_path / "docs/a.json").write_text(json.dumps(ANSWER))
    return tmp_path


# --- pictures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_picture_passes_and_a_cut_one_is_named(tmp_path, kind):
    path = picture(tmp_path / f"whole.{kind}")
    assert check_image(path) == (60, 40)
    data = path.read_bytes()
    for share in (0, 0.1, 0.5, 0.9):
        cut = tmp_path / f"cut.{kind}"
        cut.write_bytes(data[:int(len(data) * share)])
        with pytest.raises(VlmError, match=f"cut.{kind}"): check_image(cut)


def test_a_changed_byte_in_a_png_is_found(tmp_path):
    data = bytearray(picture(tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(VlmError, match="a.png"): check_image(tmp_path / "a.png")


def test_what_a_camera_leaves_after_a_jpeg_is_no_damage(tmp_path):
    path = picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes() + b"camera note" * 50)
    assert check_image(path) == (60, 40)


@pytest.mark.parametrize("kind", ["png", "jpg"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(tmp_path, kind, turn):
    note = Image.Exif()
    note[0x0112] = turn
    path = picture(tmp_path / f"a.{kind}", exif=note)
    assert check_image(path) == load_image(path).size == ((40, 60) if turn >= 5 else (60, 40))


def test_a_folder_or_a_text_is_no_picture(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.png").write_text("hello")
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(VlmError, match=name): check_image(tmp_path / name)


# --- answers ----------------------------------------------------------------------------------------------------------
json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@given(value=json_values, indent=st.sampled_from([None, 0, 2, "\t"]), ascii_only=st.booleans())
def test_compact_json_is_what_json_writes_without_blanks(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert compact_json(text) == json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_numbers_keep_their_digits(folder):
    (folder / "docs/a.json").write_text('{"price": 1.10, "big": 12345678901234567890.50, "e": 1E5}')
    assert load_examples("docs")[0].target == '{"price":1.10,"big":12345678901234567890.50,"e":1E5}'


@given(value=json_values)
def test_field_names_hold_no_list_position_and_no_repeats(value):
    names = field_names(value)
    assert len(names) == len(set(names)) and field_names([value, value]) == names


# --- one document, every form -----------------------------------------------------------------------------------------
def test_all_forms_give_the_same_example(folder):
    answer = json.dumps(ANSWER, separators=(",", ":"))
    write_jsonl("docs/text.jsonl", [dict(image="a.png", target=answer, prompt=DEFAULT_PROMPT)])
    write_jsonl("docs/value.jsonl", [dict(images=["a.png"], target=ANSWER)])
    record = talk("<image>" + DEFAULT_PROMPT, answer)
    (folder / "docs/messages.json").write_text(json.dumps([record]))
    turns = [{"from": who, "value": turn["content"]} for who, turn in zip(("human", "gpt"), record["messages"])]
    (folder / "docs/conversations.json").write_text(json.dumps([{"conversations": turns, "images": ["a.png"]}]))
    forms = ["text.jsonl", "value.jsonl", "messages.json", "conversations.json"]
    found = [load_examples(f"docs/{form}") for form in forms]
    for form in forms: (folder / "docs" / form).unlink()
    found.append(load_examples("docs"))
    seen = {(e.id, e.images[0].name, e.prompt, e.target, str(e.meta)) for rows in found for e in rows}
    assert seen == {("a", "a.png", DEFAULT_PROMPT, '{"total":{"total_price":"4.50"}}', "{}")}


def test_names_of_columns_and_roles_come_from_dataset_info(folder):
    row = {"talk": [{"who": "client", "says": "<image>Read."}, {"who": "bot", "says": "4.50"}], "pics": ["a.png"]}
    (folder / "docs/x.json").write_text(json.dumps([row]))
    entry = {"file_name": "x.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "pics"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "client", "assistant_tag": "bot"}}
    (folder / "docs/dataset_info.json").write_text(json.dumps({"x": entry, "online": {"hf_hub_url": "a/b"}}))
    example, = load_examples("docs", name="x")
    assert (example.prompt, example.target) == ("Read.", "4.50")
    with pytest.raises(VlmError, match="several data sets"): load_examples("docs")
    with pytest.raises(VlmError, match="entry 'online' of 'docs' is no local ShareGPT file"):
        load_examples("docs", name="online")


def test_splits_come_from_folders_rows_and_entries(folder):
    for split in ("train", "test"): shutil.copytree("docs", f"parts/{split}")
    assert {split: len(rows) for split, rows in load_splits("parts").items()} == {"train": 1, "test": 1}
    assert [e.id for e in load_examples("parts")] == ["a", "a-2"]
    write_jsonl("docs/r.jsonl", [dict(image="a.png", target="x", split=s) for s in ("test", "train", "test")])
    assert [e.id for e in load_examples("docs/r.jsonl", "test")] == ["a", "a-2"]
    assert len(load_examples("docs/r.jsonl", n=2)) == 2
    names = data_sets(["a_test", "b", "a", "b_validation", "my_set", "_test"])
    assert names == {"a": {"test": "a_test", "train": "a"}, "b": {"train": "b", "validation": "b_validation"},
                     "my_set": {"train": "my_set"}, "_test": {"train": "_test"}}


def test_only_the_asked_for_split_is_read(folder):
    (folder / "docs/x_test.json").write_text(json.dumps([talk()]))
    (folder / "docs/x.json").write_text("broken")
    entry = {"formatting": "sharegpt"}
    info = {"x": {**entry, "file_name": "x.json"}, "x_test": {**entry, "file_name": "x_test.json"}}
    (folder / "docs/dataset_info.json").write_text(json.dumps(info))
    assert [e.target for e in load_examples("docs", "test")] == ["4.50"]
    assert [e.target for e in load_examples("docs", name="x_test")] == ["4.50"]
    with pytest.raises(VlmError, match="x.json' is not JSON"): load_examples("docs")


def test_media_dir_comes_first_then_the_file_then_the_path_as_given(folder):
    picture(folder / "media/a.png", (32, 32))
    write_jsonl("docs/r.jsonl", [dict(image="a.png", target="x"), dict(image="docs/a.png", target="y")])
    one, two = load_examples("docs/r.jsonl", media_dir="media")
    assert (check_image(one.image), check_image(two.image)) == ((32, 32), (60, 40))


def test_prompts_are_the_rows_own_then_the_schemas_and_an_asked_for_one_wins(folder):
    write_jsonl("docs/r.jsonl", [dict(image="a.png", target=ANSWER, prompt="Own."), dict(image="a.png", target=ANSWER)])
    assert [e.prompt for e in load_examples("docs/r.jsonl", schema="cord")] == ["Own.", CORD_PROMPT]
    assert [e.prompt for e in load_examples("docs/r.jsonl", prompt="Mine.")] == ["Mine."] * 2
    assert load_examples("docs/r.jsonl", schema=CORD_SCHEMA)[0].truth == ANSWER


def test_synthetic_receipts_are_the_same_each_time():
    one, two = load_examples("synthetic", "test", 2), load_examples("synthetic", "test", 2)
    assert one == two and CORD_SCHEMA.check(one[0].truth) == []
    assert len(load_examples("synthetic")) == 20


# --- bad input --------------------------------------------------------------------------------------------------------
BAD_ROWS = {
    "no image": (dict(target="x"), "row 1 of 'r.jsonl' has no image"),
    "empty list of images": (dict(images=[], target="x"), "row 1 of 'r.jsonl' has no image"),
    "no answer": (dict(image="docs/a.png"), "row 1 of 'r.jsonl' has no answer"),
    "blank answer": (dict(id="k", image="docs/a.png", target=" \n"), "example 'k' has no answer"),
    "missing file": (dict(id="k", image="gone.png", target="x"), "example 'k': no image 'gone.png'"),
    "image as a number": (dict(image=7, target="x"), "images that are not paths"),
    "prompt as a number": (dict(image="docs/a.png", target="x", prompt=7), "a prompt that is not text: 7"),
    "unknown split": (dict(image="docs/a.png", target="x", split="dev"), "unknown split in row 1 of 'r.jsonl' 'dev'"),
    "not an object": (["a.png", "x"], "row 1 of 'r.jsonl' is no object"),
    "placeholder in the prompt": (dict(id="k", image="docs/a.png", target="x", prompt="<image>Read."),
                                  "the prompt of example 'k' holds a literal '<image>'"),
    "placeholder in the answer": (dict(id="k", image="docs/a.png", target="x <image>"),
                                  "the answer of example 'k' holds a literal '<image>'"),
    "video in the answer": (dict(id="k", image="docs/a.png", target="<video>"), "holds a literal '<video>'"),
    "half a character": (dict(id="k", image="docs/a.png", target="\ud83d"), "half a character"),
    "no placeholder": (talk("Read.", images=["docs/a.png"]), "has 1 image(s) and 0 <image> placeholder(s)"),
    "two for one": (talk("<image><image>Read.", images=["docs/a.png"]), "has 1 image(s) and 2 <image> placeholder(s)"),
    "placeholder inside": (talk("See <image>", images=["docs/a.png"]), "has <image> inside its question"),
    "question only": (dict(messages=[dict(role="user", content="<image>")], images=["docs/a.png"]), "has no answer"),
    "answer first": (dict(messages=talk()["messages"][::-1], images=["docs/a.png"]), "messages of ['assistant',"),
    "longer talk": (dict(messages=talk()["messages"] * 2, images=["docs/a.png"]), "one question (user), then one"),
    "empty answer": (talk(answer="", images=["docs/a.png"]), "example 'a' has no answer"),
    "answer that is no text": (talk(answer={"a": 1}, images=["docs/a.png"]), "has a message that is not text"),
    "messages that are none": (dict(messages="hello", images=["docs/a.png"]), "has no list of messages"),
}


@pytest.mark.parametrize("row, problem", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_one_error_that_names_it(folder, row, problem):
    (folder / "r.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(VlmError) as error: load_examples("r.jsonl")
    assert problem in str(error.value)


def bad_source(folder, what):
    "Make one source that cannot be used; return the words of the command"
    docs = folder / "docs"
    if what == "empty": (folder / "empty").mkdir()
    if what == "info": (folder / "empty").mkdir(), (folder / "empty/dataset_info.json").write_text("{}")
    if what == "no rows": (folder / "r.json").write_text("[]")
    if what == "csv": (folder / "r.csv").write_text("a,b\n1,2\n")
    if what == "xlsx": (folder / "r.xlsx").write_text("a,b")
    if what == "text": (folder / "r.jsonl").write_text("image: a.png")
    if what == "broken": (docs / "a.png").write_bytes((docs / "a.png").read_bytes()[:300])
    if what == "no answer": (docs / "a.json").unlink()
    if what == "no image": shutil.copy(docs / "a.json", docs / "b.json")
    if what == "bad json": (docs / "a.json").write_text("{'total': 4}")
    if what == "prose": write_jsonl(folder / "r.jsonl", [dict(id="k", image="docs/a.png", target="Total: 4.50")])
    if what == "alien": (docs / "a.json").write_text('{"sum": "4.50"}')


SAVE = ["save-cord-dataset-in-sharegpt-format", "out", "--source"]
BAD_SOURCES = [
    ("", ["show", "dcos"], "no folder or file 'dcos'. Accepted: 'synthetic'; a data-set folder"),
    ("", ["show", "dcos"], "Did you mean 'docs'?"),
    ("", ["show", "docs", "--split", "tset"], "unknown split 'tset'. Allowed: train, validation, test. Did you"),
    ("", ["show", "docs", "--split", "test"], "'docs' has no split 'test'. Allowed: train."),
    ("", ["show", "docs", "--n", "0"], "n is 0. Allowed: a whole number from 1."),
    ("empty", ["show", "empty"], "'empty' is an empty data set"),
    ("info", ["show", "empty"], "'empty' is an empty data set"),
    ("no rows", ["show", "r.json"], "'r.json' is an empty data set"),
    ("xlsx", ["show", "r.xlsx"], "cannot read 'r.xlsx' as a data set. Accepted: 'synthetic'"),
    ("csv", ["show", "r.csv"], "row 1 of 'r.csv' has no image"),
    ("text", ["show", "r.jsonl"], "line 1 of 'r.jsonl' is not JSON"),
    ("broken", ["show", "docs"], "example 'a': cannot read image 'docs/a.png'"),
    ("no answer", ["show", "docs"], "image 'docs/a.png' has no answer"),
    ("no image", ["show", "docs"], "answer 'docs/b.json' has no image"),
    ("bad json", ["show", "docs"], "'docs/a.json' is not JSON"),
    ("prose", [*SAVE, "r.jsonl"], "the answer of example 'k' is not JSON: 'Total: 4.50'"),
    ("alien", [*SAVE, "docs"], "the answer of example 'a' does not fit schema 'cord': unknown field 'sum'"),
    ("", ["show", "hub"], "'hub' names no data set. Allowed: hub:cord, hub:sroie, hub:OWNER/NAME."),
]


@pytest.mark.parametrize("what, words, problem", BAD_SOURCES, ids=[f"{w}-{' '.join(c)}" for w, c, _ in BAD_SOURCES])
def test_the_command_ends_with_one_line_and_code_2(folder, capsys, what, words, problem):
    bad_source(folder, what)
    code, (out, err) = main(words), capsys.readouterr()
    assert (code, out) == (2, "")
    assert problem in err and err.startswith("vlm: ") and err.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_prose_answer_is_fine_without_a_schema(folder):
    bad_source(folder, "prose")
    assert load_examples("r.jsonl")[0].target == "Total: 4.50"
    assert "not JSON" in str(show("r.jsonl"))


# --- show -------------------------------------------------------------------------------------------------------------
def test_show_prints_a_table_or_one_json_object(folder):
    done = vlm("show", "docs", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[4:5]] == [["a", "60×40", "total(total_price)"]]
    assert "next  vlm save-dataset-in-sharegpt-format data/docs --source docs" in done.stdout
    found = json.loads(vlm("show", "docs", "--json", cwd=folder).stdout)
    assert found["splits"] == {"train": 1}
    assert found["rows"] == [dict(id="a", size="60×40", fields=["total.total_price"], prompt=DEFAULT_PROMPT,
                                  target='{"total":{"total_price":"4.50"}}')]
