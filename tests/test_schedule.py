import diffusers
import pytest
import torch

from diffusers_compress.diffusion.schedule import flow_matching, from_pure_noise, from_scheduler, timestep_at

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
VARIANCE_PRESERVING = [
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler",
    "PNDMScheduler", "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler",
]  # fmt: skip


def schedule_of(name="DDIMScheduler", **config):
    base = diffusers.DDIMScheduler(**{**SD, **config})
    return from_scheduler(getattr(diffusers, name).from_config(base.config))


def test_levels_are_those_of_stable_diffusion():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    schedule = schedule_of()
    assert schedule.alpha.dtype == schedule.sigma.dtype == torch.float64
    torch.testing.assert_close(schedule.alpha**2, alphas_cumprod, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000, dtype=torch.float64))
    torch.testing.assert_close(schedule.snr, alphas_cumprod / (1 - alphas_cumprod), rtol=1e-4, atol=0)
    assert schedule.prediction_type == "epsilon"


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_levels_do_not_depend_on_the_sampler(name, zero_snr):
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    reference, schedule = schedule_of(**config), schedule_of(name, **config)
    assert torch.equal(schedule.alpha, reference.alpha) and torch.equal(schedule.sigma, reference.sigma)
    assert schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", VARIANCE_PRESERVING + ["CogVideoXDDIMScheduler", "UnCLIPScheduler"])
def test_default_configurations_give_finite_falling_levels(name):
    schedule = from_scheduler(getattr(diffusers, name)())
    assert schedule.snr.isfinite().all() and (schedule.snr > 0).all() and (schedule.sigma > 0).all()
    assert (schedule.ratio.diff() < 0).all()


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_sampling_options_are_ignored(option):
    plain = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler(**SD).config)
    scheduler = diffusers.EulerDiscreteScheduler.from_config(plain.config, timestep_spacing="leading", **{option: True})
    scheduler.set_timesteps(7)
    assert torch.equal(from_scheduler(scheduler).alpha, from_scheduler(plain).alpha)


def test_only_a_last_level_that_is_not_pure_noise_is_replaced():
    for trained_on_noise in (schedule_of(prediction_type="v_prediction", rescale_betas_zero_snr=True), flow_matching(1000)):
        assert trained_on_noise.knows_last and from_pure_noise(trained_on_noise) is trained_on_noise
    trained = schedule_of()
    schedule = from_pure_noise(trained)
    assert trained.knows_last and not schedule.knows_last
    assert schedule.level(999) == (0, 1) and schedule.snr[-1] == 0
    assert torch.equal(schedule.alpha[:-1], trained.alpha[:-1]) and torch.equal(schedule.sigma[:-1], trained.sigma[:-1])


def test_zero_terminal_snr_is_almost_zero():
    schedule = schedule_of(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert 0 < schedule.snr[-1] < 1e-7 and schedule.snr[-2] > schedule.snr[-1]


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "IPNDMScheduler"])
def test_other_diffusions_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}.*DDIMScheduler"):
        from_scheduler(getattr(diffusers, name)())


@pytest.mark.parametrize("name, options", [
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchLCMScheduler", {}),
    *((name, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}) for name in (
        "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
        "SASolverScheduler")),
])  # fmt: skip
def test_flow_matching_has_one_set_of_levels(name, options):
    schedule = from_scheduler(getattr(diffusers, name)(**options))
    torch.testing.assert_close(schedule.sigma, torch.arange(1, 1001, dtype=torch.float64) / 1000)
    torch.testing.assert_close(schedule.alpha, 1 - schedule.sigma)
    assert schedule.prediction_type == "flow_prediction" and schedule.ratio[-1] == 0 and (schedule.ratio.diff() < 0).all()
    plain = diffusers.FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(plain.sigmas.flip(0).double(), schedule.sigma)
    torch.testing.assert_close(plain.timesteps.flip(0).double(), 1000 * schedule.sigma)


def test_half_a_flow_matching_configuration_is_refused():
    with pytest.raises(ValueError, match="UniPCMultistepScheduler"):
        from_scheduler(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match="flow_prediction.*epsilon, v_prediction, sample, and with use_flow_sigmas"):
        from_scheduler(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"))
    with pytest.raises(ValueError, match="EulerDiscreteScheduler"):
        from_scheduler(diffusers.EulerDiscreteScheduler(timestep_type="continuous"))


def test_timestep_at_is_the_nearest():
    schedule = schedule_of()
    assert [timestep_at(schedule, schedule.ratio[t].item()) for t in (0, 1, 500, 999)] == [0, 1, 500, 999]
    assert timestep_at(schedule, 0.0) == 999 and timestep_at(schedule, 1e9) == 0
    assert timestep_at(schedule, 0.9 * schedule.ratio[500].item() + 0.1 * schedule.ratio[501].item()) == 500
