"""What train_perco.py trains on: random crops of pictures or of their latents, with captions, from folders or WebDataset shards."""

import itertools
import math
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from diffusers_compress import images
from diffusers_compress.files import read_text

SUFFIXES = {".webp", ".png", ".jpg", ".jpeg"}


def caption_of(path, captions):
    if path.name in captions:
        return captions[path.name]
    text = path.with_suffix(".txt")
    return read_text(text).strip() if text.exists() else ""


def random_crop(array, size, generator):
    """A random size x size window of [C, H, W], at random mirrored."""
    top, left = (int(torch.randint(side - size + 1, (), generator=generator)) for side in array.shape[1:])
    window = array[:, top : top + size, left : left + size]
    return window.flip(-1) if torch.rand((), generator=generator) < 0.5 else window


def open_crop(image, size, generator):
    """A crop [3, size, size] in [-1, 1]; a smaller picture is enlarged first."""
    scale = size / min(image.size)
    if scale > 1:
        image = image.resize([math.ceil(side * scale) for side in image.size], Image.Resampling.LANCZOS)
    return random_crop(images.to_tensor(image)[0], size, generator)


class Crops(Dataset):
    """Crop number i, a function of the seed and i alone: (picture [3, S, S] or latent [C, s, s], caption)."""

    def __init__(self, sources, captions, size, seed):
        """sources: paths of pictures, or lists of the latents of a picture and of its mirror image."""
        self.sources, self.captions, self.size, self.seed = sources, captions, size, seed

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed((self.seed << 40) + i)
        number = int(torch.randint(len(self.sources), (), generator=generator))
        source = self.sources[number]
        if isinstance(source, Path):
            return open_crop(images.open_image(source), self.size, generator), self.captions[number]
        view = source[int(torch.randint(2, (), generator=generator))]
        top, left = (int(torch.randint(side - self.size + 1, (), generator=generator)) for side in view.shape[1:])
        return view[:, top : top + self.size, left : left + self.size], self.captions[number]


def batches(crops, args, accelerator, first_step):
    """Batches (crops, captions) of this process from step `first_step` on, the same crops however often it was stopped."""
    world, rank = accelerator.num_processes, accelerator.process_index
    starts = itertools.count((first_step * world + rank) * args.batch, world * args.batch)
    order = (range(start, start + args.batch) for start in starts)
    return iter(DataLoader(crops, batch_sampler=order, num_workers=args.workers))


def shard_batches(args, accelerator, first_step):
    """As `batches`, from WebDataset shards, shuffled anew by the step at which it starts."""
    import webdataset

    generator = torch.Generator().manual_seed(
        (args.seed << 40) + first_step * accelerator.num_processes + accelerator.process_index
    )

    def crop(sample):
        picture = next(value for name, value in sample.items() if "." + name.rpartition(".")[2] in SUFFIXES)
        return open_crop(picture, args.crop, generator), sample.get("txt", "")

    split = webdataset.split_by_node if accelerator.num_processes > 1 else webdataset.single_node_only
    shards = webdataset.WebDataset(
        args.pictures, shardshuffle=100, seed=args.seed + first_step, nodesplitter=split, empty_check=False
    )
    samples = shards.repeat().shuffle(1000, seed=args.seed + first_step).decode("pil").map(crop)
    return iter(DataLoader(samples, batch_size=args.batch, num_workers=args.workers))


def data(crops, args, accelerator, first_step):
    return batches(crops, args, accelerator, first_step) if crops else shard_batches(args, accelerator, first_step)


@torch.no_grad()
def encode_all(pipe, paths):
    """For each picture the scaled latents of it and of its mirror image, [C, h, w]."""
    latents = []
    for path in tqdm(paths, desc="encoding pictures"):
        x = pipe.pad(images.to_tensor(images.open_image(path))[0][None])
        latents.append([pipe.encode_picture(view)[0].cpu() for view in (x, x.flip(-1))])
    return latents
