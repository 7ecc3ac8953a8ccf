"Augmentation: pure, of the announced size, without loss of ink, readable by a real model, refused where it is wrong."
import io, json, multiprocessing, pickle, subprocess, sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm_tutor.augment import (AUGMENTATIONS, MOST, REFUSED, Augmentation, Variant, before_after, check_name, disturb,
                               disturbed_copies)
from vlm_tutor.core import VlmError, content_hash, load_image
from vlm_tutor.engine import Visit
from vlm_tutor.receipts import make_examples, make_receipt
from vlm_tutor.sharegpt import save_cord_dataset_in_sharegpt_format
from vlm_tutor.sources import load_splits

PAGES = [make_receipt(i, level=1).image for i in range(4)]


def vlm(*words, cwd=None): return subprocess.run([sys.executable, "-m", "vlm_tutor.cli", *map(str, words)],
                                                 capture_output=True, text=True, cwd=cwd)


def grey(image): return np.asarray(image.convert("L"), float)


def digest(job): return content_hash(disturb(PAGES[0], *job).tobytes())


# --- pure -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_image_and_seed_decide_and_nothing_else(name):
    before = PAGES[0].tobytes()
    one = disturb(PAGES[0], name, 1)
    np.random.seed(5)
    disturb(PAGES[1], name, 7)
    assert disturb(PAGES[0], name, 1).tobytes() == one.tobytes() and PAGES[0].tobytes() == before
    assert len({disturb(PAGES[0], name, seed).tobytes() for seed in range(8)}) >= 7
    assert one.mode == "RGB"


def test_other_processes_in_another_order_draw_the_same():
    jobs = [(name, seed) for name in AUGMENTATIONS for seed in range(3)]
    with multiprocessing.get_context("spawn").Pool(2) as pool: found = pool.map(digest, jobs[::-1], chunksize=1)
    assert found[::-1] == [digest(job) for job in jobs]


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(192, 240), (7, 5), (1, 1), (900, 130)])
def test_sizes_are_those_announced(name, size):
    image = Image.new("RGB", size, "white")
    for seed in range(10):
        found = disturb(image, name, seed, MOST)
        if AUGMENTATIONS[name].scale(MOST) == 1: assert found.size == size
        assert all(1 <= new <= round(AUGMENTATIONS[name].scale(MOST)*old) for new, old in zip(found.size, size))


@pytest.mark.parametrize("name", sorted(set(AUGMENTATIONS) - {"jpeg"}))
def test_a_weak_disturbance_changes_little_and_a_strong_one_more(name):
    def change(strength):
        found = [disturb(page, name, seed, strength).resize(page.size) for seed, page in enumerate(PAGES)]
        return np.mean([np.abs(grey(a) - grey(b)).mean() for a, b in zip(found, PAGES)])
    weak, usual, strong = change(.02), change(.75), change(1.5)
    assert weak < 2 and weak < usual < strong


# --- nothing is lost --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["crumple", "fold", "rotation", "perspective", "crop"])
def test_spots_at_the_very_edge_stay_in_the_picture(name):
    width, height = 210, 330
    page = Image.new("RGB", (width, height), "#eeeee6")
    for x in (1, 100, width - 7):
        for y in (1, 160, height - 7): ImageDraw.Draw(page).rectangle((x, y, x + 5, y + 5), "black")
    for seed in range(40):
        dark = grey(disturb(page, name, seed, MOST)) < 110
        thirds = [part for row in np.array_split(dark, 3) for part in np.array_split(row, 3, axis=1)]
        assert all(part.sum() >= 12 for part in thirds), seed


def test_crop_takes_margins_only():
    page = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(page).rectangle((60, 80, 140, 120), "black")
    shares = []
    for seed in range(30):
        dark = grey(disturb(page, "crop", seed, MOST)) < 128
        assert not (dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())
        shares.append(dark.mean())
    assert min(shares) >= (81*41)/200**2*.95 and max(shares) > 1.3*min(shares)


def test_rotation_turns_by_angles_that_strength_bounds():
    "A long thin line: its slope is the angle"
    page = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(page).line((20, 100, 380, 100), "black", 3)
    for strength in (.5, 1.5):
        angles = []
        for seed in range(25):
            ys, xs = np.nonzero(grey(disturb(page, "rotation", seed, strength)) < 128)
            angles.append(np.degrees(np.arctan(np.polyfit(xs, ys, 1)[0])))
        assert .5*2.5*strength < max(map(abs, angles)) < 2.5*strength + .1 and min(angles) < 0 < max(angles)


def test_noise_has_the_deviation_that_it_draws_from():
    page = Image.new("RGB", (300, 300), "#808080")
    found = [grey(disturb(page, "noise", seed)) for seed in range(20)]
    assert all(3.5 < image.std() < 16.5 and abs(image.mean() - 128) < 1 for image in found)


def test_a_shadow_only_darkens_and_contrast_keeps_the_order_of_greys():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1))).convert("RGB")
    for seed in range(10):
        assert (grey(disturb(ramp, "shadow", seed)) <= grey(ramp) + 1).all()
        assert (np.diff(grey(disturb(ramp, "contrast", seed))[0]) >= 0).all()


def test_jpeg_is_what_a_jpeg_of_that_page_would_be():
    found = disturb(PAGES[0], "jpeg", 3)
    def saved(quality):
        file = io.BytesIO()
        PAGES[0].save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB").tobytes()
    assert found.tobytes() in {saved(quality) for quality in range(25, 76)}


# --- refused ----------------------------------------------------------------------------------------------------------
def test_what_is_wrong_for_documents_is_refused_with_its_reason():
    assert not set(REFUSED) & set(AUGMENTATIONS)
    for name in ("flip", "rotation_90", "hue", "random_crop", "cutout", "mixup", "elastic"):
        with pytest.raises(VlmError, match=f"'{name}' is refused for documents: .+ Allowed: texture"): check_name(name)
    with pytest.raises(VlmError, match="Did you mean 'perspective'"): Augmentation("blur,perspectiv")
    for strength in (0, -1, MOST + .01, 9):
        with pytest.raises(VlmError, match="Allowed: above 0, up to 1.5"): disturb(PAGES[0], "crumple", 0, strength)
    with pytest.raises(VlmError, match="unknown augmentation ''"): Augmentation("")
    with pytest.raises(VlmError, match="names nothing"): Augmentation([])


# --- a recipe ---------------------------------------------------------------------------------------------------------
def test_a_recipe_draws_none_to_three_in_the_order_of_the_table():
    recipe, order = Augmentation("all", seed=2), list(AUGMENTATIONS)
    drawn = [recipe.chosen(i) for i in range(2000)]
    assert all(sorted(names, key=order.index) == names for names in drawn)
    counts = [sum(len(names) == n for names in drawn) for n in range(5)]
    assert counts[4] == 0 and all(400 < n < 600 for n in counts[:4])
    uses = [sum(name in names for names in drawn) for name in order]
    assert all(200 < n < 300 for n in uses)


def test_a_variant_opens_like_a_file_and_counts_like_one(tmp_path):
    path = tmp_path / "a.png"
    PAGES[0].save(path)
    recipe = Augmentation("rotation,jpeg", seed=1)
    wanted = recipe(PAGES[0], content_hash(path), 4)
    assert load_image(Variant(path, 4, recipe)).tobytes() == wanted.tobytes()
    with Image.open(Variant(path, 4, recipe)) as image: assert image.size == PAGES[0].size
    PAGES[1].save(path)
    with pytest.raises(VlmError, match="no image"): load_image(Variant(tmp_path / "gone.png", 0, recipe))


def test_every_variant_comes_once_a_round_and_rounds_begin_apart(tmp_path):
    examples = make_examples(12, folder=tmp_path)
    recipe = Augmentation("all", seed=1, variants=4)
    numbers = [[recipe.visit(e, epoch).image.number for epoch in range(8)] for e in examples]
    assert all(sorted(row[:4]) == [0, 1, 2, 3] and row[:4] == row[4:] for row in numbers)
    assert len({row[0] for row in numbers}) > 1
    assert [Augmentation("all", seed=1).visit(examples[0], epoch).image.number for epoch in (0, 5)] == [0, 5]


def test_a_visit_is_its_index_and_travels_between_processes():
    visit = pickle.loads(pickle.dumps(Visit(7, 3)))
    assert (visit, visit.epoch, [10, 20][Visit(1, 2)], {1: "a"}[Visit(1)]) == (7, 3, 20, "a")


# --- the verb ---------------------------------------------------------------------------------------------------------
def test_the_sheet_shows_the_page_before_and_under_each_name():
    sheet = before_after(PAGES[0], ["blur", "noise"], seed=3)
    assert sheet.width >= 3*PAGES[0].width and sheet.tobytes() == before_after(PAGES[0], ["blur", "noise"], 3).tobytes()
    rows = np.asarray(sheet)
    page = np.asarray(PAGES[0])
    top = next(y for y in range(40) if (rows[y:y + page.shape[0], 10:10 + page.shape[1]] == page).all())
    assert top > 10


def test_the_verb_writes_a_sheet_and_a_data_set_that_trains(tmp_path):
    save_cord_dataset_in_sharegpt_format(tmp_path / "data", n=4)
    words = ["--names", "fold,jpeg", "--dir", tmp_path / "more", "--variants", 2, "--json"]
    done = vlm("augment", tmp_path / "data", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    facts, parts = json.loads(done.stdout), load_splits(tmp_path / "more")
    assert facts["rows"] == {"train": 12, "validation": 4, "test": 4}
    with Image.open(tmp_path / facts["sheet"]) as sheet: assert sheet.width > 3*192
    originals = {e.id: e for e in load_splits(tmp_path / "data")["train"]}
    for e in parts["train"]: assert e.target == originals[e.id.split("-form")[0]].target
    assert len({content_hash(e.image) for e in parts["train"]}) >= 8


def test_copies_are_the_recipes_variants(tmp_path):
    examples, recipe = make_examples(2, folder=tmp_path / "drawn"), Augmentation("crop,noise", seed=4)
    copies = disturbed_copies(examples, recipe, tmp_path / "copies", range(2))
    assert [e.id for e in copies] == [f"{e.id}-form{k}" for e in examples for k in range(2)]
    for e, (path, k) in zip(copies, [(e.image, k) for e in examples for k in range(2)]):
        assert load_image(e.image).tobytes() == load_image(Variant(path, k, recipe)).tobytes()


@pytest.mark.parametrize("words, said", [
    (["--names", "flip"], "refused for documents"), (["--strength", "4"], "up to 1.5"),
    (["--variants", "0"], "variants is 0"), (["--n", "0"], "n is 0")])
def test_a_mistake_is_one_line_and_nothing_is_written(tmp_path, words, said):
    done = vlm("augment", "synthetic", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
