"""examples/prove_it.py offline, with the embedded model: its page has every row it should, and says which weights were missing."""

import runpy
import sys
from pathlib import Path
from urllib.error import URLError

import pytest

from diffusers_compress import metrics
from diffusers_compress.evaluation.task import load_metric

SCRIPT = Path(__file__).parents[1] / "examples" / "prove_it.py"


@pytest.mark.slow
def test_the_page_has_every_row(photo, tmp_path, monkeypatch, capsys):
    def unreachable():
        raise URLError(OSError("Name or service not known"))

    learned = [name for name in (*metrics.PICTURE_METRICS, *metrics.SET_METRICS) if name not in metrics.WITHOUT_WEIGHTS]
    for name in learned:
        table = metrics.PICTURE_METRICS if name in metrics.PICTURE_METRICS else metrics.SET_METRICS
        monkeypatch.setitem(table, name, table[name]._replace(load=unreachable))
    load_metric.cache_clear()
    (tmp_path / "pictures" / "below").mkdir(parents=True)
    photo.save(tmp_path / "pictures" / "0.png")
    photo.rotate(180).save(tmp_path / "pictures" / "below" / "1.png")
    words = ["--pictures", tmp_path / "pictures", "--out", tmp_path / "out", "--device", "cpu", "--bpp", 0.1, 0.3]
    monkeypatch.setattr(sys, "argv", ["prove_it.py", *map(str, words)])
    script = runpy.run_path(str(SCRIPT), run_name="__main__")
    load_metric.cache_clear()

    assert capsys.readouterr().out.strip().endswith("prove_it.html")
    text = (tmp_path / "out" / "prove_it.html").read_text(encoding="utf-8")
    assert text.count("<td>diffc, ours</td>") == 2
    for method, pictures, bpp, *_, source in script["PUBLISHED"]:
        assert (
            f"<td>{method}</td><td>{pictures}</td><td>{bpp:.4g}</td>" in text and script["SOURCES"][source].split("'")[0] in text
        )
    assert {method for method, *_ in script["PUBLISHED"]} == {"DiffC", "OneDC", "AEIC-SE", "CoD-Lite", "PerCo SD"}
    for name in ("lpips_alex", "dists", "fid, kid"):
        assert f"<li>{name} not available: &lt;urlopen error Name or service not known&gt;</li>" in text
    for bpp in ("0.1", "0.3"):
        assert f"<td>{bpp}</td><td>2</td><td>2</td><td>0</td>" in text  # decoded again by another process: the same pictures
    assert "Ours with the embedded model" in text and "href='report.html'" in text
    assert (tmp_path / "out" / "report.html").exists()
