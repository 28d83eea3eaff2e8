"""The command `calibrate`."""

import json
import shutil
from pathlib import Path

from diffusers_compress.cli import loading
from diffusers_compress.cli.options import Calibrated, Device, Dtype, MaxPictures, Model, Pictures
from diffusers_compress.cli.paths import some_pictures
from diffusers_compress.cli.terminal import phase, say


def calibrate_command(
    folder: Pictures,
    out: Calibrated,
    max_pictures: MaxPictures = 16,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Measure a model on a folder of pictures, so that the codecs know its errors: files get smaller, textures right.

    Writes a copy of the model with what was found in its config. Files made with another calibration need that other copy.
    """
    if out.exists():
        raise FileExistsError(f"{out}: exists already; name a new folder")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent}: no such folder")
    pictures, notes = some_pictures(folder, max_pictures)
    pipe = loading.load(model, device, dtype)

    from diffusers_compress import calibration

    with phase("calibrating", pipe) as clock:
        found = {
            "error": calibration.calibrate_error(pipe, pictures),
            "latent": calibration.calibrate_latent(pipe, pictures),
            "second_guess": calibration.calibrate_second_guess(pipe, pictures),
        }
    source = loading.model_source(model)
    save_calibrated(source if Path(source).exists() else pipe.download(source), out, found)
    say(out, f"{out}: calibrated on {len(pictures)} pictures, {clock.seconds:.1f} s")
    for note in notes:
        say(out, f"note: {note}")
    for trained in ("variance_head", "parameter_network"):
        if (out / trained).is_dir():
            say(out, f"note: the model's {trained} was trained on top of another calibration; train it again")


def save_calibrated(model: str, target: Path, calibration: dict):
    """A copy of a model's folder, all codecs' components included and in their own types, with the calibration in its config."""
    shutil.copytree(model, target)
    index = target / "model_index.json"
    config = json.loads(index.read_text(encoding="utf-8"))
    config["_calibration"] = (config.get("_calibration") or {}) | calibration
    index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
