"""Refined files: the base comes out whole, what it says holds, and the parts of the decoder do what their equations say."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import make
from PIL import Image

from diffusers_compress import RefinePipeline, cli, codecs, embedded_model, images
from diffusers_compress.codecs.refine import blind, jpeg, restore, trained
from diffusers_compress.codecs.refine.format import LEARNED, base_file, code_of, error_of
from diffusers_compress.contract import CODECS
from diffusers_compress.diffusion import schedule
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container
from diffusers_compress.images import formats


@pytest.fixture(scope="module")
def pipe():
    return make.pipeline("refine", "epsilon")


def jpeg_of(picture, quality=20, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def with_payload(data, payload):
    header, _ = container.read_header(data)
    return container.pack(header, payload)


# -------------------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("base", formats.FORMATS)
def test_the_base_file_comes_out_whole_and_the_preview_is_its_picture(pipe, photo, base, tmp_path, capsys):
    data = pipe.compress(photo, fidelity=0.2, base=base).bitstreams[0]
    codec = formats.FORMATS[base]
    knob = codec.knobs[round(0.2 * (len(codec.knobs) - 1))]
    assert base_file(data) == codec.encode(photo, knob) and formats.kind_of(base_file(data)) == base
    assert codecs.describe(data)["base"] == base
    preview = pipe.decompress(data, preview=True).images[0]
    assert np.array_equal(np.asarray(preview), np.asarray(codec.decode(base_file(data))))

    (tmp_path / "in.dfc").write_bytes(data)
    assert cli.main(["extract", str(tmp_path / "in.dfc"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_bytes() == base_file(data)


@pytest.mark.parametrize("base", LEARNED)
def test_another_codecs_file_is_a_base_too(base, tiny_sd_folder, photo):
    pipe, codec = (kind.from_pretrained(tiny_sd_folder) for kind in (RefinePipeline, CODECS[base].pipeline_class()))
    data = pipe.compress(photo, max_bytes=300, base=base).bitstreams[0]
    assert len(data) <= 300 and codecs.codec_of(base_file(data)) == base
    own = codec.decompress(base_file(data), **CODECS[base].preview).images[0]
    assert np.array_equal(np.asarray(pipe.decompress(data, preview=True).images[0]), np.asarray(own))
    refined = pipe.decompress(data, num_inference_steps=1).images[0]
    assert refined.size == photo.size and not np.array_equal(np.asarray(refined), np.asarray(own))

    smaller = codec.compress(photo.crop((0, 0, 48, 48)), max_bytes=200).bitstreams[0]
    with pytest.raises(Corrupt, match="the base has 48x48 pixels, not 96x64"):
        pipe.decompress(with_payload(data, smaller), preview=True)


def test_a_preview_calls_no_network(pipe, photo, monkeypatch):
    data = pipe.compress(photo, fidelity=0.2, base="webp").bitstreams[0]
    monkeypatch.setattr(type(pipe), "predict", None)
    monkeypatch.setattr(type(pipe), "encode_picture", None)
    pipe.decompress(data, preview=True)


def test_other_codecs_hold_no_file(tmp_path, capsys):
    (tmp_path / "in.dfc").write_bytes((make.FOLDER / "relic-adaptive.dfc").read_bytes())
    assert cli.main(["extract", str(tmp_path / "in.dfc"), str(tmp_path / "out")]) == 1
    assert "a Relic file holds no other file" in capsys.readouterr().err


def test_the_errors_in_the_file_are_those_of_the_latents(pipe, photo):
    data = pipe.compress(photo, fidelity=0.2, base="webp").bitstreams[0]
    pictures = [photo, formats.opened("webp", base_file(data))]
    x_0, y = pipe.encode_picture(torch.stack([pipe.pad(images.to_tensor(picture)[0]) for picture in pictures]))
    expected = (y - x_0).square().mean((1, 2)).sqrt()
    assert codecs.describe(data)["errors"] == pytest.approx(expected.tolist(), rel=2 ** (0.5 / 16) - 1)
    assert [code_of(error_of(code)) for code in range(256)] == list(range(256)) and code_of(0) == 0


def test_a_limit_below_the_smallest_base_is_refused(pipe, photo):
    with pytest.raises(ValueError, match=r"may take 100 bytes here; with the smallest jpeg file it has \d{3,}"):
        pipe.compress(photo, max_bytes=100)
    limit = len(pipe.compress(photo, fidelity=1e-9).bitstreams[0])
    assert len(pipe.compress(photo, max_bytes=limit).bitstreams[0]) == limit


def test_a_broken_base_behind_right_checksums_is_corrupt(pipe, photo):
    data = pipe.compress(photo, fidelity=0.2).bitstreams[0]
    other = jpeg_of(photo.resize((40, 40)))
    for payload, reason in (base_file(data)[:200], "cannot be refined"), (other, "40x40 pixels, not 96x64"):
        with pytest.raises(Corrupt, match=reason):
            pipe.decompress(with_payload(data, payload), num_inference_steps=1)


# ------------------------------------------------------------------------------------------------------------------- the dial


def test_the_dial_blends_two_pictures_of_one_decoding(pipe, photo, monkeypatch):
    data = pipe.compress(photo, fidelity=0.1).bitstreams[0]

    def at(realism, **options):
        return pipe.decompress(data, realism=realism, num_inference_steps=2, output_type="pt", **options).images[0]

    sample, calls = at(1.0), []
    predict = type(pipe).predict
    monkeypatch.setattr(type(pipe), "predict", lambda *given: calls.append(1) or predict(*given))
    estimate, between = at(0.0), at(0.25)
    assert torch.allclose(between, 0.75 * estimate + 0.25 * sample, atol=1e-6) and not torch.equal(estimate, sample)
    assert not calls
    assert torch.equal(at(1.0, tile=128), sample) and calls  # other arguments, another decoding


def test_weights_that_changed_without_a_sign_decode_anew(photo):
    pipe = make.pipeline("refine", "epsilon")
    data = pipe.compress(photo, fidelity=0.1).bitstreams[0]
    before, identity = np.asarray(pipe.decompress(data, num_inference_steps=1).images[0]), pipe.fingerprint()
    for parameter in pipe.unet.up_blocks.parameters():
        parameter.data *= 2
    assert pipe.fingerprint() == identity
    assert not np.array_equal(np.asarray(pipe.decompress(data, num_inference_steps=1).images[0]), before)


def test_without_realism_a_base_is_left_as_it_is(pipe, photo, monkeypatch):
    monkeypatch.setattr(type(pipe), "predict", None)
    data = pipe.compress(photo, fidelity=0.1, base="webp").bitstreams[0]
    picture = pipe.decompress(data, realism=0.0).images[0]
    assert np.array_equal(np.asarray(picture), np.asarray(formats.opened("webp", base_file(data))))


# -------------------------------------------------------------------------------------------------------------- cells of a JPEG


@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4"])
@pytest.mark.parametrize("size", [(64, 48), (51, 33), (9, 7)])
def test_a_projected_picture_is_in_every_cell_after_rounding(photo, size, subsampling):
    picture = photo.crop((0, 0, *size))
    cells = jpeg.read_cells(jpeg_of(picture, subsampling=subsampling))
    x = images.to_tensor(picture)[0]
    noisy = x + 0.3 * torch.randn(x.shape)
    assert jpeg.excess(noisy, cells).max() > 5
    projected = jpeg.project(noisy, cells, 30)
    assert jpeg.excess(projected, cells).max() < 0.1
    rounded = images.to_tensor(images.to_output(projected[None])[0])[0]
    assert jpeg.excess(rounded, cells).max() < 1  # rounding moves a coefficient by less
    assert (projected - x).square().mean() < (noisy - x).square().mean()  # the cells hold the original


def test_the_original_is_in_its_cells_but_for_the_encoders_own_rounding(photo):
    cells = jpeg.read_cells(jpeg_of(photo, subsampling="4:2:0"))
    assert jpeg.excess(images.to_tensor(photo)[0], cells).max() < 2


def test_encoding_a_refined_picture_again_gives_the_base_back(pipe, photo):
    data = pipe.compress(photo, fidelity=0.1).bitstreams[0]
    refined = pipe.decompress(data, num_inference_steps=2).images[0]
    tables = Image.open(io.BytesIO(base_file(data))).quantization
    file = io.BytesIO()
    refined.save(file, "JPEG", qtables=tables, subsampling="4:2:0")
    pairs = zip(jpeg.read_cells(base_file(data)).planes, jpeg.read_cells(file.getvalue()).planes)
    changed = torch.cat([(one.stored != two.stored).flatten() for one, two in pairs])
    assert changed.float().mean() < 0.002
    assert not np.array_equal(np.asarray(refined), np.asarray(pipe.decompress(data, preview=True).images[0]))


def test_windows_of_cells_are_those_of_the_parts(photo):
    whole = jpeg.read_cells(jpeg_of(photo, subsampling="4:2:0"))
    part = jpeg.read_cells(jpeg_of(photo.crop((32, 16, 96, 64)), subsampling="4:2:0"))
    for one, two in zip(whole.window(16, 32, 48, 64).planes, part.planes):
        assert torch.equal(one.stored, two.stored)


def test_other_colours_have_no_cells(photo):
    assert jpeg.read_cells(jpeg_of(photo.convert("CMYK"))) is None
    assert len(jpeg.read_cells(jpeg_of(photo.convert("L"))).planes) == 1


# --------------------------------------------------------------------------------------------------------------- the equations


def test_a_base_like_the_test_channel_becomes_the_original_with_matched_noise():
    """Gaussian channels through the forward test channel: z - x_0 is white noise of the variance N, whatever the channel keeps."""
    power, noise = torch.tensor([9.0, 1.0, 0.5]).view(1, 3, 1, 1), 0.25
    x_0 = power.sqrt() * torch.randn(1, 3, 200, 200)
    gain = power / (power + noise)
    y = gain * (x_0 + math.sqrt(noise) * torch.randn(x_0.shape))
    errors = (y - x_0).square().mean((0, 2, 3)).sqrt()
    start = restore.match(y, errors, torch.randn(2, 3, 200, 200))
    start = start._replace(level=1.0)
    assert (start.z - x_0).square().mean((0, 2, 3)).tolist() == pytest.approx([noise] * 3, rel=0.1)
    alpha, sigma = 0.6, 0.8
    added = start.at(alpha, sigma) / alpha - x_0
    assert added.square().mean((0, 2, 3)).tolist() == pytest.approx([(sigma / alpha) ** 2] * 3, rel=0.05)


def test_the_walk_of_a_gaussian_ends_with_its_power():
    """With the exact denoiser of N(0, 1) the restored latent has the power that the base lost; the base's own was 1 - D."""
    noise = schedule.flow_matching(1000)
    x_0 = torch.randn(1, 1, 200, 200)
    y = 0.5 * (x_0 + torch.randn(x_0.shape))  # V = N = 1, D = 1/2
    start = restore.match(y, (y - x_0).square().mean().sqrt().view(1), torch.randn(2, 1, 200, 200))
    walk, sent = restore.restore(start, 200, noise), None
    try:
        while True:
            x_t, t = walk.send(sent)
            alpha, sigma = noise.level(t)
            x_0_hat = alpha / (alpha**2 + sigma**2) * x_t
            sent = (x_t - (alpha + sigma) * x_0_hat) / sigma
    except StopIteration as stop:
        restored = stop.value
    assert y.var().item() == pytest.approx(0.5, rel=0.05)
    assert restored.var().item() == pytest.approx(1.0, rel=0.1)


def gaussian_denoiser(walk, noise, y, error):
    """What a walk returns with the exact E[x_0 | x_t, y] of x_0 ~ N(y, error^2), y known."""
    sent = None
    try:
        while True:
            x_t, t = walk.send(sent)
            alpha, sigma = noise.level(t)
            x_0_hat = y + alpha * error**2 / (alpha**2 * error**2 + sigma**2) * (x_t - alpha * y)
            sent = alpha * x_t / sigma - x_0_hat / sigma  # v
    except StopIteration as stop:
        return stop.value


@pytest.fixture(scope="module")
def zero_snr():
    from diffusers import DDIMScheduler

    return schedule.from_scheduler(
        DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )


@pytest.mark.parametrize("form", trained.LATE_START)
@pytest.mark.parametrize("known", [1.0, 0.8])
def test_a_trained_walk_ends_with_a_sample_of_what_the_base_leaves_open(form, known, zero_snr):
    """x_0 given y is N(y, (known d)^2) here: the mean is y, and after four calls the sample has that deviation about it."""
    y, n, d = 2 * torch.randn(1, 1, 100, 100), torch.randn(1, 1, 100, 100), torch.full((1, 1, 100, 100), 0.3)
    calls_at = trained.timesteps(0.3, 4, zero_snr, form, trained.LATE_START[form])
    assert calls_at == sorted(set(calls_at), reverse=True) and len(calls_at) <= 4
    mean, sample = gaussian_denoiser(trained.walk(y, d, n, calls_at, zero_snr), zero_snr, y, known * d)
    # a late start has a little of the noise in its mean: 1 / (1 + 4^2) of its power
    assert (mean - y).std().item() < 0.3 * 0.3
    assert (sample - y).std().item() == pytest.approx(known * 0.3, rel=0.01 if known == 1 else 0.05)


def test_where_the_gaussians_say_nothing_a_walk_takes_eulers_steps_of_the_flow(zero_snr):
    """z_s = (1 - s) x_0 + s (y + d n) along dz/ds = (z_s - x_0_hat) / s, whose levels are those of the timesteps."""
    y, n, d, steps = torch.randn(1, 1, 50, 50), torch.randn(1, 1, 50, 50), 0.5, 5
    calls_at = trained.timesteps(d, steps, zero_snr, "flow", math.inf)
    _, x_0 = gaussian_denoiser(trained.walk(y, torch.full_like(y, 1e-5), n, calls_at, zero_snr), zero_snr, y, d)
    z = y + d * n
    for k in range(steps, 0, -1):
        s = k / steps
        x_0_hat = y + (1 - s) / ((1 - s) ** 2 + s**2) * (z - y)  # E[x_0 | z_s, y]
        z = z - (z - x_0_hat) / k
    assert torch.allclose(x_0, z, atol=0.02 * d)  # timesteps are whole numbers


def test_tiles_cover_a_picture_once():
    height, width = 150, 401
    total = torch.zeros(height, width)
    for rows, columns in restore.windows(height, width, 128, 64):
        total[rows, columns] += restore.weight(rows, columns, height, width, 64)
    assert torch.allclose(total, torch.ones(height, width), atol=1e-6)


def test_a_picture_in_tiles_keeps_what_its_base_says(pipe, photo):
    picture, options = photo.resize((288, 192)), {"num_inference_steps": 1, "tile": 192}
    data = pipe.compress(picture, fidelity=0.3).bitstreams[0]
    tiled = np.array(pipe.decompress(data, **options).images[0])
    assert jpeg.excess(images.to_tensor(tiled)[0], jpeg.read_cells(base_file(data))).max() < 1

    data = pipe.compress(picture, fidelity=0.3, base="webp").bitstreams[0]
    base, tiled = (pipe.decompress(data, realism, output_type="pt", **options).images[0] for realism in (0.0, 1.0))
    difference = tiled - base
    assert restore.low_pass(difference[None], 5).abs().max() < 0.1 * difference.abs().max()


def test_the_embedded_decoder_is_small_and_paints_what_a_base_lost():
    folder = Path(embedded_model("refine"))
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6
    pipe = RefinePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    photo = Image.open(folder.parent / "coffee.jpg").convert("RGB").resize((384, 256)).crop((128, 64, 256, 192))
    x = images.to_tensor(photo)[0]

    def error(picture):
        return (images.to_tensor(picture)[0] - x).square().mean()

    def detail(picture):
        return (picture - restore.low_pass(picture[None], 1)[0]).square().mean()

    for base in "jpeg", "avif":
        data = pipe.compress(photo, fidelity=1e-9, base=base).bitstreams[0]
        preview = pipe.decompress(data, preview=True).images[0]
        refined, estimate = (pipe.decompress(data, realism=realism, num_inference_steps=4).images[0] for realism in (1.0, 0.0))
        assert error(estimate) <= error(preview) and error(refined) < 2 * error(preview)
        if base == "avif":
            assert detail(images.to_tensor(preview)[0]) < detail(images.to_tensor(refined)[0]) < 2 * detail(x)


# ------------------------------------------------------------------------------------------------------------ files of others


def test_errors_are_estimated_within_a_factor(photo):
    pipe = make.pipeline("refine", "embedded")
    picture = photo.resize((384, 256))
    for quality in 10, 40:
        data = jpeg_of(picture, quality)
        x, x_hat = (images.to_tensor(image)[0] for image in (picture, formats.opened("jpeg", data)))
        true = (pipe.encode_picture(x_hat[None]) - pipe.encode_picture(x[None])).square().mean((0, 2, 3)).sqrt()
        found = blind.errors(x_hat, "jpeg", jpeg.read_cells(data), len(data), pipe.encode_picture)
        ratio = (found.square().mean() / true.square().mean()).sqrt()
        assert 0.5 < ratio < 2


def test_a_file_of_another_program_is_refined_upright(pipe, photo, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    (tmp_path / "old.jpg").write_bytes(jpeg_of(photo, exif=exif))
    pipe.save_pretrained(tmp_path / "model")
    words = ["--steps", "1", "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert cli.main(["refine", str(tmp_path / "old.jpg"), str(tmp_path / "out.png"), *words]) == 0
    assert Image.open(tmp_path / "out.png").size == photo.size[::-1]
    refined = pipe.refine((tmp_path / "old.jpg").read_bytes(), num_inference_steps=1).images[0]
    assert np.array_equal(np.asarray(refined), np.asarray(Image.open(tmp_path / "out.png")))


def test_what_cannot_be_refined_is_refused_in_a_line(pipe, photo):
    animation, png = io.BytesIO(), io.BytesIO()
    photo.save(animation, "WEBP", save_all=True, append_images=[photo.rotate(90)])
    photo.save(png, "PNG")
    cases = {animation.getvalue(): "animation of 2 frames", png.getvalue(): "not one of jpeg, webp"}
    cases[jpeg_of(photo)[:300]] = "this jpeg file cannot be refined"
    for data, reason in cases.items():
        with pytest.raises(ValueError, match=reason):
            pipe.refine(data)
