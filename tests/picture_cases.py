"""The rows of docs/pictures.md: for each, files with the picture that they describe and notes, or the message of the refusal."""

import io
import struct
import zlib
from functools import partial

import numpy as np
from picture_files import (
    ON_WHITE,
    ONE,
    OPACITY,
    PICTURE,
    RGB,
    WITH_ALPHA,
    H,
    W,
    apart,
    by_gamma,
    by_icc,
    chromaticities,
    cmyk_icc,
    deep,
    gamma,
    icc,
    levels,
    pack,
    png,
    saved,
    tiff,
)
from PIL import Image, ImageCms

GREY, ALPHA = "greyscale stored as colour", "alpha channel composited on white and not stored"
DEEP, FLOATS = "{} bits per sample stored as 8", "floating-point samples taken as sRGB"
PROFILE, NO_PROFILE = "colour profile converted to sRGB", "colour profile could not be applied; colours taken as sRGB"
ADOBE, CICP = "colours converted to sRGB (EXIF: Adobe RGB)", "colours converted to sRGB (cICP)"
GAMA, CHRM = "colours converted to sRGB (gAMA, cHRM)", "colours converted to sRGB (gAMA; cHRM says no colours)"


def tiff_grey():
    for bits in (1, 2, 4, 8):
        whole, wanted = levels(ONE, bits)
        for order in "<>":
            yield tiff(pack(whole, bits).tobytes(), bits, 1, order), wanted, [GREY]
            yield tiff(pack(2**bits - 1 - whole, bits).tobytes(), bits, 0, order), wanted, [GREY]


def tiff_deep_grey():
    for compression in (1, 8):
        whole, wanted = levels(ONE, 12)
        yield tiff(pack(whole, 12).tobytes(), 12, 1, compression=compression), wanted, [DEEP.format(12), GREY]
        for order in "<>":
            yield tiff(deep(ONE, order), 16, 1, order, compression=compression), ONE, [DEEP.format(16), GREY]
        yield tiff(deep(255 - ONE), 16, 0, compression=compression), ONE, [DEEP.format(16), GREY]


def tiff_floats():
    for order in "<>":
        for white_is_zero in (False, True):
            samples = (1 - ONE / 255 if white_is_zero else ONE / 255).astype(order + "f4")
            data = tiff(samples.tobytes(), 32, 1 - white_is_zero, order, {339: 3})
            yield data, ONE, [FLOATS, DEEP.format(32), GREY]
    for bad in (ONE, np.where(ONE > 70, ONE / 255, np.nan), ONE / 255 - 0.3):
        yield tiff(bad.astype("<f4").tobytes(), 32, 1, tags={339: 3}), r"permitted is \[0, 1\]"


def tiff_unclear():
    yield tiff(RGB[..., 0].tobytes(), 8, 1, tags={339: 2}), "signed samples"
    yield tiff(deep(ONE // 2), 16, 1, tags={339: 2}), "signed samples"
    yield tiff(ONE.astype("<i4").tobytes(), 32, 1, tags={339: 2}), "signed samples"
    yield tiff(ONE.astype("<u4").tobytes(), 32, 1), "integers of 32 bits"
    yield tiff(RGB[..., 0].tobytes(), 8, None), "no PhotometricInterpretation"


def tiff_rgb():
    for order in "<>":
        for compression in (1, 8):
            yield tiff(RGB.tobytes(), (8,) * 3, 2, order, compression=compression), RGB, []
            yield tiff(apart(RGB), (8,) * 3, 2, order, compression=compression), RGB, []


def tiff_deep_rgb():
    for order in "<>":
        for compression in (1, 8):
            yield tiff(deep(RGB, order), (16,) * 3, 2, order, compression=compression), RGB, [DEEP.format(16)]
        yield tiff(apart(RGB, partial(deep, order=order)), (16,) * 3, 2, order, compression=8), RGB, [DEEP.format(16)]


def tiff_planes():
    yield tiff(apart(RGB, deep), (16,) * 3, 2), "planes"
    yield tiff(apart(np.dstack([RGB, RGB[..., 0]]), deep), (16,) * 4, 5), "planes"
    yield tiff(apart(RGB), (8,) * 3, 8), "planes"
    yield tiff(apart(RGB), (8,) * 3, 8, compression=8), "planes"
    yield tiff(apart(RGB), (8,) * 3, 6, tags={530: (1, 1)}), "planes"
    yield tiff(apart(WITH_ALPHA), (8,) * 4, 2, tags={338: 1}), "planes|raw mode"


def tiff_alpha():
    premultiplied = np.rint(RGB * OPACITY / 255).astype(np.uint8)
    for compression in (1, 8):
        make = partial(tiff, compression=compression)
        for extra in ({}, {338: 2}):
            yield make(WITH_ALPHA.tobytes(), (8,) * 4, 2, tags=extra), ON_WHITE, [ALPHA]
            yield make(deep(WITH_ALPHA), (16,) * 4, 2, tags=extra), ON_WHITE, [DEEP.format(16), ALPHA]
        yield make(apart(WITH_ALPHA), (8,) * 4, 2, tags={338: 2}), ON_WHITE, [ALPHA]
        associated = np.dstack([premultiplied, WITH_ALPHA[..., 3]])
        yield make(associated.tobytes(), (8,) * 4, 2, tags={338: 1}), ON_WHITE, [ALPHA]
        yield make(deep(associated), (16,) * 4, 2, tags={338: 1}), ON_WHITE, [DEEP.format(16), ALPHA]
        yield make(WITH_ALPHA[..., [0, 3]].tobytes(), (8,) * 2, 1, tags={338: 2}), ON_WHITE[..., :1], [ALPHA, GREY]
        yield make(associated[..., [0, 3]].tobytes(), (8,) * 2, 1, tags={338: 1}), ON_WHITE[..., :1], [ALPHA, GREY]


def tiff_extra():
    note = "extra channels not stored"
    yield tiff(WITH_ALPHA.tobytes(), (8,) * 4, 2, tags={338: 0}), RGB, [note]
    yield tiff(deep(WITH_ALPHA), (16,) * 4, 2, tags={338: 0}), RGB, [DEEP.format(16), note]
    yield tiff(WITH_ALPHA[..., [0, 3]].tobytes(), (8,) * 2, 1, tags={338: 0}), ONE, [note, GREY]


def tiff_palette():
    for bits in (1, 2, 4, 8):
        whole, _ = levels(ONE, bits)
        colours = np.random.default_rng(0).integers(0, 256, (2**bits, 3))
        wanted = colours[whole[..., 0]]
        for scale in (257, 1):
            colour_map = tuple(int(c) * scale for c in colours.T.ravel())
            yield tiff(pack(whole, bits).tobytes(), bits, 3, tags={320: colour_map}), wanted, []


def tiff_cmyk():
    ink = np.dstack([255 - RGB, np.full((H, W, 1), 40, np.uint8)])
    wanted = (255 - ink[..., :3]) * (215 / 255)
    for order in "<>":
        yield tiff(ink.tobytes(), (8,) * 4, 5, order), wanted, ["CMYK converted to RGB"]
        yield tiff(deep(ink, order), (16,) * 4, 5, order), wanted, ["CMYK converted to RGB", DEEP.format(16)]
    yield tiff(apart(ink), (8,) * 4, 5), wanted, ["CMYK converted to RGB"]


def tiff_inks():
    yield tiff(WITH_ALPHA.tobytes(), (8,) * 4, 5, tags={332: 2}), "other inks"


def tiff_ycbcr():
    yield saved(PICTURE.convert("YCbCr"), "TIFF", compression="jpeg", quality=98), RGB, []
    samples = np.asarray(PICTURE.convert("YCbCr")).tobytes()
    for tags in ({}, {529: (0.299, 0.587, 0.114), 532: (0, 255, 128, 255, 128, 255)}):
        yield tiff(samples, (8,) * 3, 6, tags={530: (1, 1)} | tags), RGB, []


def tiff_other_ycbcr():
    samples = np.asarray(PICTURE.convert("YCbCr")).tobytes()
    yield tiff(samples, (8,) * 3, 6), "subsampled"
    yield tiff(samples, (8,) * 3, 6, tags={530: (1, 1), 529: (0.2126, 0.7152, 0.0722)}), "coefficients"
    yield tiff(samples, (8,) * 3, 6, tags={530: (1, 1), 532: (16, 235, 128, 240, 128, 240)}), "range"
    yield tiff(RGB.tobytes(), (8,) * 3, 2, tags={532: (16, 235) * 3}), "range"


def lab():
    transform = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(PICTURE, transform)


def tiff_lab():
    for compression in (1, 8):
        yield tiff(lab().tobytes("raw", "LAB"), (8,) * 3, 8, compression=compression), RGB, ["CIELAB converted to sRGB"]


def tiff_not_read():
    for photometric in (4, 9, 10, 32803, 32844, 34892):
        message = f"not a picture that Pillow can read .*PhotometricInterpretation {photometric}"
        yield tiff(RGB.tobytes(), (8,) * 3, photometric), message
    yield tiff(deep(RGB), (16,) * 3, 8), "BitsPerSample .16, 16, 16"
    yield tiff(RGB.astype("<f4").tobytes(), (32,) * 3, 2, tags={339: (3,) * 3}), "SampleFormat .3, 3, 3"
    yield tiff(RGB.tobytes(), 10, 1), "BitsPerSample .10"
    yield tiff(RGB.tobytes(), 24, 1), "BitsPerSample .24"
    yield tiff(deep(ONE), 12, 0), "BitsPerSample .12"
    yield tiff(deep(ONE, ">"), 16, 0, ">"), "BitsPerSample .16"


def tiff_colour_tags():
    note = "TIFF's colour tags neither applied nor stored"
    yield tiff(RGB.tobytes(), (8,) * 3, 2, tags={318: (0.3127, 0.329)}), RGB, [note]
    yield tiff(RGB.tobytes(), (8,) * 3, 2, tags={319: (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)}), RGB, [note]
    yield tiff(RGB.tobytes(), (8,) * 3, 2, tags={301: tuple(range(0, 65536, 256))}), RGB, [note]


def png_plain():
    for bits in (1, 2, 4, 8):
        whole, wanted = levels(ONE, bits)
        yield png(pack(whole, bits), bits, 0), wanted, [GREY]
        colours = np.random.default_rng(0).integers(0, 256, (2**bits, 3), dtype=np.uint8)
        yield png(pack(whole, bits), bits, 3, (b"PLTE", colours.tobytes())), colours[whole[..., 0]], []
    yield png(RGB.tobytes(), 8, 2), RGB, []


def png_deep():
    yield png(deep(ONE, ">"), 16, 0), ONE, [DEEP.format(16), GREY]
    yield png(deep(RGB, ">"), 16, 2), RGB, [DEEP.format(16)]


def png_alpha():
    grey = WITH_ALPHA[..., [0, 3]]
    yield png(WITH_ALPHA.tobytes(), 8, 6), ON_WHITE, [ALPHA]
    yield png(deep(WITH_ALPHA, ">"), 16, 6), ON_WHITE, [ALPHA, DEEP.format(16)]
    yield png(grey.tobytes(), 8, 4), ON_WHITE[..., :1], [ALPHA, GREY]
    yield png(deep(grey, ">"), 16, 4), ON_WHITE[..., :1], [ALPHA, DEEP.format(16)]


def png_transparent_colour():
    for bits in (1, 2, 4, 8, 16):
        whole, wanted = levels(ONE, bits)
        value = int(whole[0, 5, 0])
        data = png(pack(whole, bits), bits, 0, (b"tRNS", struct.pack(">H", value)))
        yield data, np.where(whole == value, 255, wanted), [ALPHA, GREY]
    colour = RGB[0, 5]
    wanted = np.where((RGB == colour).all(-1, keepdims=True), 255, RGB)
    yield png(RGB.tobytes(), 8, 2, (b"tRNS", struct.pack(">3H", *map(int, colour)))), wanted, [ALPHA]
    for bits, opacities in ((2, [255, 0, 255, 255]), (8, [128] * 90)):
        whole, _ = levels(ONE, bits)
        colours = np.random.default_rng(0).integers(0, 256, (2**bits, 3), dtype=np.uint8)
        opacity = np.array(opacities + [255] * (2**bits - len(opacities)))[:, None] / 255
        data = png(pack(whole, bits), bits, 3, (b"PLTE", colours.tobytes()), (b"tRNS", bytes(opacities)))
        yield data, (colours * opacity + 255 * (1 - opacity))[whole[..., 0]], [ALPHA]


def png_transparent_deep_colour():
    yield png(deep(RGB, ">"), 16, 2, (b"tRNS", struct.pack(">3H", 1000, 2000, 3000))), "16 bits with a transparent colour"


SRGB_CHRM = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
ADOBE_CHRM = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def png_gamma():
    for value in (1, 1 / 1.8, 1 / 2.6):
        yield png(RGB.tobytes(), 8, 2, gamma(value)), by_gamma(RGB, 1 / value), [GAMA]
        yield png(ONE.astype(np.uint8).tobytes(), 8, 0, gamma(value)), by_gamma(ONE, 1 / value), [GAMA, GREY]
        yield png(deep(ONE, ">"), 16, 0, gamma(value)), by_gamma(ONE, 1 / value), [GAMA, GREY, DEEP.format(16)]
        yield png(RGB.tobytes(), 8, 2, gamma(value), ADOBE_CHRM), by_icc(RGB, 1 / value, "Adobe RGB"), [GAMA]
    yield png(RGB.tobytes(), 8, 2, gamma(1 / 2.2), ADOBE_CHRM), by_icc(RGB, 2.2, "Adobe RGB"), [GAMA]
    yield png(RGB.tobytes(), 8, 2, ADOBE_CHRM), by_icc(RGB, 2.2, "Adobe RGB"), [GAMA]


def png_srgb():
    yield png(RGB.tobytes(), 8, 2, gamma(0.45455)), RGB, []
    yield png(RGB.tobytes(), 8, 2, gamma(0.45455), SRGB_CHRM), RGB, []
    yield png(RGB.tobytes(), 8, 2, SRGB_CHRM), RGB, []
    yield png(RGB.tobytes(), 8, 2, gamma(1), ADOBE_CHRM, (b"sRGB", b"\0")), RGB, []


def png_no_colours():
    for values in ([0] * 8, [0.3127, 0.329] * 4, [1, 0, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06]):
        yield png(RGB.tobytes(), 8, 2, gamma(0.45455), chromaticities(*values)), RGB, [CHRM]
        yield png(RGB.tobytes(), 8, 2, gamma(1), chromaticities(*values)), by_gamma(RGB, 1), [CHRM]


def png_cicp():
    def make(*codes):
        return png(RGB.tobytes(), 8, 2, (b"cICP", bytes(codes)))

    yield make(1, 8, 0, 1), by_gamma(RGB, 1), [CICP]
    yield make(1, 4, 0, 1), by_gamma(RGB, 2.2), [CICP]
    yield make(1, 5, 0, 1), by_gamma(RGB, 2.8), [CICP]
    yield make(12, 4, 0, 1), by_icc(RGB, 2.2, "Display P3"), [CICP]
    yield make(9, 4, 0, 1), by_icc(RGB, 2.2, "BT.2020"), [CICP]
    yield make(12, 13, 0, 1), by_icc(RGB, 2.2, "Display P3"), [CICP]
    for primaries in (5, 6, 7, 11):  # white stays white
        yield png(np.repeat(ONE, 3, 2).astype(np.uint8).tobytes(), 8, 2, (b"cICP", bytes([primaries, 13, 0, 1]))), ONE, [CICP]
    beside = (b"iCCP", b"x\0\0" + zlib.compress(icc("linear", 1.0)))
    yield png(RGB.tobytes(), 8, 2, (b"cICP", bytes([12, 4, 0, 1])), beside), by_icc(RGB, 2.2, "Display P3"), [CICP]


def png_hdr():
    for codes, message in (
        ((9, 16, 0, 1), "HDR picture .PQ"),
        ((9, 18, 0, 1), "HDR picture .HLG"),
        ((1, 13, 0, 0), "1-13-0-0"),
        ((1, 13, 1, 1), "1-13-1-1"),
        ((200, 13, 0, 1), "200-13-0-1"),
        ((1, 77, 0, 1), "1-77-0-1"),
    ):
        yield png(RGB.tobytes(), 8, 2, (b"cICP", bytes(codes))), message


def profile_of_srgb():
    for format in ("PNG", "TIFF"):
        yield saved(PICTURE, format, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()), RGB, []


def other_profile():
    for name in ("GIMP built-in Linear sRGB", "sRGB IEC61966-2.1", "another"):
        for format in ("PNG", "TIFF"):
            yield saved(PICTURE, format, icc_profile=icc(name, 1.0)), by_gamma(RGB, 1), [PROFILE]
        yield saved(PICTURE, "PNG", icc_profile=icc(name, 2.2, "Adobe RGB")), by_icc(RGB, 2.2, "Adobe RGB"), [PROFILE]
    indexed = PICTURE.quantize(64)
    wanted = by_gamma(np.asarray(indexed.convert("RGB")), 1.8)
    yield saved(indexed, "PNG", icc_profile=icc("another", 1.8)), wanted, [PROFILE]


def grey_profile():
    pictures = [
        (Image.fromarray(RGB[..., 0]), "PNG", GREY),
        (Image.fromarray(RGB[..., 0] * np.uint16(257)), "PNG", DEEP.format(16)),
        (Image.fromarray(RGB[..., 0] / np.float32(255)), "TIFF", FLOATS),
    ]
    for data, curve in ((icc("dot gain", 1.75, grey=True), 1.75), (icc("sRGB", 1.0, grey=True), 1), (icc("linear", 1.0), 1)):
        wanted = by_gamma(ONE, curve)
        for image, format, note in pictures:
            yield saved(image, format, icc_profile=data), wanted, [PROFILE, GREY, note]
        yield tiff(pack(levels(ONE, 12)[0], 12).tobytes(), 12, 1, tags={34675: data}), wanted, [PROFILE, GREY, DEEP.format(12)]


def wrong_profile():
    yield saved(PICTURE, "PNG", icc_profile=icc("dot gain", 1.75, grey=True)), RGB, [NO_PROFILE]
    yield saved(PICTURE, "PNG", icc_profile=b"broken"), RGB, [NO_PROFILE]
    yield saved(PICTURE, "PNG", icc_profile=icc("cut", 1.0)[:200]), RGB, [NO_PROFILE]
    yield png(RGB.tobytes(), 8, 2, (b"iCCP", b"x\0\0not deflated")), RGB, [NO_PROFILE]
    yield saved(PICTURE.convert("CMYK"), "TIFF", icc_profile=icc("x", 2.2)), RGB, [NO_PROFILE, "CMYK converted to RGB"]


def cmyk_profile():
    lightness = Image.fromarray(np.rint(RGB.mean(-1)).astype(np.uint8))
    neutral = Image.merge("LAB", (lightness, *[Image.new("L", (W, H), 128)] * 2))
    wanted = np.asarray(ImageCms.applyTransform(neutral, LAB_TO_SRGB))
    yield saved(PICTURE.convert("CMYK"), "TIFF", icc_profile=cmyk_icc()), wanted, [PROFILE, "CMYK converted to RGB"]


LAB_TO_SRGB = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def avif(primaries, transfer, **options):
    data = saved(PICTURE, "AVIF", quality=100, subsampling="4:4:4", **options)
    at = data.index(b"colrnclx") + 8
    return data[:at] + struct.pack(">HH", primaries, transfer) + data[at + 4 :]


def avif_colours():
    yield avif(1, 13), RGB, []
    yield avif(2, 2), RGB, []
    yield avif(12, 4), by_icc(RGB, 2.2, "Display P3"), [CICP]
    yield avif(1, 8), by_gamma(RGB, 1), [CICP]
    yield avif(9, 16), "HDR picture .PQ"


def avif_deep():
    image, data = Image.open(io.BytesIO(avif(1, 13))), bytearray(avif(1, 13))  # Pillow writes 8 bits only
    data[data.index(b"av1C") + 6] |= 0x40
    image.fp = io.BytesIO(data)
    yield image, RGB, [DEEP.format(10)]


def exif_adobe():
    for tags in ({0xA001: 2}, {0xA001: 65535, 0xA005: {1: "R03"}}):
        exif = Image.Exif()
        exif.get_ifd(0x8769).update(tags)
        data = saved(PICTURE, "JPEG", quality=98, subsampling=0, exif=exif.tobytes())
        yield data, by_icc(RGB, 2.2, "Adobe RGB"), [ADOBE, "EXIF and other metadata not stored"]


def orientation():
    for format in ("PNG", "TIFF", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 3
        yield saved(Image.fromarray(RGB[::-1, ::-1]), format, exif=exif, lossless=True), RGB, []


def frames():
    for format in ("PNG", "GIF", "TIFF", "WEBP"):
        data = saved(PICTURE, format, save_all=True, append_images=[PICTURE.rotate(180)], lossless=True)
        yield data, RGB, ["one of 2 frames stored"]


def other_deep_grey():
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", f"NAXIS1  = {W}", f"NAXIS2  = {H}", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + deep(ONE, ">")
    yield fits, "which does not say what sample is white"


def in_memory():
    for mode in ("RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        yield PICTURE.convert(mode), RGB, None
    yield lab(), RGB, None
    for mode in ("RGBA", "RGBa"):
        yield Image.fromarray(WITH_ALPHA).convert(mode), ON_WHITE, None
    for mode in ("LA", "La"):
        yield Image.fromarray(WITH_ALPHA[..., [0, 3]]).convert(mode), ON_WHITE[..., :1], None
    yield Image.fromarray(RGB[..., 0] * np.uint16(257)), ONE, None
    yield Image.fromarray(RGB[..., 0] * np.int32(257)), ONE, None
    yield Image.fromarray(RGB[..., 0] / np.float32(255)), ONE, None
