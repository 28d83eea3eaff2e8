"""One contract for all codecs: a picture becomes a file that comes back at its own size, on every way that users take."""

import re
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import Corrupt, DiffCPipeline, LimitExceeded, VarianceHead, WrongModel, calibration, contract, images
from diffusers_compress.codecs.diffc import drift, ends, reference
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.codecs.diffc.format import STRIDE_UNIT, Parameters, describe
from diffusers_compress.codecs.diffc.rate import MIN_BUDGET, RateControl, overhead
from diffusers_compress.codecs.diffc.timesteps import next_timestep, timesteps_of
from diffusers_compress.coding.channels import CHANNELS, channel_of
from diffusers_compress.diffusion.schedule import from_pure_noise, from_scheduler
from diffusers_compress.errors import BitstreamError
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits

RATES = [{"target_bpp": 0.25}, {"max_bytes": 200}, {"fidelity": 0.7}]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipe(request, tiny_sd_folders):
    """DiffC on a folder that diffusers' own StableDiffusionPipeline saved."""
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folders[request.param])
    pipe.set_progress_bar_config(disable=True)
    return pipe


# For tests of what no prediction type changes
epsilon_alone = pytest.mark.parametrize("pipe", ["epsilon"], indirect=True)


@pytest.fixture(scope="module")
def informed(tiny_sd_folder, photo):
    """With a calibration of its own and a variance head of random weights."""
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    head = VarianceHead(latent_channels=4, width=8)
    torch.nn.init.normal_(head.last.weight, std=0.1)
    pipe.register_modules(variance_head=head.eval())
    pipe.register_to_config(calibration={"error": calibration.calibrate_error(pipe, [photo])})
    return pipe


@pytest.fixture(scope="module")
def coded(pipe, photo):
    return pipe.compress(photo, target_bpp=0.2).bitstreams[0]


def latent(pipe, data, **options):
    """What a file decodes to, as a float array [H, W, 3]."""
    return pipe.decompress(data, output_type="np", **options).images[0]


def assert_same(a, b):
    """Equal but for the last digits of float32, which may differ from one call to the next, and their rounding to 8 bits."""
    assert np.abs(a - b).max() < 1.01 / 255


def differ(a, b):
    return np.abs(a - b).max() > 0.02


# ---------------------------------------------------------------------------------------------------------- file and back


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: next(iter(rate)))
def test_round_trip_through_a_file(pipe, photo, tmp_path, rate):
    out = pipe.compress(photo, **rate)
    (tmp_path / "photo.dfc").write_bytes(out.bitstreams[0])
    data = (tmp_path / "photo.dfc").read_bytes()
    assert out.bpp == [8 * len(data) / (photo.width * photo.height)]
    decoded = pipe.decompress(data).images[0]
    assert decoded.size == photo.size and decoded.mode == "RGB"
    assert describe(data)["complete"] and describe(data)["steps"] > 0


def test_calling_the_pipeline_is_compress_and_decompress(pipe, photo):
    both = pipe(photo, target_bpp=0.25)
    out = pipe.compress(photo, target_bpp=0.25)
    assert both.bitstreams == out.bitstreams and both.bpp == out.bpp
    assert_same(np.asarray(both.images[0]) / 255, np.asarray(pipe.decompress(out.bitstreams).images[0]) / 255)
    assert pipe(photo, target_bpp=0.25, return_dict=False)[1] == out.bitstreams


@epsilon_alone
def test_compressing_twice_gives_the_same_bytes(pipe, photo, coded):
    assert pipe.compress(photo, target_bpp=0.2).bitstreams[0] == coded


@pytest.mark.parametrize("channel", CHANNELS)
def test_the_receiver_ends_where_the_sender_did(informed, photo, monkeypatch, channel):
    """Both ends hold the very same x_t and t at the end of the stream."""
    found, reverse = [], DiffCPipeline.reverse
    monkeypatch.setattr(DiffCPipeline, "reverse", lambda self, *args: found.append(reverse(self, *args)) or found[-1])
    data = informed.compress(photo, max_bytes=60, num_coding_steps=4, coder=channel).bitstreams
    informed.decompress(data, reconstruction="denoised")
    (x_sent, t_sent), (x_received, t_received) = found[0][0], found[1][0]
    # Of the last steps the Poisson channel may give some back.
    assert t_sent <= t_received if channel == "poisson" else t_sent == t_received and torch.equal(x_sent, x_received)


def test_the_stream_brings_x_t_nearer_to_x_0(pipe, photo):
    """With an untrained network nothing but the stream can do it: the error of x_t / alpha falls to the schedule's noise."""
    noise = from_pure_noise(from_scheduler(pipe.scheduler))
    with torch.no_grad():
        x_0 = pipe.encode_picture(images.to_tensor(photo)[0][None])
    errors = []
    for fidelity in (0.7, 0.85, 0.95):
        data = pipe.compress(photo, fidelity=fidelity).bitstreams[0]
        _, parameters, messages, _ = diffc_format.read_file(data)
        receiver = ends.Receiver(noise, parameters, messages)
        with torch.no_grad():
            [(x_t, t)] = pipe.reverse(noise, channel_of(parameters.channel), [receiver], x_0.shape[1:], [""])
        assert t == timesteps_of(noise, parameters)[-1]
        alpha, sigma = noise.level(t)
        errors.append(float((x_t / alpha - x_0).square().mean()) / (sigma / alpha) ** 2)
    assert errors == pytest.approx([1, 1, 1], rel=0.35)


@pytest.mark.parametrize("size, max_bytes", [((16, 16), 3000), ((96, 64), 3000)])
def test_more_room_than_a_picture_needs(pipe, photo, size, max_bytes):
    """The stream then ends at t = 0, as near to x_0 as anywhere, in a smaller file."""
    noise, picture = from_pure_noise(from_scheduler(pipe.scheduler)), photo.resize(size)
    data = pipe.compress(picture, max_bytes=max_bytes, num_coding_steps=4).bitstreams[0]
    assert len(data) < max_bytes / 2
    _, parameters, messages, _ = diffc_format.read_file(data)
    with torch.no_grad():
        x_0 = pipe.encode_picture(images.to_tensor(picture)[0][None])
        receiver = ends.Receiver(noise, parameters, messages)
        [(x_t, t)] = pipe.reverse(noise, channel_of(parameters.channel), [receiver], x_0.shape[1:], [""])
    assert t == 0
    alpha, sigma = noise.level(0)
    assert float((x_t / alpha - x_0).square().mean()) < 15 * (sigma / alpha) ** 2  # a step of so many bits is not exact


@epsilon_alone
@pytest.mark.parametrize("channel, slack", [("trellis", 2), ("trellis32", 2), ("poisson", 25)])
def test_files_fill_their_size_and_never_exceed_it(pipe, photo, channel, slack):
    for max_bytes in (48, 90, 133) if channel == "trellis" else (48,):
        data = pipe.compress(photo, max_bytes=max_bytes, coder=channel).bitstreams[0]
        assert max_bytes - slack <= len(data) <= max_bytes
        assert describe(data)["coder"] == channel


@epsilon_alone
def test_a_rate_is_a_size(pipe, photo):
    assert 70 <= len(pipe.compress(photo, target_bpp=8 * 72 / (96 * 64)).bitstreams[0]) <= 72


@pytest.fixture
def calls(monkeypatch):
    """How many pictures each network call had."""
    batches = []
    predict = DiffCPipeline.predict
    monkeypatch.setattr(DiffCPipeline, "predict", lambda self, x_t, *args: batches.append(len(x_t)) or predict(self, x_t, *args))
    return batches


@epsilon_alone
@pytest.mark.parametrize("steps", [1, 4, 12])
def test_compress_calls_the_network_once_for_each_of_its_steps_but_the_first(pipe, photo, calls, steps):
    """Pure noise is no level of these models."""
    data = pipe.compress(photo, max_bytes=200, num_coding_steps=steps).bitstreams[0]
    assert calls == [1] * (steps - 1) and describe(data)["steps"] == steps
    assert 198 <= len(data) <= 200


@epsilon_alone
def test_tiny_files_have_fewer_steps(pipe, photo, calls):
    data = pipe.compress(photo, max_bytes=50, num_coding_steps=12).bitstreams[0]
    assert describe(data)["steps"] <= len(calls) + 1 < 12
    # of at least MIN_BUDGET bits each
    assert min(describe(data)["budgets"][:-1]) >= MIN_BUDGET


def test_fidelity_is_the_timestep_where_the_stream_ends(informed, photo):
    noise = from_pure_noise(from_scheduler(informed.scheduler))
    sizes = []
    for fidelity in (0.3, 0.6, 0.9):
        _, parameters, _, _ = diffc_format.read_file(informed.compress(photo, fidelity=fidelity).bitstreams[0])
        wanted, end = round((1 - fidelity) * 999), timesteps_of(noise, parameters)[-1]
        # within what the last stride's four digits can say
        assert 0 <= noise.ratio[wanted] - noise.ratio[end] <= parameters.strides[-1] / 8 / STRIDE_UNIT
        sizes.append(sum(parameters.budgets))
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("length", [0, 100, 123, 124, 125, 126, 4096])
def test_overhead_counts_a_long_prompt(length):
    """From 128 bytes of parameters on their length takes two bytes."""
    header, parameters = container.Header(contract.DIFFC, 768, 512, bytes(4), b""), Parameters(1, 0, prompt="a" * length)
    data = ends.Sender(None, RateControl(None, header, parameters, 0, 1, float("inf"))).file()
    assert overhead(header, parameters) == len(data)
    assert describe(data)["prompt"] == "a" * length


# ----------------------------------------------------------------------------------------------------------------- pictures


@epsilon_alone
@pytest.mark.parametrize("size", [(1, 1), (65, 65), (317, 211), (512, 97), (1, 700), (700, 1)])
def test_any_size_comes_back(pipe, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    data = pipe.compress(picture, max_bytes=60, num_coding_steps=2).bitstreams[0]
    assert len(data) <= 60
    assert pipe.decompress(data, reconstruction="denoised").images[0].size == size


@epsilon_alone
@pytest.mark.parametrize(
    "mode, note", [("L", "greyscale"), ("RGBA", "alpha"), ("P", None), ("I;16", "16 bits"), ("1", "greyscale")]
)
def test_other_modes_come_back_as_colour(pipe, photo, mode, note):
    if mode == "RGBA":
        picture = photo.copy()
        picture.putalpha(Image.linear_gradient("L").resize(photo.size))
    elif mode == "I;16":
        picture = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    else:
        picture = photo.convert(mode)
    out = pipe.compress(picture, target_bpp=0.25)
    assert any(note in text for text in out.notes[0]) if note else out.notes[0] == []
    assert pipe.decompress(out.bitstreams).images[0].size == photo.size


@epsilon_alone
def test_orientation_is_applied(pipe, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "turned.jpg", exif=exif)
    decoded = pipe(Image.open(tmp_path / "turned.jpg"), target_bpp=0.25).images[0]
    assert decoded.size == (photo.height, photo.width)


@epsilon_alone
def test_arrays_and_tensors_give_the_bytes_of_the_picture(pipe, photo, coded):
    array = np.asarray(photo)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    pictures = [photo, array, tensor, tensor[None]]  # the last a batch of one
    assert pipe.compress(pictures, target_bpp=0.2, batch_size=1).bitstreams == [coded] * 4


def test_lists_go_through_the_network_together(pipe, photo, calls):
    """Two sizes, two batches; prompts of their own; each picture decodes as it would alone."""
    small = photo.crop((0, 0, 96, 48))
    out = pipe.compress([photo, small, photo], max_bytes=120, prompt=["", "a house", "clouds"], num_coding_steps=4)
    assert calls == [2] * 3 + [1] * 3
    assert [describe(data)["prompt"] for data in out.bitstreams] == ["", "a house", "clouds"]

    calls.clear()
    together = pipe.decompress(out.bitstreams, output_type="np", num_inference_steps=3).images
    assert max(calls) == 2
    for data, image, picture in zip(out.bitstreams, together, (photo, small, photo)):
        assert image.shape == (picture.height, picture.width, 3)
        assert_same(image, latent(pipe, data, num_inference_steps=3))


# ------------------------------------------------------------------------------------------------------------------- decoding


def test_reconstructions(pipe, photo):
    coded = pipe.compress(photo, fidelity=0.3).bitstreams[0]
    flow, preview = latent(pipe, coded), latent(pipe, coded, reconstruction="denoised")
    draws = [latent(pipe, coded, reconstruction="ancestral", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert_same(draws[0], draws[1])
    assert_same(flow, latent(pipe, coded))
    assert differ(draws[0], draws[2]) and differ(flow, preview) and differ(flow, draws[0])


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"]
)
def test_the_users_scheduler_finishes_the_picture(pipe, coded, name):
    other = DiffCPipeline.from_pipe(pipe, dtype=pipe.dtype)
    other.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    assert np.isfinite(latent(other, coded)).all()


def test_guidance_moves_the_picture_only_with_a_prompt(pipe, photo, coded):
    prompted = pipe.compress(photo, target_bpp=0.2, prompt="a small house under clouds").bitstreams[0]
    assert describe(prompted)["prompt"] == "a small house under clouds"
    assert differ(latent(pipe, prompted), latent(pipe, prompted, guidance_scale=100.0))
    assert_same(latent(pipe, coded), latent(pipe, coded, guidance_scale=100.0))


@epsilon_alone
@pytest.mark.parametrize("channel", CHANNELS)
def test_every_prefix_decodes_to_its_whole_steps(pipe, photo, channel):
    data = pipe.compress(photo, max_bytes=60, coder=channel).bitstreams[0]
    _, offset = container.read_header(data)
    present = []
    for length in range(offset, len(data) + 1):
        facts = describe(data[:length])
        assert facts["complete"] == (length == len(data))
        present.append(facts["steps_present"])
    assert present == sorted(present) and present[0] == 0 and present[-1] == facts["steps"] > 3
    for length in (offset, (offset + len(data)) // 2, len(data) - 1):
        assert pipe.decompress(data[:length], reconstruction="denoised").images[0].size == photo.size


def test_another_dtype_decodes_nearly_the_same(informed, photo, tmp_path):
    """All ends must find the same order of dimensions and about the same variances."""
    data = informed.compress(photo, target_bpp=0.2).bitstreams[0]
    expected = latent(informed, data)
    informed.save_pretrained(tmp_path / "saved")
    for dtype in (torch.bfloat16, torch.float16):
        other = DiffCPipeline.from_pretrained(tmp_path / "saved", dtype=dtype)
        other.set_progress_bar_config(disable=True)
        assert other.variance_head.dtype == dtype
        assert np.sqrt(np.mean((latent(other, data) - expected) ** 2)) < 0.05


def test_a_second_process_decodes_the_same_picture(pipe, coded, tmp_path, python):
    (tmp_path / "photo.dfc").write_bytes(coded)
    program = (
        "import sys; from diffusers_compress import DiffCPipeline\n"
        "pipe = DiffCPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.decompress(open(sys.argv[2], 'rb').read()).images[0].save(sys.argv[3])"
    )
    paths = [pipe.config._name_or_path, tmp_path / "photo.dfc", tmp_path / "photo.png"]
    python.run(["-c", program, *paths], check=True)
    here = np.asarray(pipe.decompress(coded).images[0], dtype=int)
    there = np.asarray(Image.open(tmp_path / "photo.png"), dtype=int)
    assert np.abs(here - there).max() <= 1


# --------------------------------------------------------------------------------------------------------------------- files


@epsilon_alone
def test_the_smallest_file_has_twenty_bytes(pipe):
    """768x512 has two-byte sides, like any picture from 128 to 16383 pixels."""
    header = container.Header(contract.DIFFC, 768, 512, bytes(4), b"")
    assert overhead(header, Parameters(1, 0)) == 20


def test_the_example_of_the_format_description():
    """The bytes in FORMAT.md's table are what its lines of Python make."""
    text = (Path(__file__).parents[1] / "FORMAT.md").read_text(encoding="utf-8")
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace("print(", "str("), names)
    table = text[text.index("| bytes | meaning |") : text.index("| bits of the parameters |")]
    assert bytes.fromhex(" ".join(re.findall(r"^\| `([0-9a-f ]+)` \|", table, re.MULTILINE))) == names["file"]


@pytest.mark.parametrize("stride", [1, 128, 1024])
def test_timesteps_fall_and_follow_the_levels(pipe, stride):
    noise = from_pure_noise(from_scheduler(pipe.scheduler))
    timesteps = [999]
    while timesteps[-1] > 0:
        timesteps.append(next_timestep(noise, timesteps[-1], [stride] * len(timesteps)))
    assert all(t > s for t, s in zip(timesteps, timesteps[1:]))
    for step, s in enumerate(timesteps[1:20]):
        wanted = float(noise.ratio[-1]) + (step + 1) * stride / STRIDE_UNIT
        nearest = int((noise.ratio - wanted).abs().argmin())
        assert s == nearest or s == timesteps[step] - 1
    strides = [stride] * (len(timesteps) - 1)
    assert timesteps_of(noise, Parameters(1, 16, 16, strides)) == timesteps
    with pytest.raises(Corrupt, match="room for"):
        timesteps_of(noise, Parameters(1, 16, 16, [*strides, stride]))


def test_a_file_of_another_model_is_refused(pipe, coded, tiny_sd_folders):
    folder = next(f for f in tiny_sd_folders.values() if str(f) != pipe.config._name_or_path)
    other = DiffCPipeline.from_pretrained(folder)
    other.set_progress_bar_config(disable=True)
    with pytest.raises(WrongModel, match=describe(coded)["model"]):
        other.decompress(coded)
    assert other.decompress(coded, allow_other_model=True).images[0].size == (96, 64)


@epsilon_alone
def test_damage_is_told(pipe, coded):
    for position in range(len(coded)):
        damaged = bytearray(coded)
        damaged[position] ^= 4
        with pytest.raises(BitstreamError):
            pipe.decompress(bytes(damaged))
    with pytest.raises(LimitExceeded, match="96x64"):
        pipe.decompress(coded, limits=Limits(pixels=1000))


# ------------------------------------------------------------------------------------------------------------------ arguments


@epsilon_alone
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "exactly one"),
        ({"target_bpp": 0.5, "fidelity": 0.5}, "exactly one.*target_bpp, fidelity"),
        ({"target_bpp": 0}, "target_bpp must be above 0"),
        ({"fidelity": 1.5}, "fidelity.*1.5"),
        ({"max_bytes": 10}, "may take 10 bytes"),
        ({"fidelity": 0.5, "num_coding_steps": 0}, "num_coding_steps.*0"),
        ({"fidelity": 0.5, "num_coding_steps": 257}, "num_coding_steps.*257"),
        ({"fidelity": 0.5, "coder": "dither"}, "coder.*dither"),
        ({"fidelity": 0.5, "prompt": ["a", "b"]}, "2 prompts"),
        ({"fidelity": 0.5, "prompt": "x" * 5000}, "prompt"),
    ],
)
def test_wrong_arguments_of_compress(pipe, photo, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe.compress(photo, **arguments)


@epsilon_alone
@pytest.mark.parametrize(
    "arguments, words",
    [({"reconstruction": "best"}, "best"), ({"num_inference_steps": 0}, "num_inference_steps"), ({"output_type": "jpg"}, "jpg")],
)
def test_wrong_arguments_of_decompress(pipe, coded, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe.decompress(coded, **arguments)


def test_saved_and_loaded_again(pipe, coded, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = DiffCPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert again.variance_head is None and again.config.calibration is None
    assert_same(latent(again, coded), latent(pipe, coded))


def test_saved_with_calibration_and_variance_head(informed, photo, tmp_path):
    informed.save_pretrained(tmp_path / "saved")
    again = DiffCPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again.variance_head) is VarianceHead and again.config.calibration == informed.config.calibration
    assert torch.equal(again.variance_head.last.weight, informed.variance_head.last.weight)
    assert again.fingerprint() == informed.fingerprint()
    assert again.compress(photo, max_bytes=100).bitstreams == informed.compress(photo, max_bytes=100).bitstreams
    # and the model is still one of Stable Diffusion
    parts = {"safety_checker": None, "feature_extractor": None}
    assert diffusers.StableDiffusionPipeline.from_pipe(again, dtype=again.dtype, **parts).unet is again.unet


@epsilon_alone
def test_a_plain_folder_takes_the_built_in_expectations(pipe):
    assert pipe.variance_head is None and pipe.config.calibration is None
    noise, x = from_pure_noise(from_scheduler(pipe.scheduler)), torch.randn(2, 4, 8, 12)
    error, rank = reference.expected_error(noise, None, None, x, x, [999, 500])
    for k, t in enumerate((999, 500)):
        expected = reference.error_variance(None, float(noise.snr[t]), (4, 8, 12))
        assert torch.equal(error[k], expected) and torch.equal(rank[k], reference.rank(expected))


def test_the_variance_head_changes_the_variance_and_not_the_rank(informed):
    noise, x = from_pure_noise(from_scheduler(informed.scheduler)), torch.randn(1, 4, 8, 12)
    expected_error = partial(reference.expected_error, noise, informed.error_calibration(), informed.variance_head, x)
    with torch.no_grad():
        error, rank = expected_error(x / 2, [500])
    expected = reference.error_variance(informed.config.calibration["error"], float(noise.snr[500]), (4, 8, 12))
    assert torch.equal(rank[0], reference.rank(expected))
    assert torch.allclose(error[0, :, ::4, ::4], expected[:, ::4, ::4]) and not torch.allclose(error[0], expected)
    with torch.no_grad():  # at pure noise there is no prediction to look at
        error, _ = expected_error(torch.zeros_like(x), [999])
    assert torch.equal(error[0], reference.error_variance(informed.config.calibration["error"], 0.0, (4, 8, 12)))


def test_another_calibration_or_variance_head_is_another_model(informed, photo, tiny_sd_folder):
    data = informed.compress(photo, max_bytes=100).bitstreams[0]
    other = DiffCPipeline.from_pretrained(tiny_sd_folder, variance_head=informed.variance_head)
    other.set_progress_bar_config(disable=True)
    changed = dict(informed.config.calibration["error"].items())
    changed["log2_variance"] = [[[value + 1 for value in row] for row in level] for level in changed["log2_variance"]]
    for calibrated in (None, {"error": changed}):
        other.register_to_config(calibration=calibrated)
        with pytest.raises(WrongModel):
            other.decompress(data)
    # what another codec was told changes nothing here
    other.register_to_config(calibration=informed.config.calibration | {"latent": {"mean": [0.0] * 4, "std": [1.0] * 4}})
    assert other.fingerprint() == informed.fingerprint()
    other.register_modules(variance_head=None)
    with pytest.raises(WrongModel):
        other.decompress(data)


@epsilon_alone
def test_model_offload_hooks(pipe, photo, coded, tiny_sd_folders):
    """The hooks of enable_model_cpu_offload, which move each component to its device when it is called."""
    other = DiffCPipeline.from_pretrained(pipe.config._name_or_path)
    other.set_progress_bar_config(disable=True)
    other.enable_model_cpu_offload(device="cpu")
    assert other.compress(photo, target_bpp=0.2).bitstreams[0] == coded
    assert_same(latent(other, coded), latent(pipe, coded))


# --------------------------------------------------------------------------------------------------------------- portability


def test_a_receiver_tells_how_far_its_latent_drifted(pipe, monkeypatch):
    """Files of some size carry a check of the sender's last x_t; small ones do not spend bytes on it."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8))
    options = {"reconstruction": "denoised", "output_type": "np"}
    small, data = (pipe.compress(picture, max_bytes=size, num_coding_steps=3).bitstreams[0] for size in (1999, 2000))
    assert diffc_format.read_file(small)[1].check is None and diffc_format.read_file(data)[1].check is not None
    out = pipe.decompress([small, data, data[:1000]], **options)
    assert out.drift == [None, pytest.approx(0, abs=0.06), None]
    assert out.notes[:2] == [[], []] and re.fullmatch(r"the file was cut short; .* 1 of its 3 steps", *out.notes[2])

    predict, generator = DiffCPipeline.predict, torch.Generator().manual_seed(0)
    noisy = lambda self, *args: predict(self, *args) + 0.3 * torch.randn(1, 4, 24, 32, generator=generator)  # noqa: E731
    monkeypatch.setattr(DiffCPipeline, "predict", noisy)
    with pytest.warns(RuntimeWarning, match="drifted .* dtype float32"):
        out = pipe.decompress(data, **options)
    assert out.drift[0] > drift.BOUND and "drifted" in out.notes[0][0]
    with pytest.warns(RuntimeWarning, match="drifted"):  # the other end's network says something else each time
        assert "drifted" in pipe(picture, max_bytes=2000, num_coding_steps=3, **options).notes[0][0]


@epsilon_alone
def test_the_poisson_channel_drops_the_check_with_a_step(pipe, photo):
    """Where steps are given back, the check would be that of another x_t."""
    header, parameters = container.Header(contract.DIFFC, 64, 64, bytes(4), b""), Parameters(2, 20, 20, [128, 128], check=0)
    sender = ends.Sender(None, RateControl(None, header, parameters, 0, 2, 50))
    sender.messages = [np.array([700, 3]), np.array([700, 4])]
    sender.end_at(torch.randn(1, 4, 8, 8))
    assert diffc_format.read_file(sender.file())[1].check is not None
    sender.rate.max_bytes = len(sender.file()) - 1
    _, parameters, messages, _ = diffc_format.read_file(sender.file())
    assert len(messages) == 1 and parameters.check is None


def test_no_symbol_depends_on_a_networks_float(informed, photo, monkeypatch):
    """A network whose every output is off by 1e-3: the file still parses and decodes, to nearly the same picture."""
    for channel in CHANNELS:
        data = informed.compress(photo, max_bytes=60, num_coding_steps=4, coder=channel).bitstreams[0]
        seen, transmit = [], ends.Receiver.transmit
        keep = lambda *args: seen.append((args[1], args[3], args[4])) or transmit(*args)  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(ends.Receiver, "transmit", staticmethod(keep))
            exact = latent(informed, data, reconstruction="denoised")
            predict, head = DiffCPipeline.predict, VarianceHead.forward
            patch.setattr(DiffCPipeline, "predict", lambda self, *args: predict(self, *args) + 1e-3)
            patch.setattr(VarianceHead, "forward", lambda self, *args: head(self, *args) + 1e-3)
            perturbed = latent(informed, data, reconstruction="denoised")
        first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        for (messages, rank, budget), (other_messages, other_rank, other_budget) in zip(first, second, strict=True):
            assert np.array_equal(messages, other_messages) and torch.equal(rank, other_rank) and budget == other_budget
        assert 0 < np.abs(perturbed - exact).max() < 0.05


def test_a_file_made_before_the_calibration_is_told_so(informed, photo, tiny_sd_folder):
    before = DiffCPipeline.from_pretrained(tiny_sd_folder)
    before.set_progress_bar_config(disable=True)
    data = before.compress(photo, max_bytes=100).bitstreams[0]
    with pytest.raises(WrongModel, match="this model as it is without variance head and calibration"):
        informed.decompress(data)
    with pytest.raises(
        WrongModel,
        match=r"made with model [0-9a-f]{8}, this is model [0-9a-f]{8}, with latents of \[4, 8, 12\].*info FILE --find",
    ):
        before.decompress(informed.compress(photo, max_bytes=100).bitstreams[0])


@epsilon_alone
def test_missing_components_and_dead_networks_are_told(pipe, photo, coded, monkeypatch):
    other = DiffCPipeline.from_pipe(pipe, dtype=pipe.dtype)
    other.text_encoder = None
    for call in (lambda: other.compress(photo, max_bytes=100), lambda: other.decompress(coded)):
        with pytest.raises(ValueError, match="missing: text_encoder"):
            call()
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **options: (decode(z, **options)[0] * float("nan"),))
    with pytest.raises(ValueError, match="not finite.*float32"):
        pipe.decompress(coded)
