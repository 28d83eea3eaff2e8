import math

import diffusers
import pytest
import torch

from diffusers_compress.codecs.diffc.finish import CALLS, enough_calls
from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.equations import ddim, kl_bits, posterior, predict_x0
from diffusers_compress.diffusion.schedule import from_scheduler
from diffusers_compress.diffusion.solvers import DDIM_SOLVERS, NATIVE_SOLVERS, REFUSED

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
CASES = [("epsilon", False), ("v_prediction", False), ("sample", False), ("v_prediction", True)]  # prediction type, zero SNR
STRIDES = [(999, 998), (999, 700), (500, 480), (20, 1)]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def level(alphas_cumprod, t):
    """alpha and sigma at t; t = -1 is x_0 itself."""
    return (1.0, 0.0) if t < 0 else (alphas_cumprod[t].item() ** 0.5, (1 - alphas_cumprod[t].item()) ** 0.5)


# ---- one step against diffusers' own


@pytest.mark.parametrize("prediction_type, zero_snr", CASES)
@pytest.mark.parametrize("t, s", STRIDES)
def test_posterior_is_the_step_of_ddpm(t, s, prediction_type, zero_snr):
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, variance_type="fixed_small",
        prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    scheduler.set_timesteps(timesteps=[t, s])
    x_t, output = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    wanted = scheduler.step(output, t, x_t, generator=torch.Generator().manual_seed(2)).prev_sample

    level_t, level_s = level(scheduler.alphas_cumprod, t), level(scheduler.alphas_cumprod, s)
    mean, std = posterior(x_t, predict_x0(output, x_t, *level_t, prediction_type), *level_t, *level_s)
    torch.testing.assert_close(mean + std * randn(2, 4, 8, 8, seed=2), wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("prediction_type, zero_snr", CASES)
@pytest.mark.parametrize("num_steps", [4, 50, 1000])
def test_ddim_is_the_step_of_ddim(num_steps, prediction_type, zero_snr):
    scheduler = diffusers.DDIMScheduler(
        **SD, prediction_type=prediction_type, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    x_t, output = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for t in scheduler.timesteps[:: max(1, num_steps // 5)].tolist() + [scheduler.timesteps[-1].item()]:
        step = scheduler.step(output, t, x_t)
        level_t = level(scheduler.alphas_cumprod, t)
        x_0_hat = predict_x0(output, x_t, *level_t, prediction_type)
        torch.testing.assert_close(x_0_hat, step.pred_original_sample, rtol=1e-4, atol=2e-5)
        x_s = ddim(x_t, x_0_hat, *level_t, *level(scheduler.alphas_cumprod, t - 1000 // num_steps))
        torch.testing.assert_close(x_s, step.prev_sample, rtol=1e-4, atol=2e-5)


def test_predict_x0_inverts_every_prediction_type():
    x_0, eps, alpha, sigma = randn(3, 5), randn(3, 5, seed=1), 0.6, 0.8
    x_t = alpha * x_0 + sigma * eps
    for prediction_type, output in (("epsilon", eps), ("v_prediction", alpha * eps - sigma * x_0), ("sample", x_0)):
        torch.testing.assert_close(predict_x0(output, x_t, alpha, sigma, prediction_type), x_0)
    with pytest.raises(ValueError, match="'flow'.*epsilon, v_prediction, sample"):
        predict_x0(eps, x_t, alpha, sigma, "flow")


def test_half_precision_is_widened():
    x_t, x_0 = randn(2, 3).half(), randn(2, 3, seed=1).half()
    levels = (0.6, 0.8, 0.8, 0.6)
    assert posterior(x_t, x_0, *levels)[0].dtype == ddim(x_t, x_0, *levels).dtype == torch.float32
    assert predict_x0(x_0, x_t, 0.6, 0.8, "sample").dtype == kl_bits(x_t, x_0, 0.1, 0.2).dtype == torch.float32
    assert torch.equal(ddim(x_t, x_0, *levels), ddim(x_t.float(), x_0.float(), *levels))
    assert ddim(x_t.double(), x_0, *levels).dtype == torch.float64


@pytest.mark.parametrize("alpha_t", [0.0, 0.1, 0.5])
def test_kl_is_the_distance_of_the_posterior_means(alpha_t):
    x_t, x_0, x_0_hat = (randn(3, 4, 5, seed=i, dtype=torch.float64) for i in range(3))
    sigma_t, alpha_s, sigma_s = math.sqrt(1 - alpha_t**2), 0.8, 0.6
    mu_q, std = posterior(x_t, x_0, alpha_t, sigma_t, alpha_s, sigma_s)
    mu_p, _ = posterior(x_t, x_0_hat, alpha_t, sigma_t, alpha_s, sigma_s)
    wanted = (mu_q - mu_p).square().sum((1, 2)) / (2 * std**2 * math.log(2))
    kl = kl_bits(x_0, x_0_hat, (alpha_t / sigma_t) ** 2, (alpha_s / sigma_s) ** 2)
    assert kl.shape == (3,)
    torch.testing.assert_close(kl, wanted)


def test_a_start_from_pure_noise_forgets_x_t():
    x_t, x_0 = randn(2, 3), randn(2, 3, seed=1)
    mean, std = posterior(x_t, x_0, 0.0, 1.0, 0.6, 0.8)
    torch.testing.assert_close(mean, 0.6 * x_0)
    assert std == pytest.approx(0.8)
    torch.testing.assert_close(ddim(x_t, x_0, 0.0, 1.0, 0.6, 0.8), 0.6 * x_0 + 0.8 * x_t)


# ---- a unit Gaussian source: Theis et al. 2022


@pytest.mark.parametrize("variance", [0.1, 0.5])
def test_distortions_of_a_unit_gaussian(variance):
    sigma2 = torch.logspace(math.log10(variance), -4, 500, dtype=torch.float64)
    levels = list(zip((1 - sigma2).sqrt().tolist(), sigma2.sqrt().tolist())) + [(1.0, 0.0)]
    alpha, sigma = levels[0]
    x_0 = randn(100_000)
    flow = ancestral = alpha * x_0 + sigma * randn(100_000, seed=1)
    denoised = alpha * flow  # the mean of x_0 given x_t
    generator = torch.Generator().manual_seed(2)
    for level_t, level_s in zip(levels, levels[1:]):
        flow = ddim(flow, level_t[0] * flow, *level_t, *level_s)
        mean, std = posterior(ancestral, level_t[0] * ancestral, *level_t, *level_s)
        ancestral = mean + std * torch.randn(mean.shape, generator=generator)

    def distortion(x):
        return (x - x_0).square().mean().item()

    assert distortion(denoised) == pytest.approx(variance, rel=0.02)
    assert distortion(ancestral) == pytest.approx(2 * variance, rel=0.02)
    assert distortion(flow) == pytest.approx(2 - 2 * math.sqrt(1 - variance), rel=0.02)


def test_rate_of_a_unit_gaussian():
    """The KL of all steps down to sigma is the mutual information -log2 sigma, less what x_T already tells."""
    schedule = from_scheduler(diffusers.DDIMScheduler(**SD))
    alpha, sigma, snr = schedule.alpha.tolist(), schedule.sigma.tolist(), schedule.snr.tolist()
    x_0 = randn(1, 20_000)
    x, bits = alpha[-1] * x_0 + sigma[-1] * randn(1, 20_000, seed=1), 0.0
    generator = torch.Generator().manual_seed(2)
    for t in range(999, 100, -1):
        bits += kl_bits(x_0, alpha[t] * x, snr[t], snr[t - 1]).item() / 20_000
        mean, std = posterior(x, x_0, alpha[t], sigma[t], alpha[t - 1], sigma[t - 1])
        x = mean + std * torch.randn(x.shape, generator=generator)
    assert bits == pytest.approx(math.log2(sigma[-1]) - math.log2(sigma[100]), rel=0.02)


# ---- the probability-flow ODE

VARIANCE = torch.logspace(-1, 1, 64)  # smooth and unequal, element by element


def solve(predict, x_t, *arguments):
    """One walk of `solvers.solve`, with predict(x, t) as its network."""
    [x_0] = solvers.run([solvers.solve(x_t[None], *arguments)], lambda x, t, active: predict(x, t[0]))
    return x_0[0]


def gaussian_network(schedule):
    """The exact network of x_0 ~ N(0, VARIANCE), and the list of the timesteps it was asked for."""
    calls = []

    def predict(x, t):
        calls.append(t)
        alpha, sigma = schedule.alpha[t].item(), schedule.sigma[t].item()
        x_0_hat = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x
        eps = (x - alpha * x_0_hat) / sigma
        outputs = {
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * x_0_hat,
            "sample": x_0_hat,
            "flow_prediction": eps - x_0_hat,
        }
        return outputs[schedule.prediction_type]

    return predict, calls


def solve_error(name, t, num_steps, seed=0, config=None, **options):
    """Relative rms error of `solve` from x_t, where x_0 = x_t sqrt(VARIANCE / (alpha^2 VARIANCE + sigma^2)) is exact."""
    base = diffusers.DDIMScheduler(**SD, **(config or {}))
    scheduler = getattr(diffusers, name).from_config(base.config, **options)
    schedule = from_scheduler(scheduler)
    predict, calls = gaussian_network(schedule)
    std_t = (schedule.alpha[t] ** 2 * VARIANCE + schedule.sigma[t] ** 2).sqrt().float()
    x_0, x_t = VARIANCE.sqrt() * randn(64, 64, seed=seed), std_t * randn(64, 64, seed=seed)
    x = solve(predict, x_t, t, num_steps, schedule, scheduler)
    assert x.shape == x_t.shape and x.dtype == torch.float32
    return ((x - x_0).square().sum() / x_0.square().sum()).sqrt().item(), calls


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t, tolerance", [(999, 0.08), (700, 0.04), (300, 0.01), (37, 0.002), (0, 0.001)])
@pytest.mark.parametrize("name", NATIVE_SOLVERS + ("DDIMScheduler", "PNDMScheduler"))
def test_solve_reaches_the_exact_solution(name, t, tolerance, prediction_type):
    error, calls = solve_error(name, t, 20, config={"prediction_type": prediction_type})
    assert error < tolerance
    assert calls[0] == t and len(calls) == min(20, t + 1) and calls == sorted(set(calls), reverse=True)


OTHER_LEVELS = {"CogVideoXDDIMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}


@pytest.mark.parametrize("name", sorted(set(DDIM_SOLVERS) - OTHER_LEVELS))
def test_schedulers_that_become_ddim(name):
    assert solve_error(name, 700, 10) == solve_error("DDIMScheduler", 700, 10)


def test_solve_on_levels_of_another_kind():
    """CogVideoX: a shifted SNR that ends in zero."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert solve_error("CogVideoXDDIMScheduler", 800, 40, config=config, snr_shift_scale=3.0)[0] < 0.04


FLOW_SOLVERS = ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler"]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("t, tolerance", [(999, 0.15), (700, 0.04), (37, 0.002), (0, 0.001)])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", *FLOW_SOLVERS])
def test_solve_on_flow_matching(name, t, tolerance):
    options = FLOW if name in FLOW_SOLVERS else {"shift": 3.0}
    error, calls = solve_error(name, t, 20, **options)
    assert error < tolerance and calls[0] == t and len(calls) == min(20, t + 1)


def test_solvers_keep_their_own_ways_on_flow_matching():
    euler = solve_error("FlowMatchEulerDiscreteScheduler", 700, 8)[0]
    assert all(solve_error(name, 700, 8, **FLOW)[0] < 0.7 * euler for name in FLOW_SOLVERS)


@pytest.mark.parametrize("t", [999, 998, 700])
@pytest.mark.parametrize("name", NATIVE_SOLVERS + ("DDIMScheduler",))
def test_solve_with_zero_terminal_snr(name, t):
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert solve_error(name, t, 20, config=config)[0] < 0.1


@pytest.mark.parametrize(
    "name, options",
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "final_sigmas_type": "sigma_min", "lambda_min_clipped": -1.0}),
        ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
        ("UniPCMultistepScheduler", {"use_beta_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ],
)
def test_solve_keeps_to_its_timesteps_whatever_the_options(name, options):
    error, calls = solve_error(name, 700, 20, **options)
    assert error < 0.04 and calls == solve_error("DDIMScheduler", 700, 20)[1]


@pytest.mark.parametrize("name", NATIVE_SOLVERS + ("DDIMScheduler",))
def test_solve_in_few_or_too_many_steps(name):
    config = {"prediction_type": "v_prediction"}
    for t, num_steps in ((700, 1), (700, 2), (700, 3), (3, 1000), (1, 1000), (0, 1000)):
        error, calls = solve_error(name, t, num_steps, config=config)
        assert error < 1 and len(calls) == min(num_steps, t + 1) and calls[0] == t


def test_every_native_solver_is_its_own():
    """With 6 calls the solvers differ from DDIM, except Euler, which is DDIM; more calls bring every one nearer."""
    ddim_error = solve_error("DDIMScheduler", 700, 6)[0]
    for name in NATIVE_SOLVERS:
        error = solve_error(name, 700, 6)[0]
        assert (error == pytest.approx(ddim_error, rel=1e-3)) == (name == "EulerDiscreteScheduler")
        assert solve_error(name, 700, 40)[0] < error
    assert solve_error("DPMSolverMultistepScheduler", 700, 10)[0] < 0.5 * solve_error("DDIMScheduler", 700, 10)[0]


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "LMSDiscreteScheduler", "PNDMScheduler"])
def test_solve_is_deterministic_and_leaves_the_scheduler_alone(name):
    scheduler = getattr(diffusers, name).from_config(diffusers.DDIMScheduler(**SD).config)
    scheduler.set_timesteps(7)
    config, timesteps = dict(scheduler.config), scheduler.timesteps.clone()
    schedule = from_scheduler(scheduler)
    predict, _ = gaussian_network(schedule)
    first, second = (solve(predict, randn(2, 64), 500, 9, schedule, scheduler) for _ in range(2))
    assert torch.equal(first, second)
    assert dict(scheduler.config) == config and torch.equal(scheduler.timesteps, timesteps)


@pytest.mark.parametrize(
    "name, options",
    [(name, {}) for name in REFUSED]
    + [("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"})]
    + [("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})],
)
def test_schedulers_that_cannot_finish_a_picture_say_why(name, options):
    scheduler = getattr(diffusers, name).from_config(diffusers.DDIMScheduler(**SD).config, **options)
    schedule = from_scheduler(scheduler)
    with pytest.raises(ValueError, match=f"{name}.*cannot finish a picture: it .*DDIMScheduler or DPMSolverMultistep"):
        solve(gaussian_network(schedule)[0], randn(1, 64), 500, 5, schedule, scheduler)


def test_an_option_left_behind_by_a_stochastic_scheduler_does_no_harm():
    stochastic = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++")
    scheduler = diffusers.EulerDiscreteScheduler.from_config(stochastic.config)
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
    schedule = from_scheduler(scheduler)
    predict, calls = gaussian_network(schedule)
    assert solve(predict, randn(1, 64), 500, 5, schedule, scheduler).isfinite().all() and len(calls) == 5


@pytest.mark.parametrize("t, num_steps", [(1000, 5), (-1, 5), (500, 0)])
def test_solve_arguments_out_of_range(t, num_steps):
    scheduler = diffusers.DDIMScheduler(**SD)
    schedule = from_scheduler(scheduler)
    with pytest.raises(ValueError, match="permitted"):
        solve(gaussian_network(schedule)[0], randn(1, 64), t, num_steps, schedule, scheduler)


# ---- walks that share a batch


def test_walks_of_different_timesteps_share_the_network():
    """Three walks give what each gives alone, in as many calls as the longest needs."""
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(diffusers.DDIMScheduler(**SD).config)
    schedule = from_scheduler(scheduler)
    predict, calls = gaussian_network(schedule)
    x = [randn(1, 64, seed=seed) for seed in range(3)]
    starts = [(900, 8), (500, 5), (2, 8)]
    batches = []

    def network(x_t, t, active):
        batches.append(len(active))
        return torch.cat([predict(row[None], t_i) for row, t_i in zip(x_t, t)])

    together = solvers.run([solvers.solve(x_i, *start, schedule, scheduler) for x_i, start in zip(x, starts)], network)
    assert batches == [3, 3, 3, 2, 2, 1, 1, 1]
    for x_i, start, x_0 in zip(x, starts, together):
        torch.testing.assert_close(x_0, solve(predict, x_i[0], *start, schedule, scheduler)[None])


def test_a_stream_that_ends_near_x_0_is_finished_in_as_many_calls_as_are_left():
    timesteps = solvers.timesteps_to_zero(499, CALLS)
    assert [enough_calls(t, 1000) for t in timesteps] == [10, 9, 8, 7, 6, 5, 4, 4, 4, 4]
    assert enough_calls(999, 1000) == CALLS and enough_calls(184, 1000) == 7


def test_ancestral_draws_from_the_posterior_of_the_source():
    """x_0 | x_t of a Gaussian source: mean x_0_hat, variance v sigma^2 / (alpha^2 v + sigma^2)."""
    schedule = from_scheduler(diffusers.DDIMScheduler(**SD))
    predict, _ = gaussian_network(schedule)
    t, alpha, sigma = 400, *schedule.level(400)
    x_t = torch.full((1, 4000, 64), 0.7)
    walk = solvers.ancestral(x_t, t, 100, schedule, torch.Generator().manual_seed(0))
    [x_0] = solvers.run([walk], lambda x, t, active: predict(x, t[0]))
    mean = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * 0.7
    variance = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
    torch.testing.assert_close(x_0.mean((0, 1)), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(x_0.var((0, 1)), variance, rtol=0.1, atol=0)
