"""The check of a data set: every kind of mistake planted once and found once, lengths equal to the real processor and
to the real LLaMA-Factory, nothing lost in quarantine."""
import json, os, random, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from vlm_tutor.check import (LOOK, MEND, NEAR, TokenCounter, check, check_page, factory_fate, factory_size,
                             fingerprint, look_at, look_at_all, near_copies, number_marks, small_grey)
from vlm_tutor.config import load_config
from vlm_tutor.core import Example, VlmError, asset, load_image, read_jsonl, write_jsonl
from vlm_tutor.memory import size_tokens
from vlm_tutor.receipts import make_receipt
from vlm_tutor.sharegpt import dataset_entry, save_dataset_in_sharegpt_format, sharegpt_record

MEASURED = json.loads((Path(__file__).parent / "data/llamafactory.json").read_text())


def record(image, answer, question="<image>Read it.", images=None):
    "A ShareGPT record"
    names = [image] if images is None else images
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": names}


def answer(seed):
    "The truth of a receipt whose numbers are all written in one way"
    return json.dumps(make_receipt(seed, level=1).truth)


class Planted:
    "A data set of good rows, to which bad ones are added by name"
    def __init__(self, folder):
        self.folder, self.wanted, self.splits = folder, {}, {"train": [], "test": []}
        (folder / "images").mkdir(parents=True)
        for seed in range(30): self.add(None, record(self.draw(f"good-{seed}", seed), answer(seed)))
        for seed in range(30, 34): self.add(None, record(self.draw(f"test-{seed}", seed), answer(seed)), "test")

    def draw(self, name, seed, kind="png", **options):
        "Draw a receipt; its name from the folder on"
        make_receipt(seed, level=1).image.save(self.folder / f"images/{name}.{kind}", **options)
        return f"images/{name}.{kind}"

    def add(self, kinds, row, split="train"):
        "Add a row and note what shall be found about it"
        self.splits[split].append(row)
        file = "set.json" if split == "train" else "set_test.json"
        for kind in kinds or (): self.wanted.setdefault(kind, []).append(f"row {len(self.splits[split])} of '{file}'")

    def write(self):
        info = {"set": dataset_entry("set.json"), "set_test": dataset_entry("set_test.json")}
        for name, value in {"set": self.splits["train"], "set_test": self.splits["test"], "dataset_info": info}.items():
            (self.folder / f"{name}.json").write_text(json.dumps(value))
        return self.folder


def plant_texts(set):
    "Rows whose text is wrong"
    image = iter(set.draw(f"text-{n}", 100 + n) for n in range(20))
    set.add(["broken-row"], {"messages": [{"role": "user", "content": "<image>Q"}], "images": [next(image)]})
    set.add(["broken-row"], ["no", "object"])
    set.add(["placeholders"], record(next(image), answer(101), "Read it."))
    set.add(["marks"], record(next(image), json.dumps({"menu": {"nm": "<image> burger"}})))
    set.add(["empty-answer"], record(next(image), "  "))
    set.add(["not-json"], record(next(image), '{"total": '))
    set.add(["not-json"], record(next(image), '{"total": {"total_price": "1", "total_price": "2"}}'))
    set.add(["schema"], record(next(image), '{"sum": "4.50"}'))
    set.add(["cut"], record(next(image), json.dumps({"total": {"total_etc": "word " * 900}})))
    set.add(["empty-field"], record(next(image), '{"total": {"total_price": ""}}'))
    set.add(["mixed-kind"], record(next(image), '{"menu": {"nm": "tea"}}'))
    set.add(["number-form"], record(next(image), '{"total": {"total_price": "12.000", "cashprice": "15,000"}}'))


def plant_files(set):
    "Rows whose file is wrong"
    good, images = '{"total": {"total_price": "4.50"}}', set.folder / "images"
    shutil.copy(set.folder / set.draw("away", 200), set.folder.parent / "away.png")
    (images / "link.png").symlink_to("../../away.png")
    set.add(["outside"], record("../away.png", good))
    set.add(["outside"], record("images/link.png", good))
    set.add(["outside"], record(str(set.folder.parent / "away.png"), good))
    set.add(["absolute"], record(str(set.folder / set.draw("absolute", 201)), good))
    set.add(["missing"], record("images/none.png", good))
    (images / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (images / "nothing.png").touch()
    for name in ("lfs", "nothing"): set.add(["unreadable"], record(f"images/{name}.png", good))
    for kind in ("png", "jpg"):
        path = set.folder / set.draw(f"cut-{kind}", 202, kind)
        path.write_bytes(path.read_bytes()[:-600])
        set.add(["truncated"], record(f"images/{path.name}", good))
    Image.new("1", (20_000, 10_000)).save(images / "bomb.png")
    set.add(["bomb"], record("images/bomb.png", good))


def plant_pictures(set):
    "Rows whose picture reads, and looks wrong"
    good, images = '{"total": {"total_price": "4.50"}}', set.folder / "images"
    page = make_receipt(300, level=1).image
    def save(name, picture, kinds, **options):
        picture.save(images / name, **options)
        set.add(kinds, record(f"images/{name}", good))
    save("strip.png", page.resize((4200, 20)), ["strip"])
    save("small.png", make_receipt(301, level=1).image.resize((20, 40)), ["small"])
    save("grey16.png", Image.fromarray(np.asarray(page.convert("L"), np.uint16) * 257), ["sixteen-bit"])
    clear = Image.new("RGBA", page.size, (0, 0, 0, 0))
    clear.putalpha(ImageOps.invert(page.convert("L")))
    save("clear.png", clear, ["transparent", "blank"])
    save("white.png", Image.new("RGB", (300, 400), "white"), ["blank"])
    save("cmyk.jpg", make_receipt(302, level=1).image.convert("CMYK"), ["cmyk"])
    note = Image.Exif()
    note[0x0112] = 6
    save("phone.jpg", make_receipt(303, level=1).image, ["rotated"], exif=note)
    pages = [make_receipt(seed, level=1).image for seed in (304, 305)]
    save("fax.tif", pages[0], ["pages"], save_all=True, append_images=pages[1:])


def plant_copies(set):
    "Rows that are there twice"
    one = set.splits["train"][0]
    set.add(["duplicate"], one)
    set.add(["leak"], record(set.draw("leak", 400), answer(400)))
    shutil.copy(set.folder / "images/leak.png", set.folder / "images/leak-2.png")
    set.add(None, record("images/leak-2.png", answer(400)), "test")
    set.add(["near-leak"], record(set.draw("near", 401), answer(401)))
    set.add(None, record(set.draw("near-2", 401, "jpg", quality=60), answer(401)), "test")
    name = set.draw("torn", 402)
    for price in ("1.00", "2.00"): set.add(["conflict"], record(name, json.dumps({"total": {"total_price": price}})))
    small = make_receipt(1, level=1).image.resize((150, 120))
    small.save(set.folder / "images/alike.png")
    set.add(["near-duplicate"], record("images/alike.png", '{"total": {"total_price": "9.00"}}'))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    "A data set with every mistake in it, and what the check said"
    set = Planted(tmp_path_factory.mktemp("planted") / "set")
    for plant in (plant_texts, plant_files, plant_pictures, plant_copies): plant(set)
    set.result = check(str(set.write()), "tiny", "cord")
    return set


def found_by_kind(result):
    kinds = {}
    for one in result["findings"]:
        kinds.setdefault(one["kind"], set()).add(one["where"])
    return {kind: sorted(rows) for kind, rows in kinds.items()}


# --- every mistake, once ----------------------------------------------------------------------------------------------
def test_every_mistake_is_found_and_nothing_else(planted):
    expected = {kind: sorted(rows) for kind, rows in planted.wanted.items()}
    expected["blank"] = sorted([*expected["blank"], *expected["sixteen-bit"]])  # 16 bits become one white page
    expected["mixed-kind"] = sorted([*expected["mixed-kind"], *expected["marks"]])  # whose menu is no list either
    assert found_by_kind(planted.result) == expected
    assert set(planted.wanted) == {*MEND, *LOOK} - {"rare-field", "perhaps-cut"}


def test_the_exit_code_follows_what_must_be_mended(planted):
    assert planted.result.code == 1
    rows = {one["where"] for one in planted.result["findings"] if one["kind"] in MEND}
    assert planted.result["must_mend"] == len(rows) and {one["weight"] for one in planted.result["findings"]} == \
        {"mend", "look"}
    allowed = check(str(planted.folder), "tiny", "cord", allow=list(MEND), report=str(planted.folder.parent / "r"))
    assert allowed.code == allowed["must_mend"] == 0


def test_the_report_is_one_safe_page(planted):
    page = Path(planted.result["report"]).read_text()
    assert all(f'id="{kind}"' in page for kind in planted.wanted)
    assert "http" not in page.split("</head>")[1] and "<script" not in page and "<image> burger" not in page
    assert json.loads(Path(planted.result["file"]).read_text())["findings"] == planted.result["findings"]
    assert "Nothing was found" not in page and "Nothing was found" in check_page("clean", [], [], [], [], {})


def test_what_lies_outside_is_opened_only_when_allowed(tmp_path):
    (tmp_path / "secret.png").write_text("no picture")
    (tmp_path / "set").mkdir()
    rows = [dict(image="../secret.png", target="1"), dict(image="a.png", target="2")]
    make_receipt(0).image.save(tmp_path / "set/a.png")
    write_jsonl(tmp_path / "set/rows.jsonl", rows)
    closed = check(str(tmp_path / "set/rows.jsonl"), "tiny")
    opened = check(str(tmp_path / "set/rows.jsonl"), "tiny", allow=["outside"])
    kinds = [[one["kind"] for one in result["findings"]] for result in (closed, opened)]
    assert kinds == [["outside"], ["outside", "unreadable"]] and [closed["pictures"], opened["pictures"]] == [1, 2]


@pytest.mark.parametrize("name", ["http:/../../secret.png", "data:/../../secret.png", "x/../" * 300 + "../secret.png",
                                  "x/../x/../../secret.png", "y/secret.png", "./../set/../secret.png"])
def test_no_detour_leads_out(tmp_path, name):
    (tmp_path / "secret.png").write_text("no picture")
    for folder in ("http:", "data:", "x"): (tmp_path / "set" / folder).mkdir(parents=True)
    (tmp_path / "set/y").symlink_to("..")
    write_jsonl(tmp_path / "set/rows.jsonl", [dict(image=name, target="1"), record(name, "1")])
    result = check(str(tmp_path / "set/rows.jsonl"), "tiny")
    assert {one["kind"] for one in result["findings"]} - {"unreadable"} == {"outside"}
    looked_at = tmp_path / "set/report/pictures.jsonl"
    assert not looked_at.exists() or "secret" not in looked_at.read_text()


def test_good_data_has_nothing_to_mend(tmp_path):
    from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
    save_cord_dataset_in_sharegpt_format(str(tmp_path), n=60, level=2)
    result = check(str(tmp_path), "tiny", "cord")
    assert (result.code, result["findings"]) == (0, []) and result["splits"] == dict(train=60, validation=60, test=60)


# --- pictures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_note_is_obeyed_everywhere_the_same_way(tmp_path, kind, orientation):
    from vlm_tutor.collate import image_size
    from vlm_tutor.sources import check_image
    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
             7: "TRANSVERSE", 8: "ROTATE_270"}  # what a camera must do for the note to be right
    right = Image.fromarray(np.kron(np.random.default_rng(0).integers(0, 255, (6, 4)), np.ones((16, 16)))
                            .astype(np.uint8)).convert("RGB")
    stored, note, path = right, Image.Exif(), tmp_path / f"x.{kind}"
    if orientation > 1: stored = right.transpose(Image.Transpose[turns[orientation]])
    note[0x0112] = orientation
    stored.save(path, exif=note, **dict(jpg=dict(quality=95), webp=dict(lossless=True)).get(kind, {}))
    seen, look = load_image(path), look_at(path)
    assert np.abs(np.asarray(seen, int) - np.asarray(right, int)).mean() < 4
    assert seen.size == check_image(path) == image_size(path)[::-1] == tuple(look["size"]) == (64, 96)
    turned_by_us = orientation > 1 and kind != "tif"  # Pillow turns a TIFF by itself
    assert [kind for kind, _ in look["problems"]] == ["rotated"] * turned_by_us
    assert bits_apart(bytes.fromhex(look["print"]), fingerprint(small_grey(right))) < 60


def bits_apart(one, other):
    return sum((a ^ b).bit_count() for a, b in zip(one, other))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_copies_are_near_and_others_are_not(level, tmp_path):
    pages = [make_receipt(seed, level).image for seed in range(80)]
    prints = [fingerprint(small_grey(page)) for page in pages]
    apart = [bits_apart(prints[i], prints[j]) for i in range(80) for j in range(i)]
    assert min(apart) > NEAR + 30
    for page, mark in list(zip(pages, prints))[:10]:
        for copy in (page.resize((page.width // 2, page.height // 2)), page.point(lambda v: v * 0.7)):
            assert bits_apart(fingerprint(small_grey(copy)), mark) < NEAR - 30
        page.resize((864, 1296), Image.Resampling.BICUBIC).save(tmp_path / "photo.jpg", quality=40)
        assert bits_apart(bytes.fromhex(look_at(tmp_path / "photo.jpg")["print"]), mark) < NEAR - 30


def test_near_copies_equal_a_plain_search():
    draw = np.random.default_rng(0)
    prints = draw.integers(0, 2**64, (150, 16), np.uint64)
    for i in range(40, 150, 3):  # a copy of an earlier one with a few bits turned, the coarse ones too
        prints[i] = prints[draw.integers(0, i)]
        for _ in range(draw.integers(0, 160)): prints[i, draw.integers(0, 16)] ^= np.uint64(1 << int(draw.integers(64)))
    groups, wanted = draw.integers(0, 3, 150), set()
    for i in range(150):
        near = [(bits_apart(prints[i].tobytes(), prints[j].tobytes()), j) for j in range(i)
                if bits_apart(prints[i, :4].tobytes(), prints[j, :4].tobytes()) <= 24]
        for same in (True, False):
            found = [(n, j) for n, j in near if n <= NEAR and (groups[i] == groups[j]) == same]
            if found: wanted.add((i, min(found)[1], min(found)[0]))
    found = set(near_copies(prints, groups))
    assert {(i, n) for i, _, n in found} == {(i, n) for i, _, n in wanted} and len(wanted) > 15


def test_a_look_is_remembered_until_the_file_changes(tmp_path):
    page, memory = tmp_path / "a.png", tmp_path / "memory.jsonl"
    make_receipt(0).image.save(page)
    look, stat = look_at_all([page], memory)[page], page.stat()
    with open(memory, "a") as file: file.write('{"key": "half a li')  # as an interruption leaves it
    page.write_bytes(b"x" * stat.st_size)
    os.utime(page, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert look_at_all([page], memory)[page]["digest"] == look["digest"]  # same size and time: not opened again
    os.utime(page)
    assert look_at_all([page], memory)[page]["problems"][0][0] == "unreadable"


# --- whatever people have ---------------------------------------------------------------------------------------------
def test_no_damage_to_a_file_ends_the_check(tmp_path):
    draw, page, path = random.Random(0), make_receipt(1).image, tmp_path / "x"
    for kind, options in (("png", {}), ("jpeg", {}), ("jpeg", dict(progressive=True)), ("webp", {}), ("gif", {})):
        page.save(path, kind, **options)
        whole = path.read_bytes()
        for _ in range(60):
            torn = bytearray(whole[:draw.randrange(len(whole))] if draw.random() < 0.5 else whole)
            for _ in range(draw.randrange(8)): torn[draw.randrange(max(1, len(torn)))] = draw.randrange(256)
            path.write_bytes(torn or b"x")
            try: right = load_image(path).size
            except VlmError: right = None
            assert look_at(path)["size"] == right, (kind, torn[:40])


WORDS = [None, True, 2.5, "", "<image>", "a.png", "user", "assistant", "../x", "\ud800", "a\0b", '{"a": 1}', "test"]
KEYS = "messages images image role content from value conversations target prompt id split".split()


def anything(draw, depth=0):
    "A JSON value that looks now and then like a row"
    kind = draw.randrange(8)
    if kind < 3 or depth > 3: return draw.choice(WORDS)
    if kind < 5: return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(KEYS): anything(draw, depth + 1) for _ in range(draw.randrange(6))}


def test_no_record_ends_the_check(tmp_path):
    draw = random.Random(0)
    make_receipt(0).image.save(tmp_path / "a.png")
    rows = [anything(draw) for _ in range(1500)] + [dict(image="a.png", target="1")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = check(str(tmp_path / "rows.json"), "tiny", "cord", allow=["schema"], quarantine=True)
    assert result["rows"] == 1501 and result["must_mend"] > 1400 and result.code == 0
    kept = json.loads((tmp_path / "rows.json").read_text())
    aside = [json.loads(line)["record"] for line in (tmp_path / "quarantine/rows.jsonl").read_text().splitlines()]
    assert lines(kept + aside) == lines(rows)


# --- lengths ----------------------------------------------------------------------------------------------------------
def test_visual_tokens_equal_the_processors():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    draw = random.Random(0)
    for _ in range(3000):
        size, factor = (draw.randint(1, 4000), draw.randint(1, 4000)), draw.choice([16, 28, 32])
        least, most = draw.choice([1024, 3136, 50000]), draw.choice([98304, 589824, 12845056])
        if max(size) > 200 * min(size): continue
        height, width = smart_resize(size[1], size[0], factor, least, most)
        assert size_tokens(size, factor, least, most) == height * width // factor**2, (size, factor, least, most)


def test_lengths_equal_the_real_preprocessing(tmp_path):
    from vlm_tutor.collate import Preprocess
    from vlm_tutor.tiny import load_processor
    config, examples = load_config("tiny", dict(cutoff_len=300, image_max_pixels=60000)), []
    for seed, level in enumerate([0, 1, 2, 3] * 3):
        names = [tmp_path / f"{seed}-{page}.png" for page in range(1 + seed % 3)]
        for name in names: make_receipt(str(name), level).image.save(name)
        examples.append(Example(str(seed), names, f"Lies das — {'语'*seed}\n", json.dumps(make_receipt(seed).truth)))
    counter = TokenCounter(config)
    real = Preprocess(load_processor("tiny-receipts"), config.cutoff_len, config.image_max_pixels,
                      config.image_min_pixels)
    sizes = [[look_at(path)["size"] for path in example.images] for example in examples]
    for example, found in zip(examples, counter.lengths(examples, sizes)):
        assert {key: found[key] for key in ("image", "prompt", "answer", "length")} == real.lengths(example)
        assert len(real.encode(example)["input_ids"]) == found["length"]


def older_model(folder):
    "The embedded base's small files in the forms that hub checkpoints of 2024 have"
    tiny = asset("tiny-receipts")
    folder.mkdir(parents=True)
    shutil.copy(tiny / "tokenizer.json", folder)
    template = json.dumps({"chat_template": (tiny / "chat_template.jinja").read_text()})
    (folder / "chat_template.json").write_text(template)
    pixels = dict(patch_size=8, merge_size=2, min_pixels=1024, max_pixels=98304)
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return folder


def test_a_models_small_files_are_found_in_every_form(tmp_path):
    folder = older_model(tmp_path / "model")
    ours, older = (TokenCounter(load_config("tiny", dict(model_name_or_path=str(name)))) for name in
                   ("tiny-receipts", folder))
    assert older.exact and older.rule == ours.rule and older.closing == ours.closing
    assert older.count([older.chat("Read it.", "4.50", 2)]) == ours.count([ours.chat("Read it.", "4.50", 2)])
    older_model(tmp_path / "hub/models--some--model/snapshots/abc")
    (tmp_path / "hub/models--some--model/refs").mkdir()
    (tmp_path / "hub/models--some--model/refs/main").write_text("abc")
    code = "from vlm_tutor.check import model_folder; print(model_folder('some/model'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | dict(HF_HUB_CACHE=str(tmp_path / "hub")))
    assert Path(out.stdout.strip()) == tmp_path / "hub/models--some--model/snapshots/abc", out.stderr


def test_without_a_tokenizer_no_row_is_counted_too_short():
    exact, bound = TokenCounter(load_config("tiny")), TokenCounter(load_config("cord"))
    assert (exact.exact, bound.exact) == (True, False) and bound.rule == dict(factor=28, least=3136, most=12845056)
    texts = [exact.chat(text, text) for text in ("", "Read it.", '{"a": "é语\\n"}', "a" * 500, "<|im_start|>")]
    assert all(most >= count for count, most in zip(exact.count(texts), bound.count(texts)))


def test_sizes_and_cuts_equal_the_measured_ones():
    for width, height, most, least, size in MEASURED["sizes"]:
        assert list(factory_size((width, height), least, most)) == size
    for question, answer, cutoff_len, *kept in MEASURED["cuts"]:
        fate = factory_fate(question, answer, 10**9, cutoff_len)
        assert [question - fate["lost_question"], answer - fate["lost_answer"]] == kept
    for question, answer, after, cutoff_len, *kept, crashes in MEASURED["runs"]:
        fate = factory_fate(question, answer, after, cutoff_len)
        assert [question - fate["lost_question"], answer - fate["lost_answer"]] == kept
        assert (fate["fate"] == "crash") == crashes and (fate["fate"] == "whole") == (kept == [question, answer])


REAL = """
import json, sys
sys.path.insert(0, sys.argv[1])
import scaffold
from PIL import Image
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.processor.processor_utils import infer_seqlen
told, plugin = json.load(open(sys.argv[2])), get_mm_plugin("qwen2_vl", image_token="<|image_pad|>")
def size(width, height, most, least, _):
    page = Image.new("L", (width, height))
    return list(plugin._preprocess_image(page, image_max_pixels=most, image_min_pixels=least).size)
cuts = [infer_seqlen(*row[:3]) for row in told["cuts"]]
print(json.dumps(dict(sizes=[size(*row) for row in told["sizes"]], cuts=cuts)))
"""


@pytest.mark.slow
def test_the_measured_figures_are_still_those_of_the_real_program(factory, tmp_path):
    import vlm_tutor
    (tmp_path / "real.py").write_text(REAL)
    peers = Path(vlm_tutor.__file__).parent / "assets/peers"
    command = [Path(factory["command"]).parent / "python", tmp_path / "real.py", peers,
               Path(__file__).parent / "data/llamafactory.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sizes"] == [row[-1] for row in MEASURED["sizes"]]
    assert found["cuts"] == [row[3:] for row in MEASURED["cuts"]]


# --- quarantine -------------------------------------------------------------------------------------------------------
def lines(rows): return sorted(json.dumps(row) for row in rows)


def test_quarantine_loses_nothing(planted, tmp_path):
    from vlm_tutor.sources import load_splits
    shutil.copytree(planted.folder, tmp_path / "set", symlinks=True)
    shutil.copy(planted.folder.parent / "away.png", tmp_path)
    before = planted.splits["train"]
    moved = check(str(tmp_path / "set"), "tiny", "cord", quarantine=True)
    aside, kept = read_jsonl(tmp_path / "set/quarantine/set.jsonl"), json.loads((tmp_path / "set/set.json").read_text())
    assert lines(kept + [row["record"] for row in aside]) == lines(before) and all(row["reasons"] for row in aside)
    assert all(before[row["row"] - 1] == row["record"] for row in aside)
    assert moved.code == 0 and sum(moved["moved"].values()) == moved["must_mend"]
    assert check(str(tmp_path / "set"), "tiny", "cord").code == 0
    assert len(load_splits(tmp_path / "set", schema="cord")["train"]) == len(kept)


def test_quarantine_of_lines_and_of_files(tmp_path):
    for seed in range(3): make_receipt(seed).image.save(tmp_path / f"{seed}.png")
    text = '{"image": "0.png", "target":  "1"}\nbroken\n\n{"image": "1.png", "target": ""}'
    (tmp_path / "rows.jsonl").write_text(text)
    check(str(tmp_path / "rows.jsonl"), "tiny", quarantine=True)
    assert (tmp_path / "rows.jsonl").read_text() == '{"image": "0.png", "target":  "1"}\n'
    assert [row["record"] for row in read_jsonl(tmp_path / "quarantine/rows.jsonl")][0] == "broken"
    folder = tmp_path / "folder"
    folder.mkdir()
    for seed in range(3): shutil.copy(tmp_path / f"{seed}.png", folder)
    for seed in range(2): (folder / f"{seed}.json").write_text('{"total": "1"' + "}" * seed)
    files = sorted(path.name for path in folder.iterdir())
    check(str(folder), "tiny", quarantine=True)
    aside = [path.name for path in (folder / "quarantine").iterdir() if path.name != "reasons.jsonl"]
    left = [path.name for path in folder.iterdir() if path.is_file()]
    assert sorted(left) == ["1.json", "1.png"] and sorted([*aside, *left]) == files
    assert len(read_jsonl(folder / "quarantine/reasons.jsonl")) == 2


# --- the command ------------------------------------------------------------------------------------------------------
def vlm(*words, cwd=None):
    command = [sys.executable, "-m", "vlm_tutor.cli", "check", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_exit_codes_and_json(planted, tmp_path):
    out = vlm(planted.folder, "--config", "tiny", "--schema", "cord", "--json", "--report", tmp_path)
    assert out.returncode == 1 and json.loads(out.stdout)["must_mend"] == planted.result["must_mend"]
    (tmp_path / "set").mkdir()
    make_receipt(0).image.save(tmp_path / "set/a.png")
    (tmp_path / "set/a.json").write_text('{"total": "1"}')
    out = vlm("set", "cutoff_len=100", cwd=tmp_path)
    assert out.returncode == 0 and "perhaps-cut" in out.stdout and "nothing must be mended" in out.stdout
    assert vlm("set", "--config", "tiny", "cutoff_len=100", cwd=tmp_path).returncode == 1


def test_the_schema_beside_the_data_is_the_default(tmp_path):
    folder = tmp_path / "set"
    save_dataset_in_sharegpt_format(folder, "synthetic", "train", 4, schema="cord")
    assert "schema" not in {one["kind"] for one in check(str(folder), "tiny")["findings"]}
    records = json.loads((folder / "set.json").read_text())
    records[0]["messages"][-1]["content"] = '{"sum": "4.50"}'
    (folder / "set.json").write_text(json.dumps(records))
    assert "schema" in {one["kind"] for one in check(str(folder), "tiny")["findings"]}


@pytest.mark.parametrize("words, said", [
    ([".", "--allow", "outsid"], "Did you mean 'outside'?"), (["none"], "no folder or file 'none'"),
    ([".", "--schema", "crod"], "Did you mean 'cord'?"), ([".", "--config", "tinny"], "Did you mean 'tiny'?"),
    (["list.json"], "'list.json' is not JSON"), (["several"], "holds several data sets"), (["empty"], "holds no rows"),
    ([".", "model_name_or_path=a b"], "no model 'a b'"),
    (["lost.jsonl", "--quarantine"], "every row of split 'train'")])
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, words, said):
    for name in ("several", "empty"): (tmp_path / name).mkdir()
    (tmp_path / "list.json").write_text("[1,]")
    (tmp_path / "several/dataset_info.json").write_text('{"a": {}, "b": {}}')
    write_jsonl(tmp_path / "lost.jsonl", [dict(image="gone.png", target="1")])
    out = vlm(*words, cwd=tmp_path)
    assert out.returncode == 2 and said in out.stderr.splitlines()[-1] and "Traceback" not in out.stderr


def test_the_check_never_loads_torch(planted, tmp_path):
    code = (f"import sys\nfrom vlm_tutor.check import check\n"
            f"check({str(planted.folder)!r}, 'tiny', report={str(tmp_path)!r})\n")
    code += "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "[]", out.stderr


@pytest.mark.parametrize("text, marks", [
    ("1,234", (",", None)), ("1.234,50", (".", ",")), ("$ 12.50", (None, ".")), ("(3,00)", (None, ",")),
    ("1 234 567", (" ", None)), ("12/05/2023", (None, None)), ("10.12.2023", (None, None)), ("1234", (None, None)),
    ("1,23,456", (None, None)), ("x", (None, None)), ("25.000 Rp", (".", None))])
def test_numbers_are_read_as_people_read_them(text, marks):
    assert number_marks(text) == marks
