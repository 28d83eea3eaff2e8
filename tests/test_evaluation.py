"""The evaluation: what a row says is what lies on disk, and a run that was killed ends as if it had not been."""

import csv
import gc
import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from urllib.error import URLError

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from diffusers_compress import cli, evaluation, images, metrics
from diffusers_compress.codecs.diffc import drift
from diffusers_compress.evaluation import report, task
from diffusers_compress.evaluation.baselines import BASELINES, largest_that_fits, read
from diffusers_compress.evaluation.codec import Codec, load_pipeline, parse_codec, split_codecs
from diffusers_compress.evaluation.run import evaluate
from diffusers_compress.evaluation.state import digest
from diffusers_compress.evaluation.task import load_metric, open_original
from diffusers_compress.metrics import distortion, wasserstein

METRICS = ("psnr", "wasserstein")
RATES = [0.12, 1.0]
CLOCKS = ("seconds", "peak_mib")  # what two runs need not share


@pytest.fixture(scope="module")
def folder(photo, tmp_path_factory):
    """Three pictures, one of them with a caption."""
    path = tmp_path_factory.mktemp("pictures")
    photo.save(path / "a.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(path / "b.png")
    photo.convert("L").save(path / "c.png")
    (path / "a.txt").write_text("a small house\n")
    return path


@pytest.fixture(scope="module")
def codecs(tiny_sd_folder):
    return [
        parse_codec("diffc", tiny_sd_folder),
        parse_codec("diffc:decode.reconstruction=denoised", tiny_sd_folder),
        Codec("jpeg"),
    ]


@pytest.fixture(scope="module")
def run(folder, codecs, tmp_path_factory):
    """(folder of the report, rows) of an uninterrupted run."""
    out = tmp_path_factory.mktemp("report")
    rows = evaluate(folder, out, codecs, RATES, METRICS)
    evaluation.write_rows(out, rows)
    return out, rows


def without_clocks(rows):
    return [{name: value for name, value in row.items() if not name.endswith(CLOCKS)} for row in rows]


# -------------------------------------------------------------------------------------------------------------------- rows


def test_bpp_is_that_of_the_bytes_on_disk(run):
    out, rows = run
    assert len(rows) == 3 * 2 * 3
    for row in rows:
        size = (out / row["file"]).stat().st_size
        assert row["bytes"] == size
        assert row["bpp"] == 8 * size / (row["width"] * row["height"])
        assert row["reached"] == (row["bpp"] <= row["target_bpp"])
    assert all(row["reached"] for row in rows if row["codec"] != "jpeg")


def test_rows_come_by_codec_rate_and_picture(run, codecs):
    expected = [(codec.label, bpp, name) for codec in codecs for bpp in RATES for name in ("a.png", "b.png", "c.png")]
    assert [(row["codec"], row["target_bpp"], row["picture"]) for row in run[1]] == expected


def test_figures_are_those_of_the_file_decoded_again(run, folder, tiny_sd_folder):
    out, rows = run
    pipe = load_pipeline("diffc", tiny_sd_folder, "cpu", "float32")
    for row in rows:
        data = (out / row["file"]).read_bytes()
        options = {"reconstruction": "denoised"} if "denoised" in row["codec"] else {}
        decoded = read(data) if row["codec"] == "jpeg" else pipe.decompress(data, **options).images[0]
        assert np.array_equal(np.asarray(decoded), np.asarray(Image.open(out / row["decoded"])))
        x = distortion.samples(open_original(folder / row["picture"]))
        assert row["psnr"] == distortion.psnr(x, distortion.samples(decoded))
        assert row["wasserstein"] == wasserstein.wasserstein_distortion(x, distortion.samples(decoded))


def test_time_is_split_and_calls_are_counted(run):
    for row in run[1]:
        for side in ("encode", "decode"):
            inside = row[f"{side}_denoiser_seconds"] + row[f"{side}_autoencoder_seconds"]
            assert 0 <= inside <= row[f"{side}_seconds"]
            assert (row[f"{side}_calls"] > 0) == (inside > 0) == (row["codec"] != "jpeg")
    flow, denoised = (
        row for row in run[1] if row["codec"] != "jpeg" and row["picture"] == "a.png" and row["target_bpp"] == RATES[0]
    )
    assert flow["encode_calls"] == denoised["encode_calls"]
    assert flow["decode_calls"] > denoised["decode_calls"]


def test_variants_of_the_decoder_share_the_file(run):
    flow, denoised = (
        row for row in run[1] if row["codec"] != "jpeg" and row["picture"] == "a.png" and row["target_bpp"] == RATES[0]
    )
    assert flow["file"] == denoised["file"] and flow["encode_seconds"] == denoised["encode_seconds"]
    assert flow["decoded"] != denoised["decoded"] and flow["psnr"] != denoised["psnr"]


def test_pictures_are_found_as_everywhere_and_what_is_not_read_is_told(photo, tmp_path, monkeypatch):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("sub/a.jfif", os.fsdecode(b"caf\xe9.png"), "._a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(folder / name, format="PNG")
    (folder / "sub" / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "broken.png").write_bytes(b"not a picture")
    os.mkfifo(folder / "pipe.png")
    rows = evaluate(folder, out, [Codec("jpeg")], [1.0], ("psnr",))
    evaluation.write_rows(out, rows)
    assert [row["picture"] for row in rows] == [os.fsdecode(b"caf\xe9.png"), "sub/a.jfif"]
    assert all((out / row["decoded"]).is_file() and row["psnr"] > 20 for row in rows)
    notes = report.notes_of(out, rows)
    for words in ("not text in UTF-8", "._a.png (hidden)", "broken.png (ValueError: ", "pipe.png (OSError: "):
        assert sum(words in note for note in notes) == 1, notes
    assert len(notes) == 4
    with pytest.raises(ValueError, match="lies in the folder"):
        evaluate(folder, folder / "out", [Codec("jpeg")], [1.0], ("psnr",))


def test_drift_is_in_the_rows(codecs, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "BOUND", -1.0)
    monkeypatch.setattr("diffusers_compress.codecs.diffc.rate.CHECKED_BYTES", 0)
    made = task.Task(tmp_path, "a.png", folder / "a.png", 0.2, (codecs[1],), (), "cpu", "float32")
    image = open_original(folder / "a.png")
    data = load_pipeline("diffc", codecs[1].model, "cpu", "float32").compress(image, target_bpp=0.2).bitstreams[0]
    (tmp_path / "drifted.dfc").write_bytes(data)
    with pytest.warns(RuntimeWarning, match="drifted"):
        row = task.measure(made, codecs[1], image, tmp_path / "drifted.dfc")
    assert "drifted" in row["note"]


def test_csv_and_parquet_hold_the_rows(run):
    from pyarrow import parquet

    out, rows = run
    with open(out / "rows.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(line["codec"], float(line["psnr"]), int(line["bytes"])) for line in written] == [
        (row["codec"], row["psnr"], row["bytes"]) for row in rows
    ]
    assert parquet.read_table(out / "rows.parquet").to_pylist() == [{**dict.fromkeys(written[0]), **row} for row in rows]


# --------------------------------------------------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_comes_as_near_to_the_rate_as_its_knob_allows(name, photo):
    image, baseline = photo.resize((192, 128)), BASELINES[name]
    sizes = [len(baseline.encode(image, baseline.knobs[k])) for k in range(0, len(baseline.knobs), 8)]
    assert sizes[0] < sizes[-1] / 4
    limit = (min(sizes) + max(sizes)) // 3
    data, seconds = largest_that_fits(baseline, image, limit)
    assert max(size for size in sizes if size <= limit) <= len(data) <= limit
    assert seconds > 0
    assert baseline.decode(data).size == image.size


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_that_cannot_go_so_low_gives_its_smallest_file(name, photo):
    data, _ = largest_that_fits(BASELINES[name], photo, 10)
    assert data == BASELINES[name].encode(photo, BASELINES[name].knobs[0])
    assert len(data) > 10


def test_a_rate_that_is_not_reached_is_said(folder, tmp_path):
    (row,) = evaluate(folder, tmp_path, [Codec("jpeg")], [0.01], METRICS, every=3)
    assert not row["reached"] and row["bpp"] > 0.01


def test_a_rate_that_a_codec_refuses_is_said_and_the_run_goes_on(folder, codecs, tmp_path):
    refused, coded = evaluate(folder, tmp_path, codecs[:1], [0.001, 1.0], METRICS, every=3)
    assert refused["note"].startswith("not coded: ") and "bytes" not in refused
    assert coded["bytes"] > 0
    assert evaluate(folder, tmp_path, codecs[:1], [0.001, 1.0], METRICS, every=3) == [refused, coded]


# ------------------------------------------------------------------------------------------------------------------ metrics


def test_a_metric_that_cannot_be_had_says_why_and_the_run_goes_on(folder, tmp_path, monkeypatch):
    def unreachable():
        raise URLError(OSError("Name or service not known"))

    load_metric.cache_clear()
    monkeypatch.setitem(metrics.PICTURE_METRICS, "lpips_alex", metrics.Metric("LPIPS", 0, unreachable))
    rows = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("psnr", "ms_ssim", "lpips_alex"))
    load_metric.cache_clear()
    for row in rows:
        assert row["psnr"] > 10 and row["ms_ssim"] is None and row["lpips_alex"] is None
        assert "lpips_alex not available: <urlopen error Name or service not known>" in row["note"]
        assert "ms_ssim not available: picture has" in row["note"]


def test_the_caption_beside_a_picture_reaches_the_metric(folder, tmp_path, monkeypatch):
    load_metric.cache_clear()
    length = metrics.Metric("length", 0, lambda: lambda x, x_hat, caption: len(caption))
    monkeypatch.setitem(metrics.PICTURE_METRICS, "clip_text", length)
    rows = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("clip_text",))
    load_metric.cache_clear()
    assert [row["clip_text"] for row in rows] == [len("a small house"), 0, 0]


def test_a_metric_with_weights_computes_on_the_device(folder, tmp_path, monkeypatch):
    load_metric.cache_clear()
    where = metrics.Metric("device", 0, lambda: lambda x, x_hat, caption: [x.device.type, x_hat.device.type])
    for name in ("psnr", "dists"):
        monkeypatch.setitem(metrics.PICTURE_METRICS, name, where)
    row = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("psnr", "dists"), device="meta")[0]
    load_metric.cache_clear()
    assert row["psnr"] == ["cpu", "cpu"] and row["dists"] == ["meta", "meta"]


def test_a_picture_for_which_memory_is_short_ends_nothing_and_is_tried_again(folder, tmp_path, monkeypatch):
    def short(task, *arguments):
        if task.name == "b.png":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(task, *arguments)

    encode = task.encode
    for replacement, notes in ((short, ["", "not coded: out of memory", ""]), (encode, [""] * 3)):
        monkeypatch.setattr(task, "encode", replacement)
        rows = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("psnr",))
        assert [row["note"] for row in rows] == notes


def test_one_pipeline_is_kept_at_a_time(tiny_sd_folder):
    first = load_pipeline("diffc", tiny_sd_folder, "cpu", "float32")
    assert load_pipeline("diffc", tiny_sd_folder, "cpu", "float32", 0.5) is first
    gone = weakref.ref(first)
    del first
    load_pipeline("relic", tiny_sd_folder, "cpu", "float32")
    gc.collect()
    assert gone() is None


def test_set_figures_compare_all_pictures_of_a_rate(run, folder, monkeypatch):
    out, rows = run
    monkeypatch.setitem(
        metrics.SET_METRICS, "fid", metrics.Metric("FID", 0, lambda: lambda a, b: {"fid": len(list(a)) + len(list(b)) / 10})
    )
    figures = evaluation.set_figures(folder, out, rows, ["fid"])
    assert figures == {(codec, bpp): {"fid": 3.3} for codec in {row["codec"] for row in rows} for bpp in RATES}


# ---------------------------------------------------------------------------------------------------------- stop and resume


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(run, folder, codecs, tmp_path):
    """Killed with two workers at work; the last line is then cut as a crash of the machine would."""
    code = f"""
import sys
from pathlib import Path
from diffusers_compress.evaluation import Codec, evaluate
if __name__ == "__main__":
    evaluate(Path({str(folder)!r}), Path({str(tmp_path)!r}), {codecs!r}, {RATES!r}, {METRICS!r}, jobs=2)
"""
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(evaluation.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")], env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "rows.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive

    kept = [json.loads(line) for line in log.read_text().splitlines()[:3]]
    with open(log, "a") as file:
        file.write('{"codec": "jp')
    counts = []
    rows = evaluate(folder, tmp_path, codecs, RATES, METRICS, progress=lambda *count: counts.append(count))
    assert counts[0][0] >= 1 and counts[-1] == (12, 12)
    assert all(row in rows for row in kept)
    assert without_clocks(rows) == without_clocks(run[1])


def test_what_is_done_is_not_done_again(run, folder, codecs, monkeypatch):
    monkeypatch.setattr(evaluation.run, "run_task", None)
    assert evaluate(folder, run[0], codecs, RATES, METRICS) == run[1]


def test_a_file_that_changed_and_a_new_metric_are_measured_again(folder, tmp_path):
    codecs = [Codec("jpeg")]
    first = evaluate(folder, tmp_path, codecs, [1.0], ("psnr",))
    path = tmp_path / first[0]["file"]
    path.write_bytes((tmp_path / first[0]["file"]).read_bytes() + b"\0")
    longer = evaluate(folder, tmp_path, codecs, [1.0], ("psnr",))
    assert longer[0]["bytes"] == first[0]["bytes"] + 1 and longer[1:] == first[1:]
    more = evaluate(folder, tmp_path, codecs, [1.0], ("psnr", "swd"))
    assert [row["psnr"] for row in more] == [row["psnr"] for row in longer] and all(row["swd"] > 0 for row in more)


def test_rows_of_other_software_are_made_anew(folder, tmp_path, monkeypatch):
    (first,) = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("psnr",), every=3)
    monkeypatch.setattr(evaluation.state, "software", lambda: {"Pillow": "1.0"})
    digest.cache_clear()
    (second,) = evaluate(folder, tmp_path, [Codec("jpeg")], [1.0], ("psnr",), every=3)
    digest.cache_clear()
    assert first["state"] != second["state"] and first["encode_seconds"] != second["encode_seconds"]
    assert first["psnr"] == second["psnr"]


def test_another_model_device_or_dtype_is_another_state(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    states = [digest("diffc", str(tmp_path), "cpu", dtype) for dtype in ("float32", "bfloat16")]
    (tmp_path / "weights").write_bytes(b"22")
    digest.cache_clear()
    states.append(digest("diffc", str(tmp_path), "cpu", "float32"))
    assert len(set(states)) == 3


# ----------------------------------------------------------------------------------------------------- arguments, command line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gif", "codec is 'gif', permitted are diffc"),
        ("jpeg:encode.quality=3", "takes no options"),
        ("diffc:steps=3", "codec option is 'steps=3'"),
    ],
)
def test_wrong_codecs_are_told(text, words):
    with pytest.raises(ValueError, match=words):
        parse_codec(text)


def test_codec_options_are_values():
    codec = parse_codec("diffc:encode.coder=poisson:decode.num_inference_steps=3", "folder", "small")
    assert codec.encode_options == (("coder", "poisson"),) and codec.decode_options == (("num_inference_steps", 3),)
    assert codec.label == "diffc@small:encode.coder=poisson:decode.num_inference_steps=3"


def test_commas_within_values_part_no_codecs():
    text = "diffc:encode.target_metric=('wd', 150):encode.coder=poisson,jpeg,diffc:encode.importance=((0,0,8,8),(8,0,16,8))"
    names = split_codecs(text)
    assert names[1] == "jpeg" and len(names) == 3
    assert parse_codec(names[0]).encode_options == (("target_metric", ("wd", 150)), ("coder", "poisson"))
    assert parse_codec(names[2]).encode_options == (("importance", ((0, 0, 8, 8), (8, 0, 16, 8))),)


def test_wrong_arguments_are_told(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ((tmp_path / "empty", tmp_path, [Codec("jpeg")], [1.0]), "no pictures"),
        ((folder, tmp_path, [], [1.0]), "at least one codec"),
        ((folder, tmp_path, [Codec("jpeg")] * 2, [1.0]), "none twice"),
        ((folder, tmp_path, [Codec("jpeg")], [0.0]), "rates must be above 0"),
        ((folder, tmp_path, [Codec("jpeg")], [1.0], ("ssim",)), "metric is 'ssim'"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(*arguments)


def test_the_command_writes_tables_and_a_page(folder, tmp_path, tiny_sd_folder, capsys):
    arguments = ["eval", folder, "--out", tmp_path / "report", "--codec", "diffc,jpeg", "--bpp", "1,2", "--model", tiny_sd_folder]
    assert cli.main([str(word) for word in [*arguments, "--metrics", "psnr,swd", "--every", 2, "--device", "cpu"]]) == 0
    out = capsys.readouterr().out
    assert "| diffc@model | 1 |" in out and "| jpeg | 2 |" in out and "report.html: 8 rows" in out
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"rows.csv", "rows.parquet", "summary.json", "report.html", "plots", "files", "decoded"} <= names


def test_a_report_counts_although_nobody_reads_of_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert (
        cli.main(["eval", str(folder), "--out", str(tmp_path / "report"), "--codec", "jpeg", "--bpp", "1", "--metrics", "psnr"])
        == 0
    )
    assert (tmp_path / "report" / "report.html").exists()


def test_the_command_tells_wrong_options_in_a_line(folder, tmp_path, capsys):
    for option, value, words in (
        ("--codec", "gif", "codec is 'gif'"),
        ("--bpp", "low", "rate is 'low'"),
        ("--metrics", "x", "metric is 'x'"),
        ("--anchor", "gif", "--anchor is 'gif'"),
    ):
        assert cli.main(["eval", str(folder), "--out", str(tmp_path / "report"), option, value]) != 0
        out, err = capsys.readouterr()
        assert out == "" and words in err and err.count("\n") == 1


def test_pictures_are_the_pipelines_own_reading(photo, tmp_path):
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    opened = open_original(tmp_path / "alpha.png")
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), np.asarray(photo))
    assert np.array_equal(images.to_tensor(opened)[0], images.to_tensor(images.open_image(tmp_path / "alpha.png"))[0])
