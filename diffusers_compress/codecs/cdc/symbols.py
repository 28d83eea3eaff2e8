"""The payload of a CDC file: side information, then the latent, under tables that follow from it. FORMAT.md, section "CDC"."""

import numpy as np
import torch
from torch import Tensor

from diffusers_compress.coding import logistic
from diffusers_compress.coding.logistic import MAX_VALUE, UNIT
from diffusers_compress.coding.range_coder import Decoder, Encoder
from diffusers_compress.models.cdc_context import CDCContextModel


def encode(model: CDCContextModel, y: Tensor, z: Tensor, level: int) -> bytes:
    """Payload of a latent y [M, h, w] and side information z [Z, a, b], as `CDCContextModel.analyse` gives them."""
    encoder = Encoder()
    z_mean, z_index = model.z_tables()
    k = symbols(z, z_mean[:, None, None])
    write(encoder, k, np.broadcast_to(z_index[:, None, None], k.shape))
    mean, index = model.tables(UNIT * k + z_mean[:, None, None], level, *y.shape[1:])
    write(encoder, symbols(y, mean), index)
    return encoder.getvalue()


def decode(model: CDCContextModel, payload: bytes, level: int, height: int, width: int) -> Tensor:
    """y_hat [M, h, w], float64, of a picture of height x width pixels. Corrupt for values that no encoder writes."""
    decoder = Decoder(payload)
    z_mean, z_index = model.z_tables()
    shape = model.z_shape(height, width)
    k = read(decoder, np.broadcast_to(z_index[:, None, None], shape))
    mean, index = model.tables(UNIT * k + z_mean[:, None, None], level, *model.y_shape(height, width)[1:])
    return torch.from_numpy(UNIT * read(decoder, index) + mean) / UNIT


def symbols(x: Tensor, mean: np.ndarray) -> np.ndarray:
    """How many steps of 1 each number is off its mean, which is in parts of UNIT: int64."""
    off = x.double().cpu().numpy() - mean / UNIT
    return np.rint(off).astype(np.int64).clip(1 - MAX_VALUE, MAX_VALUE - 1)


def write(encoder: Encoder, k: np.ndarray, index: np.ndarray) -> None:
    """k [C, h, w], channel by channel, so that few tables are in memory at a time."""
    for channel, indices in zip(k, index):
        logistic.encode(encoder, channel.ravel(), np.zeros(channel.size, dtype=np.int64), indices.ravel())


def read(decoder: Decoder, index: np.ndarray) -> np.ndarray:
    """What `write` wrote."""
    channels = [logistic.decode(decoder, np.zeros(indices.size, dtype=np.int64), indices.ravel()) for indices in index]
    return np.stack(channels).reshape(index.shape)
