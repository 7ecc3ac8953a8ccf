"""Chapters 05c and 06: one document in every form, image folders as `datasets` reads them, schemas that fit nothing."""
import base64, json, shutil

import pytest
from cord import make_cord, page, truth
from PIL import Image

from vlm_tutor.cli import main
from vlm_tutor.core import Example, VlmError, write_jsonl
from vlm_tutor.examples import SROIE_SCHEMA, find_schema, plain_row, sharegpt_row
from vlm_tutor.receipts import CORD_SCHEMA
from vlm_tutor.schema import schema_text
from vlm_tutor.sources import load_examples, load_splits, open_source, show, stream_splits

ANSWER = {"shop": "Luna", "total": {"price": "4.50"}}
TEXT = '{"shop":"Luna","total":{"price":"4.50"}}'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The working directory, with one picture"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.png").write_bytes(page(1))
    return tmp_path


def parquet(path, rows, **columns):
    "Write rows with `datasets`"
    from datasets import Dataset, Features, disable_progress_bars
    disable_progress_bars()
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
    return path


def facts(example): return example.prompt, example.target, example.system, [p.read_bytes() for p in example.images]


# --- one document, every form -----------------------------------------------------------------------------------------
FORMS = {
    "docs/r.csv": "image,shop,total.price\na.png,Luna,4.50\n",
    "docs/r.tsv": "file_name\tshop\ttotal.price\na.png\tLuna\t4.50\n",
    "docs/target.csv": 'image;target;note\na.png;"' + TEXT.replace('"', '""') + '";x\n',
    "docs/r.json": [dict(image="a.png", target=ANSWER)],
    "docs/r.jsonl": dict(images=["a.png"], target=TEXT),
    "docs/donut.jsonl": dict(file_name="a.png", ground_truth=json.dumps(dict(gt_parse=ANSWER, meta={}))),
    "docs/nested.jsonl": dict(file_name="a.png", ground_truth=dict(gt_parses=[ANSWER])),
    "docs/entities.jsonl": dict(image="a.png", entities=ANSWER),
    "docs/boxes.jsonl": dict(image="a.png", objects=dict(entities=ANSWER, bbox=[[1, 2, 3, 4]])),
    "docs/metadata.jsonl": dict(file_name="a.png", shop="Luna", total=dict(price="4.50")),
    "docs/metadata.csv": "file_name,shop,total.price\na.png,Luna,4.50\n",
    "docs/a.json": ANSWER,
}


@pytest.mark.parametrize("path, content", FORMS.items(), ids=FORMS)
def test_every_form_gives_the_same_example(folder, path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / path).write_text(text)
    source = "docs" if path.partition("/")[2] in ("a.json", "metadata.jsonl", "metadata.csv") else path
    example, = load_examples(source, prompt="Read.")
    assert facts(example) == ("Read.", TEXT, "", [page(1)]) and example.id == "a"


ASKED = [dict(role="system", content="Be exact."), dict(role="user", content="<image>Read."),
         dict(role="assistant", content=TEXT)]
PARTS = [dict(type="image"), dict(type="text", text="Read.")]
DATA = "data:image/png;base64," + base64.b64encode(page(1)).decode()
TALKS = {
    "roles": dict(messages=ASKED, images=["docs/a.png"]),
    "column": dict(messages=ASKED[1:], images=["docs/a.png"], system="Be exact."),
    "llava": dict(id="7", image="docs/a.png", conversations=[
        {"from": who, "value": turn["content"]} for who, turn in zip(("system", "human", "gpt"), ASKED)]),
    "trl": dict(images=["docs/a.png"], messages=[ASKED[0], dict(role="user", content=PARTS),
                                                 dict(role="assistant", content=[dict(type="text", text=TEXT)])]),
    "openai": dict(messages=[ASKED[0], dict(role="user", content=[
        dict(type="image_url", image_url=dict(url=DATA)), PARTS[1]]), ASKED[2]]),
    "path": dict(messages=[ASKED[0], dict(role="user", content=[dict(type="image", image="docs/a.png"), PARTS[1]]),
                           ASKED[2]]),
}


@pytest.mark.parametrize("record", TALKS.values(), ids=TALKS)
def test_every_conversation_gives_the_same_example(folder, record):
    write_jsonl("talk.jsonl", [record])
    example, = load_examples("talk.jsonl")
    assert facts(example) == ("Read.", TEXT, "Be exact.", [page(1)])


def test_several_pictures_and_pdf_pages_keep_their_order(folder):
    for i in range(3): (folder / f"docs/{i}.png").write_bytes(page(i))
    sheets = [Image.new("RGB", (72, 72), colour) for colour in ("red", "blue")]
    sheets[0].save("docs/bill.pdf", save_all=True, append_images=sheets[1:])
    (folder / "docs/bill.json").write_text("{}")
    write_jsonl("r.jsonl", [dict(images=["docs/2.png", "docs/bill.pdf", "docs/0.png"], target="x"),
                            dict(image="docs/bill.pdf", target="y")])
    many, bill = load_examples("r.jsonl")
    pixels = [Image.open(path).convert("RGB").getpixel((20, 20)) for path in bill.images]
    assert bill.id == "bill" and [max("012", key=lambda k: pixel[int(k)]) for pixel in pixels] == ["0", "2"]
    assert [p.read_bytes() for p in many.images] == [page(2), *[p.read_bytes() for p in bill.images], page(0)]
    for i in "012a": (folder / f"docs/{i}.png").unlink()
    assert facts(load_examples("docs", prompt="")[0])[3] == [p.read_bytes() for p in bill.images]


# --- Hugging Face data sets -------------------------------------------------------------------------------------------
def test_cord_as_it_lies_on_the_hub(tmp_path):
    parts = load_splits(make_cord(tmp_path / "cord"), schema="cord")
    assert {split: len(rows) for split, rows in parts.items()} == dict(train=5, validation=2, test=2)
    rows = [row for rows in parts.values() for row in rows]
    assert [row.truth for row in rows] == [truth(i) for i in range(9)]
    assert [row.image.read_bytes() for row in rows] == [page(i) for i in range(9)]
    assert rows[0].id == "receipt_00000" and {row.prompt for row in rows} == {CORD_SCHEMA.prompt}
    assert rows[0].meta == {} and CORD_SCHEMA.check(rows[2].truth) == []


def test_sroie_in_both_layouts_that_are_on_the_hub(tmp_path):
    from datasets import Image as Picture, List, Value
    told = dict(company="LUNA SDN BHD", date="25/12/2018", address="NO.53, JALAN SAGU", total="9.00")
    short = {key: told[key] for key in ("company", "total")}
    kind, words = {key: Value("string") for key in told}, List(Value("string"))
    rows = [dict(image=dict(bytes=page(i, "JPEG"), path=f"X{i}.jpg"), key=f"X{i}", words=["LUNA"], entities=found)
            for i, found in enumerate((told, short))]
    one = parquet(tmp_path / "a/data/train-00000-of-00001.parquet", rows, image=Picture(), key=Value("string"),
                  words=words, entities=kind)
    two = parquet(tmp_path / "b/train.parquet", [dict(image=row["image"], objects=dict(
        bbox=["1"], entities=row["entities"], text=["LUNA"])) for row in rows], image=Picture(),
        objects=dict(bbox=words, entities=kind, text=words))
    for place in (one.parent.parent, two):
        found = load_examples(place, schema="sroie")
        assert [row.truth for row in found] == [told, short] and found[0].prompt == SROIE_SCHEMA.prompt
        assert [row.image.suffix for row in found] == [".jpg"] * 2 and [row.id for row in found] == ["X0", "X1"]
    assert [row.meta for row in load_examples(tmp_path / "a")] == [dict(key="X0"), dict(key="X1")]


def test_conversations_with_pictures_inside_a_parquet_file(tmp_path):
    from datasets import Image as Picture, List, Value
    turn = [dict(role=Value("string"), content=Value("string"))]
    made = dict(id="k", messages=ASKED, images=[dict(bytes=page(1), path=None)])
    parquet(tmp_path / "x.parquet", [made], id=Value("string"), messages=List(turn[0]), images=List(Picture()))
    example, = load_examples(tmp_path / "x.parquet")
    assert example.id == "k" and facts(example) == ("Read.", TEXT, "Be exact.", [page(1)])
    assert [row.images for row in open_source(tmp_path / "x.parquet")["train"].read(0, [])] == [[]]


@pytest.mark.parametrize("table", ["jsonl", "csv", "parquet"])
def test_an_image_folder_is_read_as_datasets_reads_it(tmp_path, table):
    from datasets import Value, load_dataset
    root, made = tmp_path / "x", []
    for k, split in enumerate(("train", "test")):
        made = [dict(file_name=f"scans/{i}.png", text=f"{split} {i}", page=i) for i in range(2)]
        for row in made:
            (root / split / "scans").mkdir(parents=True, exist_ok=True)
            (root / split / row["file_name"]).write_bytes(page(10 * k + row["page"]))
        place = root / split / f"metadata.{table}"
        if table == "jsonl": write_jsonl(place, made)
        if table == "csv": place.write_text("file_name,text,page\n" + "".join(f"{','.join(map(str, row.values()))}\n"
                                                                              for row in made))
        if table == "parquet": parquet(place, made, file_name=Value("string"), text=Value("string"), page=Value("int8"))
    for split, rows in load_splits(root).items():
        theirs = load_dataset("imagefolder", data_dir=str(root), split=split, streaming=True).decode(False)
        theirs = sorted((row["text"], str(row["page"]), row["image"]["path"].rpartition("/x/")[2]) for row in theirs)
        ours = [(row.truth["text"], str(row.truth["page"]), str(row.image).rpartition("/x/")[2]) for row in rows]
        assert ours == theirs


def test_a_folder_a_class_is_read_as_datasets_reads_it(tmp_path):
    from datasets import load_dataset
    for i, kind in enumerate(("invoice", "letter", "letter")):
        (tmp_path / "x/train" / kind).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"x/train/{kind}/{i}.png").write_bytes(page(i))
    theirs = load_dataset("imagefolder", data_dir=str(tmp_path / "x"), split="train", streaming=True)
    names = theirs.features["label"].names
    assert [row.truth["label"] for row in load_examples(tmp_path / "x")] == [names[r["label"]] for r in theirs]
    assert [row.id for row in load_examples(tmp_path / "x")] == ["invoice-0", "letter-1", "letter-2"]


def test_the_folder_of_an_image_is_its_split(folder):
    for split in ("train", "test"):
        (folder / "x" / split).mkdir(parents=True)
        shutil.copy("docs/a.png", folder / "x" / split)
    write_jsonl("x/metadata.jsonl", [dict(file_name=f"{split}/a.png", target=split) for split in ("test", "train")])
    assert {split: [row.target for row in rows] for split, rows in load_splits("x").items()} == \
        dict(train=["train"], test=["test"])


def test_splits_with_other_names(tmp_path):
    make_cord(tmp_path / "a", train=1, validation=1, shards=1)
    place, = (tmp_path / "a/data").glob("validation*")
    place.rename(place.with_name(place.name.replace("validation", "val")))
    assert list(load_splits(tmp_path / "a")) == ["train", "validation"]
    for split in ("dev", "train"):
        (tmp_path / "b" / split).mkdir(parents=True)
        (tmp_path / "b" / split / "a.png").write_bytes(page(1))
        (tmp_path / "b" / split / "a.json").write_text("{}")
    assert list(load_splits(tmp_path / "b")) == ["train", "validation"]


# --- schemas ----------------------------------------------------------------------------------------------------------
def test_a_schema_by_name_file_folder_value_or_inferred(folder):
    (folder / "docs/a.json").write_text(json.dumps(dict(total=dict(price="4.50"), shop="Luna")))
    rows, inferred = stream_splits("docs", schema="infer")
    (folder / "rules.json").write_text(schema_text(inferred))
    (folder / "data").mkdir()
    (folder / "data/schema.bills.json").write_text(schema_text(inferred))
    swapped = json.loads(schema_text(inferred))
    swapped["properties"] = dict(reversed(swapped["properties"].items()))
    for schema in ("rules.json", "data", inferred, inferred.rules, find_schema("data/schema.bills.json")):
        example, = load_examples("docs", schema=schema)
        assert (example.prompt, example.target) == ("Extract the document as JSON with total (price) and shop.",
                                                    '{"total":{"price":"4.50"},"shop":"Luna"}')
    assert load_examples("docs", schema=swapped)[0].target == TEXT, "keys come in the order of the schema"
    assert next(iter(rows["train"])).prompt == inferred.prompt
    with pytest.raises(VlmError, match="unknown schema 'nowhere'"): find_schema("nowhere")


def test_a_schema_that_no_row_fits_is_one_error_and_one_bad_row_another(folder):
    rows = [dict(id=f"r{i}", image="docs/a.png", target=dict(sum=str(i))) for i in range(5)]
    write_jsonl("r.jsonl", rows)
    with pytest.raises(VlmError) as error: load_examples("r.jsonl", schema="cord")
    assert str(error.value) == ("none of the first 5 rows of 'r.jsonl' fits schema 'cord': unknown field 'sum'. "
                                "Choose another schema, or let --schema infer make one.")
    rows[3]["target"] = dict(total=dict(total_price="1"))
    write_jsonl("r.jsonl", rows)
    with pytest.raises(VlmError, match="the answer of example 'r0' does not fit schema 'cord': unknown field 'sum'"):
        load_examples("r.jsonl", schema="cord")
    write_jsonl("r.jsonl", rows[3:])
    with pytest.raises(VlmError, match="the answer of example 'r4' does not"): load_examples("r.jsonl", schema="cord")
    write_jsonl("r.jsonl", [row | dict(target="prose") for row in rows])
    with pytest.raises(VlmError, match="none of the first 5 rows .* the answer is not JSON"):
        load_examples("r.jsonl", schema="cord")
    with pytest.raises(VlmError, match="not JSON"): load_examples("r.jsonl", schema="infer")


# --- streams ----------------------------------------------------------------------------------------------------------
def test_a_stream_starts_anywhere_and_names_stay_apart(tmp_path):
    make_cord(tmp_path / "cord", train=6)
    whole = load_examples(tmp_path / "cord")
    for n in (None, 4):
        rows = stream_splits(tmp_path / "cord", n=n)[0]["train"]
        for first in range(7):
            assert [e.id for e in rows.read(first)] == [e.id for e in whole[:n][first:]]
        assert rows.count == (n or 6)
    twins = [dict(image=f"{i}/a.png", target="x", split="test" if i % 3 else "train") for i in range(9)]
    for i in range(9):
        (tmp_path / str(i)).mkdir()
        (tmp_path / f"{i}/a.png").write_bytes(page(i))
    write_jsonl(tmp_path / "r.jsonl", twins)
    rows = stream_splits(tmp_path / "r.jsonl", "test")[0]["test"]
    assert [e.id for e in rows] == ["a", "a-2", "a-3", "a-4", "a-5", "a-6"] and rows.count == 6
    assert [e.id for e in rows.read(2, None, {"a", "a-2"})] == ["a-3", "a-4", "a-5", "a-6"]
    assert [e.image.parent.name for e in rows.read(2)] == ["4", "5", "7", "8"]


def test_keys_follow_files_and_wishes(folder):
    (folder / "docs/a.json").write_text("{}")
    key = lambda **wishes: stream_splits("docs", **wishes)[0]["train"].key
    first = key()
    assert first == key() and len({first, key(n=1), key(prompt="x"), key(system="x"), key(schema="cord")}) == 5
    (folder / "docs/a.json").write_text('{"a": 1}')
    assert key() != first


# --- bad input --------------------------------------------------------------------------------------------------------
BAD = {
    "address": (dict(image="https://x.org/a.png", target="x"), "has an address as image"),
    "several answers": (dict(image="a.png", ground_truth=dict(gt_parses=[{}, {}])), "several answers under gt_parses"),
    "part": (dict(images=["a"], messages=[dict(role="user", content=[dict(type="video")]), ASKED[2]]), "type 'video'"),
    "system twice": (dict(images=["a"], messages=[ASKED[0], *ASKED]), "a system prompt may come first"),
    "system as a number": (dict(image="docs/a.png", target="x", system=7), "a system that is not text: 7"),
}


@pytest.mark.parametrize("row, problem", BAD.values(), ids=BAD)
def test_a_bad_row_is_one_error_that_names_it(folder, row, problem):
    write_jsonl("r.jsonl", [row])
    with pytest.raises(VlmError, match="row 1 of 'r.jsonl'") as error: load_examples("r.jsonl")
    assert problem in str(error.value)


def test_a_placeholder_in_a_system_prompt_is_refused(folder):
    write_jsonl("r.jsonl", [dict(id="k", image="docs/a.png", target="x", system="See <image>")])
    with pytest.raises(VlmError, match="the system prompt of example 'k' holds a literal '<image>'"):
        load_examples("r.jsonl")


def test_columns_that_contradict_each_other(folder):
    for table in ("image,a,a.b\nx,1,2\n", "image,a.b,a\nx,1,2\n"):
        (folder / "r.csv").write_text(table)
        with pytest.raises(VlmError, match="row 1 of 'r.csv' has a column '.*' inside another"): load_examples("r.csv")


def test_the_row_at_the_end_of_a_long_file_is_found_before_any_picture(folder):
    write_jsonl("r.jsonl", [*[dict(image="gone.png", target="x")] * 50, dict(image="gone.png")])
    with pytest.raises(VlmError, match="row 51 of 'r.jsonl' has no answer"): stream_splits("r.jsonl")


@pytest.mark.parametrize("words", [["show", "hub:cord"],
                                   ["save-cord-dataset-in-sharegpt-format", "out", "--source", "hub"],
                                   ["save-dataset-in-sharegpt-format", "out", "--source", "hub:sroie"]])
def test_an_unreachable_hub_is_one_line_and_code_2(folder, capsys, monkeypatch, words):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    code, (out, err) = main(words), capsys.readouterr()
    assert (code, out) == (2, "") and err.count("\n") == 1 and not (folder / "out").exists()
    assert "the hub is out of reach" in err and "Accepted instead: a folder with its parquet files" in err


def test_show_counts_without_reading_and_tells_the_next_step(tmp_path, capsys):
    make_cord(tmp_path / "cord")
    told = show(str(tmp_path / "cord"), n=1)
    assert told["splits"] == dict(train=5, validation=2, test=2) and len(told["rows"]) == 1
    assert str(told).splitlines()[0].endswith("5 train · 2 validation · 2 test")
    assert "next  vlm save-dataset-in-sharegpt-format data/cord --source" in str(told)


def test_rows_can_be_read_by_hand():
    picture = dict(bytes=page(1), path="x/y.jpg")
    split, example = plain_row(dict(image=picture, target="4", split="test", shop="n"), "row 1", ["."])
    assert (split, example.id, example.meta, example.image.suffix) == ("test", "y", dict(shop="n"), ".png")
    made = Example("k", [], "Read.", "4", {"a": 1}, "Be exact.")
    note = dict(id="k", split="test", image="a.png", data_set="d", a=1)
    record = dict(messages=[dict(role="system", content="Be exact."), dict(role="user", content="<image>Read."),
                            dict(role="assistant", content="4")], images=["a.png"])
    assert sharegpt_row(record, "row 1", ["."], note=note, places=[]) == ("test", made)


def test_rows_as_a_list_keep_the_order_of_the_file(folder):
    from vlm_tutor.sources import read_rows
    splits = ["test", "train", "test", "validation"]
    write_jsonl("r.jsonl", [dict(image="docs/a.png", target=str(i), split=split) for i, split in enumerate(splits)])
    assert [(split, e.target) for split, e in read_rows("r.jsonl")] == [(s, str(i)) for i, s in enumerate(splits)]
