"""Train the small latent diffusion model that ships with diffusers_compress, from a folder of photos.

    accelerate launch examples/train_embedded.py --photos FOLDER --output RUN

Stages, each limited by wall-clock minutes so that the same command fits a laptop and a GPU:
    vae      AutoencoderKL of factor 8
    unet     UNet2DConditionModel on its latents, v-prediction with zero terminal SNR
    decoder  the autoencoder's decoder once more, its encoder frozen (needs only `vae`, so it may run beside `unet`)
    export   RUN/model: a plain Stable-Diffusion folder
A run that was stopped goes on from its last checkpoint when the same command is given again.

The photos have no captions. Half of the samples see the empty prompt, half a random string, so that the model learns to pay no
attention to a prompt: its text encoder stands there because the folder layout asks for one.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

STAGES = ("vae", "unet", "decoder", "export")
VALIDATION_PHOTOS = 40  # the last ones by name are never trained on
LATENT_NOISE = 0.1  # std of the noise added to the latent in training, in units of the latent before scaling
RATE_WEIGHT = 1.4e-4  # mean squared error (on [-1, 1]) that one bit per latent position may cost


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, every side at least 128 pixels")
    parser.add_argument("--output", type=Path, required=True, help="checkpoints, log.jsonl and the finished model go here")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--vae-minutes", type=float, default=30)
    parser.add_argument("--unet-minutes", type=float, default=75)
    parser.add_argument("--decoder-minutes", type=float, default=20)
    parser.add_argument("--vae-batch", type=int, default=8, help="crops of 64x64, later 128x128, a step")
    parser.add_argument("--unet-batch", type=int, default=8, help="latents of 32x32 a step")
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--unet-lr", type=float, default=4e-4)
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--mixed-precision", default="bf16", choices=["no", "bf16", "fp16"])
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------- data


def load_photos(folder):
    """All pictures of a folder as uint8 [3, H, W] tensors, in order of name."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".webp", ".png", ".jpg", ".jpeg"})
    photos = []
    for path in tqdm(paths, desc="reading photos"):
        with Image.open(path) as image:
            photos.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous())
    return photos


def random_crop(array, size, generator):
    """A random size x size window of [C, H, W]."""
    top = int(torch.randint(array.shape[1] - size + 1, (), generator=generator))
    left = int(torch.randint(array.shape[2] - size + 1, (), generator=generator))
    return array[:, top : top + size, left : left + size]


def batch_of_crops(arrays, indices, size, generator):
    return torch.stack([random_crop(arrays[i], size, generator) for i in indices])


def to_model_range(pixels):
    return pixels.float() / 127.5 - 1


# -------------------------------------------------------------------------------------------------------------- models


def make_vae(latent_channels):
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):  # residual branches start at zero, which learns faster
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return vae


def make_unet(latent_channels):
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(64, 128, 176),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def make_scheduler():
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


def make_tokenizer(folder):
    """A CLIP tokenizer whose vocabulary is the 256 bytes, each alone and at a word's end: any text, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's byte alphabet
    tokens = symbols + [s + "</w>" for s in symbols] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
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


# -------------------------------------------------------------------------------------------------------------- stages


class Stage:
    """One stage's loop: cosine learning rate over wall-clock minutes, EMA, checkpoints, a log line a minute."""

    def __init__(self, accelerator, name, model, lr, minutes, args):
        self.accelerator, self.name, self.minutes, self.args = accelerator, name, minutes, args
        self.folder = args.output / f"checkpoint-{name}"
        self.log = args.output / "log.jsonl"
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.lr, self.step, self.seconds = lr, 0, 0.0
        self.ema = EMAModel(self.bare_model.parameters(), decay=0.999)
        self.ema.to(accelerator.device)
        if (self.folder / "progress.json").exists():
            accelerator.load_state(self.folder)
            progress = json.loads((self.folder / "progress.json").read_text())
            self.step, self.seconds = progress["step"], progress["seconds"]
            self.ema.load_state_dict(torch.load(self.folder / "ema.pt", weights_only=True, map_location=accelerator.device))
        self.generator = torch.Generator().manual_seed(args.seed + self.step)

    @property
    def progress(self):
        return self.seconds / (60 * self.minutes)

    @property
    def bare_model(self):
        return self.accelerator.unwrap_model(self.model)

    def save(self):
        self.accelerator.save_state(self.folder)
        if self.accelerator.is_main_process:
            torch.save(self.ema.state_dict(), self.folder / "ema.pt")
            (self.folder / "progress.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))

    def run(self, loss_of, validate):
        """Train until the minutes are spent, then leave the EMA weights in the model."""
        bar = tqdm(total=round(self.minutes, 1), desc=self.name, unit="min", disable=not self.accelerator.is_main_process)
        bar.update(self.seconds / 60)
        saved, logged, losses = self.seconds, self.seconds, []
        while self.seconds < 60 * self.minutes:
            start = time.perf_counter()
            warm_up = min(1, (self.step + 1) / 100)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm_up * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))
            loss = loss_of(self.model)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.bare_model.parameters())
            self.step += 1
            losses.append(loss.item())
            elapsed = time.perf_counter() - start
            self.seconds += elapsed
            bar.update(elapsed / 60)
            if self.seconds - logged > 120:
                logged = self.seconds
                self.write_log(np.mean(losses), validate)
                losses = []
            if self.seconds - saved > 60 * self.args.checkpoint_minutes:
                saved = self.seconds
                self.save()
        bar.close()
        self.save()
        self.ema.copy_to(self.bare_model.parameters())
        self.write_log(np.mean(losses) if losses else float("nan"), validate)
        model = self.bare_model.eval()
        self.accelerator.free_memory()
        return model

    def write_log(self, loss, validate):
        self.ema.store(self.bare_model.parameters())
        self.ema.copy_to(self.bare_model.parameters())
        with torch.no_grad():
            figures = validate(self.bare_model)
        self.ema.restore(self.bare_model.parameters())
        row = {"stage": self.name, "step": self.step, "seconds": round(self.seconds), "loss": round(float(loss), 5), **figures}
        if self.accelerator.is_main_process:
            with self.log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            tqdm.write(json.dumps(row))


def train_vae(accelerator, photos, validation, args):
    """Autoencoder by mean squared error, with a fixed noise on the latent and a price on its rate.

    The noise has one std for all channels and the price is the capacity of that noisy channel, so channels end up with the
    variance that their pixels deserve (an isometric embedding, as in Kato et al. 2020, RaDOGAGA): the uniform noise of a
    diffusion process then hurts all of them alike.
    """
    stage = Stage(accelerator, "vae", make_vae(args.latent_channels), args.vae_lr, args.vae_minutes, args)

    def loss_of(model):
        size = 64 if stage.progress < 0.85 else 128  # small crops first: early on it is the number of steps that counts
        error, mean = autoencode(accelerator, model, batch_of_photos(stage, photos, size, args.vae_batch))
        power = mean.square().mean(dim=(0, 2, 3))
        bits = 0.5 * torch.log2(1 + power / LATENT_NOISE**2).sum()
        price = RATE_WEIGHT * min(1, max(0, 4 * stage.progress - 1))  # channels that are priced before they are used die out
        return error + price * bits

    return stage.run(loss_of, lambda model: vae_figures(accelerator, model, validation))


def train_decoder(accelerator, vae, photos, validation, args):
    """The decoder alone, by mean squared error: latents, and so the UNet, stay as they are."""
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    stage = Stage(accelerator, "decoder", vae, args.vae_lr / 2, args.decoder_minutes, args)

    def loss_of(model):
        return autoencode(accelerator, model, batch_of_photos(stage, photos, 128, args.vae_batch))[0]

    return stage.run(loss_of, lambda model: vae_figures(accelerator, model, validation))


def batch_of_photos(stage, photos, size, batch):
    """Random crops [B, 3, size, size] in [-1, 1], half of the batches mirrored."""
    indices = torch.randint(len(photos), (batch,), generator=stage.generator).tolist()
    x = to_model_range(batch_of_crops(photos, indices, size, stage.generator)).to(stage.accelerator.device)
    return x.flip(-1) if torch.rand((), generator=stage.generator) < 0.5 else x


def autoencode(accelerator, model, x):
    """Mean squared error through the noisy latent, and the latent's mean before the noise."""
    vae = accelerator.unwrap_model(model)
    with accelerator.autocast():
        mean = vae.encode(x).latent_dist.mean.float()
        x_hat = vae.decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
    return (x - x_hat).square().mean(), mean


def vae_figures(accelerator, vae, validation):
    """Mean PSNR in dB over the top left 256x256 of the validation photos."""
    psnr = []
    for photo in validation:
        x = to_model_range(photo[None, :, :256, :256]).to(accelerator.device)
        x_hat = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        psnr.append(10 * torch.log10(4 / (x - x_hat).square().mean()).item())
    return {"psnr": round(float(np.mean(psnr)), 3)}


@torch.no_grad()
def finish_vae(vae, latents):
    """Write what the training fixed into the model: a constant posterior std, and the factor that brings latents to unit std."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(LATENT_NOISE)
    std = torch.cat([z.float().flatten() for z in latents]).std().item()
    vae.register_to_config(scaling_factor=round(1 / std, 5))


@torch.no_grad()
def encode_photos(vae, photos, device):
    """Latents [C, H/8, W/8] of each photo and of its mirror image."""
    latents = []
    for photo in tqdm(photos, desc="encoding photos"):
        height, width = (side // 8 * 8 for side in photo.shape[1:])
        x = to_model_range(photo[None, :, :height, :width]).to(device)
        latents.append([vae.encode(view).latent_dist.mode()[0].cpu() for view in (x, x.flip(-1))])
    return latents


def train_unet(accelerator, vae, text_encoder, tokenizer, scheduler, latents, validation, args):
    """v-prediction on latents [B, C, 32, 32]; timesteps uniform, so squared errors of x_0 are weighted by snr + 1."""
    scaled = [view * vae.config.scaling_factor for views in latents for view in views if min(view.shape[1:]) >= 32]
    stage = Stage(accelerator, "unet", make_unet(args.latent_channels), args.unet_lr, args.unet_minutes, args)
    generator, device = stage.generator, accelerator.device

    @torch.no_grad()
    def embed(texts):
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
        return text_encoder(ids.to(device))[0]

    def v_error(model, x_0, t, eps, texts):
        x_t = scheduler.add_noise(x_0, eps, t)
        v = scheduler.get_velocity(x_0, eps, t)
        with accelerator.autocast():
            v_hat = model(x_t, t, embed(texts), return_dict=False)[0]
        return (v_hat.float() - v).square()

    def random_text():
        length = int(torch.randint(1, 76, (), generator=generator))
        return bytes(torch.randint(33, 127, (length,), generator=generator).tolist()).decode()

    def loss_of(model):
        indices = torch.randint(len(scaled), (args.unet_batch,), generator=generator).tolist()
        x_0 = batch_of_crops(scaled, indices, 32, generator).to(device)
        t = torch.randint(1000, (args.unet_batch,), generator=generator).to(device)
        texts = ["" if i % 2 else random_text() for i in range(args.unet_batch)]
        return v_error(model, x_0, t, torch.randn_like(x_0), texts).mean()

    held_out = [views[0] * vae.config.scaling_factor for views in encode_photos(vae, validation, device)]
    x_val = torch.stack([z[:, :32, :32] for z in held_out if min(z.shape[1:]) >= 32])[:32].to(device)
    eps_val = torch.randn(x_val.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def validate(model):
        figures = {}
        for t in (800, 600, 400, 200, 100):
            ts = torch.full((len(x_val),), t, device=device)
            figures[f"v_mse_{t}"] = round(v_error(model, x_val, ts, eps_val, [""] * len(x_val)).mean().item(), 4)
        return figures

    return stage.run(loss_of, validate)


def main():
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)

    photos = load_photos(args.photos)
    train, validation = photos[:-VALIDATION_PHOTOS], photos[-VALIDATION_PHOTOS:]
    device, parts = accelerator.device, args.output / "parts"

    if "vae" in args.stages:
        vae = train_vae(accelerator, train, validation, args)
        finish_vae(vae, [view for views in encode_photos(vae, train[:100], device) for view in views])
        vae.save_pretrained(parts / "vae")
    if "unet" in args.stages:
        vae = AutoencoderKL.from_pretrained(parts / "vae").to(device)
        tokenizer = make_tokenizer(parts / "tokenizer")
        if not (parts / "text_encoder").exists():
            make_text_encoder(tokenizer).save_pretrained(parts / "text_encoder")
        text_encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").to(device).eval().requires_grad_(False)
        if not (parts / "latents.pt").exists():
            torch.save(encode_photos(vae, train, device), parts / "latents.pt")
        latents = torch.load(parts / "latents.pt", weights_only=True)
        unet = train_unet(accelerator, vae, text_encoder, tokenizer, make_scheduler(), latents, validation, args)
        unet.save_pretrained(parts / "unet")
    if "decoder" in args.stages:
        vae = train_decoder(accelerator, AutoencoderKL.from_pretrained(parts / "vae").to(device), train, validation, args)
        vae.save_pretrained(parts / "vae-refined")
    if "export" in args.stages and accelerator.is_main_process:
        export(parts, args.output / "model")


def export(parts, folder):
    """The trained parts as one Stable-Diffusion folder in fp16; the small text encoder in fp32, since transformers, unlike diffusers,
    loads a checkpoint in the type it was saved in unless told otherwise."""
    refined = parts / "vae-refined"
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(refined if refined.exists() else parts / "vae", torch_dtype=torch.float16),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet", torch_dtype=torch.float16),
        text_encoder=CLIPTextModel.from_pretrained(parts / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "tokenizer", model_max_length=77, pad_token="<|endoftext|>"),
        scheduler=UniPCMultistepScheduler.from_config(make_scheduler().config),  # the best of diffusers' ODE solvers at few steps
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
