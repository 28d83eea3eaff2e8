"""What decides the figures, as short strings: versions, code, models."""

import json
import sys
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from inspect import getfile
from pathlib import Path

from diffusers_compress.contract import CODECS
from diffusers_compress.evaluation.baselines import BASELINES

LIBRARIES = """diffusers_compress torch torchvision diffusers transformers constriction numpy Pillow imagecodecs torchmetrics
torch-fidelity open_clip_torch bjontegaard""".split()
NO_PART_OF_IT = {"cli", "report.py", "batch", "hub.py", "calibration.py"}  # of what decides a row
MEASURING = {"evaluation", "metrics", "files.py", "images"}  # what decides a row of another codec


@cache
def software() -> dict[str, str]:
    """Versions of what decides the figures."""
    found = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


@cache
def digest(codec: str, model: str = "", *settings: str) -> str:
    """8 hexadecimal digits that change with what decides a codec's rows: versions, our own code as it is, the model's files."""
    package = Path(__file__).parents[1]
    paths = {path for path in package.rglob("*.py") if NO_PART_OF_IT.isdisjoint(path.relative_to(package).parts)}
    if codec in BASELINES:
        paths = {path for path in paths if path.relative_to(package).parts[0] in MEASURING}
    else:
        paths.update(Path(getfile(CODECS[codec].pipeline_class())).parent.glob("*.py"))
    files = [path for path in Path(model).rglob("*") if path.is_file()] if model and Path(model).is_dir() else []
    stamps = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    state = blake2b(json.dumps([software(), settings, model if not files else stamps]).encode(), digest_size=4)
    for content in sorted(path.read_bytes() for path in paths):
        state.update(content)
    return state.hexdigest()
