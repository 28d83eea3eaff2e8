"""Nothing is run because a file says so: neither a compressed file nor a model folder. See SECURITY.md."""

import ast
import json
import pickle
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from diffusers_compress import DiffCPipeline, RelicPipeline

ROOT = Path(__file__).parents[1]
SOURCES = [
    path for folder in ("diffusers_compress", "pipelines", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]
RUNS_CODE = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "yaml", "runpy"}


def calls(tree):
    """(dotted name, keywords) of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def offences(source):
    """What a file does that could run what it reads."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names} != {"UnpicklingError"}:  # only an exception
            names.append(node.module)
        yield from (name for name in names if name.split(".")[0] in RUNS_CODE)
    for name, keywords in calls(tree):
        last = name.split(".")[-1]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or keywords.get("shell") == "True":
            yield name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if keywords.get("allow_pickle", "False") != "False" or keywords.get("trust_remote_code", "False") != "False":
            yield f"{name} with {keywords}"
        if last == "from_pretrained" and keywords.get("use_safetensors", "True") != "True":
            yield f"{name} without safetensors"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    assert not set(offences(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["diffusers_compress", "pipelines"])
def test_the_package_reads_no_pickle_at_all(name):
    for path in (ROOT / name).rglob("*.py"):
        assert "torch.load" not in dict(calls(ast.parse(path.read_text(encoding="utf-8")))), path


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from dill import loads", "torch.load(f)", "eval(x)", "np.load(f, allow_pickle=True)", "f(x, shell=True)"],
)
def test_the_check_sees_what_it_forbids(source):
    assert list(offences(source))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("pipeline", [DiffCPipeline, RelicPipeline])
def test_weights_that_are_pickles_are_not_read(pipeline, tiny_sd_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    for weights in folder.rglob("*.safetensors"):
        weights.with_suffix(".bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert pipeline.from_pretrained(folder).unet is not None  # where there are both, safetensors are taken
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        pipeline.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


def test_a_model_folders_own_code_is_not_run(tiny_sd_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    code = f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()\nfrom diffusers import UNet2DConditionModel as Own\n"
    for place in (folder / "pipeline.py", folder / "unet" / "own.py"):
        place.write_text(code)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["own", "Own"], "_class_name": ["pipeline", "Own"]}))
    with pytest.raises((ValueError, ImportError, AttributeError)):
        DiffCPipeline.from_pretrained(folder)
    assert not (tmp_path / "sprung").exists()


def test_an_entry_of_a_folder_that_is_no_component_is_not_imported(tiny_sd_folder, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "model"))
    (tmp_path / "sprung.py").write_text("raise SystemExit('this code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"extra": ["sprung", "Thing"]}))
    pipe = DiffCPipeline.from_pretrained(folder)
    assert isinstance(pipe.unet, torch.nn.Module)


def test_the_oldest_versions_stand_in_both_places():
    """pyproject.toml and SECURITY.md; ROBUSTNESS.md tells of a run with just these."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    floors = dict(dependency.partition(",")[0].split(">=") for dependency in dependencies)
    listed = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", (ROOT / "SECURITY.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed and listed.items() <= floors.items()
    head, _, oldest = re.search(
        r"^(.*torch.*)\n(.*)\n(\| oldest permitted.*)$", (ROOT / "ROBUSTNESS.md").read_text(), re.MULTILINE
    ).groups()
    run = dict(zip(*([cell.strip() for cell in row.split("|")] for row in (head, oldest))))
    for package in floors.keys() & run.keys():
        assert run[package].removesuffix(".0").startswith(floors[package].removesuffix(".0")), package
    assert len(floors.keys() & run.keys()) >= 7
