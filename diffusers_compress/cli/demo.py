"""The command `demo`."""

from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from diffusers_compress.cli import loading
from diffusers_compress.cli.decode import decode, decoding
from diffusers_compress.cli.encode import encode
from diffusers_compress.cli.options import (
    Bpp,
    Channel,
    Device,
    Dtype,
    Folder,
    Force,
    Guidance,
    MaxBytes,
    Model,
    Photo,
    Preview,
    Prompt,
    Quality,
    Reconstruction,
    Seed,
    Steps,
    chosen_rate,
)
from diffusers_compress.cli.paths import check_overwrite, open_picture, picture_bytes
from diffusers_compress.files import write_file

DEMO_BPP = 0.05


def demo_command(
    photo: Photo = None,
    folder: Folder = Path("demo"),
    bpp: Bpp = None,
    max_bytes: MaxBytes = None,
    quality: Quality = None,
    prompt: Prompt = "",
    channel: Channel = "trellis",
    reconstruction: Reconstruction = "flow",
    preview: Preview = False,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    model: Model = None,
    device: Device = None,
    dtype: Dtype = "float32",
    force: Force = False,
):
    """A photo to a file and back: writes the file, the decoded picture and both pictures side by side."""
    rate = {"target_bpp": DEMO_BPP} if (bpp, max_bytes, quality) == (None, None, None) else chosen_rate(bpp, max_bytes, quality)
    options = decoding(reconstruction, preview, steps, guidance, seed)
    photo = photo or demo_photo()
    coded, decoded, both = (folder / (photo.stem + suffix) for suffix in (".dfc", ".decoded.png", ".side_by_side.png"))
    for target in (coded, decoded, both):
        check_overwrite(target, photo, force)
    image = open_picture(photo)

    pipe = loading.load(model, device, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    encode(pipe, image, coded, force, prompt=prompt, channel=channel, **rate)
    seconds = decode(pipe, coded.read_bytes(), decoded, force, **options)
    psnr, pair = compare(image, open_picture(decoded))
    write_file(both, picture_bytes(pair, both), overwrite=force)
    print(f"{decoded}: PSNR {psnr:.2f} dB, {seconds:.1f} s")
    print(f"{both}: the photo on the left, what the file holds on the right")


def demo_photo() -> Path:
    """The photo that matplotlib ships for its own examples: the official portrait of Commodore Grace M. Hopper, a U.S. Navy
    photograph (Wikimedia Commons, File:Grace_Hopper.jpg), in the public domain as a work of the U.S. federal government."""
    matplotlib = find_spec("matplotlib")
    photo = Path(matplotlib.origin).parent / "mpl-data/sample_data/grace_hopper.jpg" if matplotlib else None
    if photo is None or not photo.is_file():
        raise FileNotFoundError('no demo photo here: pip install "diffusers_compress[demo]", or name a photo of yours')
    return photo


def compare(image: Image.Image, decoded: Image.Image) -> tuple[float, Image.Image]:
    """PSNR in dB over 8-bit sRGB samples, and both pictures in one."""
    from diffusers_compress import images

    x, x_hat = images.to_tensor(image)[0], images.to_tensor(decoded)[0]
    psnr = 10 * (4 / (x - x_hat).square().mean()).log10()  # samples lie in [-1, 1], so the peak is 2
    return float(psnr), images.side_by_side(images.to_output(x[None])[0], decoded)
