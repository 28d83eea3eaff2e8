"""The examples for whole datasets, run as they stand: coding on Ray, training on coded shards."""

import importlib.util
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_compress import DiffCPipeline

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(python):
    """run(name, *arguments): what the example prints, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    def run(name, *arguments):
        return python.run([ROOT / "examples" / f"{name}.py", *arguments], env=environment, check=True, text=True).stdout

    return run


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture(scope="module")
def photos(photo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "some").mkdir()
    for i in range(6):
        photo.crop((i, i, 64 + i, 48 + i)).save(folder / "some" / f"{i}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    os.mkfifo(folder / "pipe.png")
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_sd_folder):
    return DiffCPipeline.from_pretrained(tiny_sd_folder)


def test_the_ray_stage_gives_the_pipelines_files(photos, pipe, tiny_sd_folder):
    pytest.importorskip("ray")
    paths = [photos / "some" / "0.png", photos / "broken.png", photos / "some" / "3.png"]
    stage = load("ray_data").Compress(tiny_sd_folder, 4, {"max_bytes": 120})
    out = stage({"path": np.array(list(map(str, paths))), "bytes": np.array([path.read_bytes() for path in paths], dtype=object)})
    expected = pipe.compress([Image.open(paths[0]), Image.open(paths[2])], max_bytes=120).bitstreams
    assert list(out["dfc"]) == [expected[0], b"", expected[1]]
    assert [bool(error) for error in out["error"]] == [False, True, False]
    assert "not a picture" in out["error"][1]


@pytest.mark.slow
def test_ray_data_from_a_folder_to_shards(photos, pipe, tiny_sd_folder, tmp_path, run):
    pytest.importorskip("ray")
    text = run("ray_data", photos, tmp_path / "shards", "--bpp", 0.4, "--model", tiny_sd_folder, "--batch-size", 3)
    assert "6 pictures; 2 failed" in text
    found = {}
    for shard in (tmp_path / "shards").glob("*.tar"):
        found |= members(shard)
    expected = [pipe.compress(Image.open(photos / "some" / f"{i}.png"), target_bpp=0.4).bitstreams[0] for i in range(6)]
    assert found == {f"some/{i}_png.dfc": data for i, data in enumerate(expected)}
    failed = [json.loads(line) for line in (tmp_path / "shards" / "errors.jsonl").read_text().splitlines()]
    assert [Path(row["path"]).name for row in failed] == ["broken.png", "pipe.png"]
    assert "not a picture" in failed[0]["error"] and "not a regular file" in failed[1]["error"]


@pytest.fixture(scope="module")
def shard(photos, pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "coded.tar"
    files = pipe.compress([Image.open(photos / "some" / f"{i}.png") for i in range(6)], max_bytes=120).bitstreams
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(files):
            for name, content in (f"{i}.cls", b"1"), (f"{i}.dfc", data):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path, files


def test_the_loader_gives_every_file_again_and_again(shard):
    pytest.importorskip("webdataset")
    path, files = shard
    batches = iter(load("webdataset_train").coded_batches(str(path), 4, workers=0))
    seen = [data for _ in range(6) for data in next(batches)]  # 24: four times six
    assert sorted(seen) == sorted(4 * files)


def test_decoded_batches_are_the_middles_of_the_pictures(shard, pipe):
    pytest.importorskip("webdataset")
    decode = load("webdataset_train").decode
    whole = pipe.decompress(shard[1][:2], reconstruction="denoised", output_type="pt").images
    small = decode(pipe, shard[1][:2], "denoised", 40)
    assert torch.equal(small, whole[:, :, 4:44, 12:52])
    large = decode(pipe, shard[1][:2], "denoised", 64)
    assert torch.equal(large[:, :, :48], whole) and torch.equal(large[:, :, 63], large[:, :, 47])


@pytest.mark.slow
def test_training_on_coded_shards(shard, tiny_sd_folder, tmp_path, run):
    pytest.importorskip("webdataset")
    options = ["--steps", 25, "--batch-size", 3, "--crop", 48, "--workers", 1, "--model", tiny_sd_folder, "--device", "cpu"]
    text = run("webdataset_train", shard[0], *options, "--save", tmp_path / "weights.pt")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert losses[-1] < 0.9 * losses[0]
    assert torch.load(tmp_path / "weights.pt").keys()
