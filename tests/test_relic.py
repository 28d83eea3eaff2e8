"""Relic: the contract of every codec, and what is its own."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import (
    Corrupt,
    HyperPrior,
    LimitExceeded,
    ParameterNetwork,
    RelicPipeline,
    UnsupportedVersion,
    WrongModel,
    calibration,
    cli,
    embedded_model,
    images,
)
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.codecs.relic.format import Parameters, describe, read_file, step_number, step_width
from diffusers_compress.codecs.relic.quantizer import Quantizer
from diffusers_compress.codecs.relic.rate import plan
from diffusers_compress.coding import logistic
from diffusers_compress.diffusion.schedule import from_scheduler
from diffusers_compress.errors import BitstreamError
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits

RATES = [{"target_bpp": 2.0}, {"max_bytes": 700}, {"fidelity": 0.9}]


def load(folder, **options):
    pipe = RelicPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def pipe(request, tiny_sd_folders):
    """Relic on a folder that diffusers' own StableDiffusionPipeline saved."""
    return load(tiny_sd_folders[request.param])


# For tests of what no prediction type changes
epsilon_alone = pytest.mark.parametrize("pipe", ["epsilon"], indirect=True)


@pytest.fixture(scope="module")
def coded(pipe, photo):
    return pipe.compress(photo, max_bytes=400).bitstreams[0]


@pytest.fixture(scope="module")
def trained(tiny_sd_folder, photo):
    """With statistics, a hyperprior and a parameter network of random weights."""
    pipe = load(tiny_sd_folder)
    torch.manual_seed(0)
    prior, network = HyperPrior(latent_channels=4, hidden=16), ParameterNetwork(latent_channels=4)
    prior.settle()
    network.out.bias.data = torch.linspace(-0.4, 0.4, 9)
    pipe.register_modules(hyperprior=prior, parameter_network=network)
    pipe.register_to_config(calibration={"latent": calibration.calibrate_latent(pipe, [photo])})
    return pipe


def decoded(pipe, data, **options):
    return pipe.decompress(data, output_type="np", **options).images[0]


def symbols(pipe, data):
    """v of a file, [C, h w]."""
    header, parameters, payload = read_file(data)
    quantizer = Quantizer(parameters, pipe.statistics(), pipe.latent_shape(header.height, header.width))
    name = "hyperprior" if parameters.model == 2 else "adaptive"
    return pipe.entropy_model(name).receive(quantizer, payload).v


@torch.no_grad()
def latent_of(pipe, picture):
    return pipe.encode_picture(images.to_tensor(picture)[0][None])[0].cpu()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)) ** 2))


# ---------------------------------------------------------------------------------------------------------- file and back


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: next(iter(rate)))
@pytest.mark.parametrize("rounding", ["plain", "dithered"])
def test_round_trip_through_a_file(pipe, photo, tmp_path, rate, rounding):
    out = pipe.compress(photo, rounding=rounding, **rate)
    (tmp_path / "photo.dfc").write_bytes(out.bitstreams[0])
    data = (tmp_path / "photo.dfc").read_bytes()
    assert out.bpp == [8 * len(data) / (photo.width * photo.height)]
    picture = pipe.decompress(data).images[0]
    assert picture.size == photo.size and picture.mode == "RGB"
    assert describe(data)["rounding"] == rounding and describe(data)["payload"] > 0


@epsilon_alone
@pytest.mark.parametrize("limit", [100, 130, 160, 190])
def test_files_keep_to_their_size_and_fill_it(pipe, photo, limit):
    size = len(pipe.compress(photo, max_bytes=limit).bitstreams[0])
    assert 0.9 * limit - 4 <= size <= limit


@epsilon_alone
def test_compressing_twice_gives_the_same_bytes(pipe, photo, coded):
    assert pipe.compress(photo, max_bytes=400).bitstreams[0] == coded


def test_calling_the_pipeline_is_compress_and_decompress(pipe, photo, coded):
    both = pipe(photo, max_bytes=400)
    assert both.bitstreams == [coded]
    assert np.abs(np.asarray(both.images[0], dtype=int) - np.asarray(pipe.decompress(coded).images[0], dtype=int)).max() <= 1
    assert pipe(photo, max_bytes=400, return_dict=False)[1] == [coded]


@epsilon_alone
def test_compress_does_not_call_the_network(pipe, photo, monkeypatch):
    monkeypatch.setattr(RelicPipeline, "predict", None)
    data = pipe.compress(photo, fidelity=0.9).bitstreams[0]
    assert pipe.decompress(data, preview=True).images[0].size == photo.size


@epsilon_alone
@pytest.mark.parametrize("size", [(1, 1), (65, 65), (97, 12), (1, 300), (300, 1)])
def test_any_size_comes_back(pipe, trained, size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for each in (pipe, trained):
        data = each.compress(picture, fidelity=0.9).bitstreams[0]
        assert each.decompress(data, num_inference_steps=1).images[0].size == size


def test_lists_go_together_and_come_back_alone(pipe, photo, coded):
    small = photo.crop((0, 0, 40, 40))
    out = pipe.compress([photo, small, photo], max_bytes=400, prompt=["", "a house", "clouds"])
    assert out.bitstreams[0] == coded and [describe(data)["prompt"] for data in out.bitstreams] == ["", "a house", "clouds"]
    together = pipe.decompress(out.bitstreams, output_type="np").images
    assert [image.shape for image in together] == [(64, 96, 3), (40, 40, 3), (64, 96, 3)]
    assert np.abs(together[1] - decoded(pipe, out.bitstreams[1])).max() < 0.01


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_users_scheduler_finishes_the_picture(pipe, coded, name):
    other = RelicPipeline.from_pipe(pipe, dtype=pipe.dtype)
    other.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    assert np.isfinite(decoded(other, coded)).all()


def test_realism_starts_at_the_first_calls_mean(pipe, photo):
    data = pipe.compress(photo, fidelity=0.6).bitstreams[0]
    mean, half, sample = (decoded(pipe, data, realism=a) for a in (0, 0.5, 1))
    assert np.abs(mean - decoded(pipe, data, num_inference_steps=1)).max() < 0.01
    assert np.abs(mean - sample).max() > 0.02
    assert np.abs(mean - half).mean() < 0.7 * np.abs(mean - sample).mean()


# ----------------------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("coded_channels", [[True] * 4, [True, False, True, False]])
def test_universal_quantization_makes_noise_of_the_matching_level(coded_channels):
    """The error is uniform and independent of the latent, D^2 / 12 in all channels, also in weak ones that are not coded."""
    torch.manual_seed(0)
    std = [2.0, 0.05, 0.5, 0.02]
    x_0 = torch.tensor(std)[:, None, None] * torch.randn(4, 64, 64) + 0.3
    parameters = Parameters(1, True, step_number(0.4), 0, 0, coded_channels)
    quantizer = Quantizer(parameters, {"mean": [0.3] * 4, "std": std}, x_0.shape)
    error = quantizer.latent(quantizer.values(x_0)) - x_0
    sigma = step_width(parameters.step) / 12**0.5
    assert quantizer.level() == pytest.approx(sigma)
    assert error.std((1, 2)).numpy() == pytest.approx(sigma, rel=0.03)
    for c in np.flatnonzero(coded_channels):
        assert abs(np.corrcoef(error[c].flatten(), x_0[c].flatten())[0, 1]) < 0.06
        assert error[c].abs().max() <= 0.5 * step_width(parameters.step) + 1e-6


def test_plain_rounding_tells_its_own_error(pipe, photo):
    x_0 = latent_of(pipe, photo)
    noise = from_scheduler(pipe.scheduler)
    parameters = Parameters(1, False, step_number(0.5), 0, 0, None)
    parameters, quantizer = plan(parameters, x_0, noise, pipe.statistics())
    error = float((quantizer.latent(quantizer.values(x_0)) - x_0).square().mean()) ** 0.5
    assert parameters.timestep == int((noise.ratio - 1 / error).abs().argmin())


def test_timestep_matches_the_step_width(pipe, photo):
    noise = from_scheduler(pipe.scheduler)
    for t in (5, 60, 200, 400):
        facts = describe(pipe.compress(photo, fidelity=1 - t / 999, rounding="dithered").bitstreams[0])
        assert abs(facts["timestep"] - t) <= 1
        assert facts["step"] ** 2 / 12 == pytest.approx(float(noise.snr[t]) ** -1, rel=0.02)


def test_step_widths():
    widths = [step_width(number) for number in range(4096)]
    assert widths[0] == 2**-6 and widths == sorted(set(widths)) and widths[-1] == 1022
    assert max(b / a for a, b in zip(widths, widths[1:])) == 257 / 256
    assert all(step_number(widths[number] * 1.001) == number for number in (0, 5, 1000, 4095))
    assert step_width(-9) == widths[0] and step_width(9999) == widths[-1]


# ------------------------------------------------------------------------------------------------------------- entropy models


@epsilon_alone
def test_the_search_forecasts_sizes(pipe, photo):
    x_0 = latent_of(pipe, photo)
    noise, model = from_scheduler(pipe.scheduler), pipe.entropy_model()

    def sender(step):
        _, quantizer = plan(Parameters(1, True, step, 0, 0, [True] * 4), x_0, noise, pipe.statistics())
        return model.send(quantizer, quantizer.values(x_0))

    fine, coarse = sender(800), sender(1100)
    assert 100 < fine.steps_to(coarse.bits()) < 500
    assert -500 < coarse.steps_to(fine.bits()) < -100


@epsilon_alone
def test_coded_bytes_are_the_ideal_code_length(pipe, trained, photo):
    for each in (pipe, trained):
        data = each.compress(photo, max_bytes=1500).bitstreams[0]
        header, parameters, payload = read_file(data)
        quantizer = Quantizer(parameters, each.statistics(), each.latent_shape(64, 96))
        sender = each.entropy_model().send(quantizer, symbols(each, data))
        assert sender.payload() == payload
        assert sender.bits() / 8 <= len(payload) <= 1.002 * sender.bits() / 8 + 2


def test_learned_parameters_reach_the_file_and_the_reader(trained, photo):
    data = trained.compress(photo, max_bytes=250, rounding="dithered").bitstreams[0]
    assert len(data) <= 250 and describe(data)["entropy_model"] == "hyperprior"
    _, parameters, _ = read_file(data)
    assert all(parameters.scales) and any(parameters.shifts)
    assert np.isfinite(decoded(trained, data)).all()
    assert describe(trained.compress(photo, max_bytes=250, entropy_model="adaptive").bitstreams[0])["entropy_model"] == "adaptive"


def test_the_parameter_network_chooses_where_that_pays(trained, photo):
    """Not in a file that its choice would be a large part of, nor without dither, nor where hardly any noise is left to choose for."""
    picture = photo.resize((256, 256))

    def scales(rounding="dithered", **rate):
        return read_file(trained.compress(picture, rounding=rounding, **rate).bitstreams[0])[1].scales

    assert any(scales(max_bytes=1000))
    assert not any(scales(max_bytes=150)) and not any(scales("plain", max_bytes=1000)) and not any(scales(max_bytes=20_000))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_type_decodes_the_same_symbols(trained, photo, dtype, tmp_path):
    trained.save_pretrained(tmp_path)
    other = load(tmp_path, dtype=dtype)
    assert other.hyperprior.dtype == dtype and other.config.calibration == trained.config.calibration
    for model in ("hyperprior", "adaptive"):
        data = trained.compress(photo, max_bytes=600, entropy_model=model).bitstreams[0]
        assert np.array_equal(symbols(other, data), symbols(trained, data))
        assert np.sqrt(np.mean((decoded(other, data) - decoded(trained, data)) ** 2)) < 0.05


def test_a_second_process_decodes_the_same(trained, photo, tmp_path, python):
    trained.save_pretrained(tmp_path / "model")
    data = trained.compress(photo, max_bytes=600).bitstreams[0]
    (tmp_path / "photo.dfc").write_bytes(data)
    program = (
        "import sys; from diffusers_compress import RelicPipeline\n"
        "pipe = RelicPipeline.from_pretrained(sys.argv[1])\n"
        "pipe.decompress(open(sys.argv[2], 'rb').read(), preview=True).images[0].save(sys.argv[3])"
    )
    paths = [tmp_path / "model", tmp_path / "photo.dfc", tmp_path / "photo.png"]
    python.run(["-c", program, *paths], check=True)
    here = np.asarray(trained.decompress(data, preview=True).images[0], dtype=int)
    assert np.abs(here - np.asarray(Image.open(tmp_path / "photo.png"), dtype=int)).max() <= 1


def test_saved_without_what_it_does_not_have(pipe, coded, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.hyperprior is None and again.parameter_network is None
    assert np.array_equal(symbols(again, coded), symbols(pipe, coded))


def test_model_offload_hooks(trained, photo):
    data = trained.compress(photo, max_bytes=600).bitstreams[0]
    other = RelicPipeline.from_pipe(trained, dtype=trained.dtype)
    other.register_to_config(calibration=trained.config.calibration)
    other.set_progress_bar_config(disable=True)
    other.enable_model_cpu_offload(device="cpu")
    assert other.compress(photo, max_bytes=600).bitstreams[0] == data
    assert np.abs(decoded(other, data) - decoded(trained, data)).max() < 0.01
    other.remove_all_hooks()


# ---------------------------------------------------------------------------------------------------------- the real small model


@pytest.fixture(scope="module")
def embedded():
    return load(embedded_model(), dtype=torch.float32)


@pytest.fixture(scope="module")
def portrait():
    return images.open_image(demo_photo()).convert("RGB").crop((100, 20, 356, 276))


def test_context_and_training_save_bytes(embedded, portrait):
    """The same symbols: adaptive below 0.9 of tables fitted to the picture's own channels, the hyperprior well below that."""
    header, parameters, payload = read_file(embedded.compress(portrait, target_bpp=0.1).bitstreams[0])
    assert parameters.model == 2
    quantizer = Quantizer(parameters, embedded.statistics(), embedded.latent_shape(256, 256))
    v = embedded.entropy_model().receive(quantizer, payload).v
    adaptive = embedded.entropy_model("adaptive").send(quantizer, v).bits()
    static = sum(
        logistic.code_length((v[c] + quantizer.dither[c])[:, None] // 512, quantizer.dither[c][:, None], np.arange(60))
        .sum(0)
        .min()
        for c in np.flatnonzero(parameters.coded)
    )
    assert 8 * len(payload) < 0.97 * adaptive and adaptive < 0.9 * static


def test_psnr_rises_with_the_rate(embedded, portrait):
    figures = {"preview": [], 0.0: [], 1.0: []}
    for bpp in (0.03, 0.1, 0.3):
        out = embedded.compress(portrait, target_bpp=bpp)
        assert 0.97 * bpp < out.bpp[0] <= bpp
        for realism, values in figures.items():
            how = {"preview": True} if realism == "preview" else {"realism": realism}
            values.append(psnr(portrait, embedded.decompress(out.bitstreams, **how).images[0]))
    for values in figures.values():
        assert values[0] + 0.5 < values[1] and values[1] + 0.2 < values[2]


def test_denoising_takes_the_quantization_noise_away(embedded, portrait):
    """At a coarse step the denoised picture is nearer than the noisy latent shown as it is."""
    data = embedded.compress(portrait, fidelity=0.85).bitstreams[0]
    header, parameters, payload = read_file(data)
    noise = from_scheduler(embedded.scheduler)
    y_hat, _ = embedded.read_latent(parameters, payload, embedded.latent_shape(256, 256), noise)
    with torch.no_grad():
        noisy = images.to_output(embedded.decode_latent(y_hat[None].float()))[0]
    assert psnr(portrait, embedded.decompress(data).images[0]) > psnr(portrait, noisy) + 0.3


# --------------------------------------------------------------------------------------------------------------------- files


@epsilon_alone
def test_damage_and_cuts_are_told(pipe, trained, photo, coded):
    for each, data in ((pipe, coded), (trained, trained.compress(photo, max_bytes=300).bitstreams[0])):
        for position in range(0, len(data), 3):
            damaged = bytearray(data)
            damaged[position] ^= 4
            with pytest.raises(BitstreamError):
                each.decompress(bytes(damaged))
            with pytest.raises(BitstreamError):
                each.decompress(data[:position])
        with pytest.raises(Corrupt, match="too many|checksum"):
            each.decompress(data + b"\0")
        with pytest.raises(LimitExceeded, match="96x64"):
            each.decompress(data, limits=Limits(pixels=1000))


def test_another_model_or_entropy_model_is_refused(pipe, trained, photo, coded, tiny_sd_folders):
    folder = next(f for f in tiny_sd_folders.values() if f != pipe.config._name_or_path)
    other = load(folder)
    with pytest.raises(WrongModel, match=describe(coded)["model"]):
        other.decompress(coded)
    assert other.decompress(coded, allow_other_model=True).images[0].size == photo.size

    data = trained.compress(photo, max_bytes=600).bitstreams[0]
    bare = load(tiny_sd_folders["epsilon"])
    with pytest.raises(WrongModel, match="needs a hyperprior"):
        bare.decompress(data, allow_other_model=True)
    prior = HyperPrior(latent_channels=4, hidden=16)
    prior.settle()
    bare.register_modules(hyperprior=prior)
    with pytest.raises(WrongModel, match="entropy model"):
        bare.decompress(data, allow_other_model=True)


@epsilon_alone
def test_wrong_contents_behind_right_checksums(pipe, coded):
    header, parameters, payload = read_file(coded)

    def decode(codec=2, channels=4, timestep=10, payload=payload, **changes):
        changed = Parameters(**{**vars(parameters), "coded": [True] * channels, "timestep": timestep, **changes})
        data = container.pack(container.Header(codec, 96, 64, header.fingerprint, changed.to_bytes()), payload)
        return pipe.decompress(data, preview=True)

    with pytest.raises(WrongModel, match="made by DiffC.*DiffCPipeline"):
        decode(codec=1)
    with pytest.raises(Corrupt, match="5 channels"):
        decode(channels=5)
    with pytest.raises(Corrupt, match="timestep 1000"):
        decode(timestep=1000)
    with pytest.raises(Corrupt, match="entropy model 3"):
        decode(model=3)
    for garbage in (b"", bytes(50), b"\xff" * 300, np.random.default_rng(0).bytes(500)):
        try:
            assert decode(payload=garbage).images[0].size == (96, 64)
        except Corrupt:
            pass
    with pytest.raises(UnsupportedVersion):
        pipe.decompress(b"\xdf\xc2" + coded[2:])


def test_parameters_come_back():
    rng = np.random.default_rng(0)
    for _ in range(200):
        channels = int(rng.integers(1, 17))
        affine = channels * bool(rng.integers(2))
        numbers = [int(rng.integers(limit)) for limit in (4096, 1 << 14, 1 << 16)]
        rows = [rng.integers(-32, 32, affine).tolist() for _ in range(2)]
        flags = [bool(flag) for flag in rng.integers(0, 2, channels)]
        parameters = Parameters(int(rng.integers(1, 3)), bool(rng.integers(2)), *numbers, flags, *rows)
        if rng.integers(2):
            rows = rng.integers(0, rng.integers(1, 5), (int(rng.integers(1, 33)), int(rng.integers(1, 33))))
            parameters.levels = rows[np.minimum(np.arange(len(rows)), rng.integers(len(rows)))].tolist()
        parameters.prompt = str(rng.choice(["", "déjà vu 🙂", "x" * 500]))
        assert Parameters.from_bytes(parameters.to_bytes()) == parameters
    with pytest.raises(ValueError):
        Parameters(1, True, 4096, 0, 0, [True]).to_bytes()
    with pytest.raises(LimitExceeded):
        Parameters.from_bytes(Parameters(1, True, 0, 0, 0, [True], prompt="x" * 5000).to_bytes())


# ---------------------------------------------------------------------------------------------------------- command, arguments


def test_the_command_line_takes_the_codec(photo, tiny_sd_folder, tmp_path, capsys):
    source, file, target = (str(tmp_path / name) for name in ("photo.png", "photo.dfc", "decoded.png"))
    photo.save(source)
    settings = ["--model", tiny_sd_folder, "--device", "cpu", "--dtype", "float32"]
    assert cli.main(["encode", source, file, "--codec", "relic", "--max-bytes", "400", *settings]) == 0
    assert cli.main(["info", file]) == 0
    assert "Relic" in capsys.readouterr().out
    pipe = load(tiny_sd_folder)
    for arguments, options in (([], {}), (["--preview"], {"preview": True}), (["--realism", "0.5"], {"realism": 0.5})):
        assert cli.main(["decode", file, target, "--force", *arguments, *settings]) == 0
        expected = np.asarray(pipe.decompress(open(file, "rb").read(), **options).images[0], dtype=int)
        assert np.abs(expected - np.asarray(Image.open(target), dtype=int)).max() <= 1


@epsilon_alone
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "exactly one"),
        ({"target_bpp": 0.5, "fidelity": 0.5}, "exactly one.*target_bpp, fidelity"),
        ({"target_bpp": 0}, "target_bpp must be above 0"),
        ({"fidelity": 1.5}, "fidelity.*1.5"),
        ({"max_bytes": 10}, "may take 10 bytes"),
        ({"fidelity": 0.5, "rounding": "none"}, "rounding.*none"),
        ({"fidelity": 0.5, "entropy_model": "hyperprior"}, "entropy_model.*adaptive"),
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
    [({"realism": 2}, "realism"), ({"num_inference_steps": 0}, "num_inference_steps"), ({"output_type": "jpg"}, "jpg")],
)
def test_wrong_arguments_of_decompress(pipe, coded, arguments, words):
    with pytest.raises(ValueError, match=words):
        pipe.decompress(coded, **arguments)
