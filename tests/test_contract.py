"""Every row of CODECS keeps the contract, and a codec that nobody has heard of works everywhere with one row."""

import csv
import inspect
import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from golden import make
from PIL import Image

from diffusers_compress import cli, codecs, contract, embedded_model, pil
from diffusers_compress.cli.options import DECODING, ENCODING
from diffusers_compress.contract import CODECS, Codec
from diffusers_compress.errors import BitstreamError, Corrupt, NotABitstream, WrongModel
from diffusers_compress.format import container
from diffusers_compress.format.limits import DEFAULT_LIMITS

RATE = MappingProxyType({"required": {"max_bytes": 150}, "cap": {"max_bytes": 400}, "none": {}})
OWN = MappingProxyType({"refine": {"max_bytes": 250, "base": "webp"}})  # where the smallest files are larger
FACTS = {"codec", "width", "height", "bytes", "bpp", "model", "complete"}  # of every file


TOY_FORMAT = """
from diffusers_compress.format import container

NUMBER = 100


def read_file(data, limits):
    header, offset = container.read_header(data, limits)
    container.check_codec(header, NUMBER)
    return header, container.read_payload(data, offset)[0]


def describe(data, limits):
    header, _ = read_file(data, limits)
    return {
        "codec": "Toy", "width": header.width, "height": header.height, "bytes": len(data),
        "bpp": 8 * len(data) / (header.width * header.height), "model": header.fingerprint.hex(), "side": header.parameters[0],
        "complete": True,
    }
"""

TOY_PIPELINE = """
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.format import container
from diffusers_compress.outputs import DecompressOutput
from diffusers_compress.pipeline import CodecMixin, compressed
from toy_codec.format import NUMBER, read_file


class ToyPipeline(CodecMixin, DiffusionPipeline):
    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    def compress(self, image, side=4, batch_size=8):
        pictures, files = self.read_pictures(NUMBER, image), []
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for picture in pictures:
                thumb = F.interpolate(picture.x[None], (side, side), mode="area")
                samples = ((thumb + 1) * 127.5).round().byte().numpy().tobytes()
                files.append(container.pack(replace(picture.header, parameters=bytes([side])), samples))
                bar.update()
        return compressed(files, pictures)

    def decompress(self, bitstreams, num_inference_steps=3, mode="bilinear", **shared):
        files, pictures = self.read_files(read_file, bitstreams, **shared), []
        with self.labelled_bar("network calls") as bar:
            for header, payload in files.contents:
                thumb = torch.tensor(list(payload)).view(1, 3, header.parameters[0], -1) / 127.5 - 1
                x = F.interpolate(thumb, (header.height, header.width), mode=mode)
                for step in range(num_inference_steps):
                    if files.watch is not None:
                        files.watch(step, num_inference_steps - step, {"latents": x, "noise_pred": x})
                    bar.update()
                pictures += self.pictures_of(x, [header], files.output_type)
        return DecompressOutput(images=pictures, notes=files.notes)

    def fingerprint(self, fused=False):
        return fingerprint(self.networks(), {}, fused)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A codec in a folder outside the package: its format, its pipeline, a model, and one row. Called with a seed, a pipeline of it."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_codec").mkdir()
    (folder / "toy_codec" / "__init__.py").touch()
    (folder / "toy_codec" / "format.py").write_text(TOY_FORMAT)
    (folder / "toy_codec" / "pipeline.py").write_text(TOY_PIPELINE)
    row = Codec(
        100,
        "Toy",
        "toy_codec.pipeline:ToyPipeline",
        "toy_codec.format",
        str(folder / "model"),
        "none",
        preview={"mode": "nearest"},
    )
    (folder / "toy_codec" / "row.py").write_text(f"from diffusers_compress.contract import Codec\n\nROW = {row!r}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setitem(CODECS, "toy", row)

        def pipeline(seed):
            torch.manual_seed(seed)
            blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
            return row.pipeline_class()(UNet2DModel(8, 3, 3, layers_per_block=1, norm_num_groups=4, **blocks))

        pipeline.folder = folder
        pipeline(0).save_pretrained(row.embedded_model())
        yield pipeline
    for name in [name for name in sys.modules if name.startswith("toy_codec")]:
        del sys.modules[name]


@pytest.fixture(scope="module", params=[*CODECS, "toy"])
def key(request, toy):
    return request.param


@pytest.fixture(scope="module")
def pipe(key, toy):
    return toy(0) if key == "toy" else make.pipeline(key, "epsilon")


@pytest.fixture(scope="module")
def pictures(photo):
    return [photo, photo.crop((0, 0, 40, 24)), photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]


@pytest.fixture(scope="module")
def files(pipe, key, pictures):
    return pipe.compress(pictures, **OWN.get(key, RATE[CODECS[key].rate])).bitstreams


# --------------------------------------------------------------------------------------------------------------- every codec


def test_numbers_and_names_are_the_codecs_own():
    numbers = [codec.number for codec in CODECS.values()]
    assert len(set(numbers)) == len(numbers)
    assert all(0 < number < contract.LOSSLESS for number in numbers)
    assert len({codec.name for codec in CODECS.values()}) == len(CODECS)


def test_a_row_names_what_is_there(key, pipe):
    row = CODECS[key]
    assert type(pipe) is row.pipeline_class() and contract.key_of(pipe) == key
    assert any(Path(embedded_model(key)).rglob("*.json"))
    assert not contract.unknown_options(pipe.decompress, list(row.preview))
    assert ("preset" in inspect.signature(row.pipeline_class().from_pretrained).parameters) == row.presets
    assert (not contract.unknown_options(pipe.compress, ["importance"])) == row.regions
    shared = {"limits", "allow_other_model", "batch_size", "output_type"}
    assert not contract.unknown_options(pipe.decompress, sorted(shared))
    assert not contract.unknown_options(pipe.compress, ["batch_size"])
    assert len(pipe.fingerprint()) == container.FINGERPRINT_BYTES


def test_a_rate_is_taken_as_the_row_says(key, pipe, photo):
    for rates in {}, {"target_bpp": 1.0, "max_bytes": 500}:
        if CODECS[key].rate == "required" or (CODECS[key].rate == "cap" and rates):
            with pytest.raises(ValueError, match="target_bpp"):
                pipe.compress(photo, **rates)
        elif not rates:
            pipe.compress(photo)


def test_one_or_many_give_the_same_bytes_each_time(key, pipe, pictures, files):
    assert pipe.compress(pictures, **OWN.get(key, RATE[CODECS[key].rate])).bitstreams == files
    assert (
        pipe.compress(pictures[1], **OWN.get(key, RATE[CODECS[key].rate])).bitstreams == files[1:2]
    )  # among others it had the network to itself


def test_files_tell_their_facts_and_decode_at_their_sizes(key, pipe, pictures, files):
    decoded = pipe.decompress(files, num_inference_steps=2).images
    for picture, data, image in zip(pictures, files, decoded, strict=True):
        facts = codecs.describe(data)
        assert facts.keys() >= FACTS and facts["codec"] == CODECS[key].name and facts["complete"] is True
        assert (facts["width"], facts["height"], facts["bytes"]) == (*picture.size, len(data))
        assert facts["model"] == pipe.fingerprint().hex()
        assert image.size == picture.size
        json.dumps(facts)
    alone = pipe.decompress(files[1], num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(alone), np.asarray(decoded[1]))


def test_every_cut_and_every_flipped_bit_is_noticed(files):
    """A cut either raises or is told; the picture's data has a checksum, so a flipped bit of a whole file raises."""
    data = files[1]
    for length in range(len(data)):
        try:
            assert codecs.describe(data[:length])["complete"] is False
        except (Corrupt, NotABitstream):
            pass
    for i in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(BitstreamError):
            codecs.describe(bytes(flipped))


def test_another_model_is_refused(key, pipe, files, toy):
    other = toy(1) if key == "toy" else make.pipeline(key, "v_prediction")
    with pytest.raises(WrongModel, match=pipe.fingerprint().hex()):
        other.decompress(files[1])
    with suppress(WrongModel):  # parts that must be the file's own
        notes = other.decompress(files[1], allow_other_model=True, num_inference_steps=1).notes
        assert len(notes) == 1 and re.search(f"{pipe.fingerprint().hex()}.*{other.fingerprint().hex()}", notes[0][0])
    assert pipe.decompress(files[:2], num_inference_steps=1).notes == [[], []]


def test_a_round_trip_tells_the_notes_of_both_ends(key, pipe, pictures, monkeypatch):
    monkeypatch.setattr(pipe, "check_model", lambda headers, *_: [["the decoder's"] for _ in headers])
    transparent = pictures[1].convert("RGBA")
    transparent.putalpha(200)
    out = pipe([transparent, pictures[1]], **OWN.get(key, RATE[CODECS[key].rate]), num_inference_steps=1)
    assert [len(notes) for notes in out.notes] == [2, 1] and "alpha" in out.notes[0][0]
    assert [notes[-1] for notes in out.notes] == ["the decoder's"] * 2


def test_several_pictures_of_a_file(pipe, files):
    """Of seeds that follow one another; a decoder that draws nothing refuses."""
    several = {"num_images_per_prompt": 2, "num_inference_steps": 1, "output_type": "np"}
    if "seed" in codecs.describe(files[1]):
        first, second = pipe.decompress(files[1], **several).images
        assert np.abs(first - second).max() > 0.01
        with pytest.raises(ValueError, match="num_images_per_prompt must be at least 1"):
            pipe.decompress(files[1], num_images_per_prompt=0)
    else:
        with pytest.raises(ValueError, match="num_images_per_prompt must be 1: .* nothing is drawn"):
            pipe.decompress(files[1], **several)


def test_a_callback_looks_on(key, pipe, pictures, files):
    """It sees each network call, in order; what it does to the tensors, or returns, changes nothing."""
    seen = []

    def meddle(pipe, step, timestep, tensors):
        seen.append((step, timestep, sorted(tensors)))
        tensors["latents"].zero_()
        return {"latents": None}

    watching = {"callback_on_step_end": meddle, "callback_on_step_end_tensor_inputs": ["noise_pred", "latents"]}
    plain, watched = (pipe.decompress(files[1], num_inference_steps=2, **more).images[0] for more in ({}, watching))
    assert np.array_equal(np.asarray(plain), np.asarray(watched))
    assert seen and all(names == ["latents", "noise_pred"] for *_, names in seen)
    assert [timestep for _, timestep, _ in seen] == sorted((timestep for _, timestep, _ in seen), reverse=True)
    with pytest.raises(ValueError, match="latents.*noise_pred.*not.*image"):
        pipe.decompress(files[1], **watching | {"callback_on_step_end_tensor_inputs": ["image"]})
    if not contract.unknown_options(pipe.compress, list(watching)):
        assert pipe.compress(pictures[1], **OWN.get(key, RATE[CODECS[key].rate]), **watching).bitstreams == files[1:2]


def test_two_threads_do_not_mix_their_callbacks(pipe, files):
    """Both calls are under way at the same time; each callback sees its own picture's latents alone."""
    meeting = threading.Barrier(2, timeout=60)

    def shapes(data):
        seen = []

        def look(pipe, step, timestep, tensors):
            if not seen:
                meeting.wait()
            seen.append(tuple(tensors["latents"].shape))

        pipe.decompress(data, num_inference_steps=3, callback_on_step_end=look)
        return seen

    with ThreadPoolExecutor(2) as pool:
        large, small = pool.map(shapes, files[:2])
    assert len(set(large)) == len(set(small)) == 1 and large[0] != small[0]
    assert [len(large), len(small)] == [len(shapes_alone(pipe, data)) for data in files[:2]]


def shapes_alone(pipe, data):
    seen = []
    pipe.decompress(data, num_inference_steps=3, callback_on_step_end=lambda *step: seen.append(step))
    return seen


def test_both_sides_show_their_progress(key, pipe, pictures, files, capsys, monkeypatch):
    for name, work in (
        ("coding", lambda: pipe.compress(pictures[1], **OWN.get(key, RATE[CODECS[key].rate]))),
        ("painting", lambda: pipe.decompress(files[1], num_inference_steps=4)),  # a codec may have kept what 2 and 3 gave
    ):
        monkeypatch.setattr(pipe, "_progress_bar_config", {"desc": name})
        work()
        err = capsys.readouterr().err
        assert name in err and ("100%" in err or re.search("[1-9][0-9]*it", err))


SECOND_PROCESS = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "toy":
    from diffusers_compress.contract import CODECS
    from toy_codec.row import ROW

    CODECS["toy"] = ROW
    pipe = ROW.pipeline_class().from_pretrained(ROW.embedded_model())
else:
    from golden import make

    pipe = make.pipeline(sys.argv[2], "epsilon")
pipe.decompress(Path(sys.argv[3]).read_bytes(), num_inference_steps=2).images[0].save(sys.argv[4])
"""


def test_a_second_process_decodes_the_same_picture(key, pipe, files, tmp_path, python, toy):
    (tmp_path / "photo.dfc").write_bytes(files[1])
    paths = [toy.folder if key == "toy" else Path(__file__).parent, key, tmp_path / "photo.dfc", tmp_path / "photo.png"]
    python.run(["-c", SECOND_PROCESS, *paths], check=True)
    here = np.asarray(pipe.decompress(files[1], num_inference_steps=2).images[0]).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "photo.png")) - here).max() <= 1


def test_another_codec_is_refused_by_name(key, pipe, files):
    for other in CODECS.keys() - {key}:
        with pytest.raises(WrongModel, match=f"made by {CODECS[key].name}.*{CODECS[key].name}Pipeline"):
            CODECS[other].format_module().describe(files[1], DEFAULT_LIMITS)


VALUES = {"--coder": "trellis", "--captioner": "blip", "--reconstruction": "flow", "--metric": "wd=1"}


@pytest.mark.parametrize(("verb", "method", "options"), [("encode", "compress", ENCODING), ("decode", "decompress", DECODING)])
def test_an_option_that_the_codec_does_not_know_is_refused_by_name(
    key, files, photo, tmp_path, capsys, monkeypatch, verb, method, options
):
    monkeypatch.setattr(cli.loading, "load", None)
    (tmp_path / "in.dfc").write_bytes(files[1])
    photo.save(tmp_path / "in.png")
    rate = ["--max-bytes", "99"] if verb == "encode" and CODECS[key].rate == "required" else []
    of_codec = ["--codec", key, *rate] if verb == "encode" else []
    source, target = ("in.png", "out.dfc") if verb == "encode" else ("in.dfc", "out.png")
    call = [verb, str(tmp_path / source), str(tmp_path / target), *of_codec]
    function = getattr(CODECS[key].pipeline_class(), method)
    refused = [name for name, argument in options.items() if contract.unknown_options(function, [argument])]
    refused = [name for name in refused if not (rate and name == "--fidelity")]
    for option in refused:
        assert cli.main([*call, option, VALUES.get(option, "1")]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {option}: {key} has no such option")
    assert cli.main([*call, "--option", "colour=blue"]) == 2
    assert f"--option colour: {key}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ a new one


@pytest.fixture
def coded(toy, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    assert (
        cli.main(["encode", str(tmp_path / "photo.png"), str(tmp_path / "photo.dfc"), "--codec", "toy", "--option", "side=8"])
        == 0
    )
    return tmp_path / "photo.dfc"


def test_a_new_codec_works_from_the_command_line(toy, coded, photo, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["info", str(coded), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["codec"], facts["side"], facts["width"]) == ("Toy", 8, photo.width)
    for options, mode in ([], "bilinear"), (["--preview"], "nearest"):
        assert cli.main(["decode", str(coded), str(tmp_path / "back.png"), "--force", *options]) == 0
        expected = toy(0).decompress(coded.read_bytes(), mode=mode).images[0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "back.png")), np.asarray(expected))
    capsys.readouterr()
    assert cli.main(["decode", str(coded), str(tmp_path / "new.png"), "--realism", "1"]) == 2
    assert capsys.readouterr().err == "error: --realism: toy has no such option in decoding\n"
    assert cli.main(["encode", str(tmp_path / "photo.png"), str(tmp_path / "new.dfc"), "--codec", "toy", "--bpp", "1"]) == 2
    assert capsys.readouterr().err == "error: --bpp: toy has no such option in encoding\n"
    assert cli.main(["info", str(coded), "--find", str(toy.folder)]) == 0
    assert f"made with  {toy.folder / 'model'}" in capsys.readouterr().out


def test_a_new_codec_works_in_batches(toy, coded, photo, tmp_path):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / "photo.png")
    words = ["--codec", "toy", "--device", "cpu"]
    assert cli.main(["batch", str(tmp_path / "in"), str(tmp_path / "coded"), *words, "--option", "side=8"]) == 0
    assert (tmp_path / "coded" / "photo.dfc").read_bytes() == coded.read_bytes()
    assert cli.main(["batch", str(tmp_path / "coded"), str(tmp_path / "back"), *words, "--decode"]) == 0
    assert Image.open(tmp_path / "back" / "photo.png").size == photo.size


def test_a_new_codec_is_evaluated(toy, photo, tmp_path):
    (tmp_path / "in").mkdir()
    photo.save(tmp_path / "in" / "photo.png")
    words = ["--codec", "toy:encode.side=8,jpeg", "--bpp", "1", "--metrics", "psnr", "--device", "cpu"]
    assert cli.main(["eval", str(tmp_path / "in"), "--out", str(tmp_path / "report"), *words]) == 0
    row = next(csv.DictReader((tmp_path / "report" / "rows.csv").read_text().splitlines()))
    assert row["codec"] == "toy:encode.side=8" and float(row["psnr"]) > 10 and row["fingerprint"] == toy(0).fingerprint().hex()


def test_a_new_codec_is_a_format_of_pillow(toy, coded, photo, monkeypatch):
    Image.init()
    for name in ("OPEN", "SAVE", "EXTENSION", "MIME", "ID"):
        monkeypatch.setattr(Image, name, getattr(Image, name).copy())
    monkeypatch.setattr(pil, "registered", {})
    pil.register(toy(0))
    buffer = io.BytesIO()
    photo.save(buffer, "DFC", side=8)
    assert buffer.getvalue() == coded.read_bytes()
    image = Image.open(buffer)
    assert (image.info["codec"], image.size) == ("toy", photo.size)
    assert np.array_equal(np.asarray(image), np.asarray(toy(0).decompress(coded.read_bytes()).images[0]))
