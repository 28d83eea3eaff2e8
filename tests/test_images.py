import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from diffusers_compress.images import as_list, crop, open_image, pad, side_by_side, to_output, to_tensor

ALPHA = "alpha channel composited on white and not stored"
GREY = "greyscale stored as colour"
DEEP = "16 bits per sample stored as 8"
METADATA = "EXIF and other metadata not stored"
ORIENTATION = 0x0112


def picture(width, height, channels=3):
    samples = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return samples[..., 0] if channels == 1 else samples


def through_a_file(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return Image.open(buffer)


def bytes_of(image):
    """What a picture becomes: 8-bit samples [H, W, 3], and the notes."""
    x, notes = to_tensor(image)
    return np.asarray(to_output(x[None])[0]), notes


@pytest.mark.parametrize("size", [(1, 1), (65, 65), (317, 211)])
def test_round_trip_of_every_kind_of_8_bit_colour(size):
    samples = picture(*size)
    tensor = torch.from_numpy(samples).permute(2, 0, 1)
    for image in (
        Image.fromarray(samples),
        samples,
        tensor,
        samples / 255,
        tensor / 255,
        samples.astype(np.uint16) * 257,
        np.asfortranarray(samples),
    ):
        x, notes = to_tensor(image)
        assert x.shape == (3, size[1], size[0]) and x.dtype == torch.float32 and x.is_contiguous()
        assert x.min() >= -1 and x.max() <= 1
        assert notes == ([DEEP] if getattr(image, "dtype", None) == np.uint16 else [])
        assert np.array_equal(np.asarray(to_output(x[None])[0]), samples)


def test_every_8_bit_value_survives():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    x, _ = to_tensor(ramp)
    assert x[0, 0, 0] == -1 and x[0, -1, -1] == 1
    assert np.array_equal(bytes_of(ramp)[0][..., 0], ramp)


@pytest.mark.parametrize("size", [(1, 1), (65, 65), (317, 211)])
def test_greyscale(size):
    samples = picture(*size, channels=1)
    for image in (Image.fromarray(samples), samples, samples[..., None], torch.from_numpy(samples)[None]):
        got, notes = bytes_of(image)
        assert np.array_equal(got, np.stack([samples] * 3, -1)) and notes == [GREY]
    bilevel = Image.fromarray(samples).convert("1")
    got, notes = bytes_of(bilevel)
    assert np.array_equal(got[..., 0], np.where(np.asarray(bilevel), 255, 0)) and notes == [GREY]


def test_alpha_is_composited_on_white():
    samples = picture(65, 65, channels=4)
    alpha = samples[..., 3:] / 255
    wanted = np.rint(samples[..., :3] * alpha + 255 * (1 - alpha))
    for image in (Image.fromarray(samples), samples, torch.from_numpy(samples).permute(2, 0, 1), samples / 255):
        got, notes = bytes_of(image)
        assert np.abs(got - wanted).max() <= 1 and notes == [ALPHA]
    opaque = Image.fromarray(samples[..., :3]).convert("RGBA")
    got, notes = bytes_of(opaque)
    assert np.array_equal(got, samples[..., :3]) and notes == []


def test_grey_with_alpha():
    got, notes = bytes_of(Image.new("LA", (2, 1), (100, 0)))
    assert (got == 255).all() and notes == [ALPHA, GREY]


@pytest.mark.parametrize("transparency", [None, 1, b"\xff\x00\x80"])
def test_palette(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    got, notes = bytes_of(through_a_file(image, **({} if transparency is None else {"transparency": transparency})))
    wanted = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    if transparency is not None:
        wanted[1] = [255, 255, 255]
    if transparency == b"\xff\x00\x80":
        wanted[2] = [127, 127, 255]
    assert got[0].tolist() == wanted and notes == ([ALPHA] if transparency is not None else [])


@pytest.mark.parametrize("mode, colour", [("L", 7), ("1", 0), ("RGB", (7, 8, 9))])
def test_a_transparent_colour(mode, colour):
    got, notes = bytes_of(through_a_file(Image.new(mode, (2, 2), colour), transparency=colour))
    assert (got == 255).all() and ALPHA in notes


def test_16_bit_grey_keeps_its_precision():
    samples = np.array([[0, 1, 127], [32768, 65534, 65535]], dtype=np.uint16)
    wanted = torch.from_numpy(samples.astype(np.float64) / 65535 * 2 - 1).float()
    png, tiff = through_a_file(Image.fromarray(samples)), through_a_file(Image.fromarray(samples.astype(">u2")), "TIFF")
    assert png.mode == "I;16"
    for image in (png, tiff, Image.fromarray(samples.astype(np.int32)), samples, Image.fromarray(samples.astype(">u2"))):
        x, notes = to_tensor(image)
        assert torch.allclose(x, wanted.expand(3, 2, 3), atol=2e-7) and notes == [DEEP, GREY]


def test_float_pictures():
    x, notes = to_tensor(Image.fromarray(np.array([[0, 0.25, 1]], dtype=np.float32)))
    assert x[1, 0].tolist() == [-1, -0.5, 1] and notes == [GREY]
    x, _ = to_tensor(torch.full((3, 2, 2), 0.75, dtype=torch.bfloat16, requires_grad=True))
    assert x.dtype == torch.float32 and not x.requires_grad and (x == 0.5).all()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "PA"])
def test_other_modes(mode):
    colour = Image.new("RGB", (4, 4), (200, 40, 90))
    between = {"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
    image = colour.convert(between, palette=Image.Palette.ADAPTIVE).convert(mode)
    got, notes = bytes_of(image)
    assert np.abs(got.astype(int) - (200, 40, 90)).max() <= 3
    assert notes == (["CMYK converted to RGB"] if mode == "CMYK" else [])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    samples = np.zeros((16, 32, 3), dtype=np.uint8)
    samples[:8, :8] = (255, 0, 0)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    got, notes = bytes_of(through_a_file(Image.fromarray(samples), "JPEG", exif=exif, quality=95, subsampling=0))
    wanted = {
        1: samples,
        2: samples[:, ::-1],
        3: samples[::-1, ::-1],
        4: samples[::-1],
        5: samples.transpose(1, 0, 2),
        6: samples.transpose(1, 0, 2)[:, ::-1],
        7: samples.transpose(1, 0, 2)[::-1, ::-1],
        8: samples.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert got.shape == wanted.shape and np.abs(got.astype(int) - wanted).max() < 16
    assert notes == []  # orientation is not lost, and nothing else was there


def test_metadata_is_noted():
    exif = Image.Exif()
    exif[0x010F] = "camera"
    image = Image.new("RGB", (8, 8))
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a picture")
    assert to_tensor(through_a_file(image, "JPEG", exif=exif))[1] == [METADATA]
    assert to_tensor(through_a_file(image, "JPEG", comment="a picture"))[1] == [METADATA]
    assert to_tensor(through_a_file(image, pnginfo=text))[1] == [METADATA]
    assert to_tensor(through_a_file(image, "TIFF", description="a picture"))[1] == [METADATA]
    for format in ("PNG", "TIFF", "WEBP", "JPEG"):
        assert to_tensor(through_a_file(image, format))[1] == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"", b"garbage", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"])
def test_broken_exif_does_no_harm(exif):
    assert to_tensor(through_a_file(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0" + exif))[0].shape == (3, 8, 8)


def swapped_profile():
    """sRGB's profile with the primaries of red and green exchanged, so that converting exchanges the channels."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


def test_colour_profiles():
    image = Image.new("RGB", (4, 4), (200, 40, 90))
    got, notes = bytes_of(through_a_file(image, icc_profile=swapped_profile()))
    assert np.abs(got.astype(int) - (40, 200, 90)).max() <= 2 and notes == ["colour profile converted to sRGB"]
    image.putalpha(255)
    assert np.array_equal(bytes_of(through_a_file(image, icc_profile=swapped_profile()))[0], got)

    image = image.convert("RGB")
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    got, notes = bytes_of(through_a_file(image, icc_profile=srgb))
    assert np.array_equal(got, np.asarray(image)) and notes == []
    got, notes = bytes_of(through_a_file(image, icc_profile=b"garbage"))
    assert np.array_equal(got, np.asarray(image)) and notes == ["colour profile could not be applied; colours taken as sRGB"]


def test_frames_are_noted():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    got, notes = bytes_of(through_a_file(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert (got == (255, 0, 0)).all() and "one of 2 frames stored" in notes


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((2, 2), 1.5), r"\[1.5, 1.5\]"),
        (torch.full((3, 2, 2), -0.5), r"\[-0.5, -0.5\]"),
        (np.array([[np.nan, 0.5]]), "nan"),
        (np.zeros((2, 2), dtype=np.int64), "int64"),
        (np.zeros((2, 2, 5), dtype=np.uint8), r"\(2, 2, 5\)"),
        (np.zeros((0, 2), dtype=np.uint8), r"\(0, 2, 1\)"),
        (np.zeros(2, dtype=np.uint8), r"\(2,\)"),
        (torch.zeros(2, 2), r"\(2, 2\)"),
        (Image.new("I", (1, 1), 70_000), "70000"),
        (Image.new("RGB", (0, 3)), "shape"),
        ("picture.png", "str"),
    ],
)
def test_what_is_not_a_picture_is_refused(image, message):
    with pytest.raises(ValueError, match=message):
        to_tensor(image)


def test_as_list():
    image = Image.new("RGB", (2, 3))
    assert as_list(image) == [image] and as_list([image, image]) == [image, image]
    batch = torch.rand(2, 3, 4, 5)
    assert [tuple(x.shape) for x in as_list(batch)] == [(3, 4, 5)] * 2
    assert [x.shape for x in as_list(batch.permute(0, 2, 3, 1).numpy())] == [(4, 5, 3)] * 2
    assert len(as_list(batch[0])) == 1
    for empty in ([], batch[:0]):
        with pytest.raises(ValueError, match="empty"):
            as_list(empty)


@pytest.mark.parametrize("height, width", [(1, 1), (65, 65), (211, 317), (64, 128)])
@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_pad_and_crop(height, width, multiple):
    x = torch.rand(2, 3, height, width)
    padded = pad(x, multiple)
    assert padded.shape[-2] % multiple == 0 == padded.shape[-1] % multiple
    assert 0 <= padded.shape[-2] - height < multiple and 0 <= padded.shape[-1] - width < multiple
    assert torch.equal(crop(padded, height, width), x)
    assert (padded[..., height:, width:] == x[..., -1:, -1:]).all()
    assert torch.equal(pad(x[0], multiple), padded[0])


def test_output_types():
    x = torch.tensor([-1.5, -1, -1 + 1.2 / 255, 0, 1, 2]).expand(1, 3, 2, 6)
    assert np.asarray(to_output(x)[0])[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]  # 0.6 is rounded, not cut
    array, tensor = to_output(x, "np"), to_output(x.half(), "pt")
    assert array.shape == (1, 2, 6, 3) and array.dtype == np.float32 and array.min() == 0 and array.max() == 1
    assert tensor.shape == (1, 3, 2, 6) and tensor.dtype == torch.float32 and tensor[0, 0, 0, 3] == 0.5
    with pytest.raises(ValueError, match="'latent'"):
        to_output(x, "latent")


def test_side_by_side():
    both = side_by_side(Image.new("RGB", (3, 4), "red"), Image.new("RGB", (5, 2), "blue"), gap=2)
    assert both.size == (10, 4)
    assert [both.getpixel((x, 0)) for x in (2, 3, 5)] == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]


def test_open_image(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(64, 64)).save(path)
    assert np.array_equal(np.asarray(open_image(path)), picture(64, 64))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.png: not a picture that Pillow can read"):
            open_image(path)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.png")


def test_open_image_keeps_late_metadata(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert "one of 2 frames stored" in to_tensor(open_image(tmp_path / "a.gif"))[1]


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="MAX_IMAGE_PIXELS"):
            open_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", [*Image.MODES, "I;16", "I;16B", "I;16L"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_every_mode_of_pillow_is_taken(mode, size):
    x, _ = to_tensor(Image.new(mode, size))
    assert x.shape == (3, size[1], size[0]) and x.abs().max() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e-3, 1.001, 1e30])
@pytest.mark.parametrize("kind", ["array", "tensor", "picture", "half"])
def test_one_sample_out_of_range_is_told(bad, kind):
    samples = np.full((4, 4), 0.5, dtype=np.float32)
    samples[2, 1] = bad
    image = {
        "array": samples,
        "tensor": torch.from_numpy(samples)[None],
        "picture": Image.fromarray(samples),
        "half": torch.from_numpy(samples)[None].bfloat16()
        if abs(bad) > 1.002 or bad != bad
        else torch.full((1, 4, 4), 2.0).half(),
    }[kind]
    with pytest.raises(ValueError, match="permitted is \\[0, 1\\]"):
        to_tensor(image)


def test_unreadable_files(tmp_path):
    with pytest.raises(OSError):
        open_image(tmp_path)
    noise = np.random.default_rng(0).bytes(2000)
    for suffix, magic in (
        ("png", b"\x89PNG\r\n\x1a\n"),
        ("jpg", b"\xff\xd8\xff\xe0"),
        ("gif", b"GIF89a"),
        ("webp", b"RIFF\0\0\0\0WEBP"),
    ):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(magic + noise)
        with pytest.raises(ValueError, match="not a picture"):
            open_image(path)
