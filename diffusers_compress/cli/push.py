"""The command `push`."""

from pathlib import Path

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import (
    CardPictures,
    CardRates,
    CodecName,
    Device,
    Dtype,
    License,
    MaxPictures,
    Model,
    Preset,
    Private,
    Repository,
    check_preset,
)
from diffusers_compress.cli.paths import some_pictures
from diffusers_compress.cli.terminal import complain, phase, say
from diffusers_compress.contract import DEFAULT


def push_command(
    repository: Repository,
    pictures: CardPictures = None,
    max_pictures: MaxPictures = 16,
    bpp: CardRates = "0.05,0.1,0.2",
    license: License = None,
    private: Private = False,
    codec: CodecName = DEFAULT,
    preset: Preset = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Share a model as a codec on the Hub, with a card that says how to load it and what it was measured to do."""
    check_preset(codec, preset)
    from diffusers_compress import hub

    hub.check_account()  # before pictures are read and a model is loaded
    rates = [float(rate) for rate in bpp.split(",")]
    measured, notes = some_pictures(pictures, max_pictures) if pictures else ([], [])
    for note in notes:
        complain(f"note: {note}")
    pipe = loading.load(model, device, dtype, codec, preset)
    with phase("measuring and pushing", pipe):
        address = pipe.push_to_hub(repository, license, measured, rates, private=private or None)
    say(Path(repository), address)
