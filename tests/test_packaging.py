"""Installed in any way, the package finds its pipelines and its model, and diffusers finds its components."""

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines import pipeline_loading_utils

import diffusers_compress

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, unpacked to a folder."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


def origin_of_diffc(site):
    """Where a fresh Python with nothing but `site` finds diffusers_compress.pipelines.diffc."""
    code = f"import site; site.addsitedir({str(site)!r}); from importlib.util import find_spec; "
    code += "print(find_spec('diffusers_compress.pipelines.diffc').origin)"
    run = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], check=True, capture_output=True, text=True)
    return Path(run.stdout.strip())


@pytest.mark.slow
def test_wheel_has_the_pipelines(wheel):
    for path in (ROOT / "pipelines").glob("*.py"):
        assert (wheel / "diffusers_compress" / "pipelines" / path.name).read_bytes() == path.read_bytes()
    assert origin_of_diffc(wheel) == wheel / "diffusers_compress" / "pipelines" / "diffc.py"


@pytest.mark.slow
def test_wheel_has_the_whole_package_and_nothing_else(wheel):
    package = ROOT / "diffusers_compress"
    files = {path.relative_to(ROOT) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    files |= {Path("diffusers_compress") / path.relative_to(ROOT) for path in (ROOT / "pipelines").glob("*.py")}
    packed = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert {path for path in packed if ".dist-info" not in path.parts[0]} == files


@pytest.mark.slow
def test_types_are_shipped(wheel):
    """PEP 561: type checkers read the package's annotations only if this file is there."""
    assert (wheel / "diffusers_compress" / "py.typed").is_file()


@pytest.mark.slow
def test_editable_install_uses_the_checkout(tmp_path):
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=ROOT, capture_output=True)
    (built,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    assert origin_of_diffc(tmp_path / "site") == ROOT / "pipelines" / "diffc.py"


def test_a_foreign_pipelines_folder_is_not_taken_for_ours(tmp_path):
    package = tmp_path / "diffusers_compress" / "pipelines"
    package.mkdir(parents=True)
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "theirs.py").touch()
    (tmp_path / "diffusers_compress" / "__init__.py").touch()
    package.joinpath("__init__.py").write_bytes((ROOT / "diffusers_compress" / "pipelines" / "__init__.py").read_bytes())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from importlib.util import find_spec; "
    code += "print(find_spec('diffusers_compress.pipelines.theirs'))"
    run = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "None"


def test_the_embedded_model_is_a_whole_model_folder():
    index = json.loads((Path(diffusers_compress.embedded_model()) / "model_index.json").read_text(encoding="utf-8"))
    for name, component in index.items():
        if isinstance(component, list) and component[0] is not None:
            assert any((Path(diffusers_compress.embedded_model()) / name).iterdir())
    assert {"vae", "unet", "text_encoder", "tokenizer", "scheduler"} <= index.keys()


def test_custom_pipeline_loads_the_file_alone(tiny_sd_folder, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    pipe = DiffusionPipeline.from_pretrained(
        tiny_sd_folder, custom_pipeline=str(ROOT / "pipelines" / "diffc.py"), trust_remote_code=True
    )
    ours = diffusers_compress.DiffCPipeline.from_pretrained(tiny_sd_folder)
    assert type(pipe).__name__ == "DiffCPipeline" and type(pipe) is not type(ours)
    data = pipe.compress(photo, max_bytes=200).bitstreams[0]
    assert data == ours.compress(photo, max_bytes=200).bitstreams[0]
    assert ours.decompress(data).images[0].size == photo.size


def test_a_component_of_ours_is_saved_under_the_packages_name(tmp_path, monkeypatch):
    class Toy(diffusers_compress.ModelMixin, ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self, width: int = 3):
            super().__init__()
            self.linear = torch.nn.Linear(width, 1)

    class ToyPipeline(DiffusionPipeline):
        _optional_components = ("toy",)

        def __init__(self, toy: Toy | None = None):
            super().__init__()
            self.register_modules(toy=toy)

    Toy.__module__ = "diffusers_compress.some_room"
    monkeypatch.setattr(diffusers_compress, "Toy", Toy, raising=False)
    assert "diffusers_compress" in pipeline_loading_utils.LOADABLE_CLASSES

    toy = Toy(width=5)
    ToyPipeline(toy).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))["toy"] == ["diffusers_compress", "Toy"]
    loaded = ToyPipeline.from_pretrained(tmp_path).toy
    assert type(loaded) is Toy
    assert torch.equal(loaded.linear.weight, toy.linear.weight)


def test_public_names_exist():
    for name in diffusers_compress.__all__:
        assert getattr(diffusers_compress, name) is not None
    assert not hasattr(diffusers_compress, "no_such_name")


def test_importing_the_package_does_not_load_torch():
    code = "import sys, diffusers_compress.cli; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"


def test_version_stands_once():
    assert diffusers_compress.__version__ == PROJECT["version"]


def test_ci_runs_the_readmes_test_command():
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert command.endswith("-m pytest")
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
