"""UQDM: lossless to the pixel, progressive by whole steps, any size in tiles, and no float between the two ends."""

import json

import numpy as np
import pytest
import torch
from golden import make
from PIL import Image

from diffusers_compress import UQDMPipeline
from diffusers_compress.codecs.uqdm import loop, tiles
from diffusers_compress.codecs.uqdm.format import Parameters, describe, read_file
from diffusers_compress.coding.channels import dither
from diffusers_compress.diffusion import equations
from diffusers_compress.diffusion.uqdm_scheduler import UQDMScheduler
from diffusers_compress.errors import BitstreamError, Corrupt, LimitExceeded, WrongModel
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits

SIZES = [(1, 1), (3, 17), (16, 16), (50, 9), (61, 33)]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipe(request):
    return make.pipeline("uqdm", request.param)


@pytest.fixture(scope="module")
def small():
    return make.pipeline("uqdm", "v_prediction")


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


# --------------------------------------------------------------------------------------------------------------- the levels


def test_levels_are_those_of_the_published_schedule():
    """Vectors that the authors' formulas give for gamma from -12.3 to 6."""
    scheduler = UQDMScheduler()
    table = {4: (0.89784, 3.09415, 0.54780), 3: (0.20271, 0.69858, 0.49245)}
    table |= {2: (0.02101, 0.07241, 0.11118), 1: (0.00213, 0.00735, 0.01152)}
    for t, (sigma, width, scale) in table.items():
        assert abs(scheduler.level(t - 1)[1] - sigma) < 6e-6
        assert abs(scheduler.width(t) - width) < 6e-6 and abs(scheduler.scale(t) - scale) < 6e-6
        assert scheduler.time(t) == t / 4
        # the uniform posterior has the variance of the Gaussian one
        _, std = equations.posterior(torch.zeros(1), torch.zeros(1), *scheduler.level(t), *scheduler.level(t - 1))
        assert abs(scheduler.width(t) ** 2 / 12 - std**2) < 1e-12
    averaged = UQDMScheduler(gamma_min=-12.0, gamma_origin=-12.3)
    assert averaged.time(0) > 0 and averaged.time(4) == 1
    with pytest.raises(ValueError, match="0 steps"):
        UQDMScheduler(num_steps=0)
    with pytest.raises(ValueError, match="normal"):
        UQDMScheduler(reference="normal")


# ----------------------------------------------------------------------------------------------------------------- lossless


@pytest.mark.parametrize("size", SIZES)
def test_lossless_files_give_the_pixels(pipe, photo, size, tmp_path):
    image = photo.resize(size)
    (tmp_path / "a.dfc").write_bytes(pipe.compress(image, lossless=True).bitstreams[0])
    data = (tmp_path / "a.dfc").read_bytes()
    for reconstruction in loop.RECONSTRUCTIONS:
        assert np.array_equal(pixels(pipe.decompress(data, reconstruction=reconstruction).images[0]), pixels(image))
    assert describe(data)["lossless"] is True


def test_extreme_pixels_are_lossless_too(small):
    rng = np.random.default_rng(0)
    extreme, noise = rng.choice([0, 255], (9, 12, 3)), rng.integers(0, 256, (20, 33, 3))
    for picture in (np.zeros((9, 12, 3)), np.full((9, 12, 3), 255), extreme, noise):
        image = Image.fromarray(picture.astype(np.uint8))
        assert np.array_equal(pixels(small(image, lossless=True).images[0]), pixels(image))


def test_lossless_is_refused_where_it_cannot_be_promised(small, photo):
    with pytest.raises(ValueError, match="8 bits"):
        small.compress(np.random.default_rng(0).random((8, 8, 3), dtype=np.float32), lossless=True)
    with pytest.raises(ValueError, match="num_coding_steps"):
        small.compress(photo, lossless=True, num_coding_steps=2)
    with pytest.raises(ValueError, match="lossless file has"):
        small.compress(photo, lossless=True, max_bytes=500)
    other = make.pipeline("uqdm", "v_prediction").to(torch.bfloat16)
    with pytest.raises(ValueError, match="float32"):
        other.compress(photo, lossless=True)


# -------------------------------------------------------------------------------------------------------------- progressive


def test_any_prefix_of_whole_steps_is_a_file(pipe, photo):
    image = photo.resize((40, 24))
    data = pipe.compress(image, lossless=True).bitstreams[0]
    header, parameters, sections, complete = read_file(data)
    start = len(data) - 4 - sum(map(len, sections))
    assert complete and len(sections) == 5
    for count in range(5):
        end = start + sum(map(len, sections[:count]))
        for cut in (end, end + len(sections[count]) - 1):
            facts = describe(data[:cut])
            assert (facts["steps_present"], facts["complete"], facts["lossless"]) == (count, False, False)
        fewer = pipe.compress(image, num_coding_steps=count).bitstreams[0]
        for reconstruction in ("flow", "denoised"):
            a, b = (pipe.decompress(file, reconstruction=reconstruction).images[0] for file in (data[:end], fewer))
            assert np.array_equal(pixels(a), pixels(b))
    assert all(np.array_equal(a, b) for a, b in zip(read_file(fewer)[2], sections))


def test_a_size_is_kept_with_as_many_steps_as_fit(small, photo):
    whole = small.compress(photo).bitstreams[0]
    sizes = describe(whole)["step_bytes"]
    steps = [describe(small.compress(photo, max_bytes=limit).bitstreams[0])["steps"] for limit in (30, 40 + sizes[0], len(whole))]
    assert steps == [0, 1, 4]
    assert small.compress(photo, max_bytes=len(whole)).bitstreams[0] == whole
    assert small.compress(photo, target_bpp=8 * len(whole) / (photo.width * photo.height)).bitstreams[0] == whole
    with pytest.raises(ValueError, match="smallest file has"):
        small.compress(photo, max_bytes=10)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="num_coding_steps"):
            small.compress(photo, num_coding_steps=wrong)


def test_reconstructions(small, photo):
    """After all steps each is z_0 / alpha_0, a hair from the picture; draws follow the generator."""
    image = photo.resize((24, 16))
    data = small.compress(image).bitstreams[0]
    for reconstruction in loop.RECONSTRUCTIONS:
        assert np.abs(pixels(small.decompress(data, reconstruction=reconstruction).images[0]) - pixels(image)).max() <= 2
    data = small.compress(image, num_coding_steps=2).bitstreams[0]

    def drawn(seed):
        return pixels(small.decompress(data, "ancestral", generator=torch.Generator().manual_seed(seed)).images[0])

    assert np.array_equal(drawn(0), drawn(0)) and not np.array_equal(drawn(0), drawn(1))
    with pytest.raises(ValueError, match="reconstruction must be one of flow, ancestral, denoised"):
        small.decompress(data, "mean")
    assert loop.flow_levels(4, 10) == [4, 3, 2, 1, 0] and loop.flow_levels(4, 2) == [4, 2, 0] and loop.flow_levels(0, 3) == [0]


# -------------------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("side", [1, 15, 16, 17, 24, 25, 100])
def test_tiles_cover_a_side_evenly(side):
    starts, n = tiles.starts(side, 16), min(side, 16)
    assert starts[0] == 0 and starts[-1] + n == side
    assert all(0 < b - a <= 16 - tiles.OVERLAP for a, b in zip(starts, starts[1:]))


def test_blending_is_seamless_and_independent_of_the_batch():
    """Of a network that looks at single pixels it changes nothing; of tiles that differ it makes a ramp."""
    z = torch.randn(3, 50, 37, dtype=torch.float64)
    for batch in (1, 8):
        assert torch.allclose(tiles.blended(lambda x: 2 * x, z, 16, 4, batch), 2 * z, atol=1e-12, rtol=0)
    numbers = iter(range(100))
    constants = tiles.blended(lambda x: x * 0 + next(numbers), z[:, :16, :24], 16, 4, 1)[0, 0]
    assert constants[0] == 0 and constants[-1] == 1 and constants.diff().abs().max() <= 1 / 8


def test_dither_is_shared_by_position_whatever_the_tiles(small, photo):
    """k and u alone make z: that of a decoder with other tiles would be the same, only its tables would not."""
    data = small.compress(photo, num_coding_steps=1).bitstreams[0]
    assert small.compress(photo, num_coding_steps=1, batch_size=1).bitstreams[0] == data
    assert small.compress([photo, photo.resize((9, 9))], num_coding_steps=1, batch_size=3).bitstreams[0] == data


# ------------------------------------------------------------------------------------------------------- across machines


def test_a_network_that_rounds_otherwise_decodes_the_same(small, photo, monkeypatch):
    """Errors a thousand times those of float64 change nothing; those of float32 are told, not decoded to something else."""
    data = small.compress(photo, lossless=True).bitstreams[0]
    forward = type(small.network).forward

    def disturbed(size):
        generator = torch.Generator().manual_seed(0)

        def call(self, *arguments):
            outputs = forward(self, *arguments)
            errors = [size * torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in outputs]
            return tuple(part * (1 + error) for part, error in zip(outputs, errors))

        return call

    monkeypatch.setattr(type(small.network), "forward", disturbed(1e-13))
    assert np.array_equal(pixels(small.decompress(data).images[0]), pixels(photo))
    monkeypatch.setattr(type(small.network), "forward", disturbed(1e-4))
    with pytest.raises(WrongModel, match="at level 4 the network says something else"):
        small.decompress(data)


def test_weights_of_another_type_are_told(small, photo):
    data = small.compress(photo, num_coding_steps=1).bitstreams[0]
    rounded = make.pipeline("uqdm", "v_prediction").to(torch.bfloat16)
    assert rounded.fingerprint() == small.fingerprint()
    with pytest.raises(WrongModel, match="float32"):
        rounded.decompress(data)


def test_files_with_other_tables_are_refused(small, photo, monkeypatch):
    """As those of the first days, when the sum of a row was 2^16."""
    data = small.compress(photo, num_coding_steps=1).bitstreams[0]
    monkeypatch.setattr(dither, "checksum", lambda: 0xD4B6047D)
    with pytest.raises(WrongModel, match="another version"):
        small.decompress(data)


def test_it_saves_and_loads(pipe, photo, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["network"][1] == "UQDMNetwork" and index["scheduler"][1] == "UQDMScheduler"
    again = UQDMPipeline.from_pretrained(tmp_path / "model")
    assert again.fingerprint() == pipe.fingerprint()
    assert again.compress(photo).bitstreams == pipe.compress(photo).bitstreams


# ------------------------------------------------------------------------------------------------------------------- format


def test_parameters_come_back():
    for parameters in (Parameters(), Parameters(7, [1, 65535], [300, 0]), Parameters(0, [5], [9], 12)):
        assert Parameters.from_bytes(parameters.to_bytes()) == parameters
    data = Parameters(7, [1, 65535], [300, 0], 4).to_bytes()
    for i in range(len(data)):
        with pytest.raises(Corrupt):
            Parameters.from_bytes(data[:i])
    with pytest.raises(Corrupt, match="longer"):
        Parameters.from_bytes(data + b"\0")
    with pytest.raises(LimitExceeded, match="2 steps"):
        Parameters.from_bytes(data, Limits(steps=1))


def test_steps_that_the_model_does_not_have(small):
    for parameters, error in ((Parameters(0, [0] * 5, [0] * 5), WrongModel), (Parameters(0, [0], [0], 0), Corrupt)):
        header = container.Header(4, 8, 8, small.fingerprint(), parameters.to_bytes())
        with pytest.raises(error, match="steps"):
            small.decompress(container.pack(header, b""))


def test_damaged_sections_raise_or_decode(small, photo):
    """With checksums made right again: only kinds of BitstreamError, and pictures of the right size."""
    rng, image = np.random.default_rng(0), photo.resize((12, 9))
    header, parameters, sections, _ = read_file(small.compress(image, lossless=True).bitstreams[0])
    whole = container.Header(4, 12, 9, header.fingerprint, parameters.to_bytes())
    found = {}
    for _ in range(60):
        payload = bytearray(b"".join(sections))
        payload[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        try:
            result = small.decompress(container.pack(whole, bytes(payload))).images[0].size
        except BitstreamError as error:
            result = type(error)
        found[result] = found.get(result, 0) + 1
    assert found.keys() <= {(12, 9), Corrupt, WrongModel} and len(found) > 1
