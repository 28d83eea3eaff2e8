"""What both ends expect of a step before its message: the variance of the denoiser's error, frequency by frequency.

Given x_t, the true x_0 is spread around x_0_hat. That error is far from white: it lies mostly in the low frequencies, the more so
the noisier x_t is. In an orthonormal basis the noise of a step stays white, so the channel can work in a basis where the error's
variance e_i is simple (`dct`): 4x4 blocks of the latent, each by a discrete cosine transform (DCT), and the mean values of all blocks by
one DCT more over the picture. A step to the noise level s then sends, for each coefficient, with m the shift,

    q = N(m_i, 1)   where   p = N(0, 1 + v_i)   is expected,   v_i = (snr_s - snr_t) e_i

in log2(1 + v_i) / 2 bits if e_i is right, however large the step. (With the variance of the published coder, p = N(0, 1), it takes
v_i / (2 ln 2) bits.)
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_compress.coding.dct import BLOCK
from diffusers_compress.coding.devices import double, to_device
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.models.variance_head import VarianceHead

AC_BANDS = BLOCK**2 - 1
DC_BANDS = 12  # half octaves
BANDS = AC_BANDS + DC_BANDS
NEWTON_STEPS = 6  # from where `excess` starts; latents need five


@functools.lru_cache(32)
def frequencies(h: int, w: int) -> Tensor:
    """Radial frequency of each coefficient in cycles per latent pixel, at least 1/256 -> [h, w] float64."""
    y, x = torch.arange(h)[:, None], torch.arange(w)[None]
    inside = torch.hypot((y % BLOCK).double(), (x % BLOCK).double()) / (2 * BLOCK)
    rows, columns = -(-h // BLOCK), -(-w // BLOCK)
    over_all = torch.hypot((y // BLOCK).float() / (2.0 * BLOCK * rows), (x // BLOCK).float() / (2.0 * BLOCK * columns))
    return torch.where((y % BLOCK + x % BLOCK) == 0, over_all, inside).clamp(min=1 / 256)


@functools.lru_cache(32)
def bands(h: int, w: int) -> Tensor:
    """Band of each coefficient -> [h, w] int64: 0 .. 14 a block's own frequencies in rows, from 15 on half octaves of the means'."""
    y, x = torch.arange(h)[:, None] % BLOCK, torch.arange(w)[None] % BLOCK
    half_octave = (2 * torch.log2(256 * frequencies(h, w))).round().long().clamp(max=DC_BANDS - 1)
    return torch.where(y + x == 0, AC_BANDS + half_octave, BLOCK * y + x - 1)


@functools.lru_cache(32)
def places(h: int, w: int, calibrated: bool, device: torch.device) -> Tensor:
    """Which of the variances that `variances` gives is that of each coefficient -> [h, w] int64."""
    return (bands(h, w) if calibrated else frequencies(h, w).unique(return_inverse=True)[1]).to(device)


def variances(calibration: dict | None, snr: float, shape: tuple[int, int, int]) -> Tensor:
    """The different values that `error_variance` has -> [C, bands], or without a calibration [C, frequencies], float32."""
    channels, h, w = shape
    if calibration is None:
        power = frequencies(h, w).unique() ** -2.0
        power = power / (frequencies(64, 64) ** -2.0).mean()
        return (power / (1 + snr * power)).float().expand(channels, -1)
    ratio = torch.tensor(calibration["ratio"], dtype=torch.float64)
    table = torch.tensor(calibration["log2_variance"], dtype=torch.float64)  # [levels, C, bands]
    if table.shape[1:] != (channels, BANDS):
        raise ValueError(f"the calibration has channels and bands {list(table.shape[1:])}, the latent needs {[channels, BANDS]}")
    above = int(torch.searchsorted(ratio, math.sqrt(snr)).clamp(1, len(ratio) - 1))
    weight = ((math.sqrt(snr) - ratio[above - 1]) / (ratio[above] - ratio[above - 1])).clamp(0, 1)
    return torch.lerp(table[above - 1], table[above], weight).exp2().float()


def error_variance(calibration: dict | None, snr: float, shape: tuple[int, int, int]) -> Tensor:
    """Variance of the coefficients of x_0 - x_0_hat at a noise level, for latents of `shape` [C, h, w] -> [C, h, w] float32.

    calibration: what `calibration.calibrate_error` measured. Without it: the error of the best linear denoiser for natural images,
    e = P / (1 + snr P) with the power spectrum P = 1 / frequency^2, mean 1 (Field 1987).
    """
    return variances(calibration, snr, shape)[:, places(*shape[1:], calibration is not None, torch.device("cpu"))]


def expected_error(
    noise: NoiseSchedule, calibration: dict | None, head: VarianceHead | None, x_t: Tensor, x_0_hat: Tensor, timesteps: list[int]
) -> tuple[Tensor, Tensor]:
    """Variance of the coefficients of x_0 - x_0_hat, up to a factor for each picture, and their rank: [B, C, h, w] each."""
    shape, snr = x_t.shape[1:], noise.snr[timesteps]
    table = torch.stack([variances(calibration, float(level), shape) for level in snr])
    alpha, sigma = (level[timesteps].float()[:, None, None, None] for level in (noise.alpha, noise.sigma))
    # The ranks are made on the CPU: they decide which bits belong to which coefficient.
    ranks, table, alpha, sigma, level = to_device(x_t.device, rank(table), table, alpha, sigma, snr.log1p().float())
    where = places(*shape[1:], calibration is not None, x_t.device)
    variance = table[..., where]
    if head is not None and noise.knows(timesteps[0]):
        variance = variance * head(x_0_hat, (x_t - alpha * x_0_hat) / sigma, level).exp()
    return variance, ranks[..., where]


def rank(error: Tensor) -> Tensor:
    """Integers, larger for larger variances: 64 log2 e, rounded. For variances that no network made, so that all ends agree."""
    return (64 * error.double().log2()).round().long()


def excess(error: Tensor, bits: Tensor | float) -> Tensor:
    """v = a e, with the a for which a step costs so many bits: sum_i log2(1 + a e_i) / 2 = bits.  error: [B, n], bits: [B].

    The budget of a step so says how large the error is; only its shape has to be known.
    """
    log_e = double(error).log()
    nats = 2 * math.log(2) * (bits if isinstance(bits, Tensor) else log_e.new_full((len(log_e),), bits))[:, None]
    nats = nats.clamp(1e-300, 40.0 * log_e.shape[1])  # far more than any latent holds, and far from what float32 cannot
    # From log(1 + v) <= v and log(1 + v) >= log v
    least, most = nats.log() - log_e.logsumexp(1, keepdim=True), (nats - log_e.sum(1, keepdim=True)) / log_e.shape[1]
    log_a = least
    for _ in range(NEWTON_STEPS):  # sum log(1 + a e) is convex in log a
        log_v = log_a + log_e
        slope = log_v.sigmoid().sum(1, keepdim=True)
        log_a = torch.minimum(log_a - (F.softplus(log_v, threshold=40).sum(1, keepdim=True) - nats) / slope, most)
    return (log_a + log_e).exp().float().to(error.device)


def snr_gain(squared_error: Tensor, v: Tensor, bits: Tensor | float) -> Tensor:
    """snr_s - snr_t [B] of the step that costs `bits`, for a sender who knows the error.  squared_error, v: [B, n], bits: [B].

    KL(q || p) = sum_i [ log(1 + v_i) + (1 + m_i^2) / (1 + v_i) - 1 ] / 2 nats,  m_i^2 = (snr_s - snr_t) (x_0 - x_0_hat)_i^2
    """
    squared_error, v = double(squared_error), double(v)
    fixed = (v.log1p() - v / (1 + v)).sum(-1)
    return (2 * math.log(2) * bits - fixed) / (squared_error / (1 + v)).sum(-1)


def expected_bits(calibration: dict | None, shape: tuple[int, int, int], snr: float) -> float:
    """Bits in which an average picture's latent of `shape` [C, h, w] is sent from pure noise to this noise level."""
    levels = torch.linspace(0, math.sqrt(snr), 25, dtype=torch.float64).square().tolist()
    steps = zip(levels, levels[1:])
    return sum(float((1 + (s - t) * error_variance(calibration, t, shape).double()).log2().sum()) / 2 for t, s in steps)
