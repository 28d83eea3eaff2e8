"""The page's engine, without a browser; and the page itself in a real one, where gradio and a browser are installed."""

import io
import re
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import browser

from diffusers_compress import app
from diffusers_compress.codecs import describe
from diffusers_compress.errors import BitstreamError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def engine():
    return app.Engine(max_pixels=96 * 64)


@pytest.fixture
def save(tmp_path):
    def save(data, name="photo.png"):
        if isinstance(data, Image.Image):
            file = io.BytesIO()
            data.save(file, "PNG")
            data = file.getvalue()
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return save


@pytest.mark.parametrize("coder", app.coders())
def test_a_photo_to_a_file_and_back(engine, save, photo, coder):
    bpp = 2 if coder == "Refine" else 0.5  # its JPEG has many bytes for so small a picture
    image, data, notes = engine.encode(save(photo), coder, bpp)
    assert np.array_equal(image, photo) and not notes
    assert len(data) <= bpp * 96 * 64 / 8
    assert f"**{len(data):,} bytes**, {8 * len(data) / 96 / 64:.4f} bits per pixel, 96x64 pixels" == app.size_line(data, image)
    path = app.save_file(data)
    pictures = [engine.decode(engine.read_file(path), realism) for realism in (0, 1)]
    assert pictures[0].size == photo.size and not np.array_equal(*pictures)


@pytest.fixture
def layer(save):
    """Path of what was painted: a square in the middle, on a canvas of a size that is not the photo's."""
    drawn = Image.new("RGBA", (192, 128))
    drawn.paste((255, 0, 0, 255), (64, 32, 128, 96))
    return save(drawn, "layer.png")


@pytest.mark.parametrize("coder", app.coders())
def test_a_brush_says_where_the_bytes_go(engine, save, photo, layer, coder):
    path, bpp = save(photo), 2 if coder == "Refine" else 0.5
    _, without, _ = engine.encode(path, coder, bpp)
    _, nothing, notes = engine.encode(path, coder, bpp, save(Image.new("RGBA", (192, 128)), "nothing.png"))
    assert nothing == without and not notes
    _, data, notes = engine.encode(path, coder, bpp, layer)
    if app.takes_regions(coder):
        mask = Image.new("L", photo.size)
        mask.paste(255, (32, 16, 64, 48))
        pipe = engine.pipeline(app.coders()[coder])
        assert data == pipe.compress(photo, target_bpp=bpp, importance=mask).bitstreams[0] != without and not notes
    else:
        assert data == without and notes == [f"{coder} has no regions, so the brush counts for nothing"]


def test_only_refine_has_no_brush():
    assert [coder for coder in app.coders() if not app.takes_regions(coder)] == ["Refine"]


def test_what_is_painted_on_is_small(engine, save, photo):
    large = app.Engine().canvas(save(photo.resize((1200, 800))))
    assert large.size == (512, 341) and engine.canvas(save(photo)).size == photo.size
    assert engine.canvas(save(b"broken")) is None and engine.canvas(None) is None


def test_a_large_photo_is_made_smaller(engine, save, photo):
    image, notes = engine.read_photo(save(photo.resize((300, 200)).convert("RGBA")))
    assert image.width * image.height <= engine.max_pixels and abs(image.width / image.height - 1.5) < 0.05
    assert notes[0] == "made smaller, from 300x200 pixels"


def test_previews_of_beginnings_are_remembered(engine, save, photo, monkeypatch):
    """A slider that moves within a step asks the network nothing."""
    _, data, _ = engine.encode(save(photo), "DiffC", 0.5)
    whole = describe(data)["steps"]
    _, size, facts = engine.prefix(data, 1)
    assert facts["steps_present"] == 0 and size < len(data) / 4
    found = {}
    for share in range(1, 101, 3):
        picture, size, facts = engine.prefix(data, share)
        found.setdefault(facts["steps_present"], []).append(picture)
    assert 2 <= len(found) <= whole + 1
    assert all(picture is pictures[0] for pictures in found.values() for picture in pictures)


def hostile(photo):
    """Uploads that are no photo -> what is said of them."""
    file = io.BytesIO()
    photo.save(file, "PNG")
    png = file.getvalue()

    def claiming(side):
        head = png[12:16] + side.to_bytes(4, "big") * 2 + png[24:29]
        return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]

    return {
        b"": "empty",
        b"not a picture": "no picture that can be read",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>": "no picture that can be read",
        png[: len(png) // 2]: "not a picture that Pillow can read",
        claiming(60_000): "more than 64,000,000 pixels",
        claiming(9_000): "9000x9000 pixels",
    }


def test_each_hostile_photo_gets_one_line(engine, save, photo):
    for data, words in hostile(photo).items():
        with pytest.raises(ValueError, match=words) as caught:
            engine.encode(save(data), "DiffC", 0.5)
        assert len(app.one_line(caught.value).splitlines()) == 1 and words in app.one_line(caught.value)
    with pytest.raises(app.Refused, match="choose a photo"):
        engine.encode(None, "DiffC", 0.5)


def test_each_hostile_layer_gets_one_line(engine, save, photo):
    path = save(photo)
    for data, words in hostile(photo).items():
        said = "has 9000x9000 pixels" if "9000x9000" in words else "cannot be read"
        with pytest.raises(app.Refused, match=f"what was painted {said}"):
            engine.encode(path, "DiffC", 0.5, save(data, "layer.png"))


def test_the_brush_decodes_nothing_and_keeps_nothing(save):
    """gradio alone would: whatever is uploaded as a layer, and all that is sent to `accept_blobs`."""
    pytest.importorskip("gradio")
    from gradio.components.image_editor import EditorData, FileData

    editor, path = app.brush(), save(b"no picture")
    assert editor.preprocess(EditorData(layers=[FileData(path=path)])) == path
    assert editor.preprocess(EditorData()) is None and editor.preprocess(None) is None
    assert not hasattr(editor.accept_blobs, "_is_server_fn")


def test_each_hostile_file_gets_one_line(engine, save, photo):
    _, data, _ = engine.encode(save(photo), "DiffC", 0.5)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    with pytest.raises(BitstreamError):
        engine.decode(engine.read_file(save(bytes(flipped))))
    large = app.Engine().encode(save(photo.resize((120, 64))), "DiffC", 0.5)[1]
    for content in (b"", b"hello", data[:5], large):
        with pytest.raises(BitstreamError) as caught:
            engine.read_file(save(content))
        assert len(app.one_line(caught.value).splitlines()) == 1
    with pytest.raises(app.Refused, match="larger than 24,576 bytes"):
        engine.read_file(save(bytes(24_577)))
    with pytest.raises(app.Refused, match="choose a .dfc file"):
        engine.read_file(None)


def test_what_is_said_of_an_error():
    assert app.one_line(RuntimeError("CUDA out of memory. Tried\nto")) == "out of memory: try a smaller picture"
    assert app.one_line(FileNotFoundError(2, "No such file", "/secret/path")) == "this did not work (FileNotFoundError)"
    assert app.one_line(ValueError("a reason\nand more")) == "a reason"


def test_a_space_installs_what_the_package_needs():
    """The package itself lies beside the page: app/README.md."""
    needs = (ROOT / "app" / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert needs == project["dependencies"] + project["optional-dependencies"]["app"]


def upload(view, path):
    """Until it is there: a click before finds no file."""
    view.locator("input[type=file]").last.set_input_files(path)
    view.locator(".file-preview", has_text=Path(path).stem).wait_for()


def paint(view):
    """A stroke over the middle of the photo, by mouse or finger."""
    view.get_by_role("button", name="Brush: where the bytes go").click()
    canvas = view.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    view.wait_for_timeout(2000)  # until the photo is there and stands still
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if view.evaluate("navigator.maxTouchPoints"):
        finger = view.context.new_cdp_session(view)
        for kind, places in (("touchStart", [x - 20]), ("touchMove", [x]), ("touchMove", [x + 20]), ("touchEnd", [])):
            points = [{"x": place, "y": y} for place in places]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    else:
        view.mouse.move(x - 20, y)
        view.mouse.down()
        view.mouse.move(x + 20, y, steps=5)
        view.mouse.up()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)], ids=["phone", "desk"])
def test_upload_encode_download_decode_in_a_browser(engine, save, photo, tmp_path, width, height):
    pytest.importorskip("gradio")
    executable = browser()
    if executable is None:
        pytest.skip("no browser")
    from playwright.sync_api import expect, sync_playwright

    engine.pipeline("diffc")  # so that no wait below is for a model to be loaded
    page = app.build(engine)
    _, address, _ = app.serve(page, prevent_thread_lock=True, quiet=True)
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
            view = chromium.new_page(viewport={"width": width, "height": height}, has_touch=width < 500)
            view.set_default_timeout(150_000)
            expect.set_options(timeout=150_000)
            view.goto(address)
            upload(view, save(b"broken", "broken.png"))
            view.get_by_role("button", name="Compress", exact=True).click()
            expect(view.get_by_text("this is no picture that can be read")).to_be_visible()

            view.get_by_label("Clear").first.click()  # waits for the message to go, which lies over it on a phone
            upload(view, save(photo))
            paint(view)
            view.get_by_label("Refine").click()
            expect(view.get_by_text("This codec has no brush")).to_be_visible()
            expect(view.get_by_text("Brush: where the bytes go")).not_to_be_visible()
            view.get_by_label("DiffC").click()
            expect(view.get_by_text("Brush: where the bytes go")).to_be_visible()
            view.get_by_role("button", name="Compress", exact=True).click()
            said = view.locator("strong", has_text=re.compile(r"^[\d,]+ bytes$"))
            said.wait_for()
            with view.expect_download() as download:
                view.get_by_role("button", name="Download the file").click()
            download.value.save_as(tmp_path / "downloaded.dfc")
            data = (tmp_path / "downloaded.dfc").read_bytes()
            assert f"{len(data):,} bytes" == said.inner_text() and describe(data)["complete"]
            assert data != engine.encode(save(photo), "DiffC", 0.15)[1]  # made without the brush
            assert view.evaluate("document.documentElement.scrollWidth") <= width

            view.get_by_role("tab", name="File to picture").click()
            upload(view, tmp_path / "downloaded.dfc")
            view.get_by_role("button", name="Decompress").click()
            number = view.get_by_label("number input for Percent of the file, from its beginning")
            number.fill("30")
            number.press("Tab")
            expect(view.get_by_text(re.compile("Preview of the first"))).to_be_visible()
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            chromium.close()
    finally:
        page.close()
