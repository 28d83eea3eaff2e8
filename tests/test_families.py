"""Every family of diffusion models through a file and back; its denoiser is the one that diffusers' own pipeline runs."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from diffusers_compress import Corrupt, DiffCPipeline, RelicPipeline, calibration, images
from diffusers_compress.codecs.diffc import ends
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.coding.channels import channel_of
from diffusers_compress.diffusion import equations
from diffusers_compress.diffusion.families import family_of
from diffusers_compress.diffusion.schedule import FLOW, from_pure_noise

CODECS = {"diffc": DiffCPipeline, "relic": RelicPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder that diffusers' own pipeline saved."""
    folders = {}
    for name, make in tiny_models.FAMILIES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
    return folders


def load(codec, folder, **options):
    pipe = CODECS[codec].from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(folders, family):
    return load("diffc", folders[family])


# ---------------------------------------------------------------------------------------------------------- file and back


def test_round_trip_through_a_file(folders, family, pipe, photo, tmp_path):
    """At any size, in a pipeline loaded anew; damaged files are told."""
    picture, loaded = photo.crop((0, 0, 75, 50)), load("diffc", folders[family])
    for codec, options in {"diffc": {"num_coding_steps": 4}, "relic": {}}.items():
        sender, receiver = (CODECS[codec].from_pipe(end, dtype=torch.float32) for end in (pipe, loaded))
        data = sender.compress(picture, max_bytes=120, **options).bitstreams[0]
        assert len(data) <= 120
        (tmp_path / "photo.dfc").write_bytes(data)
        decoded = receiver.decompress((tmp_path / "photo.dfc").read_bytes(), num_inference_steps=2).images[0]
        assert decoded.size == picture.size and np.asarray(decoded).std() > 0
        damaged = bytearray(data)
        damaged[-1] ^= 1
        with pytest.raises(Corrupt):
            receiver.decompress(bytes(damaged))


def test_the_stream_brings_x_t_nearer_to_x_0(pipe, photo):
    """The network knows nothing, so only the stream can do it: the error of x_t / alpha falls to the schedule's noise."""
    noise, picture = from_pure_noise(pipe.noise_schedule()), photo.resize((48, 32))
    with torch.no_grad():
        x_0 = pipe.encode_picture(images.to_tensor(picture)[0][None])
        assert x_0.shape[1:] == pipe.latent_shape(32, 48)
        _, parameters, messages, _ = diffc_format.read_file(pipe.compress(picture, fidelity=0.8).bitstreams[0])
        receiver = ends.Receiver(noise, parameters, messages)
        [(x_t, t)] = pipe.reverse(noise, channel_of(parameters.channel), [receiver], x_0.shape[1:], [""])
        alpha, sigma = noise.level(t)
        assert float((x_t / alpha - x_0).square().mean()) / (sigma / alpha) ** 2 == pytest.approx(1, rel=0.5)


# ------------------------------------------------------------------------------------------- the same denoiser as diffusers'


def own_steps(pipe, x, timesteps, prompt):
    """DDIM steps along these timesteps of our levels, and x_0_hat at the last."""
    noise, conditioning = pipe.noise_schedule(), pipe.encode_prompt([prompt])
    for t, s in zip(timesteps, [*timesteps[1:], None]):
        x_0_hat = equations.predict_x0(pipe.predict(x, [t], conditioning), x, *noise.level(t), noise.prediction_type)
        x = x_0_hat if s is None else equations.ddim(x, x_0_hat, *noise.level(t), *noise.level(s))
    return x


def own_layout(theirs, ours, x):
    """x as diffusers' own pipeline of the family takes it, and what turns its latents back."""
    height, width = x.shape[-2:]
    if isinstance(theirs, diffusers.Flux2KleinPipeline):
        return theirs._patchify_latents(x), ours.family.scaled
    if isinstance(theirs, diffusers.Flux2Pipeline):
        rows, columns = height // 2, width // 2
        return theirs._patchify_latents(x), lambda packed: theirs._unpatchify_latents(packed.mT.unflatten(-1, (rows, columns)))
    if hasattr(theirs, "_pack_latents"):
        unpack = theirs._unpack_latents
        return theirs._pack_latents(x, *x.shape), lambda packed: unpack(packed, 8 * height, 8 * width, 8).view_as(x)
    return x.clone(), lambda latents: latents


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if name != "pixels"])
def test_sampling_is_that_of_diffusers_own_pipeline(folders, family):
    """Prompt, packing, positions, time, levels, scale of the latents: two steps of the family's own pipeline are two of ours."""
    theirs = diffusers.DiffusionPipeline.from_pretrained(folders[family])
    theirs.set_progress_bar_config(disable=True)
    flow = DiffCPipeline.from_pipe(theirs).family.flow
    if flow:
        theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        options = {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "leading"}
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **options)
    ours = DiffCPipeline.from_pipe(theirs)
    x = torch.randn(1, *ours.latent_shape(32, 64), generator=torch.Generator().manual_seed(0))
    latents, back = own_layout(theirs, ours, x)
    options = {"prompt": "a house", "height": 32, "width": 64, "num_inference_steps": 2, "latents": latents}
    options["guidance_scale"] = 0.0 if family == "z_image" else 1.0  # no guidance
    accepted = inspect.signature(theirs.__call__).parameters
    options |= {name: False for name in ("use_resolution_binning", "clean_caption") if name in accepted}
    expected = back(theirs(**options, output_type="latent").images)
    timesteps = [round(float(t)) - flow for t in theirs.scheduler.timesteps]
    found = own_steps(ours, x, timesteps, "a house")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    other = own_steps(ours, x, timesteps, "another one")
    assert (other - expected).abs().max() > 10 * (found - expected).abs().max()
    decoded = (ours.decode_latent(found) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, theirs(**options, output_type="pt").images, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_steps_of_the_familys_own_scheduler(pipe):
    """x_t of our levels is x_t of the scheduler: its noise at a timestep, and its step from there to the next."""
    noise = pipe.noise_schedule()
    if noise.prediction_type == FLOW:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, shift=1.0, use_dynamic_shifting=False
        )
        t, s = 799, 599  # sigma 0.8 and 0.6
        scheduler.set_timesteps(sigmas=[0.8, 0.6])
        time = torch.tensor(800.0)
    else:
        scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(5)
        t, s = scheduler.timesteps[1].item(), scheduler.timesteps[2].item()
        time = torch.tensor(t)
    x_0, eps = torch.randn(2, 1, *pipe.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)).unbind()
    alpha, sigma = noise.level(t)
    x_t = alpha * x_0 + sigma * eps
    add_noise = scheduler.scale_noise if noise.prediction_type == FLOW else scheduler.add_noise
    theirs = add_noise(x_0, time[None], eps) if noise.prediction_type == FLOW else add_noise(x_0, eps, time[None])
    torch.testing.assert_close(x_t, theirs, rtol=1e-4, atol=1e-4)

    output = pipe.predict(x_t, [t], pipe.encode_prompt([""]))
    x_0_hat = equations.predict_x0(output, x_t, alpha, sigma, noise.prediction_type)
    x_s = equations.ddim(x_t, x_0_hat, alpha, sigma, *noise.level(s))
    torch.testing.assert_close(x_s, scheduler.step(output, time, x_t, return_dict=False)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_latents_are_scaled_and_shifted(pipe, photo):
    x = pipe.pad(images.to_tensor(photo.resize((48, 32)))[0][None])
    x_0 = pipe.encode_picture(x)
    if pipe.vae is None:
        assert torch.equal(x_0, x) and torch.equal(pipe.decode_latent(x_0), x)
    else:
        mean = pipe.family.encode(pipe.vae, x)
        torch.testing.assert_close(pipe.family.unscaled(x_0), mean)
        torch.testing.assert_close(pipe.decode_latent(x_0), pipe.family.decode(pipe.vae, mean), rtol=1e-3, atol=1e-3)


def test_a_batch_is_its_pictures(pipe, photo):
    """Whatever the lengths of the prompts beside it."""
    pictures, prompts = (
        [photo.crop((0, 0, 48, 32)), photo.crop((48, 0, 96, 32))],
        ["", ""] if pipe.kind == "Pixels" else ["a house", ""],
    )
    sizes = {"max_bytes": 80, "num_coding_steps": 2}
    calls = []
    files = pipe.compress(pictures, prompt=prompts, **sizes, callback_on_step_end=lambda *step: calls.append(step)).bitstreams
    assert len(calls) == 2 - (not from_pure_noise(pipe.noise_schedule()).knows_last)
    assert files == [pipe.compress(x, prompt=prompt, **sizes).bitstreams[0] for x, prompt in zip(pictures, prompts)]
    together = pipe.decompress(files, num_inference_steps=2, output_type="pt").images
    alone = [pipe.decompress(file, num_inference_steps=2, output_type="pt").images[0] for file in files]
    assert together.shape[0] == 2  # one tensor
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1 / 255)  # a batch rounds otherwise


# --------------------------------------------------------------------------------------------------------- particular cases


def test_no_text_is_zeros_for_sdxl(folders):
    pipe = load("diffc", folders["sdxl"])
    conditioning = pipe.encode_prompt(["", "a house"])
    assert (
        conditioning["text"][0].abs().max() == 0
        and conditioning["summary"][0].abs().max() == 0
        and conditioning["text"][1].abs().max() > 0
    )
    other = load("diffc", folders["sdxl"], force_zeros_for_empty_prompt=False)
    assert other.encode_prompt([""])["text"].abs().max() > 0
    assert other.fingerprint() != pipe.fingerprint()


def test_sdxl_knows_the_size_of_the_picture(folders, monkeypatch):
    pipe, seen = load("diffc", folders["sdxl"]), []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *args, **options: seen.append(options) or forward(*args, **options))
    pipe.predict(torch.zeros(2, 4, 6, 8), [5, 6], pipe.encode_prompt(["", ""]))
    assert seen[0]["added_cond_kwargs"]["time_ids"].tolist() == [[48, 64, 0, 0, 48, 64]] * 2


def test_an_autoencoder_that_overflows_in_float16_is_widened(folders, photo, monkeypatch):
    pipe, dtypes = load("diffc", folders["sdxl"], dtype=torch.float16), []
    for name in ("encode", "decode"):
        method = getattr(pipe.vae, name)
        monkeypatch.setattr(
            pipe.vae, name, lambda x, m=method, **options: dtypes.append((x.dtype, pipe.vae.dtype)) or m(x, **options)
        )
    pipe.decode_latent(pipe.encode_picture(images.to_tensor(photo)[0][None]))
    assert dtypes == [(torch.float32, torch.float32)] * 2 and pipe.vae.dtype == torch.float16


def test_stable_diffusion_3_without_t5(folders, photo, tmp_path):
    pipe = load("diffc", folders["sd3"], text_encoder_3=None, tokenizer_3=None)
    assert pipe.encode_prompt(["a house"])["text"].shape == (1, 77 + 256, 32)
    data = pipe.compress(photo, max_bytes=100, num_coding_steps=2).bitstreams[0]
    assert pipe.decompress(data, reconstruction="denoised").images[0].size == photo.size
    assert pipe.fingerprint() != load("diffc", folders["sd3"]).fingerprint()
    pipe.save_pretrained(tmp_path)
    assert load("diffc", tmp_path).compress(photo, max_bytes=100, num_coding_steps=2).bitstreams[0] == data


def test_a_small_autoencoder_in_its_place(folders, photo):
    """AutoencoderTiny has no distribution of latents."""
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    pipe = load("diffc", folders["sd_epsilon"], vae=tiny)
    assert pipe(photo, max_bytes=100, num_inference_steps=2).images[0].size == photo.size


def test_a_model_in_pixel_space_takes_no_prompt(folders, photo):
    with pytest.raises(ValueError, match="unconditional.*'a house'"):
        load("diffc", folders["pixels"]).compress(photo, max_bytes=100, prompt="a house")


def test_networks_that_predict_a_variance_too(folders):
    pipe = load("diffc", folders["pixels"])
    config = pipe.unet.config
    pipe.unet = diffusers.UNet2DModel.from_config(config, out_channels=6)
    assert pipe.predict(torch.zeros(1, 3, 16, 16), [5], {}).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("family", ["sdxl", "flux", "pixels"])
def test_calibration_of_every_kind(folders, photo, family):
    pipe = load("diffc", folders[family])
    pipe.register_to_config(calibration={"error": calibration.calibrate_error(pipe, [photo])})
    assert len(pipe.config.calibration["error"]["log2_variance"][0]) == pipe.family.channels
    data = pipe.compress(photo, max_bytes=100, num_coding_steps=2).bitstreams[0]
    assert pipe.decompress(data, reconstruction="denoised").images[0].size == photo.size


@pytest.mark.parametrize("family, scheduler, words", [
    ("sd3", "DDIMScheduler", "StableDiffusion3 model is trained by flow matching; .*FlowMatchEulerScheduler, not DDIMScheduler"),
    ("sdxl", "FlowMatchEulerDiscreteScheduler", "StableDiffusionXL model is trained by variance-preserving.*DDIMScheduler, not Flow"),
])  # fmt: skip
def test_a_scheduler_of_the_other_kind_is_refused(folders, photo, family, scheduler, words):
    pipe = load("diffc", folders[family])
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=words):
        pipe.compress(photo, max_bytes=100)


@pytest.mark.parametrize("index, words", [
    ({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
     r"WanPipeline: a video model is not supported \(WanTransformer3DModel\); supported are .*SANA.*Z-Image"),
    ({"_class_name": "AuraFlowPipeline", "transformer": ["diffusers", "AuraFlowTransformer2DModel"]},
     r"AuraFlowPipeline: no family is known .*\(AuraFlowTransformer2DModel\); supported are "),
    ({"_class_name": "StableCascadePipeline", "decoder": ["diffusers", "StableCascadeUNet"]},
     r"StableCascadePipeline: no family.*\(no network named unet or transformer\)"),
])  # fmt: skip
def test_an_unknown_folder_is_refused_before_its_weights_are_read(tmp_path, index, words):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    with pytest.raises(ValueError, match=words) as error:
        DiffCPipeline.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, network, config", [
    ("unet", "UNet2DConditionModel", {"in_channels": 9}),
    ("transformer", "FluxTransformer2DModel", {"in_channels": 384, "out_channels": 64}),
    ("transformer", "SanaTransformer2DModel", {"guidance_embeds": True}),
    ("transformer", "PixArtTransformer2DModel", {"sample_size": 128}),
    ("transformer", "QwenImageTransformer2DModel", {"use_layer3d_rope": True}),
    ("transformer", "ZImageTransformer2DModel", {"siglip_feat_dim": 1152}),
])  # fmt: skip
def test_other_inputs_are_refused_before_weights_are_read(tmp_path, name, network, config):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "APipeline", name: ["diffusers", network]}))
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": network, **config}))
    for codec in CODECS:
        with pytest.raises(ValueError, match=rf"APipeline: no family is known .*\({network} with other inputs\); supported are "):
            load(codec, tmp_path)
    with pytest.raises(Exception) as error:  # goes on to what else is missing
        load("diffc", tmp_path, **{name: tiny_models.unet()})
    assert "no family" not in str(error.value)


def test_other_kinds_of_models_are_refused_by_name(folders, photo):
    pipe = load("diffc", folders["sd_epsilon"])
    pipe.unet = tiny_models.unet(in_channels=9)
    with pytest.raises(ValueError, match="UNet2DConditionModel.*supported are Stable Diffusion 1.x.*inpainting"):
        pipe.compress(photo, max_bytes=100)
    pipe.unet = None
    with pytest.raises(ValueError, match="no network"):
        family_of(pipe)
    pipe = load("diffc", folders["sd_epsilon"], text_encoder=None)
    with pytest.raises(ValueError, match="StableDiffusion model needs.*missing: text_encoder"):
        pipe.compress(photo, max_bytes=100)


def test_flux_packs_an_odd_number_of_patches(folders):
    """13x5 pixels are one patch of 16x16, 300x200 are 19x13."""
    pipe = load("diffc", folders["flux"])
    assert pipe.latent_shape(5, 13) == (16, 2, 2) and pipe.latent_shape(200, 300) == (16, 26, 38)
    picture = Image.new("RGB", (13, 5), "red")
    data = pipe.compress(picture, max_bytes=60, num_coding_steps=1).bitstreams[0]
    assert pipe.decompress(data, reconstruction="denoised").images[0].size == (13, 5)
