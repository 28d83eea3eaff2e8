"""The report: BD-rates against an independent calculation, means, and the page in a real browser."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.integrate import quad
from scipy.interpolate import Akima1DInterpolator

from diffusers_compress.evaluation import report
from diffusers_compress.evaluation.codec import Codec, parse_codec
from diffusers_compress.evaluation.run import evaluate

# The basic example of the package bjontegaard's README: x265 with two presets.
ANCHOR = ([9487.76, 4593.60, 2486.44, 1358.24], [40.037, 38.615, 36.845, 34.851])
TEST = ([9787.80, 4469.00, 2451.52, 1356.24], [40.121, 38.651, 36.970, 34.987])


def lines(codec, rates, figures, name="psnr", sign=1):
    return [{"codec": codec, "bpp": rate, name: sign * figure} for rate, figure in zip(rates, figures)]


def test_bd_rate_of_the_published_example():
    low, high = max(min(ANCHOR[1]), min(TEST[1])), min(max(ANCHOR[1]), max(TEST[1]))
    areas = [quad(Akima1DInterpolator(q[::-1], np.log(r[::-1])), low, high, limit=200)[0] for r, q in (ANCHOR, TEST)]
    expected = 100 * (np.exp((areas[1] - areas[0]) / (high - low)) - 1)
    assert expected == pytest.approx(-4.4252, abs=1e-3)
    (found,) = report.bd_rates(lines("anchor", *ANCHOR) + lines("test", *TEST), "anchor", ["psnr"])
    assert found["psnr"]["percent"] == pytest.approx(expected, abs=1e-3)
    assert found["psnr"]["share"] == pytest.approx((high - low) / (ANCHOR[1][0] - ANCHOR[1][-1]))


def test_bd_rate_of_a_metric_that_is_better_when_lower():
    summary = lines("anchor", *ANCHOR, "swd", -1) + lines("test", *TEST, "swd", -1)
    assert report.bd_rates(summary, "anchor", ["swd"])[0]["swd"]["percent"] == pytest.approx(-4.4252, abs=1e-3)


def test_bd_rate_of_half_the_rate_is_minus_50_percent():
    summary = lines("anchor", *ANCHOR) + lines("test", np.array(ANCHOR[0]) / 2, ANCHOR[1])
    assert report.bd_rates(summary, "anchor", ["psnr"])[0]["psnr"]["percent"] == pytest.approx(-50, abs=1e-6)


def test_no_bd_rate_without_a_common_range_or_a_curve():
    summary = lines("anchor", *ANCHOR) + lines("apart", [1, 2], [10, 11]) + lines("point", [1, 1], [36, 36])
    summary += lines("back", [1, 2, 3], [36, 38, 37]) + [{"codec": "missing", "bpp": 1, "psnr": None}]
    found = report.bd_rates(summary, "anchor", ["psnr"])
    expected = {"apart": "no common range", "point": "no curve", "back": "not better with every bit", "missing": "no curve"}
    assert {line["codec"]: line["psnr"] for line in found} == expected
    assert [values[1] for values in report.bd_table(found, "anchor", ["psnr"])[1]] == [line["psnr"] for line in found]


def test_a_mean_needs_every_picture():
    rows = [{"codec": "c", "target_bpp": 1, "bpp": 1, "bytes": 9, "psnr": 20.0, "ms_ssim": None, "reached": True}]
    rows += [{"codec": "c", "target_bpp": 1, "bpp": 2, "bytes": 18, "psnr": 30.0, "ms_ssim": 0.5, "reached": False}]
    (line,) = report.summarise(rows, {("c", 1): {"fid": 7.0}})
    assert (line["pictures"], line["over"], line["bpp"], line["psnr"], line["ms_ssim"], line["fid"]) == (2, 1, 1.5, 25, None, 7)
    head, (values, _) = report.quality_table([line, {**line, "ms_ssim": 0.5}])
    assert dict(zip(head, values)) == {
        "codec": "c",
        "target bpp": "1",
        "bpp": "1.5",
        "over target": "1 of 2",
        "PSNR, dB": "25",
        "MS-SSIM": "n/a",
        report.LABELS["fid"]: "7",
    }


def test_markdown():
    assert report.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| -- | -- |\n| 1 | 2 |"


def test_the_most_detailed_box():
    picture = np.zeros((300, 400), np.uint8)
    picture[100:200:2, 200:300] = 255
    left, top, right, bottom = report.most_detailed(Image.fromarray(picture), 100)
    assert (left, top, right, bottom) == (200, 100, 300, 200)
    assert report.most_detailed(Image.new("RGB", (50, 30)), 100) == (0, 0, 50, 30)


def test_crops_are_of_a_rate_that_most_codecs_have(photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    rates = {"a": (0.1, 0.2, 0.4), "b": (0.1, 0.2, 0.4), "c": (0.3,), "d": (0.5,)}
    rows = [
        {
            "codec": codec,
            "picture": "photo.png",
            "target_bpp": rate,
            "bytes": 9,
            "bpp": rate,
            "reached": True,
            "decoded": "photo.png",
        }
        for codec in rates
        for rate in rates[codec]
    ]
    ((name, tiles),) = report.crops(tmp_path, tmp_path, rows)
    assert [caption for caption, _ in tiles] == ["original", "a, 9 bytes, 0.2000 bpp", "b, 9 bytes, 0.2000 bpp"]


# --------------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(photo, tiny_sd_folder, tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("report")
    photo.resize((288, 192)).save(folder / "a<b>&c.png")
    photo.save(folder / "small.png")
    codecs = [parse_codec("diffc", tiny_sd_folder), Codec("jpeg"), Codec("jpeg2000")]
    rows = evaluate(folder, out, codecs, [0.3, 1.0], ("psnr", "ms_ssim", "swd"))
    return report.write_report(folder, out, rows, "diffusers-compress eval <folder>", anchor="jpeg2000")


def test_the_page_is_one_file_that_names_versions_and_command(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert "diffusers-compress eval &lt;folder&gt;" in text and "a&lt;b&gt;&amp;c.png" in text
    software = json.loads((page.parent / "software.json").read_text())
    assert all(f"{name} {version}" in text for name, version in software.items())
    assert "ms_ssim not available: picture has 96x64 pixels" in text
    for name in ("psnr", "swd"):  # each is explained, with its direction
        assert report.METRICS[name].about in text and f"{report.LABELS[name]} {report.direction(name)}</th>" in text
    assert "largest drift" in text and re.search(r"small\.png.*, [\d,]+ bytes, 0\.\d+ bpp", text)
    for name in ("psnr", "swd"):  # MS-SSIM has no mean here
        assert (page.parent / "plots" / f"{name}.png").stat().st_size > 1000
        assert (page.parent / "plots" / f"{name}.svg").read_text().startswith("<?xml")


def browser():
    """A Chromium of the system, or the one that Playwright fetched earlier; None if there is neither."""
    sync_api = pytest.importorskip("playwright.sync_api")
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    with sync_api.sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)], ids=["phone", "desk"])
def test_the_page_opens_in_a_browser(page, width, height):
    executable = browser()
    if executable is None:
        pytest.skip("no browser: looked for chromium, google-chrome and Playwright's own (playwright install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        view = chromium.new_page(viewport={"width": width, "height": height})
        requests, complaints = [], []
        view.on("request", lambda request: requests.append(request.url.partition(":")[0]))
        view.on("console", lambda message: complaints.append(message.text))
        view.on("pageerror", lambda error: complaints.append(str(error)))
        view.goto(page.as_uri())
        assert set(requests) <= {"file", "data"} and not complaints
        assert view.locator("h1").inner_text() == "2 pictures, 3 codecs"
        assert view.locator("img").count() == 2 + 2 * 4  # plots of PSNR and SWD; crops
        assert view.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            view.evaluate("Math.min(...[...document.querySelectorAll('td')].map(e => parseFloat(getComputedStyle(e).fontSize)))")
            >= 12
        )
        tile = view.locator(".tiles img").first
        small = tile.bounding_box()["width"]
        view.get_by_label("three times as large").first.check()
        assert tile.bounding_box()["width"] == 3 * small
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        chromium.close()
