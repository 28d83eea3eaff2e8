"""Coverage-guided fuzzing of all that is parsed without a network, with atheris (`pip install "diffusers_compress[fuzz]"`).

    python benchmarks/fuzz.py CORPUS_FOLDER -max_total_time=300

CORPUS_FOLDER starts with the golden files and gathers what reaches new code; further options are libFuzzer's. It stops at the first input
that raises anything but one of our errors. `--hex FILE` afterwards writes the gathered inputs, smallest first, one a line: what
`tests/corpus.hex` is.
"""

import random
import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with atheris.instrument_imports(include=["diffusers_compress"]):
    from diffusers_compress import bitstream, captions
    from diffusers_compress.pipelines import diffc, perco, relic

from golden import make  # noqa: E402
from robustness import files, parsed, parts, seal  # noqa: E402

LIMITS = bitstream.Limits(pixels=32 * 32)
LARGEST = 400  # bytes of an input that is kept
CODEBOOK = make.hyper_encoder().law()
VOCABULARY = captions.vocabulary_of(make.tokenizer(captions.ALPHABET, make.MERGES))


def read(data):
    """Everything up to the network: header, parameters, messages or symbols."""
    parsed(data)
    header, _ = bitstream.read_header(data, LIMITS)
    shape = 4, -(-header.height // 8), -(-header.width // 8)
    if header.codec == bitstream.RELIC:
        _, parameters, payload = relic.read_file(data, LIMITS)
        statistics = {"mean": [0.0] * 4, "std": [1.0] * 4}
        relic.EntropyModel(statistics).receive(relic.Quantizer(parameters, statistics, shape), payload)
    elif header.codec == bitstream.PERCO:
        _, parameters, payload = perco.read_file(data, LIMITS)
        grid = tuple(-(-side // parameters.stride) for side in shape[1:])
        caption = lambda decoder: captions.decode(parameters.caption, decoder, VOCABULARY, LIMITS)  # noqa: E731
        perco.unpack_payload(payload, parameters, grid, CODEBOOK, caption)
    else:
        _, parameters, *_ = diffc.read_file(data, LIMITS)
        assert diffc.Parameters.from_bytes(parameters.to_bytes()) == parameters


def one_input(data):
    try:
        read(data)
    except bitstream.BitstreamError:
        pass


def mutate(data, max_size, seed):
    """libFuzzer's own mutation of the parameters or the payload, with the checksums put right; of the bytes as they are now and then."""
    rng = random.Random(seed)
    try:
        fields = parts(data)
    except bitstream.BitstreamError:
        return atheris.Mutate(data, len(data) + 1)
    place = rng.choice((4, 4, 5, None))
    if place is None:
        return atheris.Mutate(data, max_size)
    fields[place] = atheris.Mutate(fields[place], min(len(fields[place]) + 8, LARGEST))
    return seal(*fields)[:max_size]


def main():
    if "--hex" in sys.argv:
        folder, target = sys.argv[1], sys.argv[sys.argv.index("--hex") + 1]
        inputs = sorted({path.read_bytes() for path in Path(folder).iterdir()}, key=lambda data: (len(data), data))
        Path(target).write_text("".join(f"{data.hex()}\n" for data in inputs if 0 < len(data) <= LARGEST))
        return
    for number, data in enumerate(files()):
        Path(sys.argv[1]).mkdir(exist_ok=True)
        (Path(sys.argv[1]) / f"golden-{number}").write_bytes(data)
    atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
