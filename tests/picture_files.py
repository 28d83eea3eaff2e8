"""Small files of every kind of TIFF, PNG, AVIF and ICC profile, written by hand: no library writes them all."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

H, W = 16, 24
y, x = np.mgrid[0:H, 0:W]
RGB = np.stack([60 + 120 * x / W, 180 - 100 * y / H, 90 + 60 * (x + y) / (H + W)], -1).round().astype(np.uint8)
PICTURE = Image.fromarray(RGB)
ONE = RGB[..., :1].astype(float)  # a picture of grey, [H, W, 1]
OPACITY = (255 * y / (H - 1))[..., None]
WITH_ALPHA = np.dstack([RGB, OPACITY.round().astype(np.uint8)])
ON_WHITE = (RGB * OPACITY + 255 * (255 - OPACITY)) / 255


def levels(samples, bits):
    """Samples of 255 levels, rounded to integers of so many bits; and what they then are of 255 again."""
    whole = np.rint(samples / 255 * (2**bits - 1)).astype(np.uint32)
    return whole, whole * 255 / (2**bits - 1)


def pack(whole, bits):
    """Integers [H, W, C] as rows of bits, the high ones first, each row filled up to bytes."""
    binary = whole.reshape(len(whole), -1, 1) >> np.arange(bits - 1, -1, -1) & 1
    return np.packbits(binary.reshape(len(whole), -1).astype(np.uint8), axis=1)


def tiff(data, bits, photometric, order="<", tags=(), compression=1):
    """A TIFF of one strip, or of one for each plane if `data` is a list. `tags`, by their numbers, come beside the usual."""
    planes = data if isinstance(data, list) else [data]
    strips = [zlib.compress(plane) if compression == 8 else bytes(plane) for plane in planes]
    bits = bits if isinstance(bits, tuple) else (bits,)
    fields = {256: W, 257: H, 258: bits, 259: compression, 262: photometric, 273: (0,) * len(strips), 277: len(bits), 278: H}
    fields |= {279: tuple(map(len, strips)), 284: 2 if isinstance(data, list) else 1} | dict(tags)
    fields = {tag: v if isinstance(v, (tuple, bytes)) else (v,) for tag, v in sorted(fields.items()) if v is not None}
    long, rational = {256, 257, 273, 278, 279}, {318, 319, 529, 532}

    def encode(tag, values):
        if isinstance(values, bytes):
            return 7, values
        if tag in rational:
            return 5, b"".join(struct.pack(order + "II", round(v * 1000), 1000) for v in values)
        return (
            (4, struct.pack(f"{order}{len(values)}I", *values))
            if tag in long
            else (3, struct.pack(f"{order}{len(values)}H", *values))
        )

    start = 8 + 2 + 12 * len(fields) + 4
    bodies = {tag: encode(tag, values)[1] for tag, values in fields.items()}
    first = start + sum(len(body) for body in bodies.values() if len(body) > 4)
    fields[273] = tuple(first + sum(map(len, strips[:i])) for i in range(len(strips)))
    directory, rest = struct.pack(order + "H", len(fields)), b""
    for tag, values in fields.items():
        kind, body = encode(tag, values)
        directory += struct.pack(order + "HHI", tag, kind, len(values))
        directory += body.ljust(4, b"\0") if len(body) <= 4 else struct.pack(order + "I", start + len(rest))
        rest += body if len(body) > 4 else b""
    return (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8) + directory + bytes(4) + rest + b"".join(strips)


def deep(samples, order="<"):
    return (samples.astype(np.uint32) * 257).astype(order + "u2").tobytes()


def apart(samples, dump=np.ndarray.tobytes):
    """Samples [H, W, C] in planes."""
    return [dump(np.ascontiguousarray(samples[..., c])) for c in range(samples.shape[-1])]


def png(data, bits, colour, *chunks):
    """A PNG of rows of bytes [H, n] with further chunks (name, content)."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = np.frombuffer(data, np.uint8).reshape(H, -1) if isinstance(data, bytes) else data
    samples = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())
    head = (b"IHDR", struct.pack(">IIBBBBB", W, H, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in (head, *chunks, (b"IDAT", samples), (b"IEND", b"")))


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


# Colorants as seen from D50, of published profiles
COLORANTS = {
    "sRGB": ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)),
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)),
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)),
    "BT.2020": ((0.67344, 0.27904, -0.00194), (0.16567, 0.67534, 0.02998), (0.12505, 0.04562, 0.79687)),
}


def icc(name, gamma, colorants="sRGB", grey=False):
    """A small ICC profile of version 2."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * v) for v in values))

    curve, text = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)), name.encode() + b"\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": xyz((0.9642, 1, 0.8249))}
    if grey:
        tags[b"kTRC"] = curve
    else:
        tags |= {letter + b"XYZ": xyz(v) for letter, v in zip((b"r", b"g", b"b"), COLORANTS[colorants], strict=True)}
        tags |= {letter + b"TRC": curve for letter in (b"r", b"g", b"b")}
    return profile(b"GRAY" if grey else b"RGB ", b"XYZ ", tags)


def cmyk_icc():
    """A profile of CMYK that prints grey: L* is the mean of 1 - C, 1 - M and 1 - Y, times 1 - K."""
    corners = ((c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1))
    lightness = [(3 - c - m - y) * 85 * (1 - k) for c, m, y, k in corners]
    table = b"mft1\0\0\0\0\4\3\2\0" + struct.pack(">9i", *(65536 * v for v in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table += bytes(range(256)) * 4 + b"".join(bytes([v, 128, 128]) for v in lightness) + bytes(range(256)) * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": table, b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)})


def profile(space, connection, tags):
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, kind, space, connection)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def by_icc(samples, gamma, colorants="sRGB"):
    """What LittleCMS makes of 8-bit samples of a gamma and colorants: the other way to what the package computes by itself."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc("reference", gamma, colorants)))
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(samples), source, ImageCms.createProfile("sRGB")))


def by_gamma(samples, gamma):
    """sRGB of samples of 255 levels with a gamma."""
    light = (samples / 255) ** gamma
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def chromaticities(*values):
    return b"cHRM", struct.pack(">8I", *(round(v * 100_000) for v in values))


def gamma(value):
    return b"gAMA", struct.pack(">I", round(value * 100_000))
