"""What a sender tells, and what it spends its bits on. `tune="ms-ssim"`: latents that decode nearer to the picture in MS-SSIM, and fewer bits
for fine detail and where the picture is busy. No receiver has to know.

An encoder network makes latents for all pictures alike. A few gradient steps through the decoder fit them to one picture and to another
measure (Campos et al. 2019, "Content adaptive optimization for neural image compression").

Left alone, a sender tells all of x_0 - x_0_hat, for the least squared error. MS-SSIM gives the finest of its five scales a weight of .0448,
and divides an error by the picture's own variance around it (Wang, Simoncelli, Bovik 2003, "Multiscale structural similarity for image quality
assessment"). So a tuned sender tells a share of x_0 - x_0_hat, other for each channel and place. What it keeps back is left for later
steps, while there are any.
"""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress.metrics.distortion import SMALLEST, ms_ssim_of

TUNES = "psnr", "ms-ssim"
FINE = 2.0  # fineness of which half is told; that of lines is 2 at a period of 4 pixels, 4 at one of 2
SIDE = 8  # of the latents that fineness is measured with
BUSY = 0.01  # variance of pictures in [0, 1], from which on less is told
MASKING = 0.15  # power of the variance
STEPS = 3  # of the latents, by Adam
RATE = 0.03  # learning rate of the first, in scaled latents; it falls linearly
PULL = 0.3  # price of the mean square by which the latents move
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
    """One picture's x_0 [1, C, h, w], block by block: the memory of a gradient does not grow with the picture."""
    h, w = x_0.shape[-2:]
    scale = picture.shape[-1] // w
    result = x_0.clone()
    for (top, bottom), (left, right) in product(parts(h, BLOCK // scale), parts(w, BLOCK // scale)):
        margin = MARGIN // scale
        y, x = max(0, top - margin), max(0, left - margin)
        around = slice(y, bottom + margin), slice(x, right + margin)
        seen = picture[:, y * scale : (bottom + margin) * scale, x * scale : (right + margin) * scale]
        if min(seen.shape[-2:]) >= SMALLEST:
            block = stepped(pipe, seen, x_0[..., *around])
            result[..., top:bottom, left:right] = block[..., top - y : bottom - y, left - x : right - x]
    return result


def parts(length: int, longest: int) -> list[tuple[int, int]]:
    """Where the fewest nearly equal parts begin and end."""
    number = -(-length // longest)
    ends = [length * i // number for i in range(number + 1)]
    return list(zip(ends, ends[1:]))


def stepped(pipe: DiffusionPipeline, picture: Tensor, x_0: Tensor) -> Tensor:
    """argmin of 1 - MS-SSIM(picture, decoded x) + PULL mean (x - x_0)^2, as near as STEPS lead."""
    # Offloading takes a layer's weights away after its call: the graph holds them itself
    held = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), held:
        start, target = x_0.clone(), picture / 2 + 0.5
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=RATE, betas=(0.8, 0.95))
        slower = torch.optim.lr_scheduler.LinearLR(adam, start_factor=1, end_factor=0, total_iters=STEPS)
        for _ in range(STEPS):
            decoded = pipe.decode_latent(x)[0] / 2 + 0.5
            loss = 1 - ms_ssim_of(target, decoded) + PULL * (x - start).square().mean()
            (x.grad,) = torch.autograd.grad(loss, x)  # the decoder's weights need none
            adam.step()
            slower.step()
    return x.detach()


def shares(pipe: DiffusionPipeline, tune: str, pictures: Sequence[Tensor], x_0: Tensor) -> Sequence[Tensor | None]:
    """What is told of each picture's x_0 - x_0_hat: [C, h, w] in (0, 1], or None for all.

    pictures: padded, [3, H, W] in [-1, 1]. x_0: their latents [B, C, h, w].
    """
    if tune == "psnr":
        return [None] * len(pictures)
    low_pass = 1 / (1 + (fineness(pipe, x_0) / FINE) ** 4)  # Butterworth's
    of_channel = (low_pass / low_pass.max())[:, None, None]
    h, w = x_0.shape[-2:]
    return [of_channel * visibility(picture, (h, w)).to(x_0.device) for picture in pictures]


def fineness(pipe: DiffusionPipeline, x_0: Tensor) -> Tensor:
    """Of each channel of latents like x_0, the power of the differences between neighbouring pixels over the pixels' own: [C], 0 to 8.

    Taken of the pattern that one coefficient draws on a plain picture. It is the mean of 4 - 2 cos(w_x) - 2 cos(w_y) over the pattern's
    frequencies w, in radians per pixel.
    """
    channels = x_0.shape[1]
    latents = x_0.new_zeros(channels + 1, channels, SIDE, SIDE)
    latents[range(channels), range(channels), SIDE // 2, SIDE // 2] = 1
    decoded = pipe.decode_latent(latents)
    patterns = decoded[:-1] - decoded[-1]
    across, down, own = (x.square().sum((1, 2, 3)) for x in (patterns.diff(dim=-1), patterns.diff(dim=-2), patterns))
    return (across + down) / own.clamp(min=1e-12)


def visibility(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """How well an error is seen at each position of a latent [h, w], to the power of MASKING: 1, or less where the variance is above BUSY."""
    y = picture.cpu().mean(0) / 2 + 0.5
    cells = F.adaptive_avg_pool2d(torch.stack([y, y.square()]), size)
    mean, square = F.avg_pool2d(cells, 3, 1, padding=1, count_include_pad=False)
    return ((square - mean.square()) / BUSY).clamp(min=1) ** -MASKING
