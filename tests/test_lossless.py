"""Lossless files of lossy codecs: every pixel comes back, and what could come out differently elsewhere is noticed."""

import hashlib
import inspect
import io

import minimal_reader
import numpy as np
import pytest
import torch
from golden import make
from PIL import Image

from diffusers_compress import cli, codecs
from diffusers_compress.coding import logistic, pixel_model
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.contract import CODECS
from diffusers_compress.errors import BitstreamError, Corrupt, LimitExceeded, NotABitstream, WrongModel
from diffusers_compress.format import container, lossless
from diffusers_compress.format.limits import DEFAULT_LIMITS

LOSSY = [key for key, codec in CODECS.items() if key != "uqdm"]
RATE = {
    "cdc": {"max_bytes": 400},
    "relic": {"max_bytes": 150},
    "refine": {"fidelity": 0.1},
    "diffc": {"max_bytes": 60, "num_coding_steps": 2},
    "perco": {},
    "text-sketch": {},
}


def coded(picture, prediction=None):
    encoder = Encoder()
    pixel_model.encode(encoder, picture, prediction)
    return encoder.getvalue()


def array(image):
    return np.asarray(image)


@pytest.fixture(scope="module", params=LOSSY)
def key(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(key):
    return make.pipeline(key, "epsilon")


@pytest.fixture(scope="module")
def picture():
    return make.picture(40, 24)


@pytest.fixture(scope="module")
def data(pipe, key, picture):
    return pipe.compress(picture, lossless=True, **RATE[key]).bitstreams[0]


@pytest.fixture
def relic():
    return make.pipeline("relic", "epsilon")


@pytest.fixture
def good(relic, picture, monkeypatch):
    """A pipeline whose autoencoder gives just this picture, so that predicting from it saves bytes: what the random one gives plus the rest."""
    exact, rest = type(relic).decode_in_float64, []

    def decode(self, x_0):
        x = exact(self, x_0)
        if x is None:
            return None
        if not rest:
            wanted = torch.from_numpy(array(picture).transpose(2, 0, 1).copy()).double() / 127.5 - 1
            rest.append(wanted + 1e-3 - x[:, :24, :40])
        x[:, :24, :40] += rest[0]
        return x

    monkeypatch.setattr(type(relic), "decode_in_float64", decode)
    return relic


# --------------------------------------------------------------------------------------------------------------- pixel model


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 2), (9, 23)])
@pytest.mark.parametrize("predicted", [False, True])
def test_pixels_come_back(shape, predicted):
    rng = np.random.default_rng(0)
    picture, prediction = rng.integers(0, 256, (2, 3, *shape), dtype=np.uint8)
    prediction = prediction if predicted else None
    assert np.array_equal(pixel_model.decode(Decoder(coded(picture, prediction)), shape, prediction), picture)


def test_strips_join(photo, monkeypatch):
    picture = array(photo.crop((0, 0, 40, 30))).transpose(2, 0, 1)
    whole = coded(picture)
    monkeypatch.setattr(pixel_model, "ROWS", 10)
    in_strips = coded(picture)
    assert in_strips != whole and len(in_strips) < 1.1 * len(whole)
    assert np.array_equal(pixel_model.decode(Decoder(in_strips), (30, 40)), picture)


def test_a_photo_takes_less_than_as_webp(photo):
    picture, file = array(photo).transpose(2, 0, 1), io.BytesIO()
    photo.save(file, "WEBP", lossless=True, quality=100, method=6)
    assert len(coded(picture)) < len(file.getvalue())


def test_what_predicts_well_saves_bits_and_what_does_not_costs_few(photo):
    picture = array(photo.crop((0, 0, 64, 64))).transpose(2, 0, 1)
    alone, rng = len(coded(picture)), np.random.default_rng(0)
    near = (picture.astype(int) + rng.integers(-3, 4, picture.shape)).clip(0, 255).astype(np.uint8)
    assert len(coded(picture, picture)) < 0.1 * alone
    assert len(coded(picture, near)) < 0.9 * alone
    assert len(coded(picture, rng.integers(0, 256, picture.shape, dtype=np.uint8))) < 1.1 * alone


def test_no_picture_takes_fewer_bytes_than_a_reader_wants():
    """A flat one comes near that."""
    picture = np.full((3, 120, 400), 77, np.uint8)
    size, fewest = len(coded(picture, picture)), 120 * 400 // lossless.PIXELS_PER_BYTE
    assert fewest < size and 3 * logistic.costs().min() / 8 > 1 / lossless.PIXELS_PER_BYTE


def test_a_stream_that_ends_early_is_noticed_early():
    """Here the decoder would go on with what it takes zeros for."""
    picture, visited = np.full((3, 64, 64), 77, np.uint8), []
    data = coded(picture)

    class Counting(Decoder):
        def check_end(self):
            visited.append(None)
            super().check_end()

    assert np.array_equal(pixel_model.decode(Counting(data), (64, 64)), picture)
    whole = len(visited)
    for end in range(len(data) // 2):
        visited.clear()
        with pytest.raises(Corrupt):
            pixel_model.decode(Counting(data[:end]), (64, 64))
        assert len(visited) < whole


def test_noise_takes_hardly_more_than_itself():
    picture = np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    assert len(coded(picture)) < 1.08 * picture.size


def test_a_stream_of_other_pixels_is_corrupt_or_another_picture():
    picture = array(make.picture(20, 20)).transpose(2, 0, 1)
    for seed in range(5):
        try:
            found = pixel_model.decode(Decoder(np.random.default_rng(seed).bytes(800)), (20, 20))
            assert not np.array_equal(found, picture)
        except Corrupt:
            pass


# --------------------------------------------------------------------------------------------------------------------- files


def test_every_pixel_comes_back(key, pipe, picture, data):
    assert np.array_equal(array(pipe.decompress(data).images[0]), array(picture))
    facts = codecs.describe(data)
    assert facts["lossless"] and facts["complete"]
    assert (facts["codec"], facts["bytes"], facts["width"]) == (CODECS[key].name, len(data), 40)
    lossy = pipe.compress(picture, **RATE[key]).bitstreams[0]
    assert codecs.lossy_part(data) == lossy and facts["lossy_bytes"] == len(lossy) and codecs.lossy_part(lossy) is None
    assert "lossless" in inspect.signature(pipe.compress).parameters and "lossless:" in pipe.compress.__doc__


def test_lossless_and_lossy_files_together(key, pipe, picture, data):
    lossy, small = codecs.lossy_part(data), make.picture(9, 7)
    other = pipe.compress(small, lossless=True, **RATE[key])
    assert other.bpp == [8 * len(other.bitstreams[0]) / 63]
    out = pipe.decompress([lossy, data, other.bitstreams[0], data[:-5]], output_type="np")
    assert np.array_equal(np.rint(255 * out.images[1]), array(picture)) and np.array_equal(
        np.rint(255 * out.images[2]), array(small)
    )
    assert np.allclose(out.images[0], out.images[3], atol=1e-3) and out.notes[0] == [] and "cut" in out.notes[3][-1]
    with pytest.raises(ValueError, match="a lossless file holds one picture"):
        pipe.decompress([lossy, data], num_images_per_prompt=2)


def test_every_cut_and_every_flipped_bit_is_noticed(data):
    for length in range(len(data)):
        try:
            assert codecs.describe(data[:length])["complete"] is False
        except (Corrupt, NotABitstream):
            pass
    for i in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[i // 8] ^= 1 << i % 8
        with pytest.raises(BitstreamError):
            codecs.describe(bytes(flipped))


def test_another_model_is_refused(key, data):
    with pytest.raises(WrongModel):
        make.pipeline(key, "v_prediction").decompress(data)


def test_pictures_that_cannot_be_lossless(relic):
    with pytest.raises(ValueError, match="8 bits"):
        relic.compress(np.full((8, 8, 3), 0.3001), max_bytes=200, lossless=True)
    with pytest.raises(ValueError, match="sides"):
        relic.compress(Image.new("RGB", (70_000, 1)), max_bytes=20_000, lossless=True)


def outer(data, parameters, payload):
    header, _ = container.read_header(data)
    return container.pack(container.Header(header.codec, header.width, header.height, header.fingerprint, parameters), payload)


def test_files_that_no_encoder_writes(data, key):
    file = lossless.read(data)
    sizes = container.write_varint(len(file.lossy)) + container.write_varint(len(file.pixels))
    assert lossless.read(outer(data, b"\0" + sizes, file.lossy + file.pixels)).prediction is None
    for parameters in b"", b"\2" + sizes, b"\0" + sizes + b"\0", b"\1" + sizes, b"\0" + sizes[:-1]:
        with pytest.raises(Corrupt):
            lossless.read(outer(data, parameters, file.lossy + file.pixels))
    small = make.pipeline(key, "epsilon").compress(make.picture(9, 7), **RATE[key]).bitstreams[0]
    sizes = container.write_varint(len(small)) + container.write_varint(len(file.pixels))
    with pytest.raises(Corrupt, match="another picture"):
        lossless.read(outer(data, b"\0" + sizes, small + file.pixels))
    large = container.Header(128 + CODECS[key].number, 10_000, 10_000, bytes(4), b"\0\0" + container.write_varint(24_413))
    with pytest.raises(Corrupt, match="24413 bytes cannot hold 10000x10000 pixels"):
        lossless.read(container.pack(large, b""))
    wide = container.Header(128 + CODECS[key].number, 65_536, 1, bytes(4), b"\0\0\0")
    with pytest.raises(LimitExceeded, match="side"):
        lossless.read(container.pack(wide, b""))


# ---------------------------------------------------------------------------------------------------------------- prediction


def moved(monkeypatch, relic, size):
    """Let the autoencoder's picture come out differently, as on another machine."""
    exact = type(relic).decode_in_float64
    noise = torch.Generator().manual_seed(0)

    def elsewhere(self, x_0):
        x = exact(self, x_0)
        return x + size * torch.randn(x.shape, generator=noise, dtype=torch.float64)

    monkeypatch.setattr(type(relic), "decode_in_float64", elsewhere)


def test_a_prediction_that_is_a_little_different_does_no_harm(good, picture, monkeypatch):
    data = good.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    assert codecs.describe(data)["predicted"]
    moved(monkeypatch, good, 1e-12)
    assert np.array_equal(array(good.decompress(data).images[0]), array(picture))


def test_a_prediction_that_is_another_is_told(good, picture, monkeypatch):
    data = good.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    moved(monkeypatch, good, 1e-2)
    with pytest.raises(WrongModel, match="comes out differently here.*extract"):
        good.decompress(data)
    assert good.decompress(codecs.lossy_part(data)).images[0].size == picture.size


def test_a_prediction_that_saves_nothing_is_not_used(relic, picture):
    data = relic.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    assert relic.prediction(codecs.lossy_part(data), DEFAULT_LIMITS) is not None and not codecs.describe(data)["predicted"]


def test_a_reader_made_from_the_format_description_alone(good, picture):
    facts = minimal_reader.lossless(good.compress(picture, lossless=True, max_bytes=150).bitstreams[0])
    x = good.prediction(facts["lossy"], DEFAULT_LIMITS).numpy()
    predicted = np.floor(127.5 * (x.clip(-1, 1) + 1) + 0.5 + facts["nudge"] / 256).clip(0, 255).astype(np.uint8)
    assert hashlib.blake2b(predicted.tobytes(), digest_size=8).digest() == facts["digest"]
    m = {place: int(value) for place, value in np.ndenumerate(predicted[[1, 0, 2]])}
    pixels = minimal_reader.pixels(facts["pixels"], facts["height"], facts["width"], m)
    assert pixels == dict(np.ndenumerate(array(picture).transpose(2, 0, 1)[[1, 0, 2]]))


def test_a_value_near_an_edge_is_moved_away():
    from diffusers_compress import lossless as shared

    class Pipe:
        def prediction(self, data, limits):
            return pixels / 127.5 - 1 + 1 / 255 + 1e-13  # half way between two pixels

    lossy = make.pipeline("relic", "epsilon").compress(make.picture(40, 24), max_bytes=150).bitstreams[0]
    pixels = torch.from_numpy(array(make.picture(40, 24)).transpose(2, 0, 1).copy()).double()
    file = lossless.read(shared.extended(Pipe(), lossy, (pixels / 127.5 - 1).float()))
    assert file.prediction.nudge > 0


def test_weights_of_16_bits_predict_nothing(good, picture):
    predicted = good.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    pipe = make.pipeline("relic", "epsilon").to(torch.bfloat16)
    data = pipe.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    assert codecs.describe(predicted)["predicted"] and not codecs.describe(data)["predicted"]
    assert np.array_equal(array(good.decompress(data).images[0]), array(picture))
    with pytest.raises(WrongModel, match="dtype"):
        pipe.decompress(predicted)


def test_the_prediction_takes_neither_hooks_nor_settings_along(good, picture):
    data = good.compress(picture, lossless=True, max_bytes=150).bitstreams[0]
    good.vae.enable_slicing()
    hook = good.vae.decoder.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert codecs.describe(data)["predicted"] and np.array_equal(array(good.decompress(data).images[0]), array(picture))
    state = torch.random.get_rng_state()
    good.prediction(codecs.lossy_part(data), DEFAULT_LIMITS)
    assert torch.equal(state, torch.random.get_rng_state())
    hook.remove()


# -------------------------------------------------------------------------------------------------------------- command line


def test_command_line_with_a_second_process(tmp_path, monkeypatch, picture, capsys, python):
    monkeypatch.chdir(tmp_path)
    picture.save("picture.png")
    for arguments in (
        "encode picture.png file.dfc --codec relic --max-bytes 150 --lossless",
        "decode file.dfc preview.png --preview",
        "extract file.dfc lossy.dfc",
        "info file.dfc",
    ):
        assert cli.main(arguments.split()) in (0, None)
    python.run(["-m", "diffusers_compress.cli", "decode", "file.dfc", "back.png"], cwd=tmp_path, check=True)
    assert np.array_equal(array(Image.open("back.png")), array(picture))
    assert not np.array_equal(array(Image.open("preview.png")), array(picture))
    assert codecs.lossy_part((tmp_path / "file.dfc").read_bytes()) == (tmp_path / "lossy.dfc").read_bytes()
    assert "lossless" in capsys.readouterr().out
