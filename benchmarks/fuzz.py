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
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
with atheris.instrument_imports(include=["diffusers_compress"]):
    from diffusers_compress import contract
    from diffusers_compress.codecs.cdc import format as cdc_format
    from diffusers_compress.codecs.cdc import symbols as cdc_symbols
    from diffusers_compress.codecs.diffc import format as diffc_format
    from diffusers_compress.codecs.perco import format as perco_format
    from diffusers_compress.codecs.perco.payload import unpack_payload
    from diffusers_compress.codecs.relic import format as relic_format
    from diffusers_compress.codecs.relic.quantizer import Quantizer
    from diffusers_compress.codecs.relic.symbols import EntropyModel
    from diffusers_compress.codecs.text_sketch import format as text_sketch_format
    from diffusers_compress.codecs.text_sketch import payload as text_sketch_payload
    from diffusers_compress.codecs.uqdm import format as uqdm_format
    from diffusers_compress.coding import pixel_model
    from diffusers_compress.coding.channels import dither
    from diffusers_compress.coding.range_coder import Decoder
    from diffusers_compress.coding.text import ALPHABET, vocabulary_of
    from diffusers_compress.errors import BitstreamError
    from diffusers_compress.format import container, lossless
    from diffusers_compress.format.limits import Limits

from golden import make  # noqa: E402
from robustness import files, parsed, parts, seal  # noqa: E402

LIMITS = Limits(pixels=32 * 32)
LARGEST = 400  # bytes of an input that is kept
CODEBOOK = make.hyper_encoder().probability_model()
CONTEXT_MODEL, _ = make.cdc_networks(published=False)
VOCABULARY = vocabulary_of(make.tokenizer(ALPHABET, make.MERGES))


def read(data):
    """Everything up to the network: header, parameters, messages or symbols."""
    parsed(data)
    header, _ = container.read_header(data, LIMITS)
    shape = 4, -(-header.height // 8), -(-header.width // 8)
    if header.codec == contract.RELIC:
        _, parameters, payload = relic_format.read_file(data, LIMITS)
        statistics = {"mean": [0.0] * 4, "std": [1.0] * 4}
        EntropyModel(statistics).receive(Quantizer(parameters, statistics, shape), payload)
    elif header.codec == contract.UQDM:
        header, parameters, sections, _ = uqdm_format.read_file(data, LIMITS)
        assert uqdm_format.Parameters.from_bytes(parameters.to_bytes()) == parameters
        for section in sections:  # under rows that no network made
            dither.symbols(section, np.arange(3 * header.height * header.width) % 2000, dither.tables())
    elif header.codec == contract.TEXT_SKETCH:
        _, parameters, payload = text_sketch_format.read_file(data, LIMITS)
        assert text_sketch_format.Parameters.from_bytes(parameters.to_bytes()) == parameters
        text_sketch_payload.decode(payload, parameters, header.height, header.width)
    elif header.codec == contract.CDC:
        header, parameters, payload = cdc_format.read_file(data, LIMITS)
        level, multiple = min(parameters.level, CONTEXT_MODEL.config.levels - 1), CONTEXT_MODEL.multiple
        cdc_symbols.decode(CONTEXT_MODEL, payload, level, *(side + -side % multiple for side in (header.height, header.width)))
    elif header.codec > contract.LOSSLESS:
        file = lossless.read(data, LIMITS)
        if file.pixels is not None:
            size = header.height, header.width
            pixel_model.decode(Decoder(file.pixels), size, np.zeros((3, *size), np.uint8) if file.prediction else None)
    elif header.codec == contract.PERCO:
        _, parameters, payload = perco_format.read_file(data, LIMITS)
        grid = tuple(-(-side // parameters.stride) for side in shape[1:])
        unpack_payload(payload, parameters, grid, CODEBOOK, VOCABULARY, LIMITS)
    else:
        _, parameters, *_ = diffc_format.read_file(data, LIMITS)
        assert diffc_format.Parameters.from_bytes(parameters.to_bytes()) == parameters


def one_input(data):
    try:
        read(data)
    except BitstreamError:
        pass


def mutate(data, max_size, seed):
    """libFuzzer's own mutation of the parameters or the payload, with the checksums put right; of the bytes as they are now and then."""
    rng = random.Random(seed)
    try:
        fields = parts(data)
    except BitstreamError:
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
