"""All figures of README.md and docs/, drawn anew:

    python docs/figures.py

`how_it_works.svg` and `compare.jpg` show the embedded model and follow its weights; the others are drawings. Text stands in filled boxes,
so that the figures can be read on light pages and on dark ones.
"""

import base64
import io
import subprocess
import sys
from html import escape
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parent
# kind of box -> its colour; white text on each has a contrast of 4.5 or more
COLOURS = {"picture": "#1a7f37", "network": "#0969da", "sum": "#59636e", "file": "#bc4c00"}
WIDTH, COLUMN = 520, 238
FONT = "font-family='system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif'"

# codec -> what the encoder does, what the file holds, what the decoder does: kind of box and its text
FLOWS = {
    "diffc": (
        [
            ("picture", "photo"),
            ("network", "autoencoder: latent x_0"),
            ("network", "each step: guess x_0 from x_t"),
            ("sum", "each step: which shared noise\nleads to the photo?"),
        ],
        "file: the numbers of the noises, step after step;\na file that is cut gives a coarser picture",
        [
            ("network", "each step: the same guess"),
            ("sum", "each step: take the noise\nof that number"),
            ("network", "last steps without bits:\nprobability-flow ODE"),
            ("picture", "autoencoder: picture"),
        ],
    ),
    "relic": (
        [
            ("picture", "photo"),
            ("network", "autoencoder: latent x_0"),
            ("sum", "round to steps of width D"),
            ("network", "entropy model: how probable\nis each number?"),
        ],
        "file: the rounded numbers, range-coded",
        [
            ("network", "the same entropy model"),
            ("sum", "x_0 + rounding error: as noisy\nas x_t is at some t"),
            ("network", "diffusion model: from t to 0"),
            ("picture", "autoencoder: picture"),
        ],
    ),
    "refine": (
        [
            ("picture", "photo"),
            ("sum", "JPEG, WebP, AVIF, JPEG XL\nor JPEG 2000 encoder"),
            ("network", "autoencoder: how much is lost\nin each channel of the latent?"),
        ],
        "file: the JPEG (or other) file, whole;\na byte for the loss in each channel",
        [
            ("sum", "any JPEG decoder: the base"),
            ("network", "add noise up to the level of\nthe loss; diffusion model to 0"),
            ("sum", "keep what the base says:\nthe cells of its coefficients"),
            ("picture", "picture"),
        ],
    ),
    "perco": (
        [
            ("picture", "photo"),
            ("network", "hyper-encoder: a small grid\nof codebook entries"),
            ("network", "captioner, or you: a caption"),
        ],
        "file: numbers of the entries, caption, seed",
        [
            ("sum", "noise of that seed"),
            ("network", "diffusion model that sees\nthe grid and the caption"),
            ("picture", "autoencoder: picture"),
        ],
    ),
    "text_sketch": (
        [
            ("picture", "photo"),
            ("network", "captioner, inversion or you:\na prompt"),
            ("sum", "edge detector: lines on a grid;\nmeans of 8 x 5 cells"),
        ],
        "file: token numbers, lines, thumbnail, seed",
        [
            ("sum", "noise of that seed"),
            ("network", "model and ControlNet that see\nprompt and lines"),
            ("picture", "picture, coloured again"),
        ],
    ),
    "uqdm": (
        [
            ("picture", "photo, as pixels"),
            ("network", "each step: mean and width\nof the next, less noisy z"),
            ("sum", "each step: round z, with a\nshared uniform dither"),
        ],
        "file: the rounded numbers of a few steps;\nthen, if wanted, the pixels",
        [
            ("network", "each step: the same mean\nand width"),
            ("sum", "each step: z from number\nand dither"),
            ("picture", "preview, or the exact pixels"),
        ],
    ),
    "cdc": (
        [
            ("picture", "photo, as pixels"),
            ("network", "learned transform: latent\nand side information"),
            ("sum", "round; probabilities in\ninteger arithmetic"),
        ],
        "file: side information and latent, range-coded",
        [
            ("network", "features of the latent"),
            ("network", "diffusion model that sees\nthem, from noise to pixels"),
            ("picture", "picture"),
        ],
    ),
}


def text(x, y, line, size=14, colour="white", anchor="middle", weight=400):
    return f"<text x='{x}' y='{y}' font-size='{size}' fill='{colour}' text-anchor='{anchor}' font-weight='{weight}'>{escape(line)}</text>"


def box(x, y, width, height, kind, lines):
    """A filled box with lines of text in its middle."""
    drawn = f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='7' fill='{COLOURS[kind]}'/>"
    first = y + height / 2 + 5 - 9 * (len(lines) - 1)
    return drawn + "".join(text(x + width / 2, first + 18 * i, line) for i, line in enumerate(lines))


def arrow(x, y, x_end, y_end):
    """Grey, which is seen on white and on black."""
    return f"<line x1='{x}' y1='{y}' x2='{x_end}' y2='{y_end}' stroke='#848d97' stroke-width='2.5' marker-end='url(#tip)'/>"


def write_svg(name, height, label, parts):
    tip = (
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='5' markerHeight='5' orient='auto'>"
        "<path d='M0 0L8 4L0 8z' fill='#848d97'/></marker></defs>"
    )
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}' role='img' {FONT}>"
    body = "\n".join([head, f"<title>{escape(label)}</title>", tip, *parts, "</svg>\n"])
    (DOCS / name).write_text(body, encoding="utf-8")


def flow(codec, encoder, file, decoder):
    """`CODEC_flow.svg`: the encoder's column downward, the file below both, the decoder's column upward from it."""
    step, gap, top = 46, 16, 36
    rows = max(len(encoder), len(decoder))
    right = WIDTH - COLUMN
    floor = top + rows * (step + gap)
    parts = [box(0, 0, COLUMN, 24, "sum", ["encoder"]), box(right, 0, COLUMN, 24, "sum", ["decoder"])]
    for x, boxes, places in (
        (0, encoder, range(len(encoder))),
        (right, decoder, [rows - 1 - i for i in range(len(decoder))]),
    ):
        for (kind, words), place in zip(boxes, places):
            parts.append(box(x, top + place * (step + gap), COLUMN, step, kind, words.split("\n")))
        middle = x + COLUMN / 2
        if x == 0:
            ends = [top + place * (step + gap) + step for place in places]
            parts += [arrow(middle, y, middle, y + gap) for y in ends[:-1]]
            parts.append(arrow(middle, ends[-1], middle, floor))
        else:
            starts = [top + place * (step + gap) + step + gap for place in places]
            parts += [arrow(middle, y, middle, y - gap) for y in starts]
    parts.append(box(0, floor, WIDTH, step, "file", file.split("\n")))
    write_svg(f"{codec}_flow.svg", floor + step, f"How {codec} works", parts)


def thumbnail(image, x, y, width):
    file = io.BytesIO()
    image.resize((2 * width, round(2 * width * image.height / image.width))).save(file, "WEBP", quality=60)
    height = round(width * image.height / image.width)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<image x='{x}' y='{y}' width='{width}' height='{height}' href='data:image/webp;base64,{data}'/>"


def how_it_works():
    """DiffC on the demo's photo: what both sides hold after some of the steps, and what the model guesses from it."""
    from diffusers_compress import DiffCPipeline, embedded_model, images
    from diffusers_compress.cli.demo import demo_photo
    from diffusers_compress.codecs import describe
    from diffusers_compress.format.container import read_header

    pipe = DiffCPipeline.from_pretrained(embedded_model())
    data = pipe.compress(Image.open(demo_photo()), target_bpp=0.15).bitstreams[0]
    sizes = {}  # steps that are whole -> bytes that hold them
    for size in range(len(data), read_header(data)[1] - 1, -1):
        sizes[describe(data[:size])["steps_present"]] = size

    columns = []
    for steps in (0, 1, 3, max(sizes)):
        cut, seen = data[: sizes[steps]], []
        keep = lambda pipe, step, timestep, tensors: seen.append(tensors["latents"])  # noqa: E731
        guess = pipe.decompress(cut, realism=0, callback_on_step_end=keep).images[0]
        x_t = images.to_output(pipe.decode_latent(seen[-1]))[0].crop((0, 0, *guess.size))
        columns.append((f"{len(cut):,} bytes" if steps else "0 bytes", x_t, guess))

    width, gap = 121, 12
    height = round(width * guess.height / guess.width)
    parts = [box(0, 0, WIDTH, 28, "sum", ["Encoder and decoder go the same way from the same noise:"])]
    second = 40 + height + 44
    for i, (label, x_t, guess) in enumerate(columns):
        x, middle = i * (width + gap), i * (width + gap) + width / 2
        parts += [thumbnail(x_t, x, 40, width), thumbnail(guess, x, second, width)]
        parts += [arrow(middle, 40 + height + 2, middle, 40 + height + 12), arrow(middle, second - 9, middle, second - 1)]
        parts.append(box(x, 40 + height + 13, width, 22, "network", ["model's guess"]))
        parts.append(box(x, second + height + 8, width, 24, "file", [label]))
        if i:
            parts.append(arrow(x - gap - 1, 40 + height / 2, x, 40 + height / 2))
    foot = [
        "The file holds the bits that steer the noise towards the photo.",
        "The better the model guesses, the fewer it takes.",
    ]
    parts.append(box(0, second + height + 42, WIDTH, 48, "file", foot))
    write_svg("how_it_works.svg", second + height + 90, "DiffC: from noise to a photo, a few hundred bytes a step", parts)


def main():
    for codec, columns in FLOWS.items():
        flow(codec, *columns)
    how_it_works()
    script = DOCS.parent / "examples" / "compare.py"
    subprocess.run([sys.executable, script, "--realism", "0.5", "--out", DOCS / "compare.jpg"], check=True)


if __name__ == "__main__":
    main()
