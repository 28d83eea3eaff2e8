"""Latents that decode nearer to one picture in MS-SSIM, by gradient steps through the autoencoder's decoder.

An encoder network makes latents for all pictures alike. A few steps fit them to one picture and to another measure before anything is sent
(Campos et al. 2019, "Content adaptive optimization for neural image compression"): `latents`. What a receiver sees in the end is not x_0, but
its guess after the last step. So in the last part of a file the sender moves x_0 again before each step, to where the receiver's next guess
will be nearer to the picture: `aimed`. Both are for the sender alone.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.codecs.diffc import reference
from diffusers_compress.coding import dct, randomness
from diffusers_compress.metrics.distortion import SMALLEST, ms_ssim_of

STEPS = 3  # of the latents before the first bit, by Adam
RATE = 0.03  # learning rate of the first, in scaled latents; it falls linearly
PULL = 0.3  # price of the mean square by which the latents move
AIMED = 0.6  # part of a file after which the sender aims
AIMS = 2  # gradient steps before a coded step
LENGTH = 0.02  # rms of the first, in scaled latents; it falls linearly
ELASTICITY = 0.7  # of 1 - MS-SSIM: with 1 % more bits it falls by .7 %, by about as much from .07 to .4 bpp
BLOCK, MARGIN = 512, 64  # pixels: so large a part has its gradient taken at a time, with its surroundings


def latents(pipe: DiffusionPipeline, tune: str, pictures: Sequence[Tensor], x_0: Tensor) -> Tensor:
    """x_0 [B, C, h, w], moved to where it decodes nearer to the pictures in MS-SSIM (Campos et al. 2019).

    pictures: padded, [3, H, W] in [-1, 1]. Latents of those too small for MS-SSIM, and pictures that are their own latents, stay.
    ValueError if the decoder's output is not finite.
    """
    if tune == "psnr" or pipe.vae is None:
        return x_0
    return torch.cat([moved(pipe, picture.to(x_0.device), x[None]) for picture, x in zip(pictures, x_0)])


def moved(pipe: DiffusionPipeline, picture: Tensor, x_0: Tensor) -> Tensor:
    """argmin of 1 - MS-SSIM(picture, decoded x) + PULL mean (x - x_0)^2, as near as STEPS lead from x_0 [1, C, h, w]."""
    x = x_0.clone()
    adam = torch.optim.Adam([x], lr=RATE, betas=(0.8, 0.95))
    slower = torch.optim.lr_scheduler.LinearLR(adam, start_factor=1, end_factor=0, total_iters=STEPS)
    for _ in range(STEPS):
        _, slope = distance(pipe, picture, x)
        x.grad = slope + 2 * PULL * (x - x_0) / x.numel()
        adam.step()
        slower.step()
    return x


def aimed(
    distance: Callable[[Tensor], tuple[float, Tensor]],
    x_0: Tensor,
    x_0_hat: Tensor,
    shares: Tensor,
    v: Tensor,
    bits: float,
    part: float,
) -> Tensor:
    """x_0 [1, C, h, w], moved to where the guess that a receiver makes after the next step will be nearer to the picture.

    To a receiver x_0 - x_0_hat is Gaussian, with coefficients of known variances e. A step that raises the snr by d shows it
    c + n / sqrt(d) for c, the coefficients of shares (x_0 - x_0_hat), and it guesses w (c + n / sqrt(d)), where w = v / (1 + v), v = d e.
    What is told costs bits: the price is `part` of all that the file's bits bring, for as much again as is told now.
    distance: of a latent from the picture, and its gradient. shares: see `tuning`. v: [1, n] as `reference.excess` has it. bits: of the
    step. part: theirs of all bits so far.
    """
    w = (v / (1 + v)).view_as(x_0)
    first = dct.transform(shares * (x_0 - x_0_hat))
    d = reference.snr_gain(first.flatten(1).square(), v, bits).item()
    n = randomness.normals(x_0.numel(), randomness.START, 1, device=x_0.device).view_as(x_0)
    for step in range(AIMS):
        c = dct.transform(shares * (x_0 - x_0_hat))
        far, slope = distance(x_0_hat + dct.inverse(w * (c + n / d**0.5)))
        # The transform is orthonormal: its transpose is its inverse
        slope = w * dct.transform(slope) + 2 * ELASTICITY * part * far * c / first.square().sum()
        slope = shares * dct.inverse(slope)
        x_0 = x_0 - LENGTH * (1 - step / AIMS) * slope / slope.square().mean().sqrt().clamp(min=1e-12)
    return x_0


def distance(pipe: DiffusionPipeline, picture: Tensor, x: Tensor) -> tuple[float, Tensor]:
    """1 - MS-SSIM of the picture [3, H, W] in [-1, 1] and the decoded x [1, C, h, w], and the gradient in x, both block by block: the
    memory does not grow with the picture. Blocks too small for MS-SSIM count as reached."""
    h, w = x.shape[-2:]
    scale = picture.shape[-1] // w
    total, slope = 0.0, torch.zeros_like(x)
    for (top, bottom), (left, right) in product(parts(h, BLOCK // scale), parts(w, BLOCK // scale)):
        margin, share = MARGIN // scale, (bottom - top) * (right - left) / (h * w)
        y, z = max(0, top - margin), max(0, left - margin)
        seen = picture[:, y * scale : (bottom + margin) * scale, z * scale : (right + margin) * scale]
        if min(seen.shape[-2:]) >= SMALLEST:
            far, own = distance_of_block(pipe, seen, x[..., y : bottom + margin, z : right + margin])
            total += share * far
            slope[..., top:bottom, left:right] = share * own[..., top - y : bottom - y, left - z : right - z]
    return total, slope


def parts(length: int, longest: int) -> list[tuple[int, int]]:
    """Where the fewest nearly equal parts begin and end."""
    number = -(-length // longest)
    ends = [length * i // number for i in range(number + 1)]
    return list(zip(ends, ends[1:]))


def distance_of_block(pipe: DiffusionPipeline, picture: Tensor, x: Tensor) -> tuple[float, Tensor]:
    # Offloading takes a layer's weights away after its call: the graph holds them itself
    held = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), held:
        x = x.clone().requires_grad_()
        far = 1 - ms_ssim_of(picture.clone() / 2 + 0.5, pipe.decode_latent(x)[0] / 2 + 0.5)
        (slope,) = torch.autograd.grad(far, x)  # the decoder's weights need none
    return far.item(), slope
