"""Every way of loading in docs/loading.md, through a server that stands for the Hub and huggingface_hub's own client."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import fake_hub
import pytest
import tiny_models
import torch
from fork_server import LIBRARIES, ForkServer
from safetensors.torch import load_file, save_file
from test_perco import make as perco

from diffusers_compress import DiffCPipeline, PerCoPipeline, RelicPipeline, VarianceHead, hub
from diffusers_compress.cli.calibrate import save_calibrated
from diffusers_compress.models import adapter

ROOT = Path(__file__).parents[1]
CLASSES = {"diffc": DiffCPipeline, "relic": RelicPipeline, "perco": PerCoPipeline}
UNTRAINED = ("folder", "id", "pipe")  # rows that PerCo, which must be trained, does not have
RATES = {"0.0019": 8, "0.1250": 1}  # adapters in a repository: their names, and the strides of their grids
COLUMNS = ["class", "file", "custom id", "trusted"]
ROWS = {"folder": COLUMNS[:3], "id": COLUMNS[:3], "saved": COLUMNS, "pushed": ["class", "trusted"], "pipe": ["class", "file"]}
OPTIONS = ["revision", "local_files_only", "variant", "dtype", "device_map", "quantization_config"]


ONLINE = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_of_a_test", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory, photo):
    """A Hub with a plain model in two revisions and a safety checker, the same model as a folder, and as both codecs saved it."""
    folder = tmp_path_factory.mktemp("world")
    plain = tiny_models.sd_epsilon()
    plain.save_pretrained(folder / "plain")
    plain.save_pretrained(folder / "hub/them/sd")
    plain.to(torch.float16).save_pretrained(folder / "hub/them/sd", variant="fp16")
    tiny_models.sd_v_prediction().save_pretrained(folder / "hub/them/sd@old")
    add_safety_checker(folder / "hub/them/sd", torch.zeros(1))
    add_safety_checker(folder / "hub/them/sd@old", torch.ones(1))
    (folder / "hub/them/sd/README.md").write_text("---\nlicense: openrail++\n---\n")
    (folder / "home").mkdir()
    DiffCPipeline.from_pretrained(folder / "plain", variance_head=head()).save_pretrained(folder / "saved" / "diffc")
    RelicPipeline.from_pretrained(folder / "plain").save_pretrained(folder / "saved" / "relic")
    perco(folder / "plain").save_pretrained(folder / "saved" / "perco")
    for rate, stride in RATES.items():
        save_adapter(perco(folder / "plain", stride), folder / "hub/me/rates@old" / rate)
    photo.save(folder / "photo.png")
    (folder / "photos").mkdir()
    photo.save(folder / "photos" / "photo.png")
    return folder


def save_adapter(pipe, folder, base="them/sd"):
    pipe.hyper_encoder.save_pretrained(folder / "hyper_encoder")
    adapter.save(
        {f"conv_in.{name}": tensor for name, tensor in pipe.unet.conv_in.state_dict().items()}, folder, base, torch.float32
    )


def head():
    torch.manual_seed(0)
    return VarianceHead(latent_channels=4, width=8)


def add_safety_checker(folder, weight):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    save_file({"weight": weight}, folder / "safety_checker/model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def address(world):
    server = fake_hub.serve(world / "hub")
    server.server_activate()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def run_with_hub(world, address):
    """run_with_hub(program, *arguments): standard output of a Python process for which the server is the Hub."""
    python = ForkServer(LIBRARIES, {"HF_ENDPOINT": address, "HF_HOME": str(world / "home"), **ONLINE})

    def run(program, *arguments):
        environment = {**os.environ, "HF_HOME": str(world / "home"), **ONLINE}
        return python.run([*program, *arguments], env=environment, cwd=world / "home", check=True, text=True).stdout

    yield run
    python.close()


PUSH = """
import sys
from PIL import Image
from diffusers_compress import DiffCPipeline, PerCoPipeline
from diffusers_compress.cli import main
for codec, pipeline in {"diffc": DiffCPipeline, "perco": PerCoPipeline}.items():
    pipe = pipeline.from_pretrained(f"{sys.argv[2]}/{codec}")
    pipe.set_progress_bar_config(disable=True)
    print(pipe.push_to_hub(f"me/{codec}", license="mit", pictures=[Image.open(sys.argv[1])], rates=(0.2,)))
pipe.save_pretrained(f"{sys.argv[2]}/again", push_to_hub=True, repo_id="me/saved", private=True)
arguments = ["--codec", "relic", "--model", f"{sys.argv[2]}/relic", "--license", "mit", "--pictures", sys.argv[3], "--bpp", "0.2"]
sys.exit(main(["push", "me/relic", *arguments, "--device", "cpu"]))
"""


@pytest.fixture(scope="module")
def cells(world, address, run_with_hub):
    """(codec, row, column) -> what the fresh process says of it; two repositories were pushed before."""
    said = run_with_hub(["-c", PUSH], world / "photo.png", world / "saved", world / "photos")
    for line, codec in zip(said.splitlines(), ("diffc", "perco", "relic"), strict=True):
        assert line.startswith(f"{address}/me/{codec}/commit/")
    program = [str(ROOT / "tests" / "loading_cells.py")]
    output = run_with_hub(program, world / "photo.png", world / "plain", world / "saved", ROOT / "pipelines")
    return {tuple(cell): value for *cell, value in json.loads(output.splitlines()[-1])}


@pytest.fixture(scope="module")
def expected(world, photo):
    """(codec, whether from one of our own repositories) -> the file of the photo."""

    def coded(codec, folder):
        pipe = CLASSES[codec].from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        options = {"max_bytes": 100} if codec != "perco" else {}
        options |= {"num_coding_steps": 2} if codec == "diffc" else {}
        return pipe.compress(photo, **options).bitstreams[0].hex()

    return {(codec, True): coded(codec, world / "saved" / codec) for codec in CLASSES} | {
        (codec, False): coded(codec, world / "plain") for codec in ("diffc", "relic")
    }


@pytest.mark.parametrize("row, column", [(row, column) for row, columns in ROWS.items() for column in columns])
@pytest.mark.parametrize("codec", CLASSES)
def test_every_way_of_loading_gives_the_same_bytes(cells, expected, codec, row, column):
    if codec == "perco" and row in UNTRAINED:
        assert (codec, row, column) not in cells
    else:
        assert cells[codec, row, column] == expected[codec, row in ("saved", "pushed")]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("codec", ("diffc", "relic"))
def test_options_are_passed_on(cells, expected, codec, option):
    assert cells[codec, "option", option] in (True, expected[codec, True])


@pytest.mark.parametrize("option", ["local_files_only", "dtype", "device_map"])
def test_options_are_passed_on_to_a_trained_model(cells, expected, option):
    assert cells["perco", "option", option] in (True, expected["perco", True])


def test_a_plain_model_is_not_trained_for_perco(world):
    with pytest.raises(ValueError, match="needs a model that was trained for it"):
        PerCoPipeline.from_pretrained(world / "plain")


def test_the_table_of_the_docs_has_these_cells():
    text = (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text[: text.index("##")].splitlines() if line.startswith("|")][2:]
    assert [[bool(cell.strip() == "yes") for cell in row[1:]] for row in rows] == [
        [column in columns for column in COLUMNS] for columns in ROWS.values()
    ]
    assert all(f"`{option}`" in text for option in OPTIONS)


def test_diffusers_alone_says_what_to_do(world):
    """As docs/loading.md quotes it."""
    folder, text = world / "saved" / "relic", (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    for loader in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForImage2Image):
        with pytest.raises(ValueError, match="trust_remote_code=True") as caught:
            loader.from_pretrained(folder)
        said = str(caught.value).replace(str(folder), "FOLDER").partition(" You can inspect")[0]
        assert f"`{said}`" in " ".join(text.split())
    assert "package diffusers_compress" in said


def test_a_push_that_cannot_be_ends_before_the_work(monkeypatch):
    """Without a network, and without a token; the pipeline is not even looked at."""
    for variable, value, words in ("HF_TOKEN", "hf_of_a_test", "nothing was pushed"), ("HF_TOKEN_PATH", "/none", "needs a token"):
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv(variable, value)
        with pytest.raises(OSError, match=words) as caught:
            hub.push(None, "me/codec", pictures=[None])
        assert "\n" not in str(caught.value)


def test_components_that_no_codec_uses_are_not_fetched(world, cells):
    fetched = (world / "hub" / "requests.log").read_text().split()
    # this revision was loaded by our classes only
    assert "sd@old/scheduler/scheduler_config.json" in fetched and "sd@old/safety_checker/model.safetensors" not in fetched
    assert "sd/safety_checker/model.safetensors" in fetched  # by DiffusionPipeline


REFUSED = """
from diffusers_compress import DiffCPipeline
try:
    DiffCPipeline.from_pretrained("them/inpainting")
except ValueError as error:
    print(error)
"""


def test_a_network_that_no_family_knows_is_not_fetched(world, run_with_hub):
    folder = world / "hub" / "them" / "inpainting"
    shutil.copytree(world / "plain", folder)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps(config | {"in_channels": 9}))
    said = run_with_hub(["-c", REFUSED])
    assert re.match(r"StableDiffusionPipeline: no family is known .*\(UNet2DConditionModel with other inputs\); .*\n$", said)
    fetched = [line for line in (world / "hub" / "requests.log").read_text().split() if line.startswith("inpainting/")]
    assert "inpainting/unet/config.json" in fetched and not any(line.endswith(".safetensors") for line in fetched)


def test_a_pushed_repository(world, cells):
    """Index, loaders and card; no path of the machine that pushed."""
    folder = world / "hub" / "me" / "diffc"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"][:2] == ["pipeline", "DiffCPipeline"]
    assert index["variance_head"] == ["modeling_variance_head", "VarianceHead"]
    assert str(world) not in "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md", ".py"))
    card = (folder / "README.md").read_text()
    for line in ("library_name: diffusers", "license: mit", "pipeline_tag: image-to-image", "- image-compression", "- diffc"):
        assert line in card
    bpp, size = re.search(r"^\| 0.2 \| ([\d.]+) \| (\d+) \| [\d.]+ \|$", card, re.MULTILINE).groups()
    assert float(bpp) == pytest.approx(8 * int(size) / (96 * 64), abs=1e-4) and 0.19 < float(bpp) <= 0.2


def test_what_save_pretrained_pushes_has_loaders(world, cells):
    index = json.loads((world / "hub" / "me" / "saved" / "model_index.json").read_text())
    assert index["_class_name"][:2] == ["pipeline", "PerCoPipeline"] and (world / "hub" / "me" / "saved" / "pipeline.py").exists()
    assert index == json.loads((world / "hub" / "me" / "perco" / "model_index.json").read_text())


def test_what_is_pushed_again_is_the_same(world, cells, tmp_path):
    """Loaded from a pushed repository and saved: the package's own names are in the index."""
    DiffCPipeline.from_pretrained(world / "hub" / "me" / "diffc").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index == json.loads((world / "saved" / "diffc" / "model_index.json").read_text())


def test_the_licence_is_that_of_the_model(world, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n")
    assert hub.licence_of(str(tmp_path)) == "openrail++"
    pipe = DiffCPipeline.from_pretrained(world / "plain")
    with pytest.raises(ValueError, match="names no licence"):
        hub.write_repository(pipe, tmp_path / "new", "me/new")


def test_a_calibrated_folder_is_still_a_stable_diffusion_model(world, caplog):
    """What `calibrate` writes into the index is no concern of diffusers' own pipeline."""
    calibration = {"latent": {"mean": [0.0] * 4, "std": [1.0] * 4}}
    save_calibrated(str(world / "plain"), world / "calibrated", calibration)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(world / "calibrated")
    assert theirs.unet is not None and "calibration" not in caplog.text
    assert DiffCPipeline.from_pretrained(world / "calibrated").config.calibration == calibration


# ---------------------------------------------------------------------------------------------------------------- adapters


def test_adapters_in_a_repository(world, cells, photo):
    """A preset by number or name; the repository's revision is not its base's, which has another one of that name."""
    assert cells["perco", "adapters", "preset"] == RATES["0.1250"]
    pipe = perco(world / "plain", RATES["0.0019"])
    assert cells["perco", "adapters", "keyword"] == pipe.compress(photo).bitstreams[0].hex()
    fetched = (world / "hub" / "requests.log").read_text().split()
    assert "rates@old/0.0019/unet_changes.safetensors" in fetched


def test_a_hyper_encoder_may_be_given_with_an_adapter(cells):
    assert cells["perco", "adapters", "given"]


def test_looking_for_a_model_asks_nothing_of_the_hub(world, run_with_hub, photo, tmp_path):
    pipe = perco(world / "plain")
    save_adapter(pipe, tmp_path / "models" / "adapter", "them/elsewhere")
    (tmp_path / "photo.dfc").write_bytes(pipe.compress(photo).bitstreams[0])
    log = world / "hub" / "requests.log"
    before = log.read_text() if log.exists() else ""
    command = "import sys; from diffusers_compress.cli import main; print(main(sys.argv[1:]))"
    run_with_hub(["-c", command, "info", tmp_path / "photo.dfc", "--find", tmp_path / "models"])
    assert (log.read_text() if log.exists() else "") == before


# ---------------------------------------------------------------------------------------------------------------- messages


def says(error, *arguments, **options):
    """The one line that loading with these arguments ends with."""
    with pytest.raises(error) as caught:
        DiffCPipeline.from_pretrained(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy(world, tmp_path):
    return shutil.copytree(world / "plain", tmp_path / "copy")


def test_pickled_weights(world, tmp_path):
    folder = copy(world, tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    message = says(FileNotFoundError, folder)
    assert "the weights of unet are a pickle (diffusion_pytorch_model.bin)" in message and "use_safetensors=False" in message


def test_a_lora_saved_inside_a_network(world, tmp_path):
    peft = pytest.importorskip("peft")
    folder = copy(world, tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.add_adapter(peft.LoraConfig(target_modules=["to_q"]))
    unet.save_pretrained(folder / "unet")
    assert "unet was saved with a LoRA inside" in says(ValueError, folder)


def test_a_folder_that_is_not_there(tmp_path):
    assert says(FileNotFoundError, tmp_path / "nothing") == f"{tmp_path / 'nothing'}: no such model folder"


MESSAGES = """
import os, sys, threading, time
time.sleep = lambda seconds: None  # between huggingface_hub's tries
import fake_hub
server = fake_hub.serve(sys.argv[1])
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
import diffusers_compress

def messages():
    for name, options in (("them/sd", {}), ("them/sd", {"local_files_only": True}), ("nobody/nothing", {})):
        for codec in (diffusers_compress.DiffCPipeline, diffusers_compress.PerCoPipeline):
            try:
                codec.from_pretrained(name, **options)
            except (OSError, ValueError) as error:
                print(str(error).replace("\\n", "|"))

messages()
print("the Hub comes up")
server.server_activate()
threading.Thread(target=server.serve_forever, daemon=True).start()
messages()
"""


def test_no_network_and_no_such_model(world, tmp_path):
    environment = {
        **os.environ,
        **ONLINE,
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    run = subprocess.run(
        [sys.executable, "-c", MESSAGES, world / "hub"], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    nowhere, known = (part.splitlines() for part in run.stdout.split("the Hub comes up\n"))
    for unreachable, forbidden, other in (nowhere[0::2], nowhere[1::2]):
        assert re.fullmatch(
            r"them/sd: the Hub cannot be reached \(.*refused.*\), and .* not in the cache; connect, or .*", unreachable
        )
        assert "local_files_only or HF_HUB_OFFLINE forbids" in forbidden and "cannot be reached" in other
    assert all("nobody/nothing: neither a folder here nor a public model on the Hub" in line for line in known[-2:])


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
def test_types_by_name(world, option):
    """diffusers alone would load float32, with a warning."""
    assert RelicPipeline.from_pretrained(world / "plain", **{option: "bfloat16"}).unet.dtype == torch.bfloat16
    mixed = RelicPipeline.from_pretrained(world / "plain", **{option: {"unet": "float16", "default": torch.float32}})
    assert (mixed.unet.dtype, mixed.vae.dtype) == (torch.float16, torch.float32)
    with pytest.raises(ValueError, match="dtype is 'half-full'; permitted are float32"):
        RelicPipeline.from_pretrained(world / "plain", **{option: "half-full"})


def test_an_autoencoder_of_another_kind(world, photo):
    """AsymmetricAutoencoderKL's config knows no shift."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    channels = {
        "down_block_out_channels": (8,) * 4,
        "up_block_out_channels": (8,) * 4,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    pipe = RelicPipeline.from_pretrained(world / "plain", vae=diffusers.AsymmetricAutoencoderKL(**blocks, **channels))
    pipe.set_progress_bar_config(disable=True)
    data = pipe.compress(photo, max_bytes=100).bitstreams[0]
    assert pipe.decompress(data, num_inference_steps=1).images[0].size == photo.size
