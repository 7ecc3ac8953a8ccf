"""Chapter 00 where a notebook cannot go: half-written files, all eight EXIF turns, folders nobody may write to."""
import hashlib, json, os, random

import numpy as np
import pytest
from PIL import Image

from vlm_tutor.core import (Example, Progress, Result, RunFolder, VlmError, append_jsonl, atomic_write, content_hash,
                            hash_folder, load_image, name_ends, read_json_file, read_jsonl, set_seed, table,
                            write_jsonl)

CLOSED = "/sys/vlm_tutor"  # not even root can make a folder here

# EXIF orientation: how a camera stored an upright picture, in NumPy's words
STORED = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.T,
          6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize("turn", STORED)
def test_every_exif_turn_is_undone(tmp_path, turn):
    upright = np.arange(6 * 10, dtype=np.uint8).reshape(6, 10) * 4
    note = Image.Exif()
    note[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(STORED[turn](upright))).save(tmp_path / "photo.png", exif=note)
    assert np.array_equal(np.asarray(load_image(tmp_path / "photo.png"))[..., 0], upright)


SPOILED = [lambda b: b[:60], lambda b: b"", lambda b: b"GIF89a" + b[6:], lambda b: b[:40] + b"x" * 40]


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_broken_image_is_named(tmp_path, spoil):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30), dtype=np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes(spoil((tmp_path / "good.png").read_bytes()))
    with pytest.raises(VlmError, match="torn.png"): load_image(tmp_path / "torn.png")


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(VlmError, match="cannot read image"): load_image(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / f"x.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (5, 4)).save(path)
    assert load_image(path).mode == "RGB"


def test_an_example_without_image_says_so():
    with pytest.raises(VlmError, match="example 'a' has no image"): Example("a", [], "Read.").image


# --- files ------------------------------------------------------------------------------------------------------------
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    atomic_write(tmp_path / "a.json", "old")
    with pytest.raises(TypeError): atomic_write(tmp_path / "a.json", 3)
    assert (tmp_path / "a.json").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_write_follows_a_link(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    atomic_write(tmp_path / "link.json", "new")
    assert (tmp_path / "real.json").read_text() == "new" and (tmp_path / "link.json").is_symlink()


def test_a_place_without_permission_is_one_sentence():
    for write in (lambda p: atomic_write(p, "x"), lambda p: append_jsonl(p, {}), lambda p: write_jsonl(p, [{}])):
        with pytest.raises(VlmError, match="cannot write '/sys/vlm_tutor/x'.*Choose a place"): write(CLOSED + "/x")
    with pytest.raises(VlmError, match="cannot write"): RunFolder.create(CLOSED, {"seed": 1})


def test_jsonl_keeps_every_value_and_odd_line_ends(tmp_path):
    rows = [{"text": "a\u2028b\u0085c\r\nd", "n": 1.5}, [1, None, True], "ümläut", {}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    append_jsonl(tmp_path / "x.jsonl", {"last": "\u2029"})
    assert read_jsonl(tmp_path / "x.jsonl") == [*rows, {"last": "\u2029"}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_cut_line_is_dropped_before_the_next(tmp_path, cut):
    path, row = tmp_path / "x.jsonl", json.dumps({"é": 12})
    path.write_bytes(b'{"first": 1}\n' + row.encode()[:cut])
    assert read_jsonl(path, unfinished=True) == [{"first": 1}]
    with pytest.raises(VlmError, match="line 2"): read_jsonl(path)
    append_jsonl(path, {"next": 2})
    assert read_jsonl(path) == [{"first": 1}, {"next": 2}]


def test_a_whole_last_line_without_line_end_stays(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"by": "hand"}')
    append_jsonl(tmp_path / "x.jsonl", {"by": "us"})
    assert read_jsonl(tmp_path / "x.jsonl") == [{"by": "hand"}, {"by": "us"}]


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(VlmError, match="x.json.*not UTF-8"): read_json_file(tmp_path / "x.json")


def test_hashes_see_content_names_and_borders(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_bytes(b"ab")
    inner = hashlib.sha256(b"ab").digest()
    assert content_hash(tmp_path / "f" / "a") == hashlib.sha256(inner).hexdigest()[:16]
    assert content_hash(b"ab", b"c") != content_hash(b"a", b"bc")
    before = hash_folder(tmp_path / "f")
    (tmp_path / "f" / "a").write_bytes(b"ac")
    assert hash_folder(tmp_path / "f") != before


# --- run folder -------------------------------------------------------------------------------------------------------
def test_a_run_folder_refuses_another_configuration_and_names_the_keys(tmp_path):
    run = tmp_path / "run"
    RunFolder.create(run, {"seed": 1, "rank": 8, "output_dir": "a"})
    assert RunFolder.create(run, {"seed": 1, "rank": 8, "output_dir": "b"}).config()["output_dir"] == "a"
    with pytest.raises(VlmError) as error: RunFolder.create(run, {"seed": 2, "alpha": 16})
    for part in ("seed (there 1, now 2)", "rank (there 8, now None)", "alpha (there None, now 16)"):
        assert part in str(error.value)
    assert "output_dir (" not in str(error.value)


def test_versions_of_the_run_are_kept(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"seed": 1})
    found = read_json_file(run.versions_file)
    import torch
    assert found["torch"] == torch.__version__ and found["cores"] >= 1 and found["python"].startswith("3.")


@pytest.mark.parametrize("group", ["", "../x", "a/b", ".hidden", None])
def test_a_group_is_a_plain_name(group):
    with pytest.raises(VlmError, match="cannot name a group"): RunFolder("r").predictions(group)


# --- words ------------------------------------------------------------------------------------------------------------
def test_table_columns_stand_below_each_other():
    lines = table([{"name": "a", "n": 5}, {"name": "long one", "n": 12345, "f": 0.5}]).splitlines()
    assert lines == ["name          n    f", "a             5", "long one  12345  0.5"]
    assert table([]) == ""


def test_a_result_is_a_dict_for_programs():
    assert json.loads(json.dumps(Result({"n": 1}, "text"))) == {"n": 1} and str(Result({"n": 1}, "text")) == "text"
    assert json.loads(str(Result({"n": 1}))) == {"n": 1}


def test_progress_renews_one_line_on_a_terminal():
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        bar = Progress(3, "count", file=terminal, every=0)
        for _ in range(3): bar.update()
        bar.close()
        shown = ""
        while "\n" not in shown: shown += os.read(ours, 10_000).decode()
    os.close(ours)
    assert shown.count("\r") - shown.count("\r\n") == 4 and shown.count("\n") == 1 and "3/3" in shown


def test_a_seed_reaches_python_numpy_and_torch():
    import torch
    draws = []
    for _ in range(2):
        set_seed(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_names_at_the_ends_of_lines_stand_apart_and_keep_their_order():
    from matplotlib.figure import Figure
    ax = Figure().subplots()
    ax.set_ylim(0, 2)
    ends = [(3, 1., "b", "red"), (3, .95, "a", "blue"), (3, 1.01, "c", "grey"), (2, 1.9, "far", "red")]
    name_ends(ax, ends, least=.1)
    found = {text.get_text(): text.xy for text in ax.texts}
    assert found == {"a": (3, .95), "b": (3, pytest.approx(1.15)), "c": (3, pytest.approx(1.35)), "far": (2, 1.9)}
