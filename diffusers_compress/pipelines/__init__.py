"""The codecs, one file each: beside this one in a wheel, in the top-level folder `pipelines/` of a checkout."""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root / "pipelines"))
