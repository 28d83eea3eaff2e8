"""docs/pictures.md, row by row: each picture becomes what its file describes, or a note says why not, or it is refused."""

import re
from pathlib import Path

import numpy as np
import picture_cases as cases
import pytest
from picture_files import ONE, RGB, by_gamma, levels, pack, png, tiff
from PIL import Image

from diffusers_compress.images import open_image, to_tensor
from diffusers_compress.images.colour import PRIMARIES, rgb_to_srgb, rgb_to_xyz

TABLE = Path(__file__).parents[1] / "docs" / "pictures.md"
OUTCOMES = dict(re.findall(r"^\| (?!what the file)([^|-][^|]*) \| ([^|]+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE))
ROWS = {
    "grey of 1, 2, 4 and 8 bits, black or white as zero": cases.tiff_grey,
    "grey of 12 bits, of 16 bits also with white as zero": cases.tiff_deep_grey,
    "grey of 32-bit floats, black or white as zero": cases.tiff_floats,
    "signed samples, integers of 32 bits, no photometric interpretation": cases.tiff_unclear,
    "RGB of 8 bits, in pixels or in planes": cases.tiff_rgb,
    "RGB of 16 bits, in pixels or in compressed planes": cases.tiff_deep_rgb,
    "uncompressed planes of 16 bits, of YCbCr or with alpha premultiplied; planes of CIELAB": cases.tiff_planes,
    "alpha, premultiplied or not, with grey or RGB": cases.tiff_alpha,
    "extra channels": cases.tiff_extra,
    "palette with a colour map of 16 bits, or of 8 bits as some programs write it": cases.tiff_palette,
    "CMYK of 8 and 16 bits": cases.tiff_cmyk,
    "other inks than CMYK": cases.tiff_inks,
    "YCbCr with JPEG compression, or with a colour sample for each pixel": cases.tiff_ycbcr,
    "YCbCr uncompressed and subsampled, of other coefficients or another range; RGB of narrow range": cases.tiff_other_ycbcr,
    "CIELAB of 8 bits": cases.tiff_lab,
    "raw sensor data, masks, ICCLAB, CIELAB of 16 bits, RGB of floats, grey of 10 or 24 bits": cases.tiff_not_read,
    "white point, primaries or transfer function in tags, without a profile": cases.tiff_colour_tags,
    "grey of 1, 2, 4 and 8 bits, palettes of 1, 2, 4 and 8 bits, RGB of 8 bits": cases.png_plain,
    "grey and RGB of 16 bits": cases.png_deep,
    "alpha of 8 and 16 bits, with grey or RGB": cases.png_alpha,
    "one transparent colour (`tRNS`) in grey or in RGB of 8 bits, transparent palette entries": cases.png_transparent_colour,
    "one transparent colour in RGB of 16 bits": cases.png_transparent_deep_colour,
    "`gAMA` or `cHRM` of other colours than sRGB's": cases.png_gamma,
    "`gAMA` of 1/2.2 and `cHRM` as in sRGB, or an `sRGB` chunk beside them": cases.png_srgb,
    "`cHRM` that describes no colours": cases.png_no_colours,
    "`cICP` of SDR (BT.709, BT.601, BT.2020, DCI-P3, Display P3; gamma 2.2, 2.8, linear, sRGB)": cases.png_cicp,
    "`cICP` of HDR (PQ, HLG), of narrow range, or unknown": cases.png_hdr,
    "an ICC profile of RGB that changes no colour by more than two levels, whatever its name": cases.profile_of_srgb,
    "any other ICC profile of RGB, also one named like sRGB": cases.other_profile,
    "grey of 8, 12, 16 or 32 bits with a profile of grey or of RGB": cases.grey_profile,
    "a profile of another kind of colours than the samples, or a broken one": cases.wrong_profile,
    "CMYK with a profile of CMYK": cases.cmyk_profile,
    "AVIF with colours in `nclx` and no profile": cases.avif_colours,
    "AVIF of 10 or 12 bits": cases.avif_deep,
    "EXIF that says Adobe RGB, without a profile": cases.exif_adobe,
    "EXIF orientation": cases.orientation,
    "more frames or pages than one": cases.frames,
    "deep grey in formats that do not say which sample is white (FITS and others)": cases.other_deep_grey,
    "every mode of Pillow in memory": cases.in_memory,
}


def test_every_row_of_the_table_has_its_test():
    assert list(OUTCOMES) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_row(row, tmp_path):
    found = list(ROWS[row]())
    assert found
    for number, case in enumerate(found):
        path = tmp_path / f"{number}.picture"
        if isinstance(case[0], bytes):
            path.write_bytes(case[0])
        if len(case) == 2:
            assert re.search("refused|as `cICP`", OUTCOMES[row]), number
            with pytest.raises(ValueError, match=case[1]) as caught:
                to_tensor(open_image(path))
            assert "\n" not in str(caught.value), number
        elif isinstance(case[0], bytes):
            check(open_image(path), *case[1:], OUTCOMES[row], number)
            check(Image.open(path), *case[1:], OUTCOMES[row], number)
        else:
            check(*case, OUTCOMES[row], number)


def check(image, wanted, notes, outcome, number):
    samples, got = to_tensor(image)
    samples = (samples.permute(1, 2, 0).numpy() + 1) * 127.5
    assert samples.shape == RGB.shape
    assert np.abs(samples.mean((0, 1)) - wanted.mean((0, 1))).max() <= 3, number
    assert np.abs(samples - wanted).mean() <= 3, number
    assert set(notes or []) <= set(got), (number, got)
    assert not outcome.startswith("refused"), number
    if not outcome.startswith(("as", "right, or")):
        assert outcome.startswith("noted" if set(got) - {cases.GREY} else "right"), (number, got)


def test_a_crop_keeps_what_open_image_found(tmp_path):
    whole, wanted = levels(ONE, 12)
    (tmp_path / "a.tif").write_bytes(tiff(pack(whole, 12).tobytes(), 12, 1))
    (tmp_path / "a.png").write_bytes(png(RGB.tobytes(), 8, 2, (b"cICP", bytes([1, 8, 0, 1]))))
    for name, true in (("a.tif", wanted), ("a.png", by_gamma(RGB, 1))):
        samples, _ = to_tensor(open_image(tmp_path / name).crop((3, 2, 20, 10)))
        assert np.abs((samples.permute(1, 2, 0).numpy() + 1) * 127.5 - true[2:10, 3:20]).max() <= 3


def test_red_of_srgb_in_wider_colour_spaces():
    """As published, in linear light; for BT.2020 in ITU-R BT.2087."""
    assert np.allclose(rgb_to_xyz(PRIMARIES[1])[1], [0.2126, 0.7152, 0.0722], atol=1e-4)
    assert np.allclose(np.linalg.inv(rgb_to_srgb(PRIMARIES[12]))[:, 0], [0.8225, 0.0332, 0.0171], atol=2e-4)
    assert np.allclose(np.linalg.inv(rgb_to_srgb(PRIMARIES[9]))[:, 0], [0.6274, 0.0691, 0.0164], atol=2e-4)
    for primaries in PRIMARIES.values():
        assert np.allclose(rgb_to_srgb(primaries).sum(1), 1)
