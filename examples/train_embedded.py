"""Train the small latent diffusion model that ships with diffusers_compress, from a folder of photos.

    python examples/train_embedded.py --photos FOLDER --output RUN

Stages, each limited by wall-clock minutes so that the same command fits a laptop and a GPU:
    vae      AutoencoderKL of factor 8: squared error and edges
    unet     UNet2DConditionModel on its latents
    decoder  the autoencoder's decoder once more, its encoder frozen, against a small critic that sees patches
    export   RUN/model: a plain Stable-Diffusion folder
A run that was stopped, anywhere, goes on from its last checkpoint when the same command is given again; stages that RUN has are passed
over. `examples/retrain_embedded.py` runs this and all that depends on the model; TRAINING.md says with which settings and results.

The photos have no captions. Half of the samples see the empty prompt, half a random string, so that the model learns to pay no
attention to a prompt: its text encoder stands there because the folder layout asks for one.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from train_common import Stage, batch_of_photos, load_photos, split, target_of, to_model_range, train_once
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_compress.diffusion import equations, schedule

STAGES = ("vae", "unet", "decoder", "export")
MAX_BYTES = 23_200_000  # of the folder, so that with the parts of DiffC and Relic and a card it has at most 24 MB
LATENT_NOISE = 0.1  # std of the noise added to the latent in training, in units of the latent before scaling
GUIDED = 0.4  # share of the autoencoder's time in which the latent is drawn towards principal components
RANDOM_TEXTS = 255
VALIDATION_T = (800, 600, 400, 200, 100)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--scales", type=float, nargs=2, default=[0.6, 2.4], help="photos are reduced by a factor in this range")
    parser.add_argument("--vae-minutes", type=float, default=8)
    parser.add_argument("--vae-widths", type=int, nargs=4, default=[32, 64, 96, 128])
    parser.add_argument("--vae-batch", type=int, default=64)
    parser.add_argument("--vae-crop", type=int, default=128, help="pixels; twice as many in the last 15 %% of the time")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--gradient-weight", type=float, default=0.02, help="of the error of the picture's gradients")
    parser.add_argument(
        "--guide-weight", type=float, default=0.05, help="of the distance from principal components, at the start"
    )
    parser.add_argument("--rate-weight", type=float, default=3e-5, help="squared error that a bit per latent position may cost")
    parser.add_argument("--unet-minutes", type=float, default=11)
    parser.add_argument("--unet-widths", type=int, nargs=3, default=[64, 128, 160])
    parser.add_argument("--unet-batch", type=int, default=64, help="crops of 256 pixels, each at two noise levels")
    parser.add_argument("--unet-lr", type=float, default=6e-4)
    parser.add_argument("--prediction-type", default="v_prediction", choices=schedule.PREDICTION_TYPES)
    parser.add_argument("--snr-gamma", type=float, default=5.0, help="SNR from which on the weight of the error of x_0 is capped")
    parser.add_argument("--decoder-minutes", type=float, default=3)
    parser.add_argument("--adversarial-weight", type=float, default=1e-3)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=1, help="between checkpoints, each with a line in the log")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# -------------------------------------------------------------------------------------------------------------- models


def make_vae(args):
    vae = AutoencoderKL(
        block_out_channels=args.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=args.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # residual branches start at zero, which learns faster
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    return vae


def make_unet(args):
    return UNet2DConditionModel(
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


def make_scheduler(prediction_type):
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type != "epsilon",  # which says nothing about x_0 where there is only noise
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_tokenizer(folder):
    """A CLIP tokenizer whose vocabulary is the 256 bytes, each alone and at a word's end: any text, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's byte alphabet
    tokens = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return load_tokenizer(folder)


def load_tokenizer(folder):
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def make_text_encoder(tokenizer):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_critic():
    """Scores [B, 1, H/8 - 2, W/8 - 2] of overlapping patches.  Isola et al. 2017 (PatchGAN)."""
    layers, widths = [], (3, 32, 64, 128)
    for inside, outside in zip(widths, widths[1:]):
        layers += [nn.Conv2d(inside, outside, 4, stride=2, padding=1), nn.GroupNorm(8, outside), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3))


# --------------------------------------------------------------------------------------------------------- autoencoder


class Autoencoder(nn.Module):
    """x [B, 3, H, W] -> (x_hat, through the latent with noise on it; the latent's mean; the critic's scores: see `forward`)."""

    def __init__(self, vae, critic=None):
        super().__init__()
        self.vae, self.critic = vae, critic

    def forward(self, x):
        """With a critic, its scores of x_hat as the decoder, of x and of x_hat as the critic itself is to learn from them."""
        mean = self.vae.encode(x).latent_dist.mean.float()
        x_hat = self.vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample
        if self.critic is None:
            return x_hat, mean, None
        self.critic.requires_grad_(False)
        judged = self.critic(x_hat)
        self.critic.requires_grad_(True)
        return x_hat, mean, (judged, self.critic(x), self.critic(x_hat.detach()))


def gradient_error(x, x_hat, scales=4):
    """Mean absolute error of the differences between neighbours, over octaves: edges count wherever they lie in brightness."""
    total, difference = 0.0, x - x_hat
    for _ in range(scales):
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        difference = F.avg_pool2d(difference, 2)
    return total / scales


def principal_components(x, count):
    """The function that takes pictures [B, 3, H, W] to half the first principal components [B, count, H/8, W/8] of 8x8 blocks of x."""
    blocks = F.pixel_unshuffle(x, 8).movedim(1, -1).flatten(0, 2)
    mean, basis = blocks.mean(0), torch.linalg.eigh(torch.cov(blocks.T)).eigenvectors.flip(1)[:, :count]
    return lambda x: 0.5 * torch.einsum("ck,bchw->bkhw", basis, F.pixel_unshuffle(x, 8) - mean[:, None, None])


def train_vae(accelerator, photos, validation, args):
    """Squared error and that of gradients, with a fixed noise on the latent and, in the second half, a small price on its rate.

    At the start the latent is drawn towards principal components, since the channels would otherwise find their uses one by one.

    The noise has one std for all channels and the price is the capacity of that noisy channel, so channels end up with the
    variance that their pixels deserve (an isometric embedding, as in Kato et al. 2020, RaDOGAGA): the uniform noise of a
    diffusion process then hurts all of them alike. A channel that is priced before it is used would die out.
    """
    stage = Stage(accelerator, "vae", Autoencoder(make_vae(args)), args.vae_lr, args.vae_minutes, args)

    first = batch_of_photos(photos, 256, 64, args.scales, torch.Generator().manual_seed(args.seed))
    components = principal_components(first, args.latent_channels)

    def loss_of(model):
        size = args.vae_crop * (1 if stage.progress < 0.85 else 2)  # small crops first: early on it is the steps that count
        x = batch_of_photos(photos, size, args.vae_batch, args.scales, stage.generator)
        x_hat, mean, _ = model(x)
        power = mean.square().mean(dim=(0, 2, 3))
        bits = 0.5 * torch.log2(1 + power / LATENT_NOISE**2).sum()
        price = args.rate_weight * min(1, max(0, 4 * stage.progress - 2))
        loss = (x - x_hat).square().mean() + args.gradient_weight * gradient_error(x, x_hat) + price * bits
        guide = args.guide_weight * max(0, 1 - stage.progress / GUIDED)
        return loss + guide * (mean - components(x)).square().mean() if guide else loss

    trained = stage.run(loss_of, lambda model: vae_figures(model.vae, validation)).vae
    return finish_vae(trained, photos[:100])


def train_decoder(accelerator, vae, photos, validation, args):
    """The decoder alone, so that the UNet fits as before, against a critic: hinge loss, which comes in over a quarter of the time."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    stage = Stage(accelerator, "decoder", Autoencoder(vae, make_critic()), args.vae_lr / 4, args.decoder_minutes, args)

    def loss_of(model):
        x = batch_of_photos(photos, 2 * args.vae_crop, max(1, args.vae_batch // 4), args.scales, stage.generator)
        x_hat, _, (judged, real, made) = model(x)
        # Lim & Ye 2017 (Geometric GAN), eq. 11-13
        critic = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        adversarial = -args.adversarial_weight * min(1, 4 * stage.progress) * judged.mean()
        return (x - x_hat).square().mean() + args.gradient_weight * gradient_error(x, x_hat) + adversarial + critic

    return stage.run(loss_of, lambda model: vae_figures(model.vae, validation)).vae


def vae_figures(vae, validation):
    """Means over the top left 256x256 of the validation photos: PSNR in dB, and power of gradients over that of the originals'."""
    psnr, sharpness = [], []
    for photo in validation:
        x = to_model_range(photo[None, :, :256, :256])
        x_hat = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        psnr.append(10 * torch.log10(4 / (x - x_hat).square().mean()))
        sharpness.append(x_hat.diff(dim=-1).square().mean() / x.diff(dim=-1).square().mean())
    return {"psnr": round(float(sum(psnr)) / len(psnr), 3), "sharpness": round(float(sum(sharpness)) / len(sharpness), 3)}


@torch.no_grad()
def finish_vae(vae, photos):
    """With what the training fixed written into it: a constant posterior std, and the factor that brings latents to unit std."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(LATENT_NOISE)
    views = (photo[None, :, : photo.shape[1] // 8 * 8, : photo.shape[2] // 8 * 8] for photo in photos)
    std = torch.cat([vae.encode(to_model_range(x)).latent_dist.mode().flatten() for x in views]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))
    return vae


# ---------------------------------------------------------------------------------------------------------------- prior


def weight_of(snr, gamma, prediction_type):
    """Weight of the squared error of the network's output.  Hang et al. 2023 (min-SNR), section 3.4.

    For what predicts x_0 or v the weight of the error of x_0 is one more: with zero terminal SNR the noisiest level counts too.
    """
    capped = snr.clamp(max=gamma)
    return {"epsilon": capped / snr, "v_prediction": (capped + 1) / (snr + 1), "sample": capped + 1}[prediction_type]


def train_unet(accelerator, vae, text_encoder, tokenizer, photos, validation, args):
    """Denoising of latents [B, C, 32, 32] at uniform timesteps; each crop is encoded once and noised twice."""
    stage = Stage(accelerator, "unet", make_unet(args), args.unet_lr, args.unet_minutes, args)
    generator, device = stage.generator, accelerator.device
    noise = schedule.from_scheduler(make_scheduler(args.prediction_type))

    @torch.no_grad()
    def latents_of(x):
        with accelerator.autocast():
            return vae.encode(x).latent_dist.mode().float() * vae.config.scaling_factor

    def random_text():
        length = int(torch.randint(1, 76, (), generator=generator))
        return bytes(torch.randint(33, 127, (length,), generator=generator).tolist()).decode()

    texts = ["", *(random_text() for _ in range(RANDOM_TEXTS))]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    told = text_encoder(ids.to(device))[0].detach()

    def levels(t):
        return (level[t].float().to(device)[:, None, None, None] for level in (noise.alpha, noise.sigma))

    def loss_of(model):
        x_0 = latents_of(batch_of_photos(photos, 256, args.unet_batch, args.scales, generator)).repeat(2, 1, 1, 1)
        t = torch.randint(len(noise.alpha), (len(x_0),), generator=generator)
        text = torch.randint(1, len(told), (len(x_0),), generator=generator) * torch.randint(2, (len(x_0),), generator=generator)
        (alpha, sigma), eps = levels(t), torch.randn_like(x_0)
        output = model(alpha * x_0 + sigma * eps, t.to(device), told[text], return_dict=False)[0]
        error = (output - target_of(x_0, eps, alpha, sigma, args.prediction_type)).square().mean((1, 2, 3))
        return (weight_of(noise.snr[t].float().to(device), args.snr_gamma, args.prediction_type) * error).mean()

    x_val = torch.cat(
        [latents_of(to_model_range(photo[None, :, :256, :256])) for photo in validation if min(photo.shape[1:]) >= 256]
    )
    eps_val = torch.randn(x_val.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def validate(model):
        """Mean squared error of x_0 at some timesteps, which prediction types can be compared by."""
        figures = {}
        for t in VALIDATION_T:
            alpha, sigma = noise.level(t)
            x_t = alpha * x_val + sigma * eps_val
            output = model(x_t, torch.tensor(t, device=device), told[:1].expand(len(x_t), -1, -1), return_dict=False)[0]
            x_0_hat = equations.predict_x0(output, x_t, alpha, sigma, args.prediction_type)
            figures[f"x_0_error_{t}"] = round((x_0_hat - x_val).square().mean().item(), 4)
        return figures

    return stage.run(loss_of, validate)


# ----------------------------------------------------------------------------------------------------------------- main


def check_size(args):
    """ValueError if the model will not fit into what it may take: float16, the text encoder float32."""
    with torch.device("meta"):
        numbers = sum(p.numel() for model in (make_vae(args), make_unet(args)) for p in model.parameters())
    size = 2 * numbers + 600_000  # text encoder, tokenizer, configs
    print(f"the model will take {size / 1e6:.1f} MB")
    if size > MAX_BYTES:
        raise ValueError(f"the model would take {size} bytes; at most {MAX_BYTES} are permitted: choose smaller widths")


def main():
    args = parse_args()
    check_size(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    device, parts = accelerator.device, args.output / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    train, validation = split([photo.to(device) for photo in load_photos(args.photos)])

    def vae():
        return AutoencoderKL.from_pretrained(parts / "vae").to(device).requires_grad_(False)

    def unet():
        tokenizer = make_tokenizer(parts / "tokenizer")
        train_once(parts / "text_encoder", lambda: make_text_encoder(tokenizer))
        text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").to(device).eval().requires_grad_(False)
        return train_unet(accelerator, vae(), text_encoder, tokenizer, train, validation, args)

    if "vae" in args.stages:
        train_once(parts / "vae", lambda: train_vae(accelerator, train, validation, args))
    if "unet" in args.stages:
        train_once(parts / "unet", unet)
    if "decoder" in args.stages:
        train_once(parts / "vae-refined", lambda: train_decoder(accelerator, vae(), train, validation, args))
    if "export" in args.stages:
        export(parts, args.output / "model", args.prediction_type)


def export(parts, folder, prediction_type):
    """The trained parts as one Stable-Diffusion folder in fp16; the small text encoder in fp32, since transformers, unlike diffusers,
    loads a checkpoint in the type it was saved in unless told otherwise."""
    refined = parts / "vae-refined"
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(refined if refined.exists() else parts / "vae", torch_dtype=torch.float16),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet", torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32),
        tokenizer=load_tokenizer(parts / "tokenizer"),
        # the best of diffusers' ODE solvers at few steps
        scheduler=UniPCMultistepScheduler.from_config(make_scheduler(prediction_type).config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    for path in folder.rglob("config.json"):  # without the paths of the machine that trained it
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
