"""Damaged and hostile files are decoded or refused by one of our errors, never anything else. See ROBUSTNESS.md for far more of them."""

import functools
import importlib.util
import json
import random
import re
import zlib
from pathlib import Path

import minimal_reader
import numpy as np
import pytest
import torch
from golden import make
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_compress import contract
from diffusers_compress.format import container

TESTS = Path(__file__).parent
CORPUS = [bytes.fromhex(line) for line in (TESTS / "corpus.hex").read_text().split()]
FILES = {path.stem: path.read_bytes() for path in sorted((TESTS / "golden").glob("*.dfc"))}
CODECS = sorted(make.PIPELINES)
BAD = ("crash", "hang")

specification = importlib.util.spec_from_file_location("robustness", TESTS.parent / "benchmarks" / "robustness.py")
robustness = importlib.util.module_from_spec(specification)
specification.loader.exec_module(robustness)
decoder = functools.cache(robustness.decoder)


@pytest.mark.parametrize("name", FILES)
def test_every_byte_flipped_and_every_length(name):
    """A whole file notices every change, and every cut that its codec cannot read. (But Poisson's length field is behind the header's
    checksum: made larger it reads like that of a file that was cut.)"""
    data = FILES[name]
    whole = robustness.parsed(data) == "read"
    _, start = container.read_header(data)
    length_field = range(start, start + 3) if "poisson" in name else ()
    for i in range(len(data)):
        for bit in (1, 16, 128) if i < 40 else (1 << i % 8,):
            found = robustness.outcome(robustness.parsed, data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :])
            assert not found.startswith(BAD) and not (whole and found.startswith("read") and i not in length_field)
        found = robustness.outcome(robustness.parsed, data[:i])
        assert found in ("NotABitstream", "Corrupt", "read as cut short")
        assert found != "read as cut short" or name.startswith(("diffc", "uqdm"))


@settings(max_examples=500)
@given(st.randoms(use_true_random=False))
def test_damaged_files_are_read_or_refused(rng):
    data = robustness.damaged(rng, list(FILES.values()))
    assert not robustness.outcome(robustness.parsed, data).startswith(BAD)


@settings(max_examples=300)
@given(st.sampled_from(CODECS), st.integers(1, 64), st.integers(1, 64), st.binary(max_size=60), st.binary(max_size=60))
def test_arbitrary_parameters_and_payload_behind_right_checksums(codec, width, height, parameters, payload):
    number = contract.CODECS[codec].number
    data = robustness.seal(number, width, height, bytes(4), parameters, payload)
    assert not robustness.outcome(robustness.parsed, data).startswith(BAD)


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_files_are_decoded_or_refused(codec):
    rng, seen = random.Random(1), set()
    for _ in range(60):
        seen.add(robustness.outcome(decoder(codec), robustness.damaged(rng, robustness.files(codec))))
    assert not any(found.startswith(BAD) for found in seen)
    assert {"decoded", "Corrupt"} <= seen


def test_the_corpus_of_the_fuzzer():
    """What `benchmarks/fuzz.py` found to reach every part of the parsers."""
    assert len(CORPUS) > 50
    seen = [robustness.outcome(robustness.parsed, data) for data in CORPUS]
    assert not any(found.startswith(BAD) for found in seen)
    assert {"read", "read as cut short", "Corrupt", "UnsupportedVersion"} <= set(seen)


@pytest.mark.parametrize("codec", CODECS)
def test_the_corpus_decodes_or_is_refused(codec):
    number = contract.CODECS[codec].number
    for data in [data for data in CORPUS if data[2:3] == bytes([number])][::4]:
        assert not robustness.outcome(decoder(codec), data).startswith(BAD)


def test_the_check_sees_crashes_and_hangs(monkeypatch):
    def crash(data):
        raise KeyError(data)

    def hang(data):
        while True:
            pass

    monkeypatch.setattr(robustness, "SECONDS", 0.1)
    assert robustness.outcome(crash, b"x") == "crash: KeyError: b'x'"
    assert robustness.outcome(hang, b"x") == "hang"


def test_the_page_is_filled_in():
    results = [json.loads(json.dumps(robustness.counted("container", 60)))]
    assert sum(results[0]["outcomes"].values()) == 60 and not results[0]["crashes"]
    page = (TESTS.parent / "ROBUSTNESS.md").read_text(encoding="utf-8")
    text = robustness.renewed(page, {"damage": robustness.outcome_table(results), "large": "a table"})
    assert "| container | 60 |" in text and "<!-- large -->\n\na table\n\ntorch" in text
    assert text.count("\n") < page.count("\n") and all(page.count(f"<!-- {name} -->") == 1 for name in robustness.TABLES)
    assert text.partition("## States")[2] == page.partition("## States")[2]


def test_no_section_of_a_file_asks_for_memory_that_it_does_not_bring():
    """Sizes and budgets blown up to their largest, in files of a few bytes: parsed in next to no memory."""
    import tracemalloc

    huge = [(1, 10_000, 10_000), (1, 1, 100_000_000), (2, 100_000_000, 1)]
    budgets = bytes.fromhex("5fffffffffff"), bytes.fromhex("9fffffffffff"), bytes.fromhex("dfffffffffff")
    tracemalloc.start()
    for codec, width, height in huge:
        for parameters in (*budgets, b"", bytes(20), b"\xff" * 20):
            data = robustness.seal(codec, width, height, bytes(4), parameters, b"\xff" * 20)
            assert not robustness.outcome(robustness.parsed, data).startswith(BAD)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", make.CASES)
def test_no_symbol_depends_on_a_networks_float(name):
    """With 1e-3 added to every output of every network the file still says the same."""
    codec, model = make.CASES[name][:2]
    pipe = make.pipeline(codec, model)
    expected = make.symbols(pipe, FILES[name])
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for module in component.modules():
                module.register_forward_hook(lambda module, inputs, output: output + 1e-3 if torch.is_tensor(output) else output)
    assert make.symbols(pipe, FILES[name]) == expected
    assert make.decoded(pipe, FILES[name], make.PREVIEW.get(codec, {})).any()


# ------------------------------------------------------------------------------------- the format description's own figures

FORMAT = (TESTS.parent / "FORMAT.md").read_text(encoding="utf-8")


def test_the_minimal_reader_has_the_generators_vectors():
    rows = re.findall(r"^\| ([0-9a-f]{8}.*?) \| ([0-9a-f]{8}.*?) \| ((?:[0-9a-f]{8} ?){4})\|$", FORMAT, re.MULTILINE)
    assert len(rows) == 3
    for *inputs, output in rows:
        numbers = [[int(word, 16) for word in re.findall(r"\b[0-9a-f]{8}\b", text)] for text in inputs]
        counter, key = (found * (size // len(found)) for found, size in zip(numbers, (4, 2)))
        assert minimal_reader.philox(counter, key) == [int(word, 16) for word in output.split()]
    assert minimal_reader.crc16(b"123456789") == 0x29B1
    table = np.array(minimal_reader.NORMALS, dtype="<i4")
    assert zlib.crc32(table.tobytes()) == int(re.search(r"the CRC-32 (0x[0-9A-F]+)\. Normal", FORMAT)[1], 16)
    tables = np.array(minimal_reader.TABLES, dtype="<i4")
    assert zlib.crc32(tables.tobytes()) == int(re.search(r"frequencies have the CRC-32 (0x[0-9A-F]+)", FORMAT)[1], 16)


def test_the_minimal_reader_makes_the_descriptions_example():
    """Its bytes, messages, timesteps, start noise, ranks, variances and samples."""
    section = FORMAT[FORMAT.index("## An example") :]
    data = bytes.fromhex(
        " ".join(re.findall(r"^\| `([0-9a-f ]+)` \| [^|]*\|$", section.partition("| bits of the")[0], re.MULTILINE))
    )
    facts = minimal_reader.diffc(data)
    assert (facts["budgets"], facts["strides"], facts["complete"]) == ([20, 20, 8], [128, 144, 64], True)
    messages = ["".join(map(str, message)) for message in facts["messages"]]
    assert messages == re.findall(r"`([01]{8,})`", section[section.index("The messages are") :])
    ratios = minimal_reader.ratios()
    timesteps = minimal_reader.timesteps(facts["strides"], ratios)
    assert f"the timesteps are {', '.join(map(str, timesteps))}." in " ".join(section.split())

    def row(name):
        return [float(number) for number in re.search(rf"^\| {name} \| (.*) \|$", section, re.MULTILINE)[1].split(", ")]

    assert minimal_reader.normals(4, minimal_reader.START) == row("start noise, times 2\\^16")
    for step, message in enumerate(facts["messages"]):
        error = minimal_reader.expected_error(ratios[timesteps[step]], 4, 8, 8)
        v = minimal_reader.excess(error, len(message), 1)
        rank = [round(64 * np.log2(np.float32(e))) for e in error]
        if step == 0:
            assert rank[:4] == row("ranks of step 0") and v[:4] == pytest.approx(row("v of step 0"), rel=1e-3)
        y = minimal_reader.trellis_samples(message, v, rank, 1, step)
        assert y[:4] == pytest.approx(row(f"y of step {step}"), abs=2e-5)


def test_the_tests_that_hold_each_kind_of_trouble_are_there():
    text = (TESTS.parent / "ROBUSTNESS.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("## Kinds of trouble")[2].partition("\n## ")[0].splitlines() if "test_" in line]
    assert len(rows) == 16
    last = ""
    for file, name in re.findall(r"`(test_\w+\.py)?(?:::(\w+))?`", "".join(rows)):
        last = file or last
        assert f"def {name}(" in (TESTS / last).read_text(encoding="utf-8") or not name
