"""`tune="ms-ssim"`: what a sender tells and keeps back, and what that brings."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.codecs.diffc import fitting
from diffusers_compress.codecs.diffc.ends import Sender
from diffusers_compress.codecs.diffc.fitting import aimed, distance, latents, moved, parts
from diffusers_compress.codecs.diffc.tuning import Tuned, fineness, shares, visibility
from diffusers_compress.coding import dct
from diffusers_compress.metrics.distortion import ms_ssim, psnr, samples


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffCPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def photo():
    """256x256 pixels: five scales need 176."""
    return images.open_image(demo_photo()).crop((300, 100, 556, 356))


def painter(patterns):
    """A model whose decoder adds a pattern [P, P] for each coefficient of its channel: patterns [C, P, P]."""
    kernel = patterns[:, None].expand(-1, 3, -1, -1)
    return SimpleNamespace(decode_latent=lambda x_0: F.conv_transpose2d(x_0, kernel, stride=patterns.shape[-1]) + 0.3)


def test_fineness_of_known_patterns():
    plain, lines, checks = torch.ones(8, 8), torch.tensor([1.0, -1]).repeat(8, 4), torch.tensor([[1.0, -1], [-1, 1]]).repeat(4, 4)
    found = fineness(painter(torch.stack([plain, lines, checks])), torch.zeros(1, 3, 2, 2))
    # Of 64 pixels: the edges alone; 7 differences of 2 in a row, 2 of 1 at its ends, and the edges above and below; both ways
    assert found.tolist() == pytest.approx([32 / 64, (8 * (7 * 4 + 2) + 16) / 64, 2 * 8 * (7 * 4 + 2) / 64])


def test_an_error_is_seen_where_the_picture_is_plain():
    picture = torch.zeros(3, 64, 64)
    picture[:, :, 32:] = torch.rand(1, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = visibility(picture, (8, 8))  # of a variance of 0 and of 1 / 12, in [0, 1]
    assert (seen[:, :3] == 1).all() and seen[:, 5:].mean().item() == pytest.approx((100 / 12) ** -0.15, rel=0.02)


def test_channels_of_one_fineness_are_told_alike():
    """Such as those of a model on pixels."""
    (share,) = shares(painter(torch.ones(3, 1, 1)), [torch.zeros(3, 16, 16)], torch.zeros(1, 3, 16, 16))
    assert torch.equal(share, torch.ones(3, 16, 16))


def test_moved_latents_decode_nearer_to_the_picture(pipe, photo):
    """On every side of a seam: in four blocks, which see 64 pixels of each other, about what it is in one."""
    picture = samples(photo) * 2 - 1
    with torch.inference_mode():
        x_0 = pipe.encode_picture(picture[None])
        whole = moved(pipe, picture, x_0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fitting, "BLOCK", 136)
            halves = moved(pipe, picture, x_0)
        plain, *tuned = (ms_ssim(picture / 2 + 0.5, pipe.decode_latent(x)[0] / 2 + 0.5) for x in (x_0, whole, halves))
    assert parts(32, 136 // 8) == [(0, 16), (16, 32)] and not torch.equal(whole, halves)
    assert max(1 - each for each in tuned) < 0.9 * (1 - plain)
    assert F.cosine_similarity((whole - x_0).flatten(), (halves - x_0).flatten(), 0) > 0.8


@pytest.mark.parametrize("family", ["sdxl", "sana", "flux_2", "qwen_image"])
def test_latents_of_other_models_move(family, photo):
    """In bfloat16, as on a GPU."""
    pipe = DiffCPipeline.from_pipe(tiny_models.FAMILIES[family](), dtype=torch.bfloat16)
    picture = pipe.pad(samples(photo)[:, :176, :180] * 2 - 1)
    with torch.no_grad():
        x_0 = pipe.encode_picture(picture[None])
        fitted = latents(pipe, "ms-ssim", [picture], x_0)
        before, after = (ms_ssim(picture / 2 + 0.5, pipe.decode_latent(x)[0] / 2 + 0.5) for x in (x_0, fitted))
    assert after > before and fitted.shape == x_0.shape and fitted.dtype == x_0.dtype


def test_latents_move_alike_where_weights_are_on_disk(photo, tmp_path):
    """Between a layer's call and its gradient, its weights are gone."""
    picture = samples(photo)[:, :176, :176] * 2 - 1
    x_0 = torch.randn(1, 4, 22, 22, generator=torch.Generator().manual_seed(0))
    pipe = DiffCPipeline.from_pipe(tiny_models.FAMILIES["sd_epsilon"](), dtype=torch.float32)
    expected = latents(pipe, "ms-ssim", [picture], x_0)
    cpu = torch.device("cpu")
    pipe.vae.enable_group_offload(cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.equal(latents(pipe, "ms-ssim", [picture], x_0), expected) and not torch.equal(x_0, expected)


def test_latents_that_stay(pipe, photo):
    picture, x_0 = samples(photo)[:, :168], torch.zeros(1, 24, 21, 32)
    assert torch.equal(latents(pipe, "ms-ssim", [picture], x_0), x_0)  # five scales need 176 pixels a side
    assert latents(pipe, "psnr", [picture], x_0) is x_0
    pixels = SimpleNamespace(vae=None)
    assert latents(pixels, "ms-ssim", [picture], picture[None]).data_ptr() == picture.data_ptr()


def test_distance_is_one_less_ms_ssim_and_falls_against_its_slope(pipe, photo):
    picture = samples(photo) * 2 - 1
    with torch.inference_mode():
        x = pipe.encode_picture(picture[None])
        far, slope = distance(pipe, picture, x)
        step = 1e-2 * slope / slope.square().mean().sqrt()
        nearer = distance(pipe, picture, x - step)[0] - distance(pipe, picture, x + step)[0]
    assert far == pytest.approx(1 - ms_ssim(picture / 2 + 0.5, pipe.decode_latent(x)[0] / 2 + 0.5), abs=1e-6)
    assert nearer == pytest.approx(-2 * (step * slope).sum().item(), rel=0.1)


def test_an_aim_is_a_trade_of_distance_and_bits():
    """Where a distance can be told exactly: the mean square from a target that is not x_0."""
    x_0, x_0_hat, target = torch.randn(3, 1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    v = torch.linspace(0.5, 50, 128)[None]
    w = (v / (1 + v)).view_as(x_0)

    def from_target(x):
        return (x - target).square().mean().item(), 2 * (x - target) / x.numel()

    def guess_of(x):
        return x_0_hat + dct.inverse(w * dct.transform(x - x_0_hat))

    shares, bits = torch.ones(2, 8, 8), v.log1p().sum().item()
    free, dear = (aimed(from_target, x_0, x_0_hat, shares, v, bits, part) for part in (0.0, 1000.0))
    assert from_target(guess_of(free))[0] < from_target(guess_of(x_0))[0]
    assert (dear - x_0_hat).square().sum() < 0.99 * (x_0 - x_0_hat).square().sum()


def test_a_sender_aims_in_the_last_part_of_its_file():
    x_0, x_0_hat, v = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 16)
    rate = SimpleNamespace(parameters=SimpleNamespace(channel=3, budgets=[100]), done=lambda t: 1 - t / 10)
    tuned, places = Tuned(torch.ones(1, 4, 4), lambda x: (0.5, x)), torch.ones(4, 4)
    cases = [(5, True, None, False), (3, False, None, False), (3, True, places, False), (3, True, None, True)]
    for t, wide, importance, aims in cases:  # the published coder is not wide
        sender = Sender(x_0, rate, importance, tuned)
        sender.aim(SimpleNamespace(wide=wide, kl=float), t, x_0_hat, v, 20)
        assert (sender.x_0 is x_0) != aims


def test_more_ms_ssim_from_as_many_bytes(pipe, photo):
    """Any receiver decodes the file: it is one like others."""
    files = [pipe.compress(photo, max_bytes=600, tune=tune).bitstreams[0] for tune in ("psnr", "ms-ssim")]
    decoded = pipe.decompress(files, realism=0.0)
    x, plain, tuned = (samples(image) for image in (photo, *decoded.images))
    assert len(files[0]) == len(files[1]) <= 600 and decoded.notes == [[], []]
    assert 1 - ms_ssim(x, tuned) < 0.98 * (1 - ms_ssim(x, plain))
    assert psnr(x, tuned) > psnr(x, plain) - 0.3


def test_the_default_is_psnr_and_others_are_refused(pipe, photo):
    small = photo.resize((64, 64))
    assert pipe.compress(small, max_bytes=100).bitstreams == pipe.compress(small, max_bytes=100, tune="psnr").bitstreams
    with pytest.raises(ValueError, match="tune must be one of psnr, ms-ssim, not 'vmaf'"):
        pipe.compress(small, max_bytes=100, tune="vmaf")


def test_a_target_of_quality_is_met_by_a_tuned_file(pipe, photo):
    target, decoding = 0.85, {"realism": 0.0}
    data = pipe.compress(photo, target_metric=("ms_ssim", target), tune="ms-ssim", decoding=decoding).bitstreams[0]
    assert target <= ms_ssim(samples(photo), samples(pipe.decompress(data, **decoding).images[0])) < target + 0.02
