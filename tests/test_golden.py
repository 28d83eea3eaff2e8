"""Files made once decode for good: to the same symbols, and to the same pictures within what `golden.json` permits."""

import functools
import io
import json
from pathlib import Path

import minimal_reader
import numpy as np
import pytest
from golden import make
from PIL import Image

from diffusers_compress.codecs import lossy_part
from diffusers_compress.coding.channels import dither
from diffusers_compress.format import container

FOLDER = Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
CASES = GOLDEN["cases"]
pipeline = functools.cache(make.pipeline)


def test_the_files_are_those_of_this_version_of_the_format():
    assert GOLDEN["version"] == container.VERSION
    assert (
        CASES.keys()
        == make.CASES.keys()
        == {path.stem for path in FOLDER.glob("*.dfc")}
        == {path.stem for path in FOLDER.glob("*.png")}
    )
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 500_000


def test_files_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["make.py"])
    (tmp_path / "golden.json").write_text(json.dumps(GOLDEN))
    with pytest.raises(SystemExit, match="stay as they are"):
        make.main()
    missing = {name: case for name, case in CASES.items() if name != "relic-hyperprior"}
    (tmp_path / "golden.json").write_text(json.dumps({"version": GOLDEN["version"], "cases": missing}))
    make.main()
    assert {path.name for path in tmp_path.iterdir()} == {"golden.json", "relic-hyperprior.dfc", "relic-hyperprior.png"}
    assert json.loads((tmp_path / "golden.json").read_text()) == GOLDEN


@pytest.mark.parametrize("name", CASES)
def test_golden_file(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    pipe = pipeline(case["codec"], case["model"])
    assert make.symbols(pipe, data) == case["symbols"]
    expected = np.asarray(Image.open(FOLDER / f"{name}.png"), dtype=float)
    difference = make.decoded(pipe, data, case["decompress"]) - expected
    assert np.sqrt(np.mean(difference**2)) <= case["rms"] and np.abs(difference).max() <= case["peak"]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "diffc"])
def test_a_reader_made_from_the_format_description_alone(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    facts = minimal_reader.diffc(lossy_part(data) or data)
    assert facts["messages"] == case["symbols"]["messages"] and facts["budgets"] == case["symbols"]["budgets"]
    ratios = minimal_reader.ratios(rescaled=case["model"] == "embedded")
    assert minimal_reader.timesteps(facts["strides"], ratios) == case["symbols"]["timesteps"]
    assert (facts["check"] is not None) == name.endswith("check")
    assert (
        facts["complete"] != name.endswith("cut") and facts["fingerprint"] == pipeline("diffc", case["model"]).fingerprint().hex()
    )


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "relic"])
def test_it_reads_all_symbols_of_relic(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    pipe = pipeline("relic", case["model"])
    trained = {key: (list(tensor.shape), tensor.flatten().tolist()) for key, tensor in pipe.hyperprior.state_dict().items()}
    facts = minimal_reader.relic(data, std=pipe.statistics()["std"], hyperprior=trained)
    assert facts["v"] == case["symbols"]["v"] and facts["timestep"] == case["symbols"]["timestep"]
    assert facts["levels"] == case["symbols"].get("levels")


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "perco"])
def test_it_reads_grid_and_caption_of_perco(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    pipe = pipeline("perco", case["model"])
    model = pipe.hyper_encoder.probability_model()
    facts = minimal_reader.perco(data, model.frequency.tolist(), model.places.tolist(), pipe.tokenizer.get_vocab())
    assert {key: facts[key] for key in case["symbols"]} == case["symbols"]


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "refine"])
def test_it_finds_the_base_of_a_refined_file(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    facts = minimal_reader.refine(data)
    assert {key: facts[key] for key in case["symbols"]} == case["symbols"]
    expected = pipeline("refine", case["model"]).decompress(data, preview=True).images[0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(facts["payload"])).convert("RGB")), np.asarray(expected))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "text-sketch"])
def test_it_reads_prompt_thumbnail_and_sketch(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    facts = minimal_reader.text_sketch(data)
    assert {key: facts[key] for key in case["symbols"]} == case["symbols"]
    assert facts["fingerprint"] == pipeline("text-sketch", case["model"]).fingerprint().hex()


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "uqdm"])
def test_it_reads_the_sections_of_uqdm(name, monkeypatch):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    pipe, steps, read = pipeline("uqdm", case["model"]), [], []
    symbols, check = dither.symbols, dither.check_of

    def recorded(section, row, tables):
        read.append((section, row.tolist(), tables is dither.tables(), symbols(section, row, tables)))
        return read[-1][-1]

    monkeypatch.setattr(dither, "symbols", recorded)
    monkeypatch.setattr(dither, "check_of", lambda whole, row: steps.append((whole.tolist(), row.tolist())) or check(whole, row))
    pipe.decompress(data)
    facts = minimal_reader.uqdm(data)
    assert facts["sections"] == [section for section, *_ in read] and facts["nudge"] == case["symbols"]["nudge"]
    assert facts["checks"][: len(steps)] == [minimal_reader.check_of(*step) for step in steps]
    for section, row, of_step, found in read:
        gamma = pipe.scheduler.config.gamma_min
        table_of = minimal_reader.step_table if of_step else functools.partial(minimal_reader.pixel_table, gamma=gamma)
        assert minimal_reader.offsets(section, row, table_of) == found.tolist()
    assert facts["complete"] != name.endswith("cut") and facts["exact"] == (name in ("uqdm-lossless", "uqdm-1x1"))


def test_it_reads_the_pixels_of_a_lossless_file():
    facts = minimal_reader.lossless((FOLDER / "diffc-lossless.dfc").read_bytes())
    pixels = minimal_reader.pixels(facts["pixels"], facts["height"], facts["width"])
    picture = np.asarray(Image.open(FOLDER / "diffc-lossless.png"))
    assert pixels == dict(np.ndenumerate(picture.transpose(2, 0, 1)[[1, 0, 2]])) and facts["digest"] is None
    assert np.array_equal(picture, np.asarray(make.picture(facts["width"], facts["height"])))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["codec"] == "cdc"])
def test_it_reads_the_latent_of_cdc(name):
    case, data = CASES[name], (FOLDER / f"{name}.dfc").read_bytes()
    pipe = pipeline("cdc", case["model"])
    model = pipe.context_model
    tensors = {key: (list(tensor.shape), tensor.flatten().tolist()) for key, tensor in model.state_dict().items()}
    facts = minimal_reader.cdc(data, tensors, model.config.log_scales, model.config.levels, pipe.multiple, model.multiple)
    assert {key: facts[key] for key in case["symbols"]} == case["symbols"]
