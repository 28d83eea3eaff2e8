"""The command `demo`."""

from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_compress.cli import loading
from diffusers_compress.cli.decode import decode, decoding
from diffusers_compress.cli.encode import encode
from diffusers_compress.cli.options import (
    ENCODING,
    Bpp,
    Coder,
    Device,
    Dtype,
    Fidelity,
    Folder,
    Force,
    Guidance,
    MaxBytes,
    Model,
    Photo,
    Preview,
    Prompt,
    Reconstruction,
    Seed,
    Steps,
    arguments_of,
    given_rates,
)
from diffusers_compress.cli.paths import check_overwrite, open_picture, picture_bytes
from diffusers_compress.cli.terminal import say
from diffusers_compress.contract import DEFAULT

if TYPE_CHECKING:
    from PIL import Image

DEMO_BPP = 0.05


def demo_command(
    photo: Photo = None,
    folder: Folder = Path("demo"),
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    fidelity: Fidelity = None,
    prompt: Prompt = None,
    coder: Coder = None,
    reconstruction: Reconstruction = None,
    preview: Preview = False,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """A photo to a file and back: writes the file, the decoded picture and both pictures side by side; again over those of before."""
    if (bpp, max_bytes, fidelity) == (None, None, None):
        bpp = DEMO_BPP
    options = {"--prompt": prompt, "--coder": coder, **given_rates(DEFAULT, bpp, max_bytes, fidelity)}
    photo = photo or demo_photo()
    targets = coded, decoded, both = [folder / (photo.stem + suffix) for suffix in (".dfc", ".decoded.png", ".side_by_side.png")]
    force = force or all(target.is_file() for target in targets)  # all three together are an earlier demo's
    for target in targets:
        check_overwrite(target, photo, force)
    encoding = arguments_of(DEFAULT, "compress", ENCODING, options)
    finishing = decoding(DEFAULT, reconstruction, preview, None, steps, guidance, seed)
    image = open_picture(photo)

    pipe = loading.load(model, device, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    encode(pipe, image, coded, force, **encoding)
    seconds = decode(pipe, coded.read_bytes(), decoded, force, **finishing)
    psnr, pair = compare(image, open_picture(decoded))
    from diffusers_compress.files import write_file

    write_file(both, picture_bytes(pair, both), overwrite=force)
    say(decoded, f"{decoded}: PSNR {psnr:.2f} dB, {seconds:.1f} s")
    say(both, f"{both}: the photo on the left, what the file holds on the right")


def demo_photo() -> Path:
    """A photo that comes with the package: a cup of coffee at the Pikolo Espresso Bar, by Rachel Michetti, who gave it to the public (CC0)."""
    return Path(__file__).parents[1] / "embedded" / "coffee.jpg"


def compare(image: "Image.Image", decoded: "Image.Image") -> "tuple[float, Image.Image]":
    """PSNR in dB over 8-bit sRGB samples, and both pictures in one."""
    from diffusers_compress import images

    x, x_hat = images.to_tensor(image)[0], images.to_tensor(decoded)[0]
    psnr = 10 * (4 / (x - x_hat).square().mean()).log10()  # samples lie in [-1, 1], so the peak is 2
    return float(psnr), images.side_by_side(images.to_output(x[None])[0], decoded)
