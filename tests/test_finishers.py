"""Students that finish a picture in few calls: they step as diffusers' own schedulers, change no symbol, and say where they cannot work."""

import copy
import json

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_compress import DiffCPipeline, RelicPipeline, embedded_model, images
from diffusers_compress.cli.decode import decoding
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.coding import randomness
from diffusers_compress.diffusion import finishers, schedule, solvers
from diffusers_compress.evaluation.codec import parse_codec
from diffusers_compress.metrics import distortion
from diffusers_compress.metrics.wasserstein import wasserstein_distortion

SD = tiny_models.SD_NOISE


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[DiffCPipeline, RelicPipeline])
def pipe(request, tiny_sd_folder):
    return silent(request.param.from_pretrained(tiny_sd_folder))


@pytest.fixture(scope="module")
def diffc(tiny_sd_folder):
    return silent(DiffCPipeline.from_pretrained(tiny_sd_folder))


@pytest.fixture(scope="module")
def data(pipe, photo):
    return pipe.compress(photo, max_bytes=150).bitstreams[0]


def lora_folder(folder, unet, changed=("to_q", "conv_in"), scheduler=None):
    """A LoRA of this UNet as diffusers saves it, under names of two kinds, and the UNet with it."""
    student = copy.deepcopy(unet)
    student.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=list(changed), init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(student))
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, weights)
    if scheduler is not None:
        scheduler.save_pretrained(folder)
    return str(folder), student


# ------------------------------------------------------------------------------------------------------------------- steps


def network(x, t):
    """Some smooth function of both."""
    return torch.sin(x * (1 + t / 500)) + 0.1 * x


@pytest.mark.parametrize(
    "name, steps, tolerance",
    [("LCMScheduler", 4, 1e-3), ("TCDScheduler", 4, 1e-4), ("DDIMScheduler", 4, 1e-4), ("FlowMatchLCMScheduler", 4, 1e-4)]
    + [("FlowMapEulerDiscreteScheduler", 4, 1e-4), ("FlowMatchEulerDiscreteScheduler", 4, 1e-4)],
)
def test_a_student_steps_as_with_diffusers_own_scheduler(monkeypatch, name, steps, tolerance):
    """From its noisiest timestep, the noise being ours."""
    options = {} if name.startswith("Flow") else SD | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    options |= {"set_alpha_to_one": True, "clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    noise, flow = schedule.from_scheduler(scheduler), name.startswith("Flow")
    x_t, drawn = torch.randn(1, 4, 8, 8), []

    def ours(shape, *_, **__):
        drawn.append(randomness.normals(x_t.numel(), randomness.FINISH, len(drawn) + 1).view(shape))
        return drawn[-1]

    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", ours, raising=False)
    x = x_t
    for time in scheduler.timesteps:
        last = x  # the schedulers' own last step leaves a trace of noise, ours is x_0_hat
        x = scheduler.step(network(x, float(time) - flow), time, x, return_dict=False)[0]
    times = [round(float(time)) - flow for time in scheduler.timesteps]
    output, level = network(last, times[-1]), noise.level(times[-1])
    expected = solvers.predict_x0(output, last, *level, noise.prediction_type)

    [found] = solvers.run(
        [solvers.few_calls(x_t, noise.level(times[0]), times, noise, solvers.fresh_noise_of(scheduler))],
        lambda x, t, _: network(x, t[0]),
    )
    assert bool(drawn) == (solvers.fresh_noise_of(scheduler) > 0)
    assert torch.allclose(found, expected, atol=tolerance * float(expected.abs().max()))


def test_noise_that_is_missing_is_added_and_no_other():
    noise = schedule.from_scheduler(diffusers.DDIMScheduler(**SD))
    x_s = noise.level(200)[0] * 3 + noise.level(200)[1] * torch.randn(1, 1, 200, 200)
    x_t = solvers.noisier(x_s, noise.level(200), noise.level(500), 0)
    alpha, sigma = noise.level(500)
    assert float(x_t.mean()) == pytest.approx(3 * alpha, abs=0.02) and float(x_t.std()) == pytest.approx(sigma, rel=0.01)
    assert torch.equal(solvers.noisier(x_s, noise.level(200), noise.level(200), 0), x_s)


def test_x_t_goes_to_the_nearest_noisier_timestep(diffc):
    noise, seen = diffc.noise_schedule(), {}
    scheduler = diffusers.LCMScheduler(**SD)
    finisher = finishers.finisher_of(diffc, with_scheduler(diffc, scheduler))
    assert finisher.timesteps == list(range(19, 1000, 20))
    for t, steps in ((0, 1), (139, 1), (140, 1), (140, 2), (140, 99), (999, 3)):
        asked = []
        walk = finisher.walk(torch.randn(1, 4, 8, 8), t, noise, steps)
        solvers.run([walk], lambda x, t, _, asked=asked: asked.append(t[0]) or x)
        seen[t, steps] = asked
    assert seen == {
        (0, 1): [19],
        (139, 1): [139],
        (140, 1): [159],
        (140, 2): [159, 79],
        (140, 99): list(range(159, 0, -20)),
        (999, 3): [999, 659, 319],
    }


def test_the_models_own_steps_go_before_a_student_of_the_last_call(diffc):
    """In two calls the model goes half-way down, without new noise, and the student the rest."""
    finisher = finishers.finisher_of(diffc, with_scheduler(diffc, diffusers.TCDScheduler(**SD, original_inference_steps=1000)))
    finisher = finisher._replace(last_call_only=True, timesteps=list(range(30, 600)))
    assert finisher.way(400, 1) == ([400], 1) and finisher.way(400, 2) == ([400, 200], 1)
    assert finisher.way(40, 4) == ([40, 30], 1) and finisher.way(20, 3) == ([20], 1)
    asked, x_t = [], torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        finisher.pipe.unet = tiny_models.unet()
        found = diffc.finish([(x_t, 400)], [""], 2, watch=lambda *step: asked.append(step[1]), finisher=finisher)
        text, noise = diffc.encode_prompt([""]), diffc.noise_schedule()
        [x_s] = solvers.run([solvers.follow(x_t, [400, 200], noise)], lambda x, t, _: diffc.predict(x, t, text))
        output = finisher.pipe.predict(x_s, [200], text)
    assert asked == [400, 200]
    assert torch.allclose(found, solvers.predict_x0(output, x_s, *noise.level(200), noise.prediction_type), atol=1e-5)


def with_scheduler(pipe, scheduler):
    student = copy.copy(pipe)
    student.scheduler = scheduler
    return student


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        (diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"), [249, 499, 749, 999]),
        (diffusers.FlowMatchEulerDiscreteScheduler(), [249, 499, 749, 999]),
        (diffusers.TCDScheduler(**SD, original_inference_steps=10), list(range(99, 1000, 100))),
    ],
)
def test_timesteps_of_students(scheduler, expected):
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler = diffusers.FlowMapEulerDiscreteScheduler()
    assert finishers.distilled_timesteps(scheduler) == expected


# -------------------------------------------------------------------------------------------------------------- in a codec


def test_a_finisher_is_called_once_and_changes_no_symbol(pipe, data, tmp_path):
    """One call after those of the loop; the same picture twice, alone or in a batch; the base is as before."""
    lcm = with_scheduler(pipe, diffusers.LCMScheduler(**SD))
    identity, before = pipe.fingerprint(), pipe.decompress(data, output_type="np")
    counts = []
    for options in ({"num_inference_steps": 1, "realism": 0.0}, {"finisher": lcm}, {"finisher": lcm, "num_inference_steps": 3}):
        calls = []
        watching = {"callback_on_step_end": lambda *step, calls=calls: calls.append(step[1])}
        pipe.decompress(data, **options, **watching)
        counts.append(len(calls))
    assert counts == [counts[0], counts[0], counts[0] + 2]
    found = pipe.decompress(data, finisher=lcm, output_type="np")
    assert np.array_equal(found.images[0], pipe.decompress(data, finisher=lcm, output_type="np").images[0])
    assert not np.allclose(found.images[0], before.images[0], atol=0.01)
    assert found.drift == before.drift and found.notes == before.notes
    together = pipe.decompress([data, data], finisher=lcm, output_type="np").images
    assert np.allclose(together[1], found.images[0], atol=1e-3)
    assert pipe.fingerprint() == identity
    assert np.array_equal(pipe.decompress(data, output_type="np").images[0], before.images[0])


def test_realism_blends_with_the_mean_of_the_base(pipe, data):
    lcm = with_scheduler(pipe, diffusers.LCMScheduler(**SD))
    with torch.no_grad():
        ends, prompts = [(torch.randn(1, 4, 8, 8), 300)], [""]
        finisher = finishers.finisher_of(pipe, lcm)
        mean, half, sample = (pipe.finish(ends, prompts, 1, realism, finisher=finisher) for realism in (0.0, 0.5, 1.0))
    assert torch.allclose(half, (mean + sample) / 2, atol=1e-6)
    assert torch.equal(mean, pipe.finish(ends, prompts, 1, 0.0))
    assert np.isfinite(pipe.decompress(data, realism=0.5, finisher=lcm, output_type="np").images[0]).all()


def test_a_lora_is_merged_into_a_copy(diffc, tmp_path):
    folder, student = lora_folder(tmp_path, diffc.unet, scheduler=diffusers.TCDScheduler(**SD))
    before = {name: tensor.clone() for name, tensor in diffc.unet.state_dict().items()}
    finisher = finishers.finisher_of(diffc, folder)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    with torch.no_grad():
        merged, expected, base = (unet(x, 100, text)[0] for unet in (finisher.pipe.unet, student, diffc.unet))
    assert torch.allclose(merged, expected, atol=1e-5) and not torch.allclose(merged, base, atol=1e-3)
    assert diffc.unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in diffc.unet.state_dict().items())
    assert finishers.finisher_of(diffc, folder).pipe.unet is finisher.pipe.unet  # loaded once
    about = {"network": finishers.network_fingerprint(diffc), "timesteps": [100, 300]}
    (tmp_path / "finisher.json").write_text(json.dumps(about))
    assert finishers.finisher_of(diffc, f"LCM@{folder}").timesteps == list(range(119, 300, 20))
    (tmp_path / "finisher.json").write_text(json.dumps(about | {"network": "01234567"}))
    with pytest.raises(ValueError, match=f"distilled from the network 01234567, this is {about['network']}"):
        finishers.finisher_of(diffc, f"TCD@{folder}")


def test_a_pipelines_folder_is_a_finisher(diffc, tmp_path, data, photo):
    student = tiny_models.sd_turbo()
    student.unet.conv_out.weight.data *= 0.5
    student.save_pretrained(tmp_path)
    file = diffc.compress(photo, max_bytes=150).bitstreams[0]
    by_folder, by_pipeline = (
        diffc.decompress(file, finisher=finisher, output_type="np").images[0] for finisher in (str(tmp_path), student)
    )
    assert np.array_equal(by_folder, by_pipeline)
    scheduler = finishers.finisher_of(diffc, f"LCM@{tmp_path}").pipe.scheduler
    assert isinstance(scheduler, diffusers.LCMScheduler) and scheduler.config.beta_start == SD["beta_start"]
    own = finishers.finisher_of(diffc, "EulerDiscrete@")
    assert own.pipe.unet is diffc.unet and own.timesteps == [249, 499, 749, 999]


def test_a_wanted_quality_is_that_of_the_finished_picture(diffc, photo):
    lcm = with_scheduler(diffc, diffusers.LCMScheduler(**SD))
    decoded = diffc.decompress(diffc.compress(photo, max_bytes=200).bitstreams[0], finisher=lcm).images[0]
    psnr = 10 * np.log10(255**2 / np.mean((np.asarray(decoded, float) - np.asarray(photo, float)) ** 2))
    data = diffc.compress(photo, target_psnr=psnr - 1, decoding={"finisher": lcm}).bitstreams[0]
    decoded = diffc.decompress(data, finisher=lcm).images[0]
    assert 10 * np.log10(255**2 / np.mean((np.asarray(decoded, float) - np.asarray(photo, float)) ** 2)) >= psnr - 1


def test_the_embedded_student(photo):
    """At most 4 MB; one call has more texture than the model's one call, and is nearer to the photo's by the metric of the tables."""
    assert sum(path.stat().st_size for path in finishers.EMBEDDED.iterdir()) <= 4_000_000
    pipe = silent(DiffCPipeline.from_pretrained(embedded_model(), dtype=torch.float32))
    coffee = images.open_image(demo_photo()).convert("RGB").crop((100, 20, 356, 276))
    data = pipe.compress(coffee, target_bpp=0.1).bitstreams[0]
    one, mean = (pipe.decompress(data, **options).images[0] for options in ({"finisher": "embedded"}, {"realism": 0.0}))
    x, *decoded = map(distortion.samples, (coffee, one, mean))
    texture, smooth = (wasserstein_distortion(x, x_hat) for x_hat in decoded)
    assert texture < 0.85 * smooth


# ----------------------------------------------------------------------------------------------------------------- refusals


def other_unet(pipe, **config):
    student = with_scheduler(pipe, diffusers.LCMScheduler(**SD))
    student.unet = tiny_models.unet(**config)
    return student


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda pipe: 3, "must be a folder, a Hub id or a pipeline, not int"),
        (lambda pipe: "nowhere", "nowhere: no such folder or file"),
        (lambda pipe: "NoSuch@", "diffusers has no NoSuchScheduler"),
        (lambda pipe: "", "names no scheduler"),
        (lambda pipe: with_scheduler(pipe, diffusers.FlowMatchLCMScheduler()), "trained by variance-preserving diffusion"),
        (lambda pipe: with_scheduler(pipe, diffusers.SASolverScheduler(**SD)), "stochastic"),
        (lambda pipe: with_scheduler(pipe, diffusers.EDMEulerScheduler()), "no noise levels"),
        (lambda pipe: other_unet(pipe, in_channels=8, out_channels=8), "in_channels = 8, the model 4"),
        (lambda pipe: other_unet(pipe, cross_attention_dim=32), "cross_attention_dim = 32"),
        (lambda pipe: other_unet(pipe, time_cond_proj_dim=8), "guidance scale as an input"),
        (lambda pipe: tiny_models.flux(), "has no unet"),
    ],
)
def test_what_cannot_finish_says_why(diffc, photo, make, reason):
    with pytest.raises(ValueError, match=reason) as error:
        diffc.decompress([], finisher=make(diffc))
    assert "\n" not in str(error.value)


def test_a_lora_of_another_model_says_so(diffc, tmp_path):
    folder, _ = lora_folder(tmp_path / "wide", tiny_models.unet(block_out_channels=(16, 32)))
    with pytest.raises(ValueError, match=r"wide.* does not fit this UNet2DConditionModel") as error:
        diffc.decompress([], finisher=f"LCM@{folder}")
    assert "\n" not in str(error.value)

    folder, _ = lora_folder(tmp_path / "more", diffc.unet)
    file = tmp_path / "more" / finishers.LORA
    tensors = load_file(file)
    tensors |= {name.replace("conv_in", "conv_between"): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"more.* does not fit this UNet2DConditionModel: 2 of its \d+ tensors belong to no layer"
    ):
        diffc.decompress([], finisher=f"LCM@{folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither pytorch_lora_weights.safetensors nor unet/config.json"):
        diffc.decompress([], finisher=f"LCM@{tmp_path / 'empty'}")


def test_no_noisier_timestep(diffc, photo, tmp_path):
    folder, _ = lora_folder(tmp_path, diffc.unet, scheduler=diffusers.TCDScheduler(**SD))
    about = {"network": finishers.network_fingerprint(diffc), "timesteps": [0, 100]}
    (tmp_path / "finisher.json").write_text(json.dumps(about))
    data = diffc.compress(photo, max_bytes=80).bitstreams[0]
    with pytest.raises(ValueError, match="knows no timestep as noisy as this file's end: alpha/sigma is .*decode without it"):
        diffc.decompress(data, finisher=folder)


def test_a_finisher_goes_with_the_flow_alone(pipe, data):
    lcm = with_scheduler(pipe, diffusers.LCMScheduler(**SD))
    other = {"preview": True} if isinstance(pipe, RelicPipeline) else {"reconstruction": "ancestral"}
    with pytest.raises(ValueError, match="not both|must be one of flow, not 'ancestral'"):
        pipe.decompress(data, finisher=lcm, **other)


def test_command_line_and_evaluation_take_one():
    arguments = decoding("diffc", None, False, None, 2, None, None, finisher="LCM@folder")
    assert arguments == {"num_inference_steps": 2, "finisher": "LCM@folder"}
    assert parse_codec("relic:decode.finisher=LCM@folder").decode_options == (("finisher", "LCM@folder"),)
