"""The dial between the mean and a sample, where the truth is known: a Gaussian source with a spectrum and its exact denoiser."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers_compress.pipelines.diffc import DiffCPipeline
from diffusers_compress.pipelines.perco import PerCoPipeline

from diffusers_compress import images
from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.realism import dial
from diffusers_compress.diffusion.schedule import from_scheduler

POWER = 4.0 / torch.arange(1, 65) ** 1.5


@pytest.fixture(scope="module")
def source():
    """(schedule, x_0 [1, 4000, 64], t, x_t, network) of a Gaussian source of this power spectrum."""
    scheduler = diffusers.UniPCMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    schedule, t = from_scheduler(scheduler), 500
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(1, 4000, 64, generator=generator) for _ in range(2))
    x_0 = POWER.sqrt() * x_0
    alpha, sigma = schedule.level(t)

    def network(x_t, timesteps, active):
        alpha, sigma = schedule.level(timesteps[0])
        x_0_hat = alpha * POWER / (alpha**2 * POWER + sigma**2) * x_t
        return (x_t - alpha * x_0_hat) / sigma

    return scheduler, schedule, x_0, t, alpha * x_0 + sigma * noise, network


def bounds(schedule, t):
    """D* and P* of the source at timestep t, summed over its 64 dimensions."""
    alpha, sigma = schedule.level(t)
    total = alpha**2 * POWER + sigma**2
    return float((POWER * sigma**2 / total).sum()), float((POWER.sqrt() - alpha * POWER / total.sqrt()).square().sum()) ** 0.5


@pytest.mark.parametrize("realism", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_law_of_distortion_and_perception(source, realism):
    """D = D* + (P* - P)^2 with P = (1 - a) P*.  Freirich, Michaeli, Meir 2021."""
    scheduler, schedule, x_0, t, x_t, network = source
    least, farthest = bounds(schedule, t)
    [x] = solvers.run([dial(solvers.solve(x_t, t, 10, schedule, scheduler), realism, schedule)], network)
    distance = float((x[0].std(0) - POWER.sqrt()).square().sum()) ** 0.5
    assert float((x - x_0).square().sum(-1).mean()) == pytest.approx(least + (realism * farthest) ** 2, rel=0.02)
    assert distance == pytest.approx((1 - realism) * farthest, abs=0.1 * farthest)


@pytest.mark.parametrize("realism", [0.0, 0.5, 1.0])
def test_an_independent_draw_costs_its_share(source, realism):
    """D = (1 + a^2) D* for a draw from the posterior."""
    _, schedule, x_0, t, x_t, network = source
    walk = solvers.ancestral(x_t, t, 200, schedule, torch.Generator().manual_seed(1))
    [x] = solvers.run([dial(walk, realism, schedule)], network)
    assert float((x - x_0).square().sum(-1).mean()) == pytest.approx((1 + realism**2) * bounds(schedule, t)[0], rel=0.03)


def test_a_draw_costs_three_decibels_at_high_rates(source):
    """D* against 2 D*: the end of the ODE is nearly the mean, a draw is off it by as much as the truth."""
    scheduler, schedule, _, t, _, _ = source
    power, generator = 300, torch.Generator().manual_seed(0)
    x_0 = power**0.5 * torch.randn(1, 50_000, generator=generator)
    alpha, sigma = schedule.level(t)
    x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator)
    assert power * (alpha / sigma) ** 2 > 100

    def network(x_t, timesteps, active):
        alpha, sigma = schedule.level(timesteps[0])
        return sigma / (alpha**2 * power + sigma**2) * x_t

    def error(walk):
        return float((solvers.run([walk], network)[0] - x_0).square().mean())

    flow = error(solvers.solve(x_t, t, 10, schedule, scheduler))
    draw = error(solvers.ancestral(x_t, t, 200, schedule, generator))
    assert 10 * math.log10(draw / flow) == pytest.approx(3.0, abs=0.2)


def test_no_call_is_added(source):
    scheduler, schedule, _, t, x_t, network = source
    for realism, expected in (0.0, 1), (0.3, 7), (1.0, 7):
        asked = []
        walk = dial(solvers.solve(x_t, t, 7, schedule, scheduler), realism, schedule)
        solvers.run([walk], lambda *request: asked.append(request[1]) or network(*request))
        assert len(asked) == expected
    [whole] = solvers.run([solvers.solve(x_t, t, 7, schedule, scheduler)], network)
    [dialled] = solvers.run([dial(solvers.solve(x_t, t, 7, schedule, scheduler), 1.0, schedule)], network)
    assert torch.equal(whole, dialled)


def test_one_call_more_follows_a_second_guess(source):
    """The mean goes its share of the way, at 0 and between; at 1 there is the flow alone."""
    scheduler, schedule, _, t, x_t, network = source

    def dialled(realism, share):
        asked = []
        walk = dial(solvers.solve(x_t, t, 7, schedule, scheduler), realism, schedule, share)
        [x] = solvers.run([walk], lambda *request: asked.append(request[1][0]) or network(*request))
        return x, asked

    first, second = dialled(0.0, 0.0)[0], solvers.run([solvers.solve(x_t, t, 2, schedule, scheduler)], network)[0]
    mean, asked = dialled(0.0, 0.4)
    assert asked == solvers.timesteps_to_zero(t, 2)
    assert torch.allclose(mean, 0.6 * first + 0.4 * second, atol=1e-4)
    flow, asked = dialled(1.0, 0.4)
    assert len(asked) == 7
    between, asked = dialled(0.3, 0.4)
    assert len(asked) == 8 and torch.allclose(between, 0.7 * mean + 0.3 * flow, atol=1e-4)


def test_the_embedded_model_gains_by_its_second_guess(photo):
    """Relic's mean of the demo's photo, with the calibration and without."""
    from diffusers_compress import RelicPipeline, embedded_model
    from diffusers_compress.metrics.distortion import psnr, samples

    pipe = RelicPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    data = pipe.compress(photo, target_bpp=0.2).bitstreams[0]

    def decibels():
        return psnr(samples(photo), samples(pipe.decompress(data, realism=0).images[0]))

    with_it = decibels()
    pipe.register_to_config(calibration={**pipe.config.calibration, "second_guess": None})
    assert with_it > decibels() + 0.01


def test_diffc_has_the_dial(tiny_sd_folder, photo):
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    data = pipe.compress(photo, max_bytes=120).bitstreams[0]

    def decoded(**options):
        return images.to_tensor(pipe.decompress(data, num_inference_steps=3, **options).images[0])[0]

    mean, half, flow = (decoded(realism=a) for a in (0.0, 0.5, 1.0))
    assert torch.equal(mean, decoded(reconstruction="denoised")) and torch.equal(flow, decoded())
    assert 0 < float((half - mean).abs().mean()) < float((flow - mean).abs().mean())
    with pytest.raises(ValueError, match="realism must be from 0 to 1, not 1.5"):
        pipe.decompress(data, realism=1.5)


def test_perco_has_the_dial():
    """At 0 the candidates of all seeds are nearly one picture, their mean; at 1 they differ."""
    from diffusers_compress import embedded_model

    pipe = PerCoPipeline.from_pretrained(embedded_model("perco"), preset="0.1250")
    pipe.set_progress_bar_config(disable=True)
    x = np.linspace(0, 255, 64).astype(np.uint8)
    data = pipe.compress(np.stack([np.tile(x, (64, 1))] * 3, -1)).bitstreams[0]

    def spread(realism):
        first, second = pipe.decompress(
            data, num_images_per_prompt=2, num_inference_steps=4, realism=realism, output_type="np"
        ).images
        return np.abs(first - second).mean()

    assert spread(0.0) < 0.6 * spread(1.0) and spread(0.0) < spread(0.5) < spread(1.0)
