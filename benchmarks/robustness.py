"""Damaged and hostile files, and decoders that compute a little otherwise: makes the tables of ROBUSTNESS.md.

    python benchmarks/robustness.py
    python benchmarks/robustness.py --tables drift                   # this one alone
    python benchmarks/robustness.py --cases CASES --plain PLAIN      # awkward inputs, by the command `batch` and back

Every file of `tests/golden` is damaged in many ways, most of them with the checksums put right again, so that the damage gets past them. A
file has to be decoded, or refused by one of our errors: anything else counts as a crash, and whatever takes longer than SECONDS as
a hang. Each part runs in a process of its own, whose peak memory is measured. The same damage, less of it, is in `tests/test_robustness.py`.
"""

import argparse
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from diffusers_compress.codecs import describe  # noqa: E402
from diffusers_compress.contract import CODECS, LOSSLESS  # noqa: E402
from diffusers_compress.errors import BitstreamError  # noqa: E402
from diffusers_compress.format import container  # noqa: E402
from diffusers_compress.format.bits import write_varint  # noqa: E402
from diffusers_compress.format.limits import Limits  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
SECONDS = 60  # more than that for one small file is a hang
LIMITS = Limits(pixels=64 * 64)  # of the full decodes
NUMBERS = (0, *(plus + codec.number for codec in CODECS.values() for plus in (0, LOSSLESS)), 255)
SIDES = (0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 128, 16383, 16384, 2**21, 2**32, 2**35 - 1)


# --------------------------------------------------------------------------------------------------------------------- damage


def files(codec=None):
    """The golden files, or those of a codec."""
    return [path.read_bytes() for path in sorted(GOLDEN.glob(f"{codec or ''}*.dfc"))]


def seal(codec, width, height, fingerprint, parameters, payload, length=None):
    """A file with right checksums around whatever it holds; `length`: what it says of the parameters' length."""
    data = bytes([0xDF, 0xC1, codec]) + write_varint(width) + write_varint(height) + fingerprint
    data += write_varint(len(parameters) if length is None else length) + parameters
    data += container._crc16(data).to_bytes(2, "little") + payload
    return data + zlib.crc32(data).to_bytes(4, "little")


def spoil(rng, data, others):
    """Bytes with something flipped, cut, put in, taken out, repeated, moved or taken from another file."""
    data, i = bytearray(data), rng.randrange(len(data) + 1)
    j, other = rng.randint(i, len(data)), rng.choice(others)
    kind = rng.randrange(9)
    if kind == 0 and data:
        data[i % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1 and data:
        data[i % len(data)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
    elif kind == 2:
        del data[i:]
    elif kind == 3:
        data[i:i] = rng.randbytes(rng.choice((1, 2, 5, 50)))
    elif kind == 4:
        del data[i:j]
    elif kind == 5:
        data[i:i] = data[i:j]
    elif kind == 6:
        data = data[i:] + data[:i]
    elif kind == 7:
        data[i:] = other[min(i, len(other)) :]
    else:
        data[i:j] = bytes([rng.choice((0, 255))]) * (j - i)
    return bytes(data)


def parts(data):
    """[codec, width, height, fingerprint, parameters, payload] of a good file, cut or not."""
    header, offset = container.read_header(data)
    return [*vars(header).values(), data[offset : -container.CHECKSUM_BYTES]]


def damaged(rng, corpus):
    """A damaged file; in three of four the checksums are right."""
    data = rng.choice(corpus)
    if rng.random() < 0.25:
        for _ in range(rng.choice((1, 1, 2, 5))):
            data = spoil(rng, data, corpus)
        return data
    fields, other, length = parts(data), parts(rng.choice(corpus)), None
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(10)
        if kind == 0:
            fields[0] = rng.choice(NUMBERS)
        elif kind in (1, 2):
            fields[kind] = rng.choice(SIDES)
        elif kind == 3:
            fields[3] = rng.randbytes(4)
        elif kind == 4:
            length = rng.choice((0, 1, len(fields[4]) + 1, 65537, 2**32, 2**35 - 1))
        elif kind == 5:
            at = rng.randrange(6)
            fields[at] = other[at]
        elif kind == 6:
            fields[4], fields[5] = fields[5], fields[4]
        elif kind == 7:
            fields[5] = spoil(rng, fields[5], [other[5]])
        else:
            fields[4] = spoil(rng, fields[4], [other[4]])
    sealed = seal(*fields, length)
    return sealed[: rng.randrange(len(sealed))] if rng.random() < 0.1 else sealed


# ------------------------------------------------------------------------------------------------------------------ what becomes of it


class Hang(BaseException):
    """A file took longer than SECONDS."""


@contextmanager
def watched(seconds):
    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outcome(read, data):
    """What reading says of a file: its words, the kind of the error, or "hang" or "crash: ..."."""
    try:
        with watched(SECONDS):
            return read(data)
    except BitstreamError as error:
        return type(error).__name__
    except Hang:
        return "hang"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"crash: {type(error).__name__}: {error}"


def parsed(data):
    """All that a file says, as `diffusers-compress info` reads it, without a model."""
    facts = describe(data)
    return "read" if facts["complete"] else "read as cut short"


def decoder(codec, model="epsilon"):
    """Function of a file that decodes it in full, in one network call, with a tiny model."""
    from golden import make

    pipe = make.pipeline(codec, model)

    def decode(data):
        header, _ = container.read_header(data, LIMITS)
        (image,) = pipe.decompress(data, allow_other_model=True, limits=LIMITS, **make.PREVIEW.get(codec, {})).images
        assert image.size == (header.width, header.height) and image.mode == "RGB"
        return "decoded"

    return decode


def counted(part, count, seed=0):
    """Outcomes of `count` damaged files, the longest time, and the peak memory before and after."""
    codec = None if part == "container" else part
    read, corpus = parsed if codec is None else decoder(codec), files(codec)
    for data in corpus:
        outcome(read, data)  # whatever is loaded or built once
    rng, outcomes, examples, slowest, before = random.Random(seed), Counter(), {}, 0.0, peak()
    for _ in range(count):
        data, start = damaged(rng, corpus), time.perf_counter()
        found = outcome(read, data)
        slowest = max(slowest, time.perf_counter() - start)
        outcomes[found] += 1
        examples.setdefault(found, data.hex())
    crashes = {found: data for found, data in examples.items() if found.startswith(("crash", "hang"))}
    return {"part": part, "outcomes": outcomes, "crashes": crashes, "slowest": slowest, "before": before, "after": peak()}


def large_rows(size=1_000_000):
    """For each codec and channel: what a payload of so many bytes comes to, in seconds and MB beyond those before."""
    from diffusers_compress.codecs.diffc.format import Parameters, number_of, rank_of
    from diffusers_compress.coding.channels import CHANNELS

    budget, rng, rows = number_of(rank_of(8 * size, 5), 5), random.Random(0), []
    for channel, (number, *_) in CHANNELS.items():
        head = size.to_bytes(3, "little") if channel == "poisson" else b""
        payload = head + rng.randbytes(size if head else budget // 8)
        parameters = Parameters(number, budget, budget, [128]).to_bytes()
        rows.append(["diffc", channel, *cost("diffc", [1, 16, 16, bytes(4), parameters, payload])])
    for codec in {path.stem.partition("-")[0] for path in GOLDEN.glob("*.dfc")} - {"diffc"}:
        fields = parts(files(codec)[0])
        rows.append([codec, "", *cost(codec, [fields[0], 16, 16, bytes(4), fields[4], rng.randbytes(size)])])
    return sorted(rows)


def cost(codec, fields):
    """[outcome, seconds, MB] of a sealed file."""
    decode, data = decoder(codec), seal(*fields)
    outcome(decode, files(codec)[0])
    before, start = peak(), time.perf_counter()
    found = outcome(decode, data)
    return [found, f"{time.perf_counter() - start:.1f}", f"{peak() - before:.0f}"]


def peak():
    """MB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------------------------------ drift


def drift_rows(keys=("diffc", "relic", "text-sketch")):
    """Of these codecs, for each way of decoding: latent's rms drift, what the file's check says of it, dB between the pictures, dB lost."""
    import numpy as np
    import torch
    from diffusers.hooks import apply_layerwise_casting
    from diffusers.models.attention_processor import AttnProcessor

    from diffusers_compress import DiffCPipeline, embedded_model, images
    from diffusers_compress.cli.demo import demo_photo
    from diffusers_compress.codecs.diffc import rate

    rate.CHECKED_BYTES = 0
    picture = images.open_image(demo_photo()).convert("RGB").crop((100, 20, 356, 276))
    ends, reverse = [], DiffCPipeline.reverse
    DiffCPipeline.reverse = lambda self, *args: ends.append(reverse(self, *args)) or ends[-1]

    def load(key, dtype=torch.float32, device="cpu"):
        pipe = CODECS[key].pipeline_class().from_pretrained(embedded_model(key), dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def threads(pipe):
        torch.set_num_threads(2)

    def rounded(pipe):
        for weight in pipe.unet.parameters():
            weight.data = weight.data.to(torch.float8_e4m3fn).float()

    def quantized(config):
        def change(pipe):
            from torchao import quantization

            quantization.quantize_(pipe.unet, getattr(quantization, config)())

        return change

    ways = {
        "float32, 1 thread": {},
        "float32, 2 threads": {"change": threads},
        "float32, channels last": {
            "change": lambda pipe: [m.to(memory_format=torch.channels_last) for m in (pipe.unet, pipe.vae)]
        },
        "float32, plain attention": {"change": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor())},
        "float32, sliced attention": {"change": lambda pipe: pipe.enable_attention_slicing(1)},
        "bfloat16": {"dtype": torch.bfloat16},
        "float16": {"dtype": torch.float16},
        "weights that were rounded to float8_e4m3fn": {"change": rounded},
        "layerwise casting to float8_e4m3fn": {
            "change": lambda pipe: apply_layerwise_casting(pipe.unet, torch.float8_e4m3fn, torch.float32)
        },
    }
    if find_spec("torchao"):
        kinds = {"float8": "Float8WeightOnlyConfig", "int8": "Int8WeightOnlyConfig"}
        ways |= {f"torchao's {kind} weights": {"change": quantized(config)} for kind, config in kinds.items()}
    if torch.cuda.is_available():
        ways |= {"CUDA, float32": {"device": "cuda"}, "CUDA, float16": {"device": "cuda", "dtype": torch.float16}}
    rows = []
    for key in keys:
        torch.set_num_threads(1)
        rate = {"target_bpp": 0.1} if CODECS[key].rate == "required" else {}
        data = load(key).compress(picture, **rate).bitstreams[0]
        original, reference, latent = np.asarray(picture, dtype=float), None, None
        for name, way in ways.items():
            torch.set_num_threads(1)
            change = way.get("change", lambda pipe: None)
            pipe = load(key, **{name: value for name, value in way.items() if name != "change"})
            change(pipe)
            out = pipe.decompress(data, allow_other_model=True)  # quantized weights are another model
            decoded = np.asarray(out.images[0], dtype=float)
            x_t = ends[-1][0][0].float().cpu() if key == "diffc" else None
            if reference is None:
                reference, latent = decoded, x_t
            rms = "none" if x_t is None else f"{float((x_t - latent).square().mean()) ** 0.5:.1e}"
            told = "none" if x_t is None else f"{out.drift[0]:.3f}"
            lost = psnr(original, reference) - psnr(original, decoded)
            rows.append([CODECS[key].name, name, rms, told, f"{psnr(reference, decoded):.1f}", f"{lost:+.3f}"])
            torch.set_num_threads(1)
    return rows


def psnr(a, b):
    import numpy as np

    return 10 * np.log10(255**2 / np.mean((a - b) ** 2)) if (a != b).any() else float("inf")


def check_rows(count=2000, n=4096):
    """How often the check warns of a drift of given rms, and what it estimates on average."""
    import torch

    from diffusers_compress.codecs.diffc import drift

    generator, rows = torch.Generator().manual_seed(0), []
    for size in (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.4):
        found = []
        for _ in range(count):
            x_t = torch.randn(n, generator=generator)
            found.append(drift.drift(x_t + size * torch.randn(n, generator=generator), drift.check_of(x_t)))
        warned = sum(value > drift.BOUND for value in found) / count
        rows.append([f"{size:.3f}", f"{sorted(found)[count // 2]:.3f}", f"{100 * warned:.1f} %"])
    return rows


def exchange_rows(ends=("float32", "float16", "bfloat16"), side=128):
    """Of every codec, with its embedded model, a file made with each type of weights and decoded with each: PSNR in dB of the picture to
    that of a decoder of the sender's own type, or the error. An end may name its device too: "float16 cuda"."""
    import numpy as np
    import torch

    from diffusers_compress import images
    from diffusers_compress.cli.demo import demo_photo

    picture, rows = images.open_image(demo_photo()).convert("RGB").crop((100, 20, 100 + side, 20 + side)), []
    for codec in CODECS.values():
        pipes = {}
        for end in ends:
            dtype, _, device = end.partition(" ")
            pipe = codec.pipeline_class().from_pretrained(codec.embedded_model(), dtype=getattr(torch, dtype))
            pipe.set_progress_bar_config(disable=True)
            pipes[end] = pipe.to(device or "cpu")

        def decoded(data, end, pipes=pipes):
            try:
                return np.asarray(pipes[end].decompress(data, num_inference_steps=4).images[0], dtype=float)
            except BitstreamError as error:
                return type(error).__name__

        for sender in ends:
            data = pipes[sender].compress(picture, **({"target_bpp": 1.0} if codec.rate == "required" else {})).bitstreams[0]
            pictures = {end: decoded(data, end) for end in ends}
            told = [found if isinstance(found, str) else f"{psnr(pictures[sender], found):.1f}" for found in pictures.values()]
            rows.append([codec.name, sender, *told])
    return rows


# ---------------------------------------------------------------------------------------------------------------- awkward inputs

FAR = 3  # of 255 levels: a mean colour that is further off is wrong


def described(data, plain):
    """Mean red, green and blue that a picture file describes, by Pillow's own means, or those of `plain`, which it was made of: in
    colour or in grey."""
    import numpy as np
    from PIL import Image, ImageCms

    image, white = Image.open(io.BytesIO(data)), Image.new("RGBA", (1, 1), "white")
    profile = image.info.get("icc_profile")
    if image.mode in ("P", "LA", "RGBA", "1"):
        flat = image.convert("RGBA")
        flat = Image.alpha_composite(white.resize(flat.size), flat)
    elif profile and (image.mode, profile[16:20]) in (("L", b"GRAY"), ("L", b"RGB "), ("RGB", b"RGB ")):
        image = image.convert("L" if profile[16:20] == b"GRAY" else "RGB")
        flat = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    else:
        flat = plain.convert("L") if image.mode[0] in "LIF" else plain
    return np.asarray(flat.convert("RGB"), dtype=float).mean((0, 1))


def members(path, prefix=""):
    """(name, bytes) of the files below a folder, and in the tar files there; bytes are None of what is no file."""
    for name in sorted(os.listdir(path)):
        at, name = Path(path, name), f"{prefix}{name}"
        if at.is_dir() and not at.is_symlink():
            yield from members(at, f"{name}/")
        elif at.is_file() and at.suffix == ".tar":
            yield name, None
            with suppress(tarfile.TarError), tarfile.open(at) as tar:
                yield from ((f"{name}::{m.name.removeprefix('./')}", tar.extractfile(m).read()) for m in tar if m.isfile())
        else:
            yield name, at.read_bytes() if at.is_file() else None


class Identity:
    """A codec whose files keep every sample: what is off behind it was off before any network saw the picture."""

    vae_scale_factor = 8

    def set_progress_bar_config(self, **_):
        pass

    def compress(self, pictures, batch_size, target_bpp):
        from diffusers_compress import images
        from diffusers_compress.files import png

        tensors, notes = zip(*map(images.to_tensor, pictures))
        shown = [images.to_output(x[None])[0] for x in tensors]
        header = [container.Header(CODECS["relic"].number, *x.size, bytes(4), b"") for x in shown]
        return SimpleNamespace(bitstreams=[container.pack(*one) for one in zip(header, map(png, shown))], notes=notes)

    def decompress(self, files, batch_size):
        from PIL import Image

        payloads = [data[container.read_header(data)[1] : -container.CHECKSUM_BYTES] for data in files]
        return SimpleNamespace(images=[Image.open(io.BytesIO(data)) for data in payloads], notes=[[]] * len(files))


def case_rows(folder, plain, codec):
    """[what became of it, how many, examples] of every input below `folder`, through `batch` at 0.5 bpp and back by files."""
    import numpy as np
    from PIL import Image

    from diffusers_compress import cli
    from diffusers_compress.cli import loading

    if codec is None:
        loading.load, codec = lambda *_, **__: Identity(), "relic"
    from diffusers_compress.batch.manifest import read_manifest
    from diffusers_compress.files import PICTURE_SUFFIXES, find_files

    found, kinds = {}, {}
    with tempfile.TemporaryDirectory() as out, open(Path(out, "said"), "w", encoding="utf-8") as said:
        for words in ["batch", folder, f"{out}/coded", "--bpp", "0.5"], ["batch", f"{out}/coded", f"{out}/back", "--decode"]:
            with redirect_stderr(said), redirect_stdout(said), watched(3600):
                status = cli.main([*map(str, words), "--codec", codec, "--batch-size", "16", "--device", "cpu"])
            assert status in (0, 3), Path(out, "said").read_text()
        said.flush()
        print(Path(out, "said").read_text(), file=sys.stderr)
        coded = {row["source"]: row for row in read_manifest(Path(out, "coded"))}
        back = dict(members(Path(out, "back")))
        skipped = find_files(folder, {*PICTURE_SUFFIXES, ".tar"}).skipped
        for name, data in members(folder):
            row, shard = coded.get(name), name.rpartition("::")[0]
            if row is None and shard and coded[shard]["error"]:
                kind = "files in the shards that are refused"
            elif row is None:
                known = any(name == one or name.startswith(f"{one}/") for one in skipped)
                kind = "passed over, with a note" if known else "kept beside a picture in a shard" if shard else "SILENT SKIP"
            elif row["error"]:
                reason = row["error"].partition(": ")[2].removeprefix("[Errno 2] ").removeprefix(f"{folder}/{name}: ")
                kind = "refused: " + ("shard that was cut" if name.endswith(".tar") else reason.partition(": '")[0])
            elif name.endswith(".tar"):
                kind = "shard, coded"
            else:
                target = f"{shard}::{row['target']}" if shard else row["target"]
                picture = Image.open(io.BytesIO(back[target.removesuffix(".dfc") + ".png"]))
                off = np.abs(np.asarray(picture, dtype=float).mean((0, 1)) - described(data, plain)).max()
                kind = "WRONG COLOURS" if off > FAR else "coded, noted" if row["notes"] else "coded"
                found[name] = off
            kinds.setdefault(kind, []).append(name)
    rows = [[kind, len(names), ", ".join(f"`{name}`" for name in names[:3])] for kind, names in sorted(kinds.items())]
    worst = max(found, key=found.get)
    return [*rows, ["worst mean colour, levels", f"{found[worst]:.2f}", f"`{worst}`"]]


# ------------------------------------------------------------------------------------------------------------------- the page


def alone(part, count=0):
    """`counted` in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--count", str(count)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def table(head, rows):
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in (head, ["--"] * len(head), *rows)])


def outcome_table(results):
    kinds = sorted({kind for each in results for kind in each["outcomes"] if not kind.startswith(("crash", "hang"))})
    rows = []
    for each in results:
        counts = Counter(each["outcomes"])
        bad = [sum(n for kind, n in counts.items() if kind.startswith(word)) for word in ("crash", "hang")]
        memory = f"{each['before']:.0f} + {each['after'] - each['before']:.0f}"
        rows.append(
            [each["part"], sum(counts.values()), *(counts[kind] for kind in kinds), *bad, f"{each['slowest']:.1f}", memory]
        )
    return table(["", "files", *kinds, "crashes", "hangs", "slowest, s", "peak memory, MB"], rows)


def damage_table(args):
    results = [alone("container", args.container), *(alone(codec, args.decode) for codec in CODECS)]
    for each in results:
        print(json.dumps(each), file=sys.stderr)
    return outcome_table(results)


TABLES = {  # name in the page: what makes it
    "damage": damage_table,
    "large": lambda args: table(["codec", "channel", "outcome", "seconds", "MB more"], alone("large")),
    "drift": lambda args: table(
        ["codec", "decoded in", "latent, rms", "check says", "picture, dB", "PSNR lost, dB"], alone("drift")
    ),
    "exchange": lambda args: table(["codec", "made in", *(f"decoded in {end}" for end in args.ends)], exchange_rows(args.ends)),
    "check": lambda args: table(["drift, rms", "estimate, median", "warned"], check_rows()),
}


def versions():
    from importlib.metadata import version

    names = ["torch", "diffusers", "transformers", "Pillow", "numpy", "constriction", *["torchao"] * bool(find_spec("torchao"))]
    return ", ".join(f"{name} {version(name)}" for name in names)


def renewed(text, tables):
    """The page with these tables in place of those between `<!-- NAME -->` and `<!-- end -->`, and what they were made with."""
    for name, made in tables.items():
        new = f"<!-- {name} -->\n\n{made}\n\n{versions()}.\n\n<!-- end -->"
        text, found = re.subn(rf"(?s)<!-- {name} -->.*?<!-- end -->", lambda _: new, text)
        assert found == 1, name
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "ROBUSTNESS.md", help="the page whose tables are made again")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--ends", nargs="+", default=["float32", "float16", "bfloat16"], help='of "exchange"; or "float16 cuda"')
    parser.add_argument("--container", type=int, default=100_000, help="damaged files that are parsed")
    parser.add_argument("--decode", type=int, default=2_000, help="damaged files of each codec that are decoded")
    parser.add_argument("--part", help="this one alone, as a line of JSON")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--cases", type=Path, help="folder of inputs; prints what becomes of them, and does nothing else")
    parser.add_argument("--plain", type=Path, help="the picture that those of --cases were made of")
    parser.add_argument(
        "--codec", choices=list(CODECS), help="of --cases, on the embedded model. Default: one that loses nothing"
    )
    args = parser.parse_args()
    if args.cases:
        from PIL import Image

        print(table(["outcome", "inputs", "such as"], case_rows(args.cases, Image.open(args.plain).convert("RGB"), args.codec)))
        return
    if args.part:
        parts = {"large": large_rows, "drift": drift_rows}
        print(json.dumps(parts[args.part]() if args.part in parts else counted(args.part, args.count)))
        return
    tables = {name: TABLES[name](args) for name in args.tables}
    args.out.write_text(renewed(args.out.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
