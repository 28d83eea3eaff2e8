"""CDC: tables that are the same on all machines, rates, and a decoder whose noise is the user's to choose."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import make
from PIL import Image

from diffusers_compress import CDCContextModel, CDCPipeline, CDCScheduler, embedded_model
from diffusers_compress.codecs.cdc.format import Parameters, describe, read_file
from diffusers_compress.diffusion import equations
from diffusers_compress.errors import Corrupt, WrongModel
from diffusers_compress.images import to_tensor
from diffusers_compress.metrics.wasserstein import wasserstein_distortion
from diffusers_compress.models import fixed_point
from diffusers_compress.models.cdc_context import std_thresholds
from diffusers_compress.models.fixed_point import UNIT, FixedPointConv, FixedPointNetwork

LEVELS, PUBLISHED = "epsilon", "v_prediction"  # the two models of golden/make.py


@pytest.fixture(scope="module")
def pipe():
    return make.pipeline("cdc", LEVELS)


@pytest.fixture(scope="module")
def published():
    return make.pipeline("cdc", PUBLISHED)


@pytest.fixture(scope="module")
def embedded():
    pipe = CDCPipeline.from_pretrained(embedded_model("cdc"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(image):
    return np.asarray(image).astype(float)


def decibels(image, other):
    return -10 * math.log10(np.square(pixels(image) - pixels(other)).mean() / 255**2)


# ------------------------------------------------------------------------------------------------------------ noise levels


def test_noise_levels_are_the_published_ones():
    """The cosine over T + 1 places, and 1000 / T times the usual line."""
    scheduler = CDCScheduler()
    squared_cosine = [math.cos((t / 8193 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(8193)]
    for t in (0, 100, 4096, 8000):
        assert scheduler.level(t)[0] ** 2 == pytest.approx(squared_cosine[t + 1] / squared_cosine[0], rel=1e-9)
    assert 0 < scheduler.level(8192)[0] < 1e-4  # the last beta is 0.999, not 1
    assert scheduler.level(-1) == (1.0, 0.0)
    linear = CDCScheduler(20000, "linear", "epsilon", clip_sample=False)
    assert linear.level(0)[1] ** 2 == pytest.approx(1e-4 / 20) and linear.level(19999)[0] ** 2 == pytest.approx(4e-5, rel=0.1)
    for time in (0.25, 0.75):
        alpha, sigma = scheduler.levels_at(torch.tensor([time]))
        assert (float(alpha), float(sigma)) == pytest.approx(scheduler.level(int(8193 * time)))
    with pytest.raises(ValueError, match="beta_schedule"):
        CDCScheduler(beta_schedule="squared")


def test_a_decoder_walks_over_the_published_timesteps():
    assert CDCScheduler().timesteps(5) == [8192, 6144, 4096, 2048, 0]
    assert CDCScheduler(20000, "linear").timesteps(4) == [19999, 13332, 6666, 0]
    assert CDCScheduler().timesteps(1) == [8192]
    with pytest.raises(ValueError, match="8193 levels"):
        CDCScheduler().timesteps(8194)


def test_a_right_denoiser_of_either_kind_gives_the_picture(pipe, monkeypatch):
    """One that knows x_0 comes to it from any noise, in any number of steps."""
    x_0 = 0.9 * torch.rand(1, 3, 16, 16) * 2 - 0.9
    context = [torch.zeros(1, 16, 8, 8)]
    for scheduler in CDCScheduler(100), CDCScheduler(100, "linear", "epsilon", clip_sample=False):
        other = CDCPipeline(pipe.context_model, pipe.unet, scheduler)

        def denoiser(x_t, time, context, rate, scheduler=scheduler):
            alpha, sigma = scheduler.level(round(100 * float(time[0])))
            return x_0 if scheduler.config.prediction_type == "sample" else (x_t - alpha * x_0) / sigma

        monkeypatch.setattr(pipe.unet, "forward", denoiser)
        for steps in (1, 4):
            found = other.paint(context, torch.zeros(1), [3], 0.8, scheduler.timesteps(steps), None, other.progress_bar(total=0))
            assert torch.allclose(found, x_0, atol=2e-4)


# -------------------------------------------------------------------------------------------------------------- fixed point


@pytest.mark.parametrize("doubles", [False, True])
def test_layers_in_integers_are_exact_and_those_of_training(doubles):
    layer = FixedPointConv(3, 4, 5, doubles).requires_grad_(False)
    x = torch.randint(-3000, 3000, (1, 3, 4, 5)).double()
    y = layer.exact(x)
    assert torch.equal(y, y.round()) and y.shape == ((1, 4, 8, 10) if doubles else (1, 4, 4, 5))
    assert (layer.double()(x / 512) - y / 512).abs().max() < 1 / 512
    # One number in fractions
    integers, step = layer.integers()
    corner = [int(integers[c, 1, 2, 2] if doubles else integers[1, c, 2, 2]) for c in range(3)]
    alone = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    alone[0, :, 0, 0] = x[0, :, 2, 2]
    total = sum(w * int(v) for w, v in zip(corner, alone.flatten())) * Fraction(float(step.flatten()[1]))
    expected = math.floor(total + round(512 * float(layer.bias[1])) + Fraction(1, 2))
    assert int(layer.exact(alone)[0, 1, 0, 0]) == expected


def test_rounding_in_integers_does_not_add_up():
    """Weights of one sign, to which a bias of all activations would add up."""
    torch.manual_seed(0)
    network = FixedPointNetwork([FixedPointConv(3, 16, 5, True), FixedPointConv(16, 16, 5, True), FixedPointConv(16, 4, 3)])
    for layer in network.requires_grad_(False).layers:
        layer.weight.abs_()
        layer.settle()
    x = torch.randint(-1500, 1500, (1, 3, 6, 6)).double()
    found = network.exact(x)
    assert (found - UNIT * network.double()(x / UNIT)).mean().abs() < 0.7


def test_tables_survive_casts_and_settling_twice(pipe):
    """float16 and bfloat16 hold the weights that a settled model has."""
    model = CDCContextModel.from_config(pipe.context_model.config)
    model.settle()
    z_hat = 512 * torch.randint(-4, 5, (4, 2, 3)).numpy()
    expected, identity = model.tables(z_hat, 3, 8, 9), model.identity()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert model.identity() == identity and all(map(np.array_equal, model.tables(z_hat, 3, 8, 9), expected))
    model.settle()
    assert model.identity() == identity
    model.hyper_decoder[1].weight.data[0, 0, 0, 0] += model.hyper_decoder[1].weight.data.abs().max() / 8
    assert model.identity() != identity


def test_no_symbol_feels_a_small_error_of_any_network(pipe, published, photo, monkeypatch):
    """1e-3 on all that any convolution gives, those in integers included, at both ends."""
    for each in (pipe, published):
        data = each.compress(photo).bitstreams[0]
        symbols = each.read_symbols(*read_file(data))
        with monkeypatch.context() as patch:
            exact = fixed_point.FixedPointConv.convolve
            noisy = lambda layer, *given: (y := exact(layer, *given)) + 1e-3 * torch.randn(y.shape, dtype=y.dtype)  # noqa: E731
            patch.setattr(fixed_point.FixedPointConv, "convolve", noisy)
            hooks = [
                module.register_forward_hook(lambda module, given, y: y + 1e-3 * torch.randn(y.shape))
                for network in (each.context_model, each.unet)
                for module in network.modules()
                if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
            ]
            assert torch.equal(each.read_symbols(*read_file(data)), symbols)
            disturbed = each.compress(photo).bitstreams[0]  # another picture, in a way, whose file must be read alike
            found = each.read_symbols(*read_file(disturbed))
            for hook in hooks:
                hook.remove()
        assert torch.equal(each.read_symbols(*read_file(disturbed)), found)


def test_standard_deviations_find_the_nearest_table():
    thresholds = std_thresholds()
    for index in (4, 20, 33):
        std = 512 * math.pi / math.sqrt(3) * 2 ** ((index - 20) / 4)
        assert np.searchsorted(thresholds, round(std), side="right") == index


# --------------------------------------------------------------------------------------------------------------------- rate


@pytest.mark.parametrize("fidelity", [0.01, 0.5, 1.0])
def test_files_are_as_large_as_the_model_says(embedded, photo, fidelity):
    """Within 1 % of the bits of its probabilities, in floats and before means and scales are put on the tables' grid."""
    image = photo.resize((512, 384))
    header, parameters, payload = read_file(embedded.compress(image, fidelity=fidelity).bitstreams[0])
    x = torch.from_numpy(pixels(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        _, bits = embedded.context_model.eval()(x, embedded.rates([parameters.level]))
    assert len(payload) == pytest.approx(float(bits) / 8, rel=0.01)


def test_a_rate_is_a_place_or_a_limit(pipe, published, photo):
    sizes = [len(pipe.compress(photo, fidelity=fidelity).bitstreams[0]) for fidelity in (0.01, 0.4, 1.0)]
    levels = [describe(pipe.compress(photo, fidelity=fidelity).bitstreams[0])["level"] for fidelity in (0.01, 0.4, 1.0)]
    assert sizes == sorted(sizes) and levels == [0, 2, 5]
    for size, level in zip(sizes, levels):
        assert describe(pipe.compress(photo, max_bytes=size).bitstreams[0])["level"] >= level
    assert describe(pipe.compress(photo).bitstreams[0])["level"] == 5
    with pytest.raises(ValueError, match=f"at the model's lowest rate it has {sizes[0]}"):
        pipe.compress(photo, max_bytes=sizes[0] - 1)
    with pytest.raises(ValueError, match="may take 20 bytes"):
        published.compress(photo, max_bytes=20)
    with pytest.raises(ValueError, match="seed"):
        pipe.compress(photo, seed=-1)


def test_parameters_are_those_that_an_encoder_writes(pipe, published, photo):
    for parameters in (Parameters(0), Parameters(255, 7), Parameters(3, 2**32 - 1)):
        assert Parameters.from_bytes(parameters.to_bytes()) == parameters
    for data in (b"", b"\x01\x00", b"\x01\x80", b"\x01\x01\x00", b"\x01" + b"\xff" * 4 + b"\x7f"):
        with pytest.raises(Corrupt):
            Parameters.from_bytes(data)
    data = pipe.compress(photo).bitstreams[0]
    with pytest.raises(WrongModel, match="rate 5 of its model, this one has 1"):
        published.decompress(data, allow_other_model=True)


# ----------------------------------------------------------------------------------------------------------------- decoding


def test_noise_is_the_users_to_choose(published, photo):
    data, other = (published.compress(photo, seed=seed).bitstreams[0] for seed in (1, 2))
    decode = lambda data, **options: pixels(published.decompress(data, num_inference_steps=3, **options).images[0])  # noqa: E731
    assert np.array_equal(decode(data, gamma=0.0), decode(other, gamma=0.0))
    assert not np.array_equal(decode(data), decode(other)) and np.array_equal(decode(data), decode(data))
    assert not np.array_equal(decode(data), decode(data, gamma=0.5))
    with pytest.raises(ValueError, match="gamma"):
        published.decompress(data, gamma=-1.0)


def test_a_preview_is_near_the_picture_in_a_single_pass(embedded, published, photo):
    image = photo.resize((128, 96))
    data = embedded.compress(image, fidelity=1.0).bitstreams[0]
    preview, painted = (embedded.decompress(data, **options).images[0] for options in ({"preview": True}, {"gamma": 0.0}))
    assert decibels(preview, image) > 24 and decibels(painted, image) > 24
    with pytest.raises(ValueError, match="not trained to give previews"):
        published.decompress(published.compress(photo).bitstreams[0], preview=True)


def test_noise_trades_the_least_error_for_texture(embedded):
    """At the lowest rate, where the file leaves most of the wood's texture open."""
    with Image.open(Path(embedded_model()).parent / "coffee.jpg") as image:
        image = image.convert("RGB").crop((0, 160, 144, 256))
    data = embedded.compress(image, fidelity=0.01).bitstreams[0]
    smooth, noisy = (embedded.decompress(data, gamma=gamma, num_inference_steps=4).images[0] for gamma in (0.0, 0.8))
    distortion = [float(wasserstein_distortion(*(to_tensor(i)[0] / 2 + 0.5 for i in (image, each)))) for each in (smooth, noisy)]
    assert decibels(image, noisy) < decibels(image, smooth) and distortion[1] < distortion[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_type_decodes_nearly_the_same_picture(embedded, photo, dtype):
    image = photo.resize((96, 64))
    data = embedded.compress(image, fidelity=0.5).bitstreams[0]
    other = CDCPipeline.from_pretrained(embedded_model("cdc"), dtype=dtype)
    other.set_progress_bar_config(disable=True)
    here, there = (each.decompress(data, num_inference_steps=4).images[0] for each in (embedded, other))
    assert abs(decibels(here, image) - decibels(there, image)) < 0.1


def test_ddim_ends_without_noise():
    x_0, x_t = torch.rand(2, 3, 4, 4)
    assert torch.equal(equations.ddim(x_t, x_0, *CDCScheduler().level(10), *CDCScheduler().level(-1)), x_0)
