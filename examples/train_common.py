"""What the training scripts share: photos and random windows of them, checkpoints to go on from, and the loop of one stage."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm

VALIDATION_PHOTOS = 40  # the last ones by name, a quarter of a small folder, are never trained on
COOLDOWN = 0.2  # of a stage's minutes, in which the learning rate falls

# ---------------------------------------------------------------------------------------------------------------- data


def load_photos(folder):
    """All pictures of a folder as uint8 [3, H, W] tensors, in order of name."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in {".webp", ".png", ".jpg", ".jpeg"})
    photos = []
    for path in tqdm(paths, desc="reading photos"):
        with Image.open(path) as image:
            photos.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous())
    return photos


def split(photos):
    """(photos to train on, photos for validation)"""
    count = len(photos) - min(VALIDATION_PHOTOS, len(photos) // 4)
    if count == len(photos):
        raise ValueError(f"there are {len(photos)} photos; at least four are needed, to train on and to validate")
    return photos[:count], photos[count:]


def to_model_range(pixels):
    return pixels.float() / 127.5 - 1


def log_uniform(limits, generator):
    low, high = torch.tensor(limits).log()
    return float((low + (high - low) * torch.rand((), generator=generator)).exp())


def random_crop(array, size, generator):
    """A random size x size window of [C, H, W]."""
    top = int(torch.randint(array.shape[1] - size + 1, (), generator=generator))
    left = int(torch.randint(array.shape[2] - size + 1, (), generator=generator))
    return array[:, top : top + size, left : left + size]


def batch_of_crops(arrays, indices, size, generator):
    return torch.stack([random_crop(arrays[i], size, generator) for i in indices])


def batch_of_photos(photos, size, batch, scales, generator):
    """Random windows of photos as [B, 3, size, size] in [-1, 1], half of the batches mirrored.

    All of a batch are reduced by one random factor within `scales` (below 1: enlarged) as far as the photos allow. This happens where the
    photos lie, so it costs a GPU that holds them next to nothing.
    """
    chosen = [photos[i] for i in torch.randint(len(photos), (batch,), generator=generator).tolist()]
    side = min(round(size * log_uniform(scales, generator)), *(min(photo.shape[1:]) for photo in chosen))
    x = to_model_range(batch_of_crops(chosen, range(batch), side, generator))
    if side != size:
        x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
    return x.flip(-1) if torch.rand((), generator=generator) < 0.5 else x


@torch.no_grad()
def encode_photos(pipe, photos):
    """Scaled latents [C, h, w] of each photo and of its mirror image, [photos][2]; photos below 256 pixels a side are left out."""
    latents = []
    for photo in tqdm(photos, desc="encoding photos"):
        height, width = (side // 8 * 8 for side in photo.shape[1:])
        x = to_model_range(photo[None, :, :height, :width])
        if min(height, width) >= 256:
            latents.append([pipe.encode_picture(view)[0].cpu() for view in (x, x.flip(-1))])
    return latents


def target_of(x_0, eps, alpha, sigma, prediction_type):
    """What the network should say."""
    # Salimans & Ho 2022, section 4
    return {"epsilon": eps, "sample": x_0, "v_prediction": alpha * eps - sigma * x_0}[prediction_type]


def local_moments(x):
    """Local standard deviations of what is finer than an eighth of a cycle a pixel, over two window sizes: [B, 3, ...] each."""
    fine = x - F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    return [(F.avg_pool2d(fine.square(), size, size // 2) + 1e-4).sqrt() for size in (8, 16)]


# --------------------------------------------------------------------------------------------------------- checkpoints


def latest_checkpoint(folder):
    """(steps done, folder) of the newest checkpoint that was written to its end, or (0, None)."""
    done = {int(path.parent.name.removeprefix("checkpoint-")): path.parent for path in folder.glob("checkpoint-*/complete")}
    return max(done.items(), default=(0, None))


def save_checkpoint(accelerator, folder, ema, step, seconds):
    """Write a checkpoint of a run so many seconds long, then remove those before it."""
    path, (_, before) = folder / f"checkpoint-{step}", latest_checkpoint(folder)
    accelerator.save_state(path)
    if accelerator.is_main_process:
        torch.save(ema.state_dict(), path / "ema.pt")
        (path / "complete").write_text(str(seconds))
        if before and before != path:
            shutil.rmtree(before)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, path, ema):
    """The seconds trained before it."""
    accelerator.load_state(path)
    ema.load_state_dict(torch.load(path / "ema.pt", weights_only=True, map_location=accelerator.device))
    return float((path / "complete").read_text())


def forget_log(accelerator, log, later):
    """Drop the lines of a log that will be written again."""
    if accelerator.is_main_process and log.exists():
        rows = [row for row in log.read_text().splitlines() if not later(json.loads(row))]
        log.write_text("".join(row + "\n" for row in rows))


def make_once(path, make):
    """`make(path)`, which writes a file or folder, unless an earlier run did so to its end."""
    if not path.exists():
        unfinished = path.with_name(path.name + ".unfinished")
        make(unfinished)
        unfinished.rename(path)
    return path


def train_once(path, train):
    """Save the model that `train()` gives, unless an earlier run did so."""
    make_once(path, lambda unfinished: train().save_pretrained(unfinished))


def forget_paths(folder):
    """Take the paths of this machine, which diffusers notes, from a folder's configs."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def add_parts(model, folder, calibration, **components):
    """Write a folder: the model's folder or Hub id as it is, with further calibration and, in float16, further components.

    Saving through one codec's pipeline would leave out the components of the others.
    """
    source = model if Path(model).is_dir() else StableDiffusionPipeline.download(model)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["_calibration"] = index.get("_calibration", {}) | calibration
    for name, component in components.items():
        component.half().save_pretrained(folder / name)
        index[name] = ["diffusers_compress", type(component).__name__]
        forget_paths(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    print(f"wrote {folder}")


# --------------------------------------------------------------------------------------------------------------- stage


class Stage:
    """One stage's loop over wall-clock minutes, in one process: averaged weights, checkpoints, log lines.

    The learning rate is constant and falls linearly at the end, so that a short run lies on the curve of a long one until then.
    Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training durations".
    """

    def __init__(
        self, accelerator, name, model, lr, minutes, args, warm_up=100, decay=0.999, betas=(0.9, 0.99), weight_decay=0.01
    ):
        self.accelerator, self.name, self.lr, self.minutes, self.args = accelerator, name, lr, minutes, args
        self.warm_up = warm_up  # steps
        self.folder, self.log = args.output / "checkpoints" / name, args.output / "log.jsonl"
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = EMAModel(self.bare_model.parameters(), decay=decay, foreach=True)
        self.ema.to(accelerator.device)
        self.seconds, (self.step, checkpoint) = 0.0, latest_checkpoint(self.folder)
        if checkpoint:
            self.seconds = load_checkpoint(accelerator, checkpoint, self.ema)
            forget_log(accelerator, self.log, lambda row: row["stage"] == name and row["step"] > self.step)
        self.generator = torch.Generator().manual_seed((args.seed << 40) + self.step)

    @property
    def progress(self):
        """0 at the start to 1 at the end."""
        return self.seconds / (60 * self.minutes)

    @property
    def bare_model(self):
        return self.accelerator.unwrap_model(self.model)

    def run(self, loss_of, validate):
        """Train until the minutes are spent: the model with its averaged weights. A checkpoint goes with each line of the log."""
        bar = tqdm(total=round(self.minutes, 1), desc=self.name, unit="min")
        bar.update(self.seconds / 60)
        since, steps, total = self.seconds, 0, 0.0
        while self.progress < 1:
            start = time.perf_counter()
            warm_up = min(1, (self.step + 1) / self.warm_up)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * warm_up * min(1, 0.01 + (1 - self.progress) / COOLDOWN)
            loss = loss_of(self.model)
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.step(self.bare_model.parameters())
            self.step, steps, total = self.step + 1, steps + 1, total + loss.detach()
            elapsed = time.perf_counter() - start
            self.seconds += elapsed
            bar.update(elapsed / 60)
            if self.seconds - since > 60 * self.args.checkpoint_minutes or self.progress >= 1:
                self.write_log(float(total) / steps, validate)
                save_checkpoint(self.accelerator, self.folder, self.ema, self.step, self.seconds)
                since, steps, total = self.seconds, 0, 0.0
        bar.close()
        self.ema.copy_to(self.bare_model.parameters())
        model = self.bare_model.eval()
        self.accelerator.free_memory()
        return model

    def write_log(self, loss, validate):
        self.ema.store(self.bare_model.parameters())
        self.ema.copy_to(self.bare_model.parameters())
        with torch.no_grad():
            figures = validate(self.bare_model)
        self.ema.restore(self.bare_model.parameters())
        seconds = round(self.seconds)
        row = {"stage": self.name, "step": self.step, "seconds": seconds, "loss": round(loss, 5), **figures}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write(json.dumps(row))
