"""The command line, run as a user would on a tiny random model; its failures one by one."""

import dataclasses
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline, VarianceHead, __version__, calibration, cli, codecs, images
from diffusers_compress.cli import info, loading, terminal
from diffusers_compress.cli.calibrate import save_calibrated
from diffusers_compress.cli.demo import DEMO_BPP, demo_photo
from diffusers_compress.cli.paths import check_picture_format, some_pictures
from diffusers_compress.codecs.diffc import format as diffc_format
from diffusers_compress.coding import bit_payload
from diffusers_compress.format import container

SETTINGS = ["--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def no_lines_of_progress(monkeypatch):
    """However slow this machine is now."""
    monkeypatch.setattr(terminal, "INTERVAL", 1e6)


@pytest.fixture
def run(capsys):
    """Runs a command line in this process: (exit status, lines on stdout, lines on stderr)."""

    def run(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.fixture(scope="module")
def picture(photo, tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "photo.png"
    photo.save(path)
    return path


@pytest.fixture(scope="module")
def coded(picture, tiny_sd_folder, tmp_path_factory):
    """A compressed file made by the command line."""
    path = tmp_path_factory.mktemp("coded") / "photo.dfc"
    arguments = ["encode", picture, path, "--max-bytes", 150, "--prompt", "a small house", "--model", tiny_sd_folder, *SETTINGS]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return path


def assert_fails(result, words):
    status, out, err = result
    assert status != 0
    assert out == []
    assert len(err) == 1, err
    assert err[0].startswith("error: ") and words in err[0], err[0]


# ------------------------------------------------------------------------------------------------------------ what works


def test_encode_says_bytes_bpp_and_seconds(run, picture, tiny_sd_folder, tmp_path):
    path = tmp_path / "photo.dfc"
    status, out, err = run("encode", picture, path, "--bpp", 0.4, "--model", tiny_sd_folder, *SETTINGS)
    assert (status, err) == (0, [])
    size = path.stat().st_size
    assert 8 * size / (96 * 64) <= 0.4
    assert out[0].startswith(f"{path}: {size:,} bytes, {8 * size / (96 * 64):.4f} bpp, ")
    assert os.listdir(tmp_path) == ["photo.dfc"]


def test_encode_says_what_is_not_carried(run, photo, tiny_sd_folder, tmp_path):
    photo.copy().convert("RGBA").save(tmp_path / "opaque.png")
    see_through = photo.convert("RGBA")
    see_through.putalpha(100)
    see_through.save(tmp_path / "see_through.png")
    for name, notes in ("opaque", 0), ("see_through", 1):
        path = tmp_path / f"{name}.dfc"
        _, out, _ = run("encode", tmp_path / f"{name}.png", path, "--max-bytes", 120, "--model", tiny_sd_folder, *SETTINGS)
        assert len(out) == 1 + notes
        assert all("alpha" in line for line in out[1:])


def test_decode_is_the_pipelines_decompress(run, coded, tiny_sd_folder, tmp_path):
    path = tmp_path / "photo.png"
    status, out, err = run("decode", coded, path, "--model", tiny_sd_folder, "--steps", 3, *SETTINGS)
    assert (status, err) == (0, [])
    assert out[0].startswith(f"{path}: 96x64 pixels, ")
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    expected = pipe.decompress(coded.read_bytes(), num_inference_steps=3).images[0]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected))


def test_decode_options_reach_the_pipeline(run, coded, tiny_sd_folder, tmp_path):
    def decoded(*options):
        path = tmp_path / "decoded.png"
        status, *_ = run("decode", coded, path, "--force", "--model", tiny_sd_folder, *SETTINGS, *options)
        assert status == 0
        return path.read_bytes()

    assert decoded("--preview") == decoded("--reconstruction", "denoised") != decoded()
    ancestral = ["--reconstruction", "ancestral", "--steps", 4, "--seed"]
    assert decoded(*ancestral, 1) == decoded(*ancestral, 1) != decoded(*ancestral, 2)
    assert decoded("--guidance", 5) != decoded()


def test_a_cut_file_decodes_and_says_so(run, coded, tiny_sd_folder, tmp_path):
    cut = tmp_path / "cut.dfc"
    cut.write_bytes(coded.read_bytes()[:-60])
    status, out, err = run("decode", cut, tmp_path / "cut.png", "--model", tiny_sd_folder, *SETTINGS)
    assert (status, err) == (0, [])
    assert out[0].startswith("note: the file was cut short; the picture is made of ")
    assert Image.open(tmp_path / "cut.png").size == (96, 64)


def test_info_tells_the_facts_without_a_model(run, coded, monkeypatch):
    monkeypatch.setattr(DiffCPipeline, "from_pretrained", None)
    status, out, err = run("info", coded)
    assert (status, err) == (0, [])
    facts = dict(line.split(maxsplit=1) for line in out)
    assert (facts["width"], facts["height"], facts["bytes"]) == ("96", "64", str(coded.stat().st_size))
    assert facts["prompt"] == "a small house"
    assert facts["complete"] == "True"


def test_info_finds_the_model_among_folders(run, coded, tiny_sd_folders, tmp_path):
    """By what its weights are, whatever it is called; folders without a model of this kind are passed over."""
    epsilon, other = tiny_sd_folders["epsilon"], tiny_sd_folders["v_prediction"]
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "model_index.json").write_text("{}")
    shutil.copytree(epsilon, tmp_path / "models" / "deep" / "some name")
    status, out, err = run("info", coded, "--find", other, "--find", tmp_path)
    assert (status, err) == (0, [])
    assert out[-1] == f"made with  {tmp_path / 'models' / 'deep' / 'some name'}"

    status, out, err = run("info", coded, "--find", other, "--find", tmp_path / "models" / "broken")
    assert status == 1 and not any(line.startswith("made with") for line in out)
    assert any(line.startswith(f"not {other}: ") for line in err)
    facts = dict(line.split(maxsplit=1) for line in out)
    assert err[-1] == f"error: model {facts['model']} is none of the 2 model folders there"


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(run, coded, tiny_sd_folder, tmp_path, component):
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    shutil.rmtree(folder / component)
    arguments = ["decode", coded, tmp_path / "o.png", "--model", folder, *SETTINGS]
    assert_fails(run(*arguments), f"component {component} is missing")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({name: value for name, value in index.items() if name != component}))
    assert_fails(run(*arguments), "scheduler" if component == "scheduler" else "no network" if component == "unet" else component)


def test_limits_can_be_raised_and_lowered(run, coded, tiny_sd_folder, tmp_path):
    assert_fails(run("info", coded, "--max-pixels", 6143), "96x64 pixels are more than the limit of 6143")
    target = tmp_path / "o.png"
    assert_fails(run("decode", coded, target, "--max-pixels", 6143, "--model", tiny_sd_folder, *SETTINGS), "96x64 pixels")
    assert run("info", coded, "--max-pixels", 6144)[0] == 0


def test_notes_of_the_decoding_are_told(run, coded, tiny_sd_folder, tmp_path, monkeypatch):
    decompress = DiffCPipeline.decompress

    def noted(*arguments, **options):
        return SimpleNamespace(images=decompress(*arguments, **options).images, notes=[["the latent drifted"]])

    monkeypatch.setattr(DiffCPipeline, "decompress", noted)
    _, out, _ = run("decode", coded, tmp_path / "o.png", "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert out[0] == "note: the latent drifted"


def test_through_pipes(picture, tiny_sd_folder, python):
    """- is stdin and stdout; what is said goes to stderr."""
    command = ["-m", "diffusers_compress.cli"]
    options = ["--model", tiny_sd_folder, *SETTINGS]
    encode = python.run([*command, "encode", "-", "-", "--max-bytes", "150", *options], check=True, input=picture.read_bytes())
    assert encode.stdout[:2].hex() == "dfc1" and len(encode.stdout) <= 150 and b"-: " in encode.stderr
    decode = python.run([*command, "decode", "-", "-", *options], check=True, input=encode.stdout)
    assert Image.open(BytesIO(decode.stdout)).size == (96, 64) and b"96x64" in decode.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout(coded):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "diffusers_compress.cli", "info", str(coded)]
        result = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1 and result.stderr == "error: No space left on device\n"


def test_a_process_that_is_told_to_end_removes_what_it_began(picture, tmp_path, python):
    program = (
        "import os, signal, sys, types\n"
        "from diffusers_compress.cli import loading, main\n"
        "out = types.SimpleNamespace(bitstreams=[b'data'], bpp=[1.0], notes=[[]])\n"
        "loading.load = lambda *_: types.SimpleNamespace(compress=lambda *_, **__: out)\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.exit(main())"
    )
    result = python.run(["-c", program, "encode", picture, tmp_path / "o.dfc", "--bpp", "1"])
    assert result.returncode == 128 + signal.SIGTERM and os.listdir(tmp_path) == []


def test_demo_measures_on_what_it_wrote(run, photo, picture, tiny_sd_folder, tmp_path):
    folder = tmp_path / "new" / "demo"
    status, out, err = run("demo", picture, "--folder", folder, "--bpp", 0.5, "--model", tiny_sd_folder, *SETTINGS)
    assert (status, err) == (0, [])
    assert sorted(os.listdir(folder)) == ["photo.decoded.png", "photo.dfc", "photo.side_by_side.png"]
    size = (folder / "photo.dfc").stat().st_size
    assert f"{size:,} bytes, {8 * size / (96 * 64):.4f} bpp" in out[0]
    error = np.asarray(photo).astype(float) - np.asarray(Image.open(folder / "photo.decoded.png"))
    assert f"PSNR {10 * np.log10(255**2 / (error**2).mean()):.2f} dB" in out[1]
    both = np.asarray(Image.open(folder / "photo.side_by_side.png"))
    assert np.array_equal(both[:, :96], np.asarray(photo))
    again = run("demo", picture, "--folder", folder, "--bpp", 0.4, "--model", tiny_sd_folder, *SETTINGS)
    assert again[0] == 0 and (folder / "photo.dfc").stat().st_size < size


@pytest.mark.slow
def test_demo_takes_matplotlibs_photo_at_its_own_rate(run, tiny_sd_folder, tmp_path):
    status, _, err = run("demo", "--folder", tmp_path, "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert (status, err) == (0, [])
    width, height = images.open_image(demo_photo()).size
    assert Image.open(tmp_path / "coffee.decoded.png").size == (width, height)
    assert 8 * (tmp_path / "coffee.dfc").stat().st_size / (width * height) <= DEMO_BPP


def test_calibrate_copies_the_model_with_what_it_found(run, photo, tiny_sd_folder, tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "more/c.png", "more/d.png")):
        photo.rotate(90 * i).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    out = tmp_path / "calibrated"
    arguments = ["calibrate", tmp_path / "photos", "--out", out, "--max-pictures", 2, "--model", tiny_sd_folder]
    status, lines, err = run(*arguments, *SETTINGS)
    assert (status, err) == (0, [])
    assert lines[0].startswith(f"{out}: calibrated on 2 pictures, ")
    assert_fails(run(*arguments, *SETTINGS), "exists already")

    plain, pipe = DiffCPipeline.from_pretrained(tiny_sd_folder), DiffCPipeline.from_pretrained(out)
    pictures = [images.open_image(tmp_path / "photos" / name) for name in ("a.png", "more/c.png")]
    assert pipe.config.calibration["error"] == calibration.calibrate_error(plain, pictures)
    assert pipe.config.calibration["latent"] == calibration.calibrate_latent(plain, pictures)
    assert pipe.config.calibration["second_guess"] == calibration.calibrate_second_guess(plain, pictures)
    assert all(torch.equal(*pair) for pair in zip(plain.unet.parameters(), pipe.unet.parameters()))
    assert pipe.fingerprint() != plain.fingerprint()


def test_calibrate_keeps_what_other_codecs_added(photo, tiny_sd_folder, tmp_path):
    pipe = DiffCPipeline.from_pretrained(tiny_sd_folder)
    pipe.register_modules(variance_head=VarianceHead(4, 8))
    pipe.register_to_config(calibration={"latent": {"mean": [1.0]}, "error": None})
    pipe.save_pretrained(tmp_path / "model")
    save_calibrated(str(tmp_path / "model"), tmp_path / "new", {"error": {"ratio": [0.5]}})
    saved = DiffCPipeline.from_pretrained(tmp_path / "new")
    assert saved.config.calibration == {"latent": {"mean": [1.0]}, "error": {"ratio": [0.5]}}
    assert saved.variance_head is not None


def test_help_and_version(run):
    status, out, err = run()
    assert status == 0 and err == []
    assert all(any(command in line for line in out) for command in ("encode", "decode", "info", "demo", "batch", "calibrate"))
    assert run("--version") == (0, [f"diffusers-compress {__version__}"], [])


def test_as_a_process_of_its_own(tmp_path):
    (tmp_path / "no.dfc").write_bytes(b"hello")
    command = [sys.executable, "-m", "diffusers_compress.cli", "info", "no.dfc"]
    result = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("rate", "words"), [([], "given: none"), (["--bpp", "0.1", "--max-bytes", "9"], "given: --bpp, --max-bytes")]
)
def test_one_rate_is_wanted(run, picture, tmp_path, rate, words):
    assert_fails(run("encode", picture, tmp_path / "o.dfc", *rate), words)


@pytest.mark.parametrize("rate", [["--bpp", "-1"], ["--fidelity", "7"], ["--max-bytes", "3"]])
def test_a_rate_out_of_range(run, picture, tiny_sd_folder, tmp_path, rate):
    assert_fails(run("encode", picture, tmp_path / "o.dfc", *rate, "--model", tiny_sd_folder, *SETTINGS), rate[1])
    assert os.listdir(tmp_path) == []


def test_usage_errors(run, picture):
    assert_fails(run("encode", picture), "OUT")
    assert_fails(run("encode", picture, "o.dfc", "--nonsense"), "--nonsense")
    assert_fails(run("encode", picture, "o.dfc", "--bpp", "much"), "--bpp")
    assert_fails(run("decode", picture, "o.png", "--dtype", "int3"), "int3")
    assert_fails(run("improve"), "improve")


@pytest.mark.parametrize("command", [["encode", "--bpp", "1"], ["decode"], ["info"]])
def test_missing_input(run, tmp_path, command):
    target = [] if command == ["info"] else [tmp_path / "out.png"]
    assert_fails(run(command[0], tmp_path / "none.png", *target, *command[1:]), "none.png")


def test_calibrate_wants_pictures(run, tmp_path):
    (tmp_path / "photos").mkdir()
    assert_fails(run("calibrate", tmp_path / "photos", "--out", tmp_path / "new"), "no picture here")
    assert_fails(run("calibrate", tmp_path / "photos", "--out", tmp_path / "nowhere" / "new"), "no such folder")
    assert not (tmp_path / "new").exists()


def test_pictures_for_a_measurement_and_what_was_passed_over(photo, tmp_path):
    (tmp_path / "sub").mkdir()
    photo.save(tmp_path / "sub" / "b.jfif", format="JPEG")
    photo.save(tmp_path / "._a.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    pictures, notes = some_pictures(tmp_path, 3)
    assert [picture.size for picture in pictures] == [(96, 64)]
    assert [note.partition(" (")[0] for note in notes] == [f"passed over: {n}" for n in ("._a.png", "broken.png", "pipe.png")]


def test_unreadable_picture(run, tmp_path):
    (tmp_path / "noise.png").write_bytes(b"not a picture")
    assert_fails(run("encode", tmp_path / "noise.png", tmp_path / "o.dfc", "--bpp", 1), "noise.png")


@pytest.mark.parametrize(
    ("suffix", "size", "words"),
    [
        (".h5", (96, 64), "HDF5 cannot hold a picture of 96x64 pixels (HDF5 save handler not installed)"),
        (".nothing", (96, 64), "no picture format has the suffix '.nothing'"),
        (".xbm", (96, 64), "XBM cannot hold a picture of 96x64 pixels"),
        (".webp", (16_384, 8), "WEBP cannot hold a picture of 16384x8 pixels"),
        (".ICO", (300, 200), "ICO would shrink 300x200 pixels to "),
    ],
)
def test_a_format_that_cannot_hold_the_picture_is_refused_before_the_model_loads(run, tmp_path, monkeypatch, suffix, size, words):
    monkeypatch.setattr(loading, "load", None)
    facts = {"codec": "DiffC", "width": size[0], "height": size[1]}
    monkeypatch.setattr("diffusers_compress.cli.decode.describe", lambda data, limits: facts)
    monkeypatch.setattr("diffusers_compress.cli.decode.codec_of", lambda *_: "diffc")
    (tmp_path / "a.dfc").write_bytes(b"a file")
    assert_fails(run("decode", tmp_path / "a.dfc", tmp_path / f"out{suffix}"), words)
    assert os.listdir(tmp_path) == ["a.dfc"]


@pytest.mark.parametrize("suffix", [".avif", ".bmp", ".gif", ".jp2", ".jpg", ".pdf", ".png", ".ppm", ".tif", ".webp"])
def test_formats_that_hold_the_picture_are_taken(suffix):
    check_picture_format(Path(f"out{suffix}"), 96, 64)


def test_large_pictures_fit_into_png(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    check_picture_format(Path("out.png"), 70_000, 1)


def test_existing_output_stays_and_is_noticed_before_the_model_loads(run, picture, coded, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    for name in ("o.dfc", "o.png", "photo.side_by_side.png"):
        (tmp_path / name).write_text("precious")
    assert_fails(run("encode", picture, tmp_path / "o.dfc", "--bpp", 1), "--force")
    assert_fails(run("decode", coded, tmp_path / "o.png"), "--force")
    assert_fails(run("demo", picture, "--folder", tmp_path), "--force")
    for name in ("o.dfc", "o.png", "photo.side_by_side.png"):
        assert (tmp_path / name).read_text() == "precious"
    assert_fails(run("encode", picture, picture, "--bpp", 1, "--force"), "the input itself")
    assert_fails(run("encode", picture, tmp_path, "--bpp", 1, "--force"), "not a file")
    assert_fails(run("encode", picture, tmp_path / "nowhere" / "o.dfc", "--bpp", 1), "no such folder")
    assert_fails(run("decode", coded, tmp_path / "picture.xyz"), ".xyz")


def test_force_overwrites(run, coded, tiny_sd_folder, tmp_path):
    (tmp_path / "o.png").write_text("old")
    status, *_ = run("decode", coded, tmp_path / "o.png", "--force", "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert status == 0
    assert Image.open(tmp_path / "o.png").size == (96, 64)


def test_missing_model(run, picture, tmp_path):
    (tmp_path / "empty").mkdir()
    target = tmp_path / "o.dfc"
    for model, words in [
        (tmp_path / "none", "no such model folder"),
        (tmp_path / "empty", "model_index.json"),
        ("nobody/no-such-model", "nobody/no-such-model"),  # looks like a Hub id, and the tests are offline
    ]:
        assert_fails(run("encode", picture, target, "--bpp", 1, "--model", model), words)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"", "empty"),
        (lambda data: b"PNG" + data, "not a .dfc file"),
        (lambda data: data[:6], "cut"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
        (lambda data: data + b"more", "too many"),
    ],
)
def test_bad_file(run, coded, tmp_path, damage, words):
    bad = tmp_path / "bad.dfc"
    bad.write_bytes(damage(coded.read_bytes()))
    assert_fails(run("info", bad), words)
    assert_fails(run("decode", bad, tmp_path / "out.png"), words)
    assert os.listdir(tmp_path) == ["bad.dfc"]


def other_weights(folder, target):
    """A copy of a model whose weights differ."""
    pipe = DiffCPipeline.from_pretrained(folder)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.neg_()
    pipe.save_pretrained(target)
    return target


def test_another_model_is_refused_unless_wanted(run, coded, tiny_sd_folder, tmp_path):
    other = other_weights(tiny_sd_folder, tmp_path / "other")
    arguments = ["decode", coded, tmp_path / "out.png", "--preview", "--model", other, *SETTINGS]
    assert_fails(run(*arguments), "model")
    assert not (tmp_path / "out.png").exists()
    status, *_ = run(*arguments, "--any-model")
    assert status == 0
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "smaller picture"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "smaller picture"),
        (MemoryError(), "smaller picture"),
        (KeyError("first line\nsecond line"), "KeyError"),
        (OSError(errno.ENOSPC, "No space left on device", "o.png"), "o.png: No space left"),
    ],
)
def test_whatever_happens_is_one_line(run, coded, tiny_sd_folder, tmp_path, monkeypatch, error, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(DiffCPipeline, "decompress", fail)
    assert_fails(run("decode", coded, tmp_path / "o.png", "--model", tiny_sd_folder, *SETTINGS), words)
    assert os.listdir(tmp_path) == []


def test_an_interruption_ends_quietly(run, coded, tiny_sd_folder, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(DiffCPipeline, "decompress", interrupt)
    status, out, err = run("decode", coded, tmp_path / "o.png", "--model", tiny_sd_folder, *SETTINGS)
    assert status != 0
    assert out == [] and len(err) <= 1
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_nothing(run, coded, tiny_sd_folder, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error", "o.png")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(os, "replace", fail)
    result = run("decode", coded, tmp_path / "o.png", "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert_fails(result, "o.png: Input/output error")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------- terminals and streams


def process(*words, **options):
    command = [sys.executable, "-m", "diffusers_compress.cli", *map(str, words)]
    return subprocess.run(command, **{"check": False, "capture_output": True, "text": True, **options})


@pytest.fixture(scope="module")
def hostile(coded, tmp_path_factory):
    """A file whose prompt would steer a terminal, and has letters that ASCII cannot show."""
    header, parameters, messages, _ = diffc_format.read_file(coded.read_bytes())
    parameters.prompt = "red \x1b[31m \u202e Größe 🙂\r"
    whole = dataclasses.replace(header, parameters=parameters.to_bytes())
    path = tmp_path_factory.mktemp("hostile") / "photo.dfc"
    path.write_bytes(container.pack(whole, bit_payload.pack(messages, parameters.budgets)))
    return path


def test_info_imports_no_torch_numpy_or_diffusers(coded):
    program = (
        "import sys; from diffusers_compress.cli import main; status = main(['info', sys.argv[1]]);"
        "sys.exit(status or ' '.join({'torch', 'numpy', 'diffusers', 'transformers', 'PIL'} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(coded)], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "a small house" in result.stdout


def test_info_as_json_and_long_lists_shortened(run, coded):
    (line,) = run("info", coded, "--json")[1]
    facts = json.loads(line)
    assert facts == codecs.describe(coded.read_bytes()) and len(facts["budgets"]) > info.LONGEST
    shown = dict(line.split(maxsplit=1) for line in run("info", coded)[1])["budgets"]
    assert shown.endswith(f", ... ({len(facts['budgets'])} in all)]") and shown.count(",") == info.LONGEST


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_nothing_raw_reaches_the_terminal(hostile, tmp_path, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = process("info", hostile, text=False, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    prompt = next(line for line in result.stdout.decode(encoding).splitlines() if line.startswith("prompt"))
    assert prompt.isprintable() and r"\x1b[31m" in prompt and r"\u202e" in prompt and prompt.endswith(r"\r")
    assert ("ö" in prompt) == (encoding != "ascii")
    result = process("info", tmp_path / "no\x1b[2J\udcff.dfc", text=False, env=environment)
    assert result.returncode == 2 and b"\x1b" not in result.stderr and result.stderr.count(b"\n") == 1


def closed(redirections, *words):
    command = f'"$0" -m diffusers_compress.cli "$@" {redirections}'
    return subprocess.run(["sh", "-c", command, sys.executable, *map(str, words)], check=False, capture_output=True, text=True)


def test_closed_streams(coded):
    assert closed("<&-", "info", coded).returncode == 0
    assert closed("2>&-", "info", coded).stdout.startswith("codec")
    result = closed(">&-", "info", coded)
    assert result.returncode == 1 and result.stderr == "error: stdout is closed\n"
    assert closed("<&-", "info", "-").stderr == "error: IN is -, and stdin is closed\n"
    assert closed(">&- 2>&- <&-", "info", coded).returncode == 1
    result = closed(">&-", "decode", coded, "-")
    assert result.returncode == 1 and "stdout is closed" in result.stderr


WHILE_A_MODULE_IS_LOADED = """
import os, signal, sys
from diffusers_compress.__main__ import main

class Finder:
    def find_spec(name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

wanted, sys.argv[1:] = sys.argv[1], ["demo"]
sys.meta_path.insert(0, Finder)
sys.exit(main())
"""
# As numpy and torch do with whatever is raised while they load a part of theirs
WHILE_A_LIBRARY_HIDES_IT = """
import os, signal, sys, time
from diffusers_compress.__main__ import main
from diffusers_compress.cli import demo

def check(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    except BaseException:
        raise RuntimeError("Failed to import because of the following error (look up to see its traceback)")

demo.arguments_of = check
sys.argv[1:] = ["demo"]
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["diffusers_compress.cli", "typer", "torch"])
def test_ctrl_c_while_a_module_is_loaded(name, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WHILE_A_MODULE_IS_LOADED, name], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_that_a_library_makes_another_error_of(python):
    result = python.run(["-c", WHILE_A_LIBRARY_HIDES_IT], text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


def test_ctrl_c_is_ignored_where_the_shell_says_so():
    ignored = f"trap '' INT; exec \"$0\" -c '{WHILE_A_MODULE_IS_LOADED}' typer".replace('["demo"]', '["--version"]')
    result = subprocess.run(["sh", "-c", ignored, sys.executable], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_pipe_that_ends_early(coded):
    for words in ["info", coded], ["--help"]:
        read, write = os.pipe()
        os.close(read)
        result = process(*words, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_works_success_decides_not_who_hears_of_it(run, coded, tiny_sd_folder, tmp_path, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    status, *_ = run("decode", coded, tmp_path / "o.png", "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert status == 0 and Image.open(tmp_path / "o.png").size == (96, 64)
    monkeypatch.setattr(sys, "stdout", None)
    status, *_ = run("decode", coded, tmp_path / "p.png", "--preview", "--model", tiny_sd_folder, *SETTINGS)
    assert status == 0 and (tmp_path / "p.png").exists()


def test_debug_shows_the_traceback(run, tmp_path):
    (tmp_path / "no.dfc").write_bytes(b"hello")
    for words in ["--debug", "info", tmp_path / "no.dfc"], ["info", tmp_path / "no.dfc", "--debug"]:
        status, _, err = run(*words)
        assert status == 1 and err[0].startswith("Traceback") and err[-1].startswith("error: not a .dfc file")


def test_exit_statuses(run, picture, tmp_path, monkeypatch):
    target = tmp_path / "o.dfc"
    assert run("encode", picture, target)[0] == run("encode", picture, target, "--bpp", 0)[0] == 2
    status, _, err = run("encode", picture, target, "--bpp", -1)
    assert status == 2 and "--bpp" in err[0] and "target_bpp" not in err[0]
    assert run("encode", picture, target, "--bpp", 1, "--model", tmp_path / "none")[0] == 1

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", interrupt)
    assert run("encode", picture, target, "--bpp", 1)[::2] == (130, ["error: interrupted"])


def test_a_message_names_the_option_that_was_typed(run, coded, picture, tiny_sd_folder, tmp_path):
    status, _, err = run("decode", coded, tmp_path / "o.png", "--steps", 0, "--model", tiny_sd_folder, *SETTINGS)
    assert status == 1 and err[0].startswith("error: --steps must be at least 1")
    assert_fails(
        run("decode", coded, tmp_path / "o.png", "--preview", "--reconstruction", "flow"), "--preview or --reconstruction"
    )


def test_the_shell_completes(coded):
    environment = os.environ | {
        "_DIFFUSERS_COMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "diffusers-compress enc",
        "COMP_CWORD": "1",
    }
    result = process(env=environment)
    assert result.stdout.split() == ["encode"]
