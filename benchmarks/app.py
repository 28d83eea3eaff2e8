"""The page under 50 uploads, good, broken, huge and hostile: what it answers to each, and its memory.

    python benchmarks/app.py            # needs the extra `app`; Linux, for the memory

Starts the page in a process of its own, with pictures of 16,384 pixels at most, and uploads to it as a browser does. Prints a line an upload and
the memory; exits with 1 if any answer was no single line, a good upload failed, a bad one did not, or memory grew after the first ten.
"""

import argparse
import io
import os
import random
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from diffusers_compress.app import MAX_UPLOAD, PHOTO

SERVER = "from diffusers_compress.app import *; serve(build(Engine(max_pixels=16_384)), server_port={port}, quiet=True)"
SETTINGS = ("DiffC", 0.5, 0.5)  # codec, bits per pixel, realism
GROWTH = 64  # MiB that memory may grow by after the first ten uploads: what PyTorch and Python keep for later


def file_of(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def claiming(png, width, height):
    """The PNG with another size in its header, and that header's checksum."""
    head = png[12:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]


def photos(draw):
    """(file name, its bytes, whether it can be coded)."""
    photo = Image.open(PHOTO).resize((150, 100))
    png, jpeg = file_of(photo), file_of(photo, "JPEG")
    yield "photo.png", png, True
    yield "photo.jpg", jpeg, True
    yield "12 megapixels.jpg", file_of(photo.resize((4000, 3000)), "JPEG"), True
    yield "cmyk.jpg", file_of(photo.convert("CMYK"), "JPEG"), True
    yield "grey.png", file_of(photo.convert("L")), True
    yield "palette.png", file_of(photo.convert("P")), True
    yield "alpha.png", file_of(photo.convert("RGBA")), True
    yield "16 bit.png", file_of(Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)), True
    yield (
        "animation.gif",
        file_of(photo.convert("P"), "GIF", save_all=True, append_images=[photo.rotate(180).convert("P")] * 5),
        True,
    )
    yield "1x1.png", file_of(Image.new("RGB", (1, 1))), False  # a file of at most 0.5 bits per pixel has no room for a header
    yield "1x4000.png", file_of(photo.resize((1, 4000))), True
    yield "../../etc/name.png", png, True
    yield "<img src=x onerror=alert(1)>.png", png, True
    yield "empty.png", b"", False
    yield "text.jpg", b"I am no picture.\n" * 1000, False
    yield "page.png", b"<html><script>alert(1)</script></html>", False
    yield "drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", False
    yield "entities.svg", b"<!DOCTYPE x [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><svg>&b;</svg>", False
    yield "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(/etc/passwd) (r) file\n", False
    yield "cut.png", png[: len(png) // 2], False
    yield "cut.jpg", jpeg[: len(jpeg) // 2], False
    yield "bomb.png", claiming(png, 60_000, 60_000), False
    yield "too large.png", claiming(png, 9_000, 9_000), False
    yield "wide.png", claiming(png, 2_000_000_000, 1), False
    text = b"zTXt" + b"Comment\0\0" + zlib.compress(bytes(200_000_000))
    yield (
        "text bomb.png",
        png[:33] + (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big") + png[33:],
        None,
    )
    yield "archive.zip", b"PK\3\4" + draw.randbytes(1000), False
    yield "program.exe", b"MZ" + draw.randbytes(100_000), False
    yield "above the limit.png", png + bytes(MAX_UPLOAD), False
    for i in range(6):
        broken = bytearray(jpeg if i % 2 else png)
        for _ in range(20):
            broken[draw.randrange(8, len(broken))] = draw.randrange(256)
        yield f"broken {i}.{'jpg' if i % 2 else 'png'}", bytes(broken), None


def layers(draw):
    """(file name, its bytes, whether it is a stroke of the brush): what can be uploaded in place of one."""
    drawn = Image.new("RGBA", (150, 100))
    drawn.paste((255, 0, 0, 255), (40, 20, 90, 70))
    png = file_of(drawn)
    yield "stroke.png", png, True
    yield "no stroke.png", file_of(Image.new("RGBA", (150, 100))), True
    yield "huge stroke.png", file_of(Image.new("RGBA", (9_000, 9_000))), False
    yield "bomb.png", claiming(png, 60_000, 60_000), False
    yield "cut.png", png[: len(png) // 2], False
    yield "text.png", b"I am no picture.", False
    yield "program.png", b"MZ" + draw.randbytes(100_000), False


def files(data, draw):
    """(file name, its bytes, whether it can be decoded), from a file that can."""
    yield "photo.dfc", data, True
    yield "half.dfc", data[: len(data) // 2], True  # a coarser picture
    yield "empty.dfc", b"", False
    yield "head.dfc", data[:5], False
    yield "text.dfc", b"hello", False
    yield "photo.png", file_of(Image.new("RGB", (9, 9))), False
    yield "noise.dfc", draw.randbytes(10_000), False
    yield "large.dfc", draw.randbytes(1_000_000), False
    yield "tail.dfc", data + b"more", False
    for i in range(6):
        broken = bytearray(data)
        broken[draw.randrange(2, len(data))] ^= 1 << draw.randrange(8)
        yield f"broken {i}.dfc", bytes(broken), False
    yield "again.dfc", data, True


def resident(process):
    """MiB of memory."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[0]) / 1024


def ask(client, path, api_name, *settings):
    """(whether it went well, what the page said)."""
    try:
        out = client.predict(handle_file(str(path)), *settings, api_name=api_name)
        return True, out[1].replace("\n", " ")
    except (AppError, ValueError, OSError) as error:
        return False, str(error)
    except Exception as error:  # noqa: BLE001 - httpx's kinds, of an upload that the server refuses
        return False, f"refused by the server: {error}".partition("\n")[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=7899)
    args = parser.parse_args()

    draw = random.Random(0)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    server = subprocess.Popen([sys.executable, "-c", SERVER.format(port=args.port)], env=environment)
    faults, memory = [], []
    try:
        client = connect(args.port)
        with tempfile.TemporaryDirectory() as folder:

            def write(name, content):
                path = Path(folder, name.replace("/", "_"))
                path.write_bytes(content)
                return path

            def upload(name, content, wanted, api_name, *settings):
                good, said = ask(client, write(name, content), api_name, *settings)
                memory.append(resident(server))
                print(f"{len(memory):3} {memory[-1]:6.0f} MiB  {name}: {'' if good else 'refused: '}{said}", flush=True)
                if wanted not in (None, good) or "\n" in said or not said.strip():
                    faults.append(name)

            upload("warm up.jpg", PHOTO.read_bytes(), True, "/compress", *SETTINGS, None)
            made = client.predict(handle_file(str(PHOTO)), *SETTINGS, None, api_name="/compress")
            data = Path(made[2]["value"] if isinstance(made[2], dict) else made[2]).read_bytes()
            for name, content, wanted in photos(draw):
                upload(name, content, wanted, "/compress", *SETTINGS, None)
            for name, content, wanted in layers(draw):
                layer = handle_file(str(write(name, content)))
                painted = {"background": None, "layers": [layer], "composite": None}
                upload(f"photo, with the brush's {name}", PHOTO.read_bytes(), wanted, "/compress", *SETTINGS, painted)
            for name, content, wanted in files(data, draw):
                upload(name, content, wanted, "/decompress", 0.5)
    finally:
        server.terminate()
        server.wait()
    growth = max(memory[10:]) - max(memory[:10])
    print(
        f"{len(memory)} uploads; memory {max(memory[:10]):.0f} MiB in the first ten, {max(memory[10:]):.0f} after: {growth:+.0f} MiB"
    )
    if faults or growth > GROWTH:
        raise SystemExit(f"faults: {', '.join(faults) or 'memory grew'}")


def connect(port):
    """A client of the page, once it is up."""
    import time

    for _ in range(150):
        try:
            return Client(f"http://127.0.0.1:{port}", verbose=False)
        except Exception:  # noqa: BLE001 - not yet
            time.sleep(2)
    raise SystemExit("the page did not start")


if __name__ == "__main__":
    main()
