"""How good a model folder is for what this package does with it, against what the embedded model should be.

    python benchmarks/embedded_model.py KODAK --model FOLDER --samples samples.png

VAE: PSNR of its pictures over 8-bit samples; as a yardstick, that of as many principal components of 8x8 blocks of the very pictures.
Its high-frequency power over the original's, and the PSNR that would be left if the missing power were put back as noise: texture that
the latent does not hold can be painted at that price only.
Prior: bits of an ideal DiffC without end, from pure noise to a noise level, by the error of the denoised mean on the way there
(I-MMSE: Guo et al. 2005, eq. 1; Kingma et al. 2021, section 4.1), of the UNet and of a Gaussian prior. That one is stationary, with the
power spectrum in each channel (DCT of the whole latent) of the very pictures, and denoises by Wiener's filter: the best that knows
nothing else. The level is where the UNet's denoised mean, decoded, comes within 2 dB of the VAE's PSNR.
DiffC: through files, at some rates; with the high-frequency power of `flow` over the original's (3x3 high pass, geometric mean) and the
standard deviation of its colours (Cb, Cr) over the original's.
Samples: unconditional pictures of 256x256, as a sheet.

Means over the pictures; the spectrum is always fitted on all of them, of the rest `--every` takes each n-th.
"""

import argparse
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from diffusers import AutoModel
from PIL import Image

from diffusers_compress import DiffCPipeline, embedded_model, images
from diffusers_compress.diffusion import equations, schedule, solvers
from diffusers_compress.metrics.distortion import psnr, samples

RATIOS = np.geomspace(0.05, 12, 29)  # alpha/sigma
LOWEST_DECODED = 0.8  # the denoised mean is decoded from here on
BPP = (0.02, 0.05, 0.1, 0.2, 0.4)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="model folder or Hub id")
    parser.add_argument("--vae", type=Path, help="an autoencoder's folder: measure it alone, no model is needed yet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--every", type=int, default=1, help="measure each n-th picture only")
    parser.add_argument("--only", choices=["vae", "prior", "diffc"], nargs="+", default=["vae", "prior", "diffc"])
    parser.add_argument("--bpp", type=float, nargs="+", default=BPP, help="rates of DiffC")
    parser.add_argument("--samples", type=Path, help="write a sheet of unconditional samples here")
    return parser.parse_args()


def blocks(image):
    """[N, 192] in [0, 1]"""
    return F.pixel_unshuffle(samples(image).double()[:, : image.height // 8 * 8, : image.width // 8 * 8], 8).flatten(1).T


def principal_components_psnr(pictures, count):
    """Mean PSNR in dB of the pictures' 8x8 blocks from `count` principal components of all of them."""
    rows = [blocks(image) for image in pictures]
    mean = sum(r.sum(0) for r in rows) / sum(len(r) for r in rows)
    basis = torch.linalg.eigh(sum((r - mean).T @ (r - mean) for r in rows)).eigenvectors[:, -count:]
    return np.mean([psnr(r - mean, (r - mean) @ basis @ basis.T) for r in rows])


# --------------------------------------------------------------------------------------------------------------- the priors


def spectrum(latents):
    """Mean power of the DCT coefficients of latents [1, C, h, w] in landscape format -> [C, h, w]."""
    return np.mean([coefficients(landscape(x_0)) ** 2 for x_0 in latents], axis=0)


def landscape(x):
    return x.mT if x.shape[-2] > x.shape[-1] else x


def coefficients(x):
    return scipy.fft.dctn(x[0].double().cpu().numpy(), axes=(1, 2), norm="ortho")


def gaussian_denoiser(spectrum):
    """(x_t [1, C, h, w], t, alpha, sigma) -> E[x_0 | x_t]"""

    def denoise(x_t, t, alpha, sigma):
        # Wiener's filter: E[X_0 | X_t] = alpha P / (alpha^2 P + sigma^2) X_t
        gain = alpha * spectrum / (alpha**2 * spectrum + sigma**2)
        x_0_hat = scipy.fft.idctn(gain * coefficients(landscape(x_t)), axes=(1, 2), norm="ortho")
        x_0_hat = torch.from_numpy(x_0_hat)[None].to(x_t)
        return x_0_hat if x_0_hat.shape == x_t.shape else x_0_hat.mT

    return denoise


def network_denoiser(pipe, noise):
    embeds = pipe.encode_prompt([""])

    def denoise(x_t, t, alpha, sigma):
        return equations.predict_x0(pipe.predict(x_t, [t], embeds), x_t, alpha, sigma, noise.prediction_type)

    return denoise


def walk(pipe, noise, timesteps, denoise, image, x_0):
    """(bits [levels] from pure noise to each level, PSNR [levels] of the decoded mean there) of a picture."""
    generator, errors, decibels = torch.Generator().manual_seed(0), [], []
    for t in timesteps:
        alpha, sigma = noise.level(t)
        x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator).to(x_0)
        x_0_hat = denoise(x_t, t, alpha, sigma)
        errors.append((x_0 - x_0_hat).square().sum().item())
        shown = decode(pipe, x_0_hat, image) if alpha >= LOWEST_DECODED * sigma else None
        decibels.append(psnr(samples(image), samples(shown)) if shown else 0.0)
    snr, errors = noise.snr[timesteps].numpy(), np.array(errors)
    # Kingma et al. 2021 (VDM), section 4.1:  KL = 1/2 int |x_0 - x_0_hat|^2 d snr = 1/2 int snr |x_0 - x_0_hat|^2 d log snr  nats
    slope = snr * errors / (2 * math.log(2))
    steps = np.diff(np.log(snr)) * (slope[1:] + slope[:-1]) / 2
    return np.cumsum([slope[0], *steps]), np.array(decibels)


def decode(pipe, x_0, image):
    return images.to_output(images.crop(pipe.decode_latent(x_0), image.height, image.width))[0]


def measure_prior(pipe, pictures, latents, chosen, target):
    """{name: (bits per pixel at the UNet's level, at the prior's own level)}; the level as alpha/sigma."""
    noise = schedule.from_scheduler(pipe.scheduler)
    timesteps = sorted({schedule.timestep_at(noise, ratio) for ratio in RATIOS}, reverse=True)
    ratio = noise.ratio[timesteps].numpy()
    pixels = sum(pictures[i].width * pictures[i].height for i in chosen)
    priors = {"UNet": network_denoiser(pipe, noise), "Gaussian": gaussian_denoiser(spectrum(latents))}
    curves = {}
    for name, denoise in priors.items():
        walks = [walk(pipe, noise, timesteps, denoise, pictures[i], latents[i]) for i in chosen]
        curves[name] = sum(bits for bits, _ in walks) / pixels, np.mean([decibels for _, decibels in walks], axis=0)

    def level_of(decibels):
        if decibels.max() < target:
            raise SystemExit(f"the denoised mean reaches {decibels.max():.2f} dB only, not {target:.2f} dB")
        return np.interp(target, np.maximum.accumulate(decibels), ratio)

    level = level_of(curves["UNet"][1])
    at = {
        name: (np.interp(level, ratio, bits), np.interp(level_of(decibels), ratio, bits))
        for name, (bits, decibels) in curves.items()
    }
    return at, level


# ---------------------------------------------------------------------------------------------------------------- the rest


def measure_diffc(pipe, image, folder, rate):
    """Bits per pixel, PSNR of denoised and flow, high-frequency power and colour deviation of flow over the original's; through a file."""
    path = folder / "picture.dfc"
    path.write_bytes(pipe.compress(image, target_bpp=rate).bitstreams[0])
    data = path.read_bytes()
    denoised, flow = (pipe.decompress(data, reconstruction=name).images[0] for name in ("denoised", "flow"))
    detail, colour = high_frequencies(flow) / high_frequencies(image), chroma(flow) / chroma(image)
    x = samples(image)
    return 8 * len(data) / (image.width * image.height), psnr(x, samples(denoised)), psnr(x, samples(flow)), detail, colour


def high_frequencies(image):
    """Mean square of what a 3x3 mean leaves."""
    x = samples(image).float()[None]
    return float((x - F.avg_pool2d(x, 3, 1, 1)).square()[..., 1:-1, 1:-1].mean())


def psnr_with_texture(image, shown):
    """PSNR in dB with white noise added to `shown` until it has the high-frequency power of `image`."""
    missing = max(0.0, high_frequencies(image) - high_frequencies(shown))
    error = (samples(image).double() - samples(shown).double()).square().mean()
    return float(10 * torch.log10(1 / (error + missing * 9 / 8)))  # less its 3x3 mean, noise keeps 8/9 of its power


def chroma(image):
    """Standard deviation of Cb and Cr together."""
    return float(np.asarray(image.convert("YCbCr"), dtype=float)[..., 1:].std((0, 1)).mean())


def flat_colours(pipe):
    """The largest error in levels of a channel's mean, over 64 flat pictures through the autoencoder."""
    worst = 0.0
    for red, green, blue in itertools.product((20, 90, 160, 230), repeat=3):
        image = Image.new("RGB", (64, 64), (red, green, blue))
        x_0 = pipe.encode_picture(images.to_tensor(image)[0][None])
        shown = np.asarray(decode(pipe, x_0, image), dtype=float).mean((0, 1))
        worst = max(worst, float(np.abs(shown - (red, green, blue)).max()))
    return worst


def sample_sheet(pipe, path, columns=5, rows=3):
    """Unconditional pictures of 256x256 in 50 steps of the flow."""
    noise, sheet = pipe.noise_schedule(), Image.new("RGB", (256 * columns, 256 * rows))
    generator, shape = torch.Generator().manual_seed(0), pipe.latent_shape(256, 256)
    for row in range(rows):
        x = torch.randn(columns, *shape, generator=generator).to(pipe.device)
        walks = [solvers.solve(x_t, noise.alpha.numel() - 1, 50, noise, pipe.scheduler) for x_t in x.split(1)]
        for column, x_0 in enumerate(pipe.run(walks, [""] * columns)):
            sheet.paste(images.to_output(pipe.decode_latent(x_0))[0], (256 * column, 256 * row))
    sheet.save(path, quality=85)


def row(what, figure, wanted, met):
    print(f"| {what} | {figure} | {wanted} | {'yes' if met else 'no'} |", flush=True)


@torch.no_grad()
def main():
    args = parse_args()
    paths = sorted(p for p in args.folder.iterdir() if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    if not paths:
        raise SystemExit(f"no pictures in {args.folder}")
    pipe = DiffCPipeline.from_pretrained(args.model, dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.vae:
        pipe.register_modules(vae=AutoModel.from_pretrained(args.vae).to(args.device))
        args.only = ["vae"]
    pictures, chosen = [images.open_image(path).convert("RGB") for path in paths], range(0, len(paths), args.every)
    latents = [pipe.encode_picture(pipe.pad(images.to_tensor(image)[0][None])) for image in pictures]
    shown = [decode(pipe, x_0, image) for image, x_0 in zip(pictures, latents)]
    alone = [psnr(samples(image), samples(picture)) for image, picture in zip(pictures, shown)]

    print(
        f"{len(pictures)} pictures, of which {len(chosen)} for prior and DiffC\n\n| what | measured | wanted | met |\n|--|--|--|--|"
    )
    channels = latents[0].shape[1]
    if "vae" in args.only:
        linear = principal_components_psnr(pictures, channels)
        figure = f"{np.mean(alone):.2f} dB (principal components {linear:.2f} dB)"
        row(f"VAE alone, {channels} channels", figure, "29.8 dB", np.mean(alone) >= 29.8)
        detail = np.exp(np.mean([np.log(high_frequencies(b) / high_frequencies(a)) for a, b in zip(pictures, shown)]))
        textured = np.mean([psnr_with_texture(a, b) for a, b in zip(pictures, shown)])
        print(f"| high frequencies of the VAE alone | {detail:.3f}; with the missing ones as noise {textured:.2f} dB | | |")
        worst = flat_colours(pipe)
        row("64 flat colours, largest error of a channel", f"{worst:.1f} levels", "3 levels", worst <= 3)
    own = np.mean([alone[i] for i in chosen])
    if "prior" in args.only:
        at, level = measure_prior(pipe, pictures, latents, chosen, own - 2)
        (unet, _), (gaussian, own_level) = at["UNet"], at["Gaussian"]
        what = f"bits per pixel to alpha/sigma {level:.2f}, UNet over Gaussian prior"
        figure = f"{unet:.4f} / {gaussian:.4f} = {unet / gaussian:.3f} ({unet / own_level:.3f} where the latter has that PSNR)"
        row(what, figure, "0.75", unet <= 0.75 * gaussian)
    if "diffc" in args.only:
        print("\n| DiffC asked | bpp | denoised, dB | flow, dB | high frequencies | colours |\n|--|--|--|--|--|--|")
        with tempfile.TemporaryDirectory() as folder:
            for rate in args.bpp:
                figures = np.array([measure_diffc(pipe, pictures[i], Path(folder), rate) for i in chosen])
                figures[:, 3] = np.log(figures[:, 3])
                bpp, denoised, flow, detail, colour = figures.mean(0)
                print(f"| {rate} | {bpp:.4f} | {denoised:.2f} | {flow:.2f} | {np.exp(detail):.3f} | {colour:.3f} |", flush=True)
    if args.samples:
        sample_sheet(pipe, args.samples)


if __name__ == "__main__":
    main()
