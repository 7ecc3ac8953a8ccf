"""Chapter 07 where a notebook cannot go: odd texts, crashes, other people's files, other working directories."""
import hashlib, json, os, shutil, subprocess, sys, tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cord import make_cord, page, truth
from vlm_tutor.core import Example, VlmError, read_jsonl
from vlm_tutor.pages import place_image
from vlm_tutor.receipts import CORD_SCHEMA, make_examples
from vlm_tutor.sharegpt import (meta_row, register, save_cord_dataset_in_sharegpt_format,
                                save_dataset_in_sharegpt_format, set_config, set_entries, with_entry, with_settings,
                                write_split, write_splits)
from vlm_tutor.sources import Examples, load_examples, load_splits

# As llama-factory.md writes them down
ENTRY = {"file_name": "cord.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"},
         "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}}
CLOSED = "/sys/vlm_tutor"  # not even root can make a folder here


def tree(folder):
    "Every file below a folder with its bytes, inode and time: equal trees were not touched"
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_ino, p.stat().st_mtime_ns)
            for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def picture(path, grey=0):
    "A small picture; equal greys give equal bytes"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (32, 24), grey).save(path)
    return path


def rows(folder, n=3, grey=0):
    "Examples with a picture each"
    places = [picture(folder / f"{i}.png", grey + i) for i in range(n)]
    return [Example(f"doc-{i}", [place], "Read.", f'{{"n":{i}}}', {"i": i}) for i, place in enumerate(places)]


def stored(path):
    "The name of an image in a data set, as `sha256sum` would tell it"
    kind = {".jpeg": ".jpg"}.get(path.suffix.lower(), path.suffix.lower())
    return f"images/{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}{kind}"


def facts(examples):
    "All that must come back, images as bytes"
    return [(e.id, e.prompt, e.target, e.meta, [Path(p).read_bytes() for p in e.images]) for e in examples]


def vlm(*words, cwd):
    command = [sys.executable, "-m", "vlm_tutor.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def docs(tmp_path): return rows(tmp_path / "docs")


# --- what is written --------------------------------------------------------------------------------------------------
def test_files_are_exactly_what_llama_factory_reads(tmp_path):
    made = make_examples(1, folder=tmp_path)
    save_cord_dataset_in_sharegpt_format(tmp_path / "out", n=1)
    assert json.loads((tmp_path / "out/cord.json").read_text()) == [
        {"id": "train-00000", "messages": [{"role": "user", "content": "<image>" + made[0].prompt},
                                           {"role": "assistant", "content": made[0].target}],
         "images": [stored(made[0].image)]}]
    info = json.loads((tmp_path / "out/dataset_info.json").read_text())
    assert info == {k: {**ENTRY, "file_name": f"{k}.json"} for k in ("cord", "cord_validation", "cord_test")}
    assert list(info) == ["cord", "cord_validation", "cord_test"]
    assert sorted(os.listdir(tmp_path / "out")) == ["cord.json", "cord_test.json",
                                                    "cord_validation.json", "dataset_info.json", "images", "meta.jsonl",
                                                    "schema.cord.json"]
    meta = read_jsonl(tmp_path / "out/meta.jsonl")
    assert meta[0] == {"id": "train-00000", "data_set": "cord", "split": "train", "image": stored(made[0].image),
                       **made[0].meta}


def test_datasets_loads_the_file_as_llama_factory_does(tmp_path):
    from datasets import load_dataset
    odd = ["tab\there", 'quo"te \\ back', "line\nend\r\n", "日本 🧾 é", "\u2028 \u0085 \x00 \x7f", "<|im_end|>"]
    image = picture(tmp_path / "a.png")
    made = [Example(f"e{i}", [image], text, text + "!") for i, text in enumerate(odd)]
    write_split(tmp_path / "out", "odd", "train", made)
    file, cache = str(tmp_path / "out/odd.json"), str(tmp_path / "cache")
    table = load_dataset("json", data_files=file, split="train", cache_dir=cache)
    assert [[m["content"] for m in r["messages"]] for r in table] == [["<image>" + t, t + "!"] for t in odd]
    assert all(os.path.isfile(tmp_path / "out" / p) for r in table for p in r["images"])


# --- round trip -------------------------------------------------------------------------------------------------------
words = st.text(max_size=30).filter(lambda t: not any(m in t for m in ("<image>", "<video>", "<audio>")))
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(st.none() | st.booleans() | numbers | words, lambda inner: st.lists(inner, max_size=3) |
                      st.dictionaries(words, inner, max_size=3), max_leaves=5)
metas = st.dictionaries(words.filter(lambda t: t not in ("id", "split", "image")), values, max_size=3)
documents = st.tuples(words, st.lists(st.integers(0, 3), min_size=1, max_size=3), words,
                      words.filter(str.strip) | values.map(json.dumps), metas)


@pytest.fixture(scope="module")
def pictures():
    with tempfile.TemporaryDirectory() as folder: yield [picture(Path(folder) / f"{i}.png", i * 40) for i in range(4)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=st.dictionaries(st.sampled_from(["train", "validation", "test"]),
                            st.lists(documents, min_size=1, max_size=4, unique_by=lambda d: d[0]), min_size=1))
def test_what_was_written_comes_back(pictures, made):
    parts = {split: [Example(id, [pictures[i] for i in images], prompt, target, meta)
                     for id, images, prompt, target, meta in found] for split, found in made.items()}
    with tempfile.TemporaryDirectory() as out:
        for split, examples in parts.items(): assert write_split(out, "odd", split, examples) == "new"
        for split, examples in parts.items():
            assert write_split(out, "odd", split, iter(examples)) == "unchanged"
            assert facts(load_examples(out, split)) == facts(examples)
        again, found = Path(out) / "again", load_splits(out)
        for split, examples in found.items(): write_split(again, "odd", split, examples)
        assert [*map(facts, load_splits(again).values())] == [*map(facts, found.values())]


def test_the_folder_may_move(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert facts(load_examples(tmp_path / "moved")) == facts(docs)


def test_a_file_alone_is_a_source_with_the_same_examples(tmp_path, docs):
    write_split(tmp_path / "out", "d", "test", docs)
    assert facts(load_examples(tmp_path / "out/d_test.json", "test")) == facts(docs)


def test_meta_stays_with_its_record_when_others_are_deleted(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    records = json.loads((tmp_path / "out/d.json").read_text())
    (tmp_path / "out/d.json").write_text(json.dumps([records[2], records[0]]))
    assert facts(load_examples(tmp_path / "out")) == facts([docs[2], docs[0]])


def test_equal_ids_in_two_splits_keep_their_images_and_meta(tmp_path):
    one, two = rows(tmp_path / "a"), rows(tmp_path / "b", grey=100)
    for split, examples in (("train", one), ("test", two)): write_split(tmp_path / "out", "d", split, examples)
    assert facts(load_examples(tmp_path / "out", "train")) == facts(one)
    assert facts(load_examples(tmp_path / "out", "test")) == facts(two)
    for split, examples in (("train", one), ("test", two)):
        assert write_split(tmp_path / "out", "d", split, examples) == "unchanged"


@pytest.mark.parametrize("meta", [{"a": (1, 2)}, {"a": Path("x")}, {1: "a"}, {"a": float("nan")}, {"a": "\ud83d"},
                                  {"split": "x"}], ids=repr)
def test_meta_that_would_change_is_refused(meta):
    with pytest.raises(VlmError, match="the meta of example 'x'"):
        meta_row(Example("x", [], "", "", meta), "train", "x.png")


# --- images -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "JPEG"])
def test_images_are_linked_not_encoded(tmp_path, kind):
    image = picture(tmp_path / f"photo.{kind}")
    write_split(tmp_path / "out", "d", "train", [Example("x", [image], "Read.", "4")])
    assert os.path.samefile(tmp_path / "out" / stored(image), image)


def test_images_of_another_file_system_are_copied_byte_for_byte(tmp_path):
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no second file system here to copy from")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as far:
        image = picture(Path(far) / "a.png")
        place_image(image, tmp_path / "b.png")
        assert not os.path.samefile(image, tmp_path / "b.png")
        assert image.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_symlinked_image_outlives_its_symlink(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/link.png").symlink_to(picture(tmp_path / "real.png"))
    write_split(tmp_path / "out", "d", "train", [Example("x", [tmp_path / "docs/link.png"], "Read.", "4")])
    shutil.rmtree(tmp_path / "docs")
    image, = (tmp_path / "out/images").iterdir()
    assert not image.is_symlink() and load_examples(tmp_path / "out")[0].load_images()


def test_no_image_is_ever_overwritten(tmp_path, docs):
    theirs = tmp_path / "out" / stored(docs[0].image)
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"somebody has edited this one")
    with pytest.raises(VlmError, match="was changed after it was saved"):
        write_split(tmp_path / "out", "d", "train", docs)
    write_split(tmp_path / "out", "d", "train", rows(tmp_path / "other", grey=200))
    assert theirs.read_bytes() == b"somebody has edited this one"
    assert facts(load_examples(tmp_path / "out")) == facts(rows(tmp_path / "other", grey=200))
    assert (tmp_path / "docs/0.png").read_bytes() == picture(tmp_path / "same.png", 0).read_bytes()


def test_a_lost_image_comes_back(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    before = tree(tmp_path / "out")
    (tmp_path / "out" / stored(docs[1].image)).unlink()
    assert write_split(tmp_path / "out", "d", "train", docs) == "completed"
    assert tree(tmp_path / "out") == before


# --- again, others, half ----------------------------------------------------------------------------------------------
def test_the_same_again_touches_nothing_and_says_so(tmp_path):
    first = save_cord_dataset_in_sharegpt_format(tmp_path / "out", n=2)
    before = tree(tmp_path / "out")
    second = save_cord_dataset_in_sharegpt_format(tmp_path / "out", n=2)
    assert tree(tmp_path / "out") == before
    assert {r["state"] for r in first["splits"]} == {"new"} and {r["state"] for r in second["splits"]} == {"unchanged"}
    assert "nothing to do" in str(second) and "nothing to do" not in str(first)


def test_another_data_set_of_that_name_is_refused_and_stays(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    before, other = tree(tmp_path / "out"), rows(tmp_path / "other", grey=90)
    less_meta = [*docs[:2], Example("doc-2", docs[2].images, "Read.", docs[2].target)]
    for examples in (other, docs[:2], docs[::-1], less_meta):
        with pytest.raises(VlmError, match="holds another data set 'd'"):
            write_split(tmp_path / "out", "d", "train", examples)
        assert tree(tmp_path / "out") == before
    assert write_split(tmp_path / "out", "d", "train", other, force=True) == "replaced"
    assert facts(load_examples(tmp_path / "out")) == facts(other)
    assert [row["i"] for row in read_jsonl(tmp_path / "out/meta.jsonl")] == [0, 1, 2], "rows of the old one are gone"


def test_a_file_of_that_name_that_is_no_data_set_is_not_overwritten(tmp_path, docs):
    (tmp_path / "d.json").write_text('[{"mine": 1}]')
    with pytest.raises(VlmError, match="holds another data set 'd'"): write_split(tmp_path, "d", "train", docs)
    assert (tmp_path / "d.json").read_text() == '[{"mine": 1}]'


def test_the_training_split_comes_first_whenever_it_is_saved(tmp_path, docs):
    for split in ("test", "train", "validation"): write_split(tmp_path / "out", "d", split, docs)
    assert list(json.loads((tmp_path / "out/dataset_info.json").read_text())) == ["d", "d_validation", "d_test"]


def test_a_bad_row_late_in_the_list_leaves_nothing(tmp_path, docs):
    bad = Example("bad", docs[0].images, "Read.", "<image>")
    with pytest.raises(VlmError, match="'bad'"): write_split(tmp_path / "out", "d", "train", iter([*docs, bad]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(VlmError, match="no examples"): write_split(tmp_path / "out", "d", "train", [])


def test_a_bad_row_in_the_last_split_leaves_nothing(tmp_path):
    for split in ("train", "test"):
        picture(tmp_path / f"docs/{split}/a.png")
        (tmp_path / f"docs/{split}/a.json").write_text("{}")
    (tmp_path / "docs/test/a.json").write_text('{"a": "<image>"}')
    with pytest.raises(VlmError, match="<image>"): save_dataset_in_sharegpt_format(tmp_path / "out", tmp_path / "docs")
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle_the_old_data_set_is_whole_and_the_next_try_succeeds(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    before = tree(tmp_path / "out")
    code = f"""import os, signal
from pathlib import Path
from vlm_tutor.sources import load_examples
from vlm_tutor.sharegpt import write_split
def half():
    rows = load_examples({str(tmp_path / 'out')!r})
    for row in rows:
        row.prompt = 'Other.'
        yield row
    os.kill(os.getpid(), signal.SIGKILL)
write_split({str(tmp_path / 'out')!r}, 'd', 'train', half(), force=True)"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    now = tree(tmp_path / "out")
    assert {k: now[k] for k in before} == before and facts(load_examples(tmp_path / "out")) == facts(docs)
    assert write_split(tmp_path / "out", "d", "train", docs) == "unchanged" and tree(tmp_path / "out") == before


# --- any size ---------------------------------------------------------------------------------------------------------
SAVE = """import sys
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format as save
from vlm_tutor import sharegpt
{}
save(sys.argv[1], sys.argv[2])"""
# The process ends like one that the system kills: no cleaning up, buffers lost
KILL = """keep, count = sharegpt.place_pictures, [0]
def killed(*words):
    import os, signal
    count[0] += 1
    if count[0] > {}: os.kill(os.getpid(), signal.SIGKILL)
    return keep(*words)
sharegpt.place_pictures = killed"""


def save(out, source, extra=""):
    command = [sys.executable, "-c", SAVE.format(extra), str(out), str(source)]
    return subprocess.run(command, capture_output=True, text=True)


def content(folder): return {name: data for name, (data, *_) in tree(folder).items()}


def test_cord_from_parquet_is_what_it_was(tmp_path):
    save_cord_dataset_in_sharegpt_format(tmp_path / "out", make_cord(tmp_path / "cord"))
    rows = [row for rows in load_splits(tmp_path / "out").values() for row in rows]
    assert [row.truth for row in rows] == [truth(i) for i in range(9)]
    assert [row.image.read_bytes() for row in rows] == [page(i) for i in range(9)]
    assert facts(load_examples(tmp_path / "out")) == facts(load_examples(tmp_path / "cord", schema="cord"))
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("stop", [0, 7, 300])
def test_a_killed_save_goes_on_and_ends_as_if_nothing_had_been(tmp_path, stop):
    n = 10 if stop < 10 else stop + 40
    source = make_cord(tmp_path / "cord", train=n, validation=2)
    assert save(tmp_path / "out", source, KILL.format(stop)).returncode == -9
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".cord.saving"]
    rows = tmp_path / "out/.cord.saving/rows"
    with open(rows, "ab") as file: file.write(b'{"id": "half a ro')
    kept = rows.read_bytes().count(b"\n")
    assert kept <= stop and (kept > 0 or stop < 10)
    assert save(tmp_path / "out", source).returncode == 0
    assert save(tmp_path / "whole", source).returncode == 0
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert save(tmp_path / "out", source).returncode == 0 and content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_changed_source_starts_over(tmp_path):
    source = make_cord(tmp_path / "cord", train=10, shards=1)
    save(tmp_path / "out", source, KILL.format(7))
    shutil.rmtree(source)
    make_cord(source, train=6, shards=1)
    assert save(tmp_path / "out", source).returncode == 0
    assert [e.truth for e in load_examples(tmp_path / "out")] == [truth(i) for i in range(6)]


def test_rows_that_are_done_are_not_read_again(tmp_path):
    seen, made = [], rows(tmp_path / "docs", 4)
    def read(first, places, taken=None):
        seen.append((first, sorted(taken)))
        yield from made[first:3]
        if not first: raise KeyboardInterrupt
    stream = Examples("x", read, 4, "key")
    with pytest.raises(KeyboardInterrupt): write_splits(tmp_path / "out", "d", {"train": stream})
    assert write_splits(tmp_path / "out", "d", {"train": stream}) == {"train": ("new", 3)}
    assert seen == [(0, []), (3, ["doc-0", "doc-1", "doc-2"])]
    with pytest.raises(KeyboardInterrupt): write_splits(tmp_path / "b", "d", {"train": Examples("x", read, 4)})
    assert not (tmp_path / "b").exists(), "without a key nothing is left behind"


def test_all_splits_or_none(tmp_path, docs):
    write_split(tmp_path / "out", "d", "test", docs)
    before = tree(tmp_path / "out")
    with pytest.raises(VlmError, match="holds another data set 'd_test'"):
        write_splits(tmp_path / "out", "d", {"train": docs, "test": docs[:2]})
    bad = Example("bad", docs[0].images, "Read.", "<image>")
    with pytest.raises(VlmError, match="'bad'"):
        write_splits(tmp_path / "out", "d", {"train": docs, "test": [bad]}, force=True)
    assert tree(tmp_path / "out") == before


def test_another_data_set_is_refused_at_its_first_row(tmp_path, docs):
    write_split(tmp_path / "out", "d", "train", docs)
    asked = []
    with pytest.raises(VlmError, match="holds another data set 'd'"):
        write_split(tmp_path / "out", "d", "train", (asked.append(e) or e for e in docs[::-1]))
    assert len(asked) == 1


PEAK = """import resource, sys
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format as save
save(sys.argv[1], sys.argv[2], n=int(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""


def peak(out, source, n):
    "Peak memory of a save, in MiB"
    command = [sys.executable, "-c", PEAK, str(out), str(source), str(n)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    source = make_cord(tmp_path / "cord", shards=1, train=12_000)
    few, many = peak(tmp_path / "few", source, 1_000), peak(tmp_path / "many", source, 12_000)
    assert many - few < 12, f"{few:.0f} MiB for 1,000 rows, {many:.0f} for 12,000"
    again = peak(tmp_path / "again", tmp_path / "many", 12_000)
    assert again < few + 12 and content(tmp_path / "again") == content(tmp_path / "many"), "a data set as the source"


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path):
    source = make_cord(tmp_path / "cord", shards=4, train=100_000)
    few, many = peak(tmp_path / "few", source, 1_000), peak(tmp_path / "many", source, 100_000)
    assert many - few < 40, "ids so that names stay apart, nothing else"
    ids = {record["id"] for record in json.loads((tmp_path / "many/cord.json").read_text())}
    assert len(ids) == len(read_jsonl(tmp_path / "many/meta.jsonl")) == 100_000


# --- what a record can hold -------------------------------------------------------------------------------------------
def test_examples_that_share_an_image_keep_their_own_meta(tmp_path):
    place = picture(tmp_path / "a.png")
    made = [Example(f"e{i}", [place], f"Question {i % 2}?", "4", {"i": i}) for i in range(4)]
    for split, part in (("train", made[:3]), ("test", made[3:])): write_split(tmp_path / "out", "d", split, part)
    assert len(list((tmp_path / "out/images").iterdir())) == 1
    assert facts(load_examples(tmp_path / "out", "train")) == facts(made[:3])
    records = json.loads((tmp_path / "out/d.json").read_text())
    (tmp_path / "out/d.json").write_text(json.dumps([records[2], records[0]]))
    assert facts(load_examples(tmp_path / "out", "train")) == facts([made[2], made[0]])
    assert facts(load_examples(tmp_path / "out", "test")) == facts(made[3:])


def test_two_data_sets_in_one_folder_keep_their_meta_apart(tmp_path, docs):
    other = [Example(e.id, e.images, "Other?", e.target, {"other": True}) for e in docs]
    write_split(tmp_path, "one", "train", docs)
    write_split(tmp_path, "two", "train", other)
    assert facts(load_examples(tmp_path, name="one")) == facts(docs)
    assert facts(load_examples(tmp_path, name="two")) == facts(other)
    assert write_split(tmp_path, "one", "train", docs) == "unchanged"


def test_meta_of_the_first_version_is_still_found(tmp_path, docs):
    "Records without ids, and notes that only name the image"
    write_split(tmp_path, "d", "train", docs)
    records, notes = json.loads((tmp_path / "d.json").read_text()), read_jsonl(tmp_path / "meta.jsonl")
    for row in [*records, *notes]: row.pop("data_set", None)
    (tmp_path / "d.json").write_text(json.dumps([{k: v for k, v in r.items() if k != "id"} for r in records[::-1]]))
    (tmp_path / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in notes))
    assert facts(load_examples(tmp_path)) == facts(docs[::-1])


def test_system_prompts_come_back_and_llama_factory_is_told(tmp_path, docs):
    made = [Example("s", docs[0].images * 2, "Read.", "4", {}, "Be exact."), docs[1]]
    write_split(tmp_path / "out", "d", "train", made)
    write_split(tmp_path / "out", "d", "test", docs[1:])
    info = json.loads((tmp_path / "out/dataset_info.json").read_text())
    assert info["d"] == {**ENTRY, "file_name": "d.json", "tags": {**ENTRY["tags"], "system_tag": "system"}}
    assert info["d_test"] == {**ENTRY, "file_name": "d_test.json"}
    assert json.loads((tmp_path / "out/d.json").read_text())[0]["messages"][:2] == [
        {"role": "system", "content": "Be exact."}, {"role": "user", "content": "<image><image>Read."}]
    back = load_examples(tmp_path / "out", "train")
    assert facts(back) == facts(made) and [e.system for e in back] == ["Be exact.", ""]
    assert write_split(tmp_path / "out", "d", "train", made) == "unchanged"
    one = [Example("q", docs[0].images, 'Say "messages": [{"role": "system"', "4")]
    write_split(tmp_path / "out", "odd", "train", one)
    assert "system_tag" not in json.loads((tmp_path / "out/dataset_info.json").read_text())["odd"]["tags"]


READ_BY_FACTORY = """import json, sys
from llamafactory.data.loader import _load_single_dataset
from llamafactory.data.parser import get_dataset_list
from llamafactory.hparams import DataArguments, ModelArguments
from transformers import Seq2SeqTrainingArguments
data = DataArguments(dataset="sys", dataset_dir=sys.argv[1], media_dir=sys.argv[1], overwrite_cache=True)
words = ModelArguments(model_name_or_path="x"), data, Seq2SeqTrainingArguments(output_dir=sys.argv[2], use_cpu=True)
entries = get_dataset_list(sys.argv[3:], sys.argv[1])
told = {entry.dataset_name: list(_load_single_dataset(entry, *words)) for entry in entries}
print(json.dumps(told))"""


@pytest.mark.slow
def test_llama_factory_itself_reads_the_same(factory, tmp_path, docs):
    out = tmp_path / "out"
    save_cord_dataset_in_sharegpt_format(out, make_cord(tmp_path / "cord"))
    write_split(out, "sys", "train", [Example("s", docs[0].images * 2, "Read.", "4", {"a": 1}, "Be exact."), docs[1]])
    python = str(Path(factory["command"]).parent / "python")
    words = [python, "-c", READ_BY_FACTORY, str(out), str(tmp_path / "run"), "sys", "cord"]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(HF_HUB_OFFLINE="1")
    done = subprocess.run(words, capture_output=True, text=True, env=clean | dict(HF_HOME=str(tmp_path / "home")))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    for name, rows in told.items():
        mine = load_examples(out, "train", name=name.removesuffix(".json"))
        assert [(r["_system"], r["_prompt"][0]["content"], r["_response"][0]["content"], r["_images"])
                for r in rows] == [(e.system, "<image>" * len(e.images) + e.prompt, e.target,
                                    list(map(str, e.images))) for e in mine]


def test_images_are_shrunk_only_when_asked_and_only_when_too_large(tmp_path):
    source = make_cord(tmp_path / "cord", train=3, shards=1)
    large = tmp_path / "docs/large.jpg"
    large.parent.mkdir()
    Image.effect_noise((400, 300), 50).save(large)
    large.with_suffix(".json").write_text("{}")
    done = save_dataset_in_sharegpt_format(tmp_path / "a", large.parent, max_pixels=12_000)
    image, = (tmp_path / "a/images").iterdir()
    assert done["splits"][0]["state"] == "new" and Image.open(image).size == (126, 94)
    assert save_dataset_in_sharegpt_format(tmp_path / "a", large.parent, max_pixels=12_000)["splits"][0]["state"] == \
        "unchanged"
    save_dataset_in_sharegpt_format(tmp_path / "b", source, max_pixels=48 * 36)
    assert [e.image.read_bytes() for e in load_examples(tmp_path / "b")] == [page(i) for i in range(3)]
    save_dataset_in_sharegpt_format(tmp_path / "c", source, max_pixels=48 * 36 - 1)
    assert len(list((tmp_path / "c/images").iterdir())) == 3, "the large ones are not kept"
    with pytest.raises(VlmError, match="max_pixels is 0"): save_dataset_in_sharegpt_format("x", source, max_pixels=0)


def test_one_image_may_stand_in_two_splits(tmp_path, docs):
    write_splits(tmp_path, "d", dict(train=docs, test=docs[:1]))
    assert len(list((tmp_path / "images").iterdir())) == len({e.image.read_bytes() for e in docs})
    assert facts(load_examples(tmp_path, "test")) == facts(docs[:1])


def test_the_schema_lies_beside_the_data(tmp_path):
    from vlm_tutor.sources import find_schema
    source = make_cord(tmp_path / "cord")
    save_dataset_in_sharegpt_format(tmp_path / "a", source, schema="infer")
    found = find_schema(tmp_path / "a")
    assert found.name == "cord" and found.prompt == load_examples(tmp_path / "a")[0].prompt
    assert found.fields == ("menu.nm", "menu.cnt", "menu.price", "menu.sub.nm", "sub_total.subtotal_price",
                            "total.total_price")
    assert all(found.check(e.truth) == [] for e in load_examples(tmp_path / "a"))
    save_cord_dataset_in_sharegpt_format(tmp_path / "b", source)
    assert find_schema(tmp_path / "b") == CORD_SCHEMA


# --- arguments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call, problem", [
    (dict(source=None), "no source given. Accepted: 'synthetic'"),
    (dict(source="synthetic", split="dev"), "unknown split 'dev'. Allowed: all, train, validation, test"),
    (dict(source="synthetic", n=0), "n is 0"),
    (dict(source="synthetic", name="my set"), "'my set' cannot name a data set"),
    (dict(source="synthetic", name="cord_test"), "'cord_test' cannot name a data set"),
    (dict(source="synthetic", level=9), "level 9"),
    (dict(source="synthetic", schema="crod"), "unknown schema 'crod'. Allowed: cord, sroie, a JSON"),
    (dict(source="nowhere"), "no folder or file 'nowhere'")])
def test_a_wrong_argument_is_refused_before_anything_is_written(tmp_path, call, problem):
    with pytest.raises(VlmError) as error: save_dataset_in_sharegpt_format(str(tmp_path / "out"), **call)
    assert problem in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.isdir("/sys"), reason="there is no /sys here")
def test_a_folder_nobody_may_write_to_is_named(tmp_path, docs):
    with pytest.raises(VlmError, match=f"cannot write '{CLOSED}'"): save_cord_dataset_in_sharegpt_format(CLOSED, n=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(VlmError, match="cannot write"): write_split(tmp_path / "file", "d", "train", docs)


def test_the_name_is_the_folders_and_the_prompt_can_be_given(tmp_path):
    done = save_dataset_in_sharegpt_format(str(tmp_path / "my docs"), "synthetic", "train", 1, prompt="Mine.")
    assert done["name"] == "my_docs" and load_examples(tmp_path / "my docs")[0].prompt == "Mine."


# --- dataset_info.json ------------------------------------------------------------------------------------------------
LAYOUTS = {"two": '{\n  "a": {\n    "file_name": "a.json"\n  },\n  "é": {"x": "}"}\n}\n', "none": "{}\n",
           "tab": '{\n\t"a": {},\n\t"b": {}\n}', "line": '{"a": {}, "b": [1, 2]}', "odd": ' { "a" :1\n,"b": 2 }',
           "crlf": '{\r\n    "a": {},\r\n    "b": {}\r\n}\r\n'}


@pytest.mark.parametrize("text", LAYOUTS.values(), ids=LAYOUTS)
def test_a_new_entry_leaves_every_other_byte(tmp_path, text):
    path = tmp_path / "dataset_info.json"
    path.write_bytes(text.encode())
    assert set_entries(path, {"cord": ENTRY}) == {"cord": "added"}
    new = path.read_bytes().decode()
    assert json.loads(new) == {**json.loads(text), "cord": ENTRY} and list(json.loads(new))[-1] == "cord"
    at = os.path.commonprefix([text, new])
    assert text == "{}\n" or new.endswith(text[len(at):]), "the old text is the new one with one piece taken out"
    assert ("\r\n" in text) == ("\r\n" in new) and new.count("\r") == (new.count("\n") if "\r" in text else 0)


infos = st.dictionaries(st.text(max_size=8), values, max_size=5)


@given(info=infos, key=st.text(max_size=8), indent=st.sampled_from([None, 1, 2, 4, "\t"]), compact=st.booleans())
def test_one_entry_is_set_and_the_others_keep_their_order(info, key, indent, compact):
    text = json.dumps(info, indent=indent, separators=(",", ":") if compact else None)
    new = json.loads(with_entry(text, key, ENTRY))
    assert new == {**info, key: ENTRY} and list(new) == list({**info, key: ENTRY})


@given(info=infos, entries=st.permutations(["d", "d_validation", "d_test"]), indent=st.sampled_from([None, 2]))
def test_training_goes_before_its_siblings(info, entries, indent):
    text, order = json.dumps(info, indent=indent), ["d", "d_validation", "d_test"]
    for key in entries: text = with_entry(text, key, ENTRY, before=order[order.index(key) + 1:])
    assert json.loads(text) == {**info, **dict.fromkeys(order, ENTRY)}
    assert [k for k in json.loads(text) if k in order] == order


def test_a_different_entry_needs_force_and_keeps_its_place(tmp_path):
    path = tmp_path / "dataset_info.json"
    path.write_text('{"a": {}, "cord": {"file_name": "old.json"}, "b": {}}')
    before = tree(tmp_path)
    with pytest.raises(VlmError, match="a different entry 'cord' already.*--force"):
        set_entries(path, {"new": {}, "cord": ENTRY})
    assert tree(tmp_path) == before
    assert set_entries(path, {"new": {}, "cord": ENTRY}, force=True) == {"new": "added", "cord": "replaced"}
    assert list(json.loads(path.read_text()).items()) == [("a", {}), ("cord", ENTRY), ("b", {}), ("new", {})]
    before = tree(tmp_path)
    assert set(set_entries(path, {"new": {}, "cord": ENTRY}).values()) == {"unchanged"} and tree(tmp_path) == before


# --- the training YAML ------------------------------------------------------------------------------------------------
NEW = dict(dataset="cord", dataset_dir="/a b/# c/data", media_dir="/a: b/'c'/é")
YAMLS = ["", "# only a comment\n", "cutoff_len: 1024", "### model\ndataset: a,b  # two\n\nlr: 1.0e-4  # x\n",
         "dataset:\n- a\n- b\n# after\nlr: 1\n", "dataset: |\n  a\n  b\nlr: 1\n", "dataset:\nlr: 1\n",
         "media_dir: 'old # not a comment'  # a comment\r\nlr: 1\r\n", "dataset: &x old\nother: 1\n", "---\nlr: 1\n"]


@pytest.mark.parametrize("text", YAMLS)
def test_a_yaml_keeps_its_other_lines_and_comments(tmp_path, text):
    path = tmp_path / "train.yaml"
    path.write_bytes(text.encode())
    assert set(set_config(path, NEW)) == set(NEW)
    new = path.read_bytes().decode()
    assert yaml.safe_load(new) == {**(yaml.safe_load(text) or {}), **NEW}
    for line in ("# only a comment", "### model", "lr: 1.0e-4  # x", "# two", "cutoff_len: 1024", "# after",
                 "  # a comment\r\n"):
        assert (line in text) == (line in new)
    before = tree(tmp_path)
    assert set_config(path, NEW) == {} and tree(tmp_path) == before


@pytest.mark.parametrize("text", ["{lr: 1}\n", "a: &x 1\nb: *x\n...\n"])
def test_a_yaml_that_cannot_be_edited_safely_is_left_alone(tmp_path, text):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(VlmError, match="Put these in by hand: dataset: cord"): set_config(tmp_path / "train.yaml", NEW)
    assert (tmp_path / "train.yaml").read_text() == text


@given(st.dictionaries(st.sampled_from(list(NEW)), st.text(min_size=1, max_size=20), min_size=1))
def test_any_path_survives_yaml(found): assert yaml.safe_load(with_settings("", found)) == found


# --- registration -----------------------------------------------------------------------------------------------------
@pytest.fixture
def beside(tmp_path):
    "A folder where LLaMA-Factory would run, a data set elsewhere, and a YAML"
    (tmp_path / "LF/data").mkdir(parents=True)
    (tmp_path / "LF/data/dataset_info.json").write_text('{\n  "identity": {"file_name": "identity.json"}\n}')
    (tmp_path / "LF/train.yaml").write_text("template: qwen2_vl  # keep\ndataset: identity\n")
    save_cord_dataset_in_sharegpt_format(tmp_path / "my/cord", n=2)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def test_registered_from_one_working_directory_read_from_another(beside, monkeypatch):
    done = vlm("register", "cord", "--llamafactory", "../LF", "--config", "../LF/train.yaml", cwd=beside / "my")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(beside / "elsewhere")
    config = yaml.safe_load((beside / "LF/train.yaml").read_text())
    assert f"media_dir: {config['media_dir']}" in done.stdout.splitlines()
    info = json.loads(Path(config["dataset_dir"], "dataset_info.json").read_text())
    assert list(info) == ["identity", "cord", "cord_validation", "cord_test"]
    assert os.path.isabs(info["cord"]["file_name"])
    records = json.loads(Path(config["dataset_dir"], info[config["dataset"]]["file_name"]).read_text())
    images = [os.path.join(config["media_dir"], image) for record in records for image in record["images"]]
    assert len(images) == 2 and all(map(os.path.isfile, images))
    assert "template: qwen2_vl  # keep" in (beside / "LF/train.yaml").read_text().splitlines()
    mine = load_examples(config["dataset_dir"], "train", name=config["dataset"], media_dir=config["media_dir"])
    assert facts(mine) == facts(load_examples(beside / "my/cord", "train"))


def test_registering_twice_touches_nothing(beside):
    call = dict(llamafactory=beside / "LF/data", config=beside / "LF/train.yaml")
    register(beside / "my/cord", **call)
    before = tree(beside)
    again = register(beside / "my/cord", **call)
    assert {row["state"] for row in again["entries"]} == {"unchanged"} and tree(beside) == before


def test_a_data_set_that_moved_needs_force(beside):
    register(beside / "my/cord", beside / "LF")
    shutil.move(beside / "my/cord", beside / "moved")
    before = tree(beside)
    with pytest.raises(VlmError, match="different entry 'cord'"):
        register(beside / "moved", beside / "LF", config=beside / "LF/train.yaml")
    assert tree(beside) == before
    register(beside / "moved", beside / "LF", force=True)
    assert load_examples(beside / "LF/data", "test", name="cord", media_dir=beside / "moved")


@pytest.mark.parametrize("call, problem", [
    (dict(dir="my"), "no data set in 'my': it has no dataset_info.json"),
    (dict(llamafactory="FL"), "no folder 'FL'"),
    (dict(llamafactory="my"), "no dataset_info.json in 'my' or its data folder"),
    (dict(name="crod"), "unknown data set 'crod'. Allowed: cord. Did you mean 'cord'?"),
    (dict(config="none.yaml"), "no file 'none.yaml'"),
    (dict(config="my/cord/cord.json"), "does not hold 'key: value' lines")])
def test_what_cannot_be_registered_changes_nothing(beside, monkeypatch, call, problem):
    monkeypatch.chdir(beside)
    before = tree(beside)
    with pytest.raises(VlmError) as error: register(**{"dir": "my/cord", "llamafactory": "LF", **call})
    assert problem in str(error.value) and tree(beside) == before


def test_an_entry_whose_file_is_gone_is_not_registered(beside):
    (beside / "my/cord/cord_test.json").unlink()
    with pytest.raises(VlmError, match="entry 'cord_test' of .* names no file"):
        register(beside / "my/cord", beside / "LF")
