"""Chapter 05b: names against `sha256sum`, PDF pages against what was drawn, nothing re-encoded unasked."""
import hashlib, io, os, sys

import pytest
from PIL import Image, ImageDraw

from vlm_tutor.core import VlmError
from vlm_tutor.pages import PDF_MAX_PIXELS, find_place, image_name, keep_file, keep_image, pdf_pages, shrink_image

KINDS = dict(PNG=".png", JPEG=".jpg", WEBP=".webp", BMP=".bmp", TIFF=".tif", GIF=".gif")


def picture(kind="PNG", size=(40, 30), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind, ending", KINDS.items())
def test_a_name_is_the_content_and_its_real_kind(tmp_path, kind, ending):
    data = picture(kind)
    assert image_name(data, ".what") == hashlib.sha256(data).hexdigest()[:16] + ending
    assert image_name(b"something else", ".HEIC").endswith(".heic")
    assert keep_image(data, [tmp_path / "a"]).read_bytes() == data


def test_an_image_is_stored_once_wherever_it_comes_from(tmp_path):
    data, places = picture(), [tmp_path / "new", tmp_path / "old"]
    (tmp_path / "scan.jpeg").write_bytes(data)
    first = keep_image(data, places[1:])
    before = first.stat().st_mtime_ns
    assert keep_image(data, places) == keep_file(tmp_path / "scan.jpeg", places) == keep_file(first, places) == first
    assert first.stat().st_mtime_ns == before and not places[0].exists()


def test_half_a_write_is_done_again_and_an_edited_image_is_not_touched(tmp_path):
    data, new, old = picture(), tmp_path / "new", tmp_path / "old"
    half = new / image_name(data)
    for keep in (lambda: keep_image(data, [new, old]), lambda: keep_file(tmp_path / "scan.png", [new, old])):
        (tmp_path / "scan.png").write_bytes(data)
        new.mkdir(exist_ok=True)
        half.unlink(missing_ok=True)
        half.write_bytes(data[:50])
        assert keep() == half and half.read_bytes() == data
    half.unlink()
    old.mkdir()
    (old / half.name).write_bytes(b"edited")
    with pytest.raises(VlmError, match="was changed after it was saved"): keep_image(data, [new, old])
    assert (old / half.name).read_bytes() == b"edited" and find_place("x", 1, [new]) == (new / "x", False)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_small_image_keeps_its_bytes_and_a_large_one_its_kind_and_shape(tmp_path, kind):
    path = tmp_path / "a.bin"
    path.write_bytes(picture(kind, (300, 200)))
    assert shrink_image(path, 60_000, [tmp_path / "out"]) == path and not (tmp_path / "out").exists()
    small = shrink_image(path, 6_000, [tmp_path / "out"])
    with Image.open(small) as image:
        assert image.format == kind and image.size == (94, 63) and 94 * 63 <= 6_000


def test_a_sideways_photo_is_shrunk_upright(tmp_path):
    note = Image.Exif()
    note[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(picture("JPEG", (300, 200), exif=note))
    with Image.open(shrink_image(tmp_path / "a.jpg", 6_000, [tmp_path])) as image:
        assert image.size == (63, 94) and image.getexif().get(0x0112, 1) == 1


def test_pdf_pages_are_what_was_drawn_in_their_order_and_the_same_each_time(tmp_path):
    pages = []
    for i in range(3):
        pages.append(Image.new("RGB", (288, 144), "white"))
        ImageDraw.Draw(pages[-1]).rectangle([96 * i, 0, 96 * i + 95, 143], fill="black")
    pages[0].save(tmp_path / "a.pdf", save_all=True, append_images=pages[1:])
    found = pdf_pages(tmp_path / "a.pdf", [tmp_path / "out"])
    assert pdf_pages(tmp_path / "a.pdf", [tmp_path / "out"]) == found and len(set(found)) == 3
    for i, path in enumerate(found):
        with Image.open(path) as page:
            assert page.size == (600, 300), "288 × 144 points at 150 dots an inch"
            dark = [page.convert("L").getpixel((100 + 200 * k, 150)) < 128 for k in range(3)]
        assert dark == [k == i for k in range(3)]


def test_a_poster_is_drawn_coarser(tmp_path):
    Image.new("1", (7200, 3600), 1).save(tmp_path / "a.pdf", resolution=72)
    with Image.open(pdf_pages(tmp_path / "a.pdf", [tmp_path])[0]) as page:
        assert page.width * page.height <= PDF_MAX_PIXELS * 1.01 and page.width > 5000


def test_what_is_no_pdf_or_cannot_be_read_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "a.pdf").write_text("no pdf")
    with pytest.raises(VlmError, match="cannot read PDF '.*a.pdf'"): pdf_pages(tmp_path / "a.pdf", [tmp_path])
    with pytest.raises(VlmError, match="no file '.*b.pdf'"): pdf_pages(tmp_path / "b.pdf", [tmp_path])
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(VlmError, match="pypdfium2 is not installed. pip install 'vlm_tutor\\[pdf\\]'"):
        pdf_pages(tmp_path / "a.pdf", [tmp_path])


@pytest.mark.skipif(not hasattr(os, "link"), reason="no hard links here")
def test_a_file_is_linked_and_its_link_outlives_it(tmp_path):
    (tmp_path / "scan.png").write_bytes(picture())
    kept = keep_file(tmp_path / "scan.png", [tmp_path / "out"])
    assert os.path.samefile(kept, tmp_path / "scan.png")
    (tmp_path / "scan.png").unlink()
    assert Image.open(kept).size == (40, 30)
