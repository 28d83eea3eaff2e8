"""Train the small latent diffusion model that ships with diffusers_compress, from a folder of photos.

    python examples/train_embedded.py --photos FOLDER --output RUN

Stages, each limited by wall-clock minutes so that the same command fits a laptop and a GPU:
    components  principal components of 8x8 blocks: the encoder, for good, and the decoder's start
    decoder     AutoencoderDC's decoder: squared error
    unet        WienerUNet on the latents; it needs the components alone, so it may run beside the decoder
    texture     the decoder once more, against a small critic that sees patches; the squared error may rise a little
    export      RUN/model: a folder in the Stable-Diffusion layout
A run that was stopped, anywhere, goes on from its last checkpoint when the same command is given again; stages that RUN has are passed
over. `examples/retrain_embedded.py` runs this and all that depends on the model; docs/training.md says with which settings and results.

The photos have no captions. The text encoder stands there because the folder layout asks for one; the UNet sees the empty prompt or a
random string and learns to pay no attention to it.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderDC, DDIMScheduler, DiffusionPipeline, UniPCMultistepScheduler
from torch import nn
from train_common import Stage, batch_of_photos, forget_paths, load_photos, local_moments, split, to_model_range, train_once
from train_embedded_text import embed_texts, load_tokenizer, make_text_encoder, make_tokenizer
from transformers import CLIPTextModel

from diffusers_compress import DiffCPipeline, WienerUNet

STAGES = ("components", "decoder", "unet", "texture", "export")
BLOCK = 8
WIDTHS = (16, 16, 64, 256)  # of the autoencoder: each step down then only moves pixels into channels
CONSTANT = 32.0  # in spare channels of the decoder: it keeps RMSNorm linear
OPENING = 2.0  # bias that keeps ReLU linear
LATENT_NOISE = 0.03  # std of the noise on the latent that the decoder is trained with
VALIDATION_SIGMAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.12)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument(
        "--start", type=Path, help="a model folder that this script made: go on from its components, decoder and UNet"
    )
    parser.add_argument("--scales", type=float, nargs=2, default=[0.6, 1.4], help="photos are reduced by a factor in this range")
    parser.add_argument("--latent-channels", type=int, default=24)
    parser.add_argument("--spread", type=float, default=0.25, help="each component is scaled by its std to this power")
    parser.add_argument("--decoder-layers", type=int, nargs=4, default=[0, 1, 2, 3])
    parser.add_argument("--decoder-minutes", type=float, default=60)
    parser.add_argument("--decoder-batch", type=int, default=8)
    parser.add_argument("--decoder-crop", type=int, default=128, help="pixels")
    parser.add_argument("--decoder-lr", type=float, default=1e-4)
    parser.add_argument("--unet-minutes", type=float, default=240)
    parser.add_argument("--unet-widths", type=int, nargs=3, default=[64, 144, 208])
    parser.add_argument("--unet-batch", type=int, default=10)
    parser.add_argument("--unet-crop", type=int, default=320, help="pixels")
    parser.add_argument("--unet-lr", type=float, default=4e-4)
    parser.add_argument("--noise-levels", type=float, nargs=2, default=[0.05, 200.0], help="sigma / alpha, log-uniform")
    parser.add_argument("--texture-minutes", type=float, default=20)
    parser.add_argument("--texture-lr", type=float, default=5e-5)
    parser.add_argument("--moments-weight", type=float, default=0.01, help="of the error of local standard deviations")
    parser.add_argument("--adversarial-weight", type=float, default=1e-3)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=4, help="between checkpoints, each with a line in the log")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------- autoencoder


class Components:
    """Principal components of 8x8 blocks as latents: analysis [C, 192], synthesis [192, C], the blocks' mean [192].

    Each is scaled by its std to the power of `spread`. With 0 the basis is orthonormal, and equal noise on all channels is what an
    optimal code allots (reverse water-filling); a little more is better for low rates, whitening (-1) costs 2 to 3 dB.
    """

    def __init__(self, analysis, synthesis, mean):
        self.analysis, self.synthesis, self.mean = analysis, synthesis, mean

    @classmethod
    def measure(cls, photos, channels, spread):
        count, total, products = 0, 0.0, 0.0
        for photo in photos:
            x = to_model_range(photo[None, :, : photo.shape[1] // BLOCK * BLOCK, : photo.shape[2] // BLOCK * BLOCK])
            blocks = F.pixel_unshuffle(x, BLOCK)[0].flatten(1).double()
            count, total, products = count + blocks.shape[1], total + blocks.sum(1), products + blocks @ blocks.T
        mean = total / count
        power, basis = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        power, basis = power.flip(0)[:channels], basis.flip(1)[:, :channels]
        basis = basis * basis.sum(0).sign()  # eigenvectors have no sign of their own
        scale = power ** (spread / 2)
        return cls((scale[:, None] * basis.T).float(), (basis / scale).float(), mean.float())

    @classmethod
    @torch.no_grad()
    def of(cls, encoder):
        """Those that an encoder of `make_vae` holds; of the mean, which it does not, what the components see."""
        analysis = encoder.conv_out.weight[:, :, 1, 1] @ pixel_places(encoder).T
        synthesis = torch.linalg.pinv(analysis)
        return cls(analysis, synthesis, -synthesis @ encoder.conv_out.bias)

    def encode(self, x):
        """Pictures [B, 3, H, W] to latents [B, C, H/8, W/8]."""
        return torch.einsum("ck,bkhw->bchw", self.analysis, F.pixel_unshuffle(x, BLOCK) - self.mean[:, None, None])

    def save(self, path):
        torch.save([self.analysis, self.synthesis, self.mean], path)

    @classmethod
    def load(cls, path, device):
        return cls(*(tensor.to(device) for tensor in torch.load(path, weights_only=True)))


def pixel_places(encoder):
    """Into which channel the encoder puts each of the 192 pixels of a block, as ones in [192, 256]."""
    x = F.pixel_shuffle(torch.eye(3 * BLOCK**2)[..., None, None], BLOCK)
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = block(x)
    return x[..., 0, 0]


@torch.no_grad()
def make_vae(components, decoder_layers):
    """AutoencoderDC that is exactly this linear transform.

    Its shortcuts move pixels into channels and back and nothing else; the first and last convolutions hold the components, residual
    branches start at zero. The encoder stays so and has only the layers that the class asks for.
    """
    vae = AutoencoderDC(
        latent_channels=len(components.analysis),
        encoder_block_out_channels=WIDTHS,
        decoder_block_out_channels=WIDTHS,
        encoder_layers_per_block=(0, 1, 1, 0),
        decoder_layers_per_block=decoder_layers,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )
    for module in vae.modules():
        kind = type(module).__name__
        if kind == "ResBlock":
            nn.init.zeros_(module.norm.weight)
            nn.init.zeros_(module.norm.bias)
        if kind in ("DCDownBlock2d", "DCUpBlock2d"):
            nn.init.zeros_(module.conv.weight)
            nn.init.zeros_(module.conv.bias)
    encoder, decoder = vae.encoder, vae.decoder
    # the further channels that pixel_unshuffle would give another picture stay empty
    for color in range(3):
        encoder.conv_in.conv.weight[color, color, 1, 1] = 1

    place = pixel_places(encoder)
    used = place.sum(0) > 0

    nn.init.zeros_(encoder.conv_out.weight)
    encoder.conv_out.weight[:, :, 1, 1] = components.analysis @ place
    encoder.conv_out.bias.copy_(-components.analysis @ components.mean)
    nn.init.zeros_(decoder.conv_in.weight)
    decoder.conv_in.weight[:, :, 1, 1] = place.T @ components.synthesis
    decoder.conv_in.bias.copy_(torch.where(used, place.T @ components.mean, CONSTANT))

    # At half the resolution 12 of 16 channels are pixels, 4 the constant: RMSNorm divides by about CONSTANT sqrt(4 / 16)
    pixels = torch.arange(WIDTHS[1]) < 12
    decoder.norm_out.weight.copy_(torch.where(pixels, CONSTANT * (4 / WIDTHS[1]) ** 0.5, 0.0))
    decoder.norm_out.bias.copy_(torch.where(pixels, OPENING, 0.0))
    for channel in range(12):
        decoder.conv_out.conv.weight[channel, channel, 1, 1] = 1
    decoder.conv_out.conv.bias.fill_(-OPENING)
    return vae


class Critic(nn.Sequential):
    """Scores [B, 1, H/8 - 2, W/8 - 2] of overlapping patches.  Isola et al. 2017 (PatchGAN)."""

    def __init__(self, widths=(3, 32, 64, 128)):
        layers = []
        for inside, outside in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.GroupNorm(8, outside), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 3))


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> x_hat [B, 3, 8h, 8w]; with a critic its scores of x_hat, for the decoder, of x and of x_hat, for itself."""

    def __init__(self, vae, critic=None):
        super().__init__()
        self.vae, self.critic = vae, critic
        vae.encoder.requires_grad_(False)

    def forward(self, z, x):
        x_hat = self.vae.decode(z + LATENT_NOISE * torch.randn_like(z)).sample.float()
        if self.critic is None:
            return x_hat, None
        self.critic.requires_grad_(False)
        judged = self.critic(x_hat)
        self.critic.requires_grad_(True)
        return x_hat, (judged, self.critic(x), self.critic(x_hat.detach()))


def start_vae(args):
    return AutoencoderDC.from_pretrained(args.start / "vae", torch_dtype=torch.float32)


def train_decoder(accelerator, vae, components, photos, validation, args):
    stage = Stage(accelerator, "decoder", Decoder(vae), args.decoder_lr, args.decoder_minutes, args, warm_up=500)

    def loss_of(model):
        x = batch_of_photos(photos, args.decoder_crop, args.decoder_batch, args.scales, stage.generator)
        x_hat, _ = model(components.encode(x), x)
        return (x - x_hat).square().mean()

    return stage.run(loss_of, lambda model: vae_figures(model.vae, validation)).vae


def train_texture(accelerator, vae, components, photos, validation, args):
    """Squared error, local moments of fine detail, and a critic by hinge loss, which come in over a quarter of the time."""
    stage = Stage(accelerator, "texture", Decoder(vae, Critic()), args.texture_lr, args.texture_minutes, args)

    def loss_of(model):
        x = batch_of_photos(photos, args.decoder_crop, args.decoder_batch, args.scales, stage.generator)
        x_hat, (judged, real, made) = model(components.encode(x), x)
        # Lim & Ye 2017 (Geometric GAN), eq. 11-13
        critic = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        moments = sum((ours - theirs).abs().mean() for ours, theirs in zip(local_moments(x_hat), local_moments(x)))
        texture = args.moments_weight * moments - args.adversarial_weight * judged.mean()
        return (x - x_hat).square().mean() + min(1, 4 * stage.progress) * texture + critic

    return stage.run(loss_of, lambda model: vae_figures(model.vae, validation)).vae


def vae_figures(vae, validation):
    """Means over the top left 256x256 of the validation photos: PSNR in dB, and power of fine detail over that of the originals'."""
    psnr, detail = [], []
    for photo in validation:
        x = to_model_range(photo[None, :, :256, :256])
        x_hat = vae.decode(vae.encode(x).latent).sample.clamp(-1, 1)
        psnr.append(10 * torch.log10(4 / (x - x_hat).square().mean()))
        fine = [(y - F.avg_pool2d(y, 3, 1, 1)).square().mean() for y in (x_hat, x)]
        detail.append(fine[0] / fine[1])
    return {"psnr": round(float(sum(psnr)) / len(psnr), 3), "detail": round(float(sum(detail)) / len(detail), 3)}


# ---------------------------------------------------------------------------------------------------------------- prior


def make_unet(args):
    return WienerUNet(
        sample_size=32,
        in_channels=args.latent_channels,
        out_channels=args.latent_channels,
        block_out_channels=args.unet_widths,
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def make_scheduler():
    """The levels of `WienerUNet`."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def train_unet(accelerator, components, text_encoder, tokenizer, photos, validation, args):
    """Denoising of latents. The error is weighed against that of the Wiener filter alone at the same noise level."""
    unet = WienerUNet.from_pretrained(args.start / "unet", torch_dtype=torch.float32) if args.start else make_unet(args)
    unet.fit([components.encode(photo_at_blocks(photo))[0] for photo in photos[::2]])
    stage = Stage(accelerator, "unet", unet, args.unet_lr, args.unet_minutes, args)
    generator, device = stage.generator, accelerator.device
    told = embed_texts(text_encoder, tokenizer, device)
    ratio = torch.stack([unet.levels(t, 1, "cpu").flatten() for t in range(1000)])
    ratio = ratio[:, 1] / ratio[:, 0].clamp(min=1e-6)  # sigma / alpha, rising with t

    def timesteps_at(sigmas):
        return (ratio - sigmas[:, None]).abs().argmin(1)

    def errors(model, x_0, t, eps, text):
        """Squared error of x_0_hat over the Wiener filter's expected one, [B]."""
        alpha, sigma = stage.bare_model.levels(t.to(device), len(x_0), device)
        x_t = alpha * x_0 + sigma * eps
        v = model(x_t, t.to(device), text, return_dict=False)[0]
        x_0_hat = alpha * x_t - sigma * v
        power = stage.bare_model.power(*x_0.shape[-2:])
        expected = (sigma**2 * power / (alpha**2 * power + sigma**2)).mean((1, 2, 3))
        return (x_0_hat - x_0).square().mean((1, 2, 3)) / expected

    def loss_of(model):
        x_0 = components.encode(batch_of_photos(photos, args.unet_crop, args.unet_batch, args.scales, generator))
        low, high = map(math.log, args.noise_levels)
        # stratified: each batch holds all levels
        places = (torch.arange(len(x_0)) + torch.rand(len(x_0), generator=generator)) / len(x_0)
        t = timesteps_at((low + (high - low) * places).exp())
        text = torch.randint(1, len(told), (len(x_0),), generator=generator) * torch.randint(2, (len(x_0),), generator=generator)
        return errors(model, x_0, t, torch.randn_like(x_0), told[text]).mean()

    x_val = torch.cat([components.encode(to_model_range(p[None, :, :256, :256])) for p in validation if min(p.shape[1:]) >= 256])
    eps_val = torch.randn(x_val.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def validate(model):
        figures = {}
        for sigma in VALIDATION_SIGMAS:
            t = timesteps_at(torch.tensor([sigma])).expand(len(x_val))
            error = errors(model, x_val, t, eps_val, told[:1].expand(len(x_val), -1, -1)).mean()
            figures[f"error_{sigma}"] = round(error.item(), 4)
        return figures

    return stage.run(loss_of, validate)


def photo_at_blocks(photo):
    return to_model_range(photo[None, :, : photo.shape[1] // BLOCK * BLOCK, : photo.shape[2] // BLOCK * BLOCK])


# ----------------------------------------------------------------------------------------------------------------- main


def main():
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    device, parts = accelerator.device, args.output / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    train, validation = split([photo.to(device) for photo in load_photos(args.photos)])

    file = parts / "components.pt"
    if not file.exists():
        if args.start:
            started = Components.of(start_vae(args).encoder)
        else:
            started = Components.measure(train, args.latent_channels, args.spread)
        started.save(file)
    components = Components.load(file, device)

    def decoder():
        vae = start_vae(args) if args.start else make_vae(Components.load(file, "cpu"), args.decoder_layers)
        return train_decoder(accelerator, vae, components, train, validation, args)

    def texture():
        vae = AutoencoderDC.from_pretrained(parts / "vae")
        return train_texture(accelerator, vae, components, train, validation, args)

    def unet():
        tokenizer = make_tokenizer(parts / "tokenizer")
        train_once(parts / "text_encoder", lambda: make_text_encoder(tokenizer))
        text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").to(device).eval().requires_grad_(False)
        return train_unet(accelerator, components, text_encoder, tokenizer, train, validation, args)

    if "decoder" in args.stages:
        train_once(parts / "vae", decoder)
    if "unet" in args.stages:
        train_once(parts / "unet", unet)
    if "texture" in args.stages:
        train_once(parts / "vae-textured", texture)
    if "export" in args.stages:
        export(parts, args.output / "model")


def export(parts, folder):
    """The trained parts as one folder in fp16; the small text encoder in fp32, since transformers, unlike diffusers, loads a checkpoint in
    the type it was saved in unless told otherwise."""
    textured = parts / "vae-textured"
    pipe = DiffCPipeline(
        vae=AutoencoderDC.from_pretrained(textured if textured.exists() else parts / "vae", torch_dtype=torch.float16),
        unet=WienerUNet.from_pretrained(parts / "unet", torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32),
        tokenizer=load_tokenizer(parts / "tokenizer"),
        # the best of diffusers' ODE solvers at few steps
        scheduler=UniPCMultistepScheduler.from_config(make_scheduler().config),
    )
    DiffusionPipeline.save_pretrained(pipe, folder)  # without the files that let a plain diffusers load it
    forget_paths(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
