"""The pictures of a pipeline on bases: the best estimate and the refined sample, tile by tile."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.codecs.refine import bases, blind, jpeg, restore, trained
from diffusers_compress.codecs.refine.format import Parameters, error_of
from diffusers_compress.coding import randomness
from diffusers_compress.errors import Corrupt
from diffusers_compress.format.container import Header
from diffusers_compress.images import formats

OVERLAP = 64  # pixels that tiles share
ROUNDS = 30  # of projections at the end


@dataclass
class Job:
    """A base picture [3, H, W] in [-1, 1], the cells of its coefficients if it is a JPEG, and the rms error of each latent channel."""

    base: Tensor
    cells: jpeg.Cells | None
    errors: Tensor
    seed: int = 0
    prompt: str = ""


def job_of(pipe: DiffusionPipeline, header: Header, parameters: Parameters, data: bytes) -> Job:
    """What is to do for a refined file. Corrupt if its base is, or the model has another number of channels."""
    if len(parameters.errors) != pipe.family.channels:
        raise Corrupt(f"the file has the errors of {len(parameters.errors)} channels, the model has {pipe.family.channels}")
    base = bases.picture(pipe, header, parameters, data)
    cells = jpeg.read_cells(data) if parameters.base == "jpeg" else None
    errors = torch.tensor([error_of(code) for code in parameters.errors], dtype=torch.float32)
    return Job(base, cells, errors, parameters.seed, parameters.prompt)


def estimated_job(pipe: DiffusionPipeline, picture: Image.Image, data: bytes, seed: int, prompt: str) -> Job:
    """What is to do for a file that some other program wrote, which `picture` was read from."""
    kind, base = formats.kind_of(data), formats.as_stored(picture)
    cells = jpeg.read_cells(data) if kind == "jpeg" else None
    errors = blind.errors(base, kind, cells, len(data), lambda x: pipe.encode_picture(pipe.pad(x)))
    return Job(base, cells, errors, seed, prompt)


@dataclass
class Settings:
    """Those of `decompress`: network calls a tile, guidance, calls between projections, side of a tile, noise at the start."""

    num_inference_steps: int
    guidance_scale: float
    projection_interval: int
    tile: int
    late_start: float | None = None

    def __post_init__(self):
        if self.projection_interval < 1:
            raise ValueError(f"projection_interval must be at least 1, not {self.projection_interval}")
        if self.tile < 2 * OVERLAP or self.tile % OVERLAP:
            raise ValueError(f"tile must be a multiple of {OVERLAP} from {2 * OVERLAP} on, not {self.tile}")
        if self.late_start is not None and not self.late_start > 0:
            raise ValueError(f"late_start must be above 0, not {self.late_start}")


def paint(
    pipe: DiffusionPipeline, jobs: list[Job], settings: Settings, watch: Callable | None = None
) -> list[tuple[Tensor, Tensor]]:
    """For each of the jobs, whose latents have one shape: estimate and sample, [3, H, W] in [-1, 1] on the CPU."""
    x = torch.stack([pipe.pad(job.base) for job in jobs])
    height, width = x.shape[-2:]
    n = [noise_field(pipe.latent_shape(height, width), job.seed) for job in jobs]
    both = x.new_zeros(2, *x.shape)
    for rows, columns in restore.windows(height, width, settings.tile, OVERLAP):
        ys, xs = (slice(side.start // pipe.vae_scale_factor, side.stop // pipe.vae_scale_factor) for side in (rows, columns))
        parts = [
            Job(x[i, :, rows, columns], cells_of(job, rows, columns), job.errors, job.seed, job.prompt)
            for i, job in enumerate(jobs)
        ]
        painted = paint_tile(pipe, parts, [field[..., ys, xs] for field in n], settings, watch)
        both[..., rows, columns] += restore.weight(rows, columns, height, width, OVERLAP) * painted
    return [finished(job, *(images.crop(picture, *job.base.shape[-2:]) for picture in both[:, i])) for i, job in enumerate(jobs)]


def paint_tile(pipe: DiffusionPipeline, jobs: list[Job], noises: list[Tensor], settings: Settings, watch=None) -> Tensor:
    """Estimates and samples [2, B, 3, h, w] on the CPU, of tiles of one size; noises: [2, C, h', w'] each."""
    x = torch.stack([job.base for job in jobs]).to(pipe._execution_device)
    y = pipe.encode_picture(x)
    # what the autoencoder itself loses of the base is no loss of the base: only differences pass through it
    lost = x - pipe.decode_latent(y)
    restored = with_training if pipe.config.form else without_training
    mean, sample = restored(pipe, jobs, y, lost, torch.stack(noises).to(y), settings, watch)
    estimate, refined = x, pipe.decode_latent(sample) + lost
    if any(job.cells for job in jobs):  # whose codec knows no better than the middle of each cell
        is_jpeg = torch.tensor([job.cells is not None for job in jobs], device=x.device).view(-1, 1, 1, 1)
        estimate = torch.where(is_jpeg, pipe.decode_latent(mean) + lost, x)
        if pipe.config.form:  # where blocks lost their colours, what it draws place by place would become coloured grain
            refined = torch.where(is_jpeg, estimate + jpeg.luma(refined - estimate), refined)
    return torch.stack([estimate, refined]).cpu()


def with_training(
    pipe: DiffusionPipeline, jobs: list[Job], y: Tensor, lost: Tensor, noises: Tensor, settings: Settings, watch: Callable | None
) -> tuple[Tensor, Tensor]:
    """Latents of estimates and samples [B, C, h', w'], by a network that was trained to refine."""
    schedule, form = pipe.noise_schedule(), pipe.config.form
    late_start = trained.LATE_START[form] if settings.late_start is None else settings.late_start
    seen = trained.seen_of(pipe.estimator, y, torch.stack([job.errors for job in jobs]).to(y))
    log2_deviations, means = (part.split(1) for part in seen.chunk(2, 1))
    walks = []
    for i, d in enumerate(trained.deviations(seen)):
        calls_at = trained.timesteps(d, settings.num_inference_steps, schedule, form, late_start)
        walks.append(trained.walk(means[i], log2_deviations[i].exp2(), noises[i, :1], calls_at, schedule))
    prompts = [job.prompt for job in jobs]
    means, samples = zip(*pipe.run(walks, prompts, settings.guidance_scale, watch, extra_channels=seen))
    return torch.cat(means), torch.cat(samples)


def without_training(
    pipe: DiffusionPipeline, jobs: list[Job], y: Tensor, lost: Tensor, noises: Tensor, settings: Settings, watch: Callable | None
) -> tuple[Tensor, Tensor]:
    """The same by any network; estimates are made for JPEGs alone."""
    schedule, plain, matched = pipe.noise_schedule(), [], []
    for i, job in enumerate(jobs):

        def project(x_0, i=i, cells=job.cells):
            seen = pipe.decode_latent(x_0) + lost[i : i + 1]
            return x_0 + pipe.encode_picture(within(seen, cells, 2)) - pipe.encode_picture(seen)

        start = restore.match(y[i : i + 1], job.errors, noises[i])
        onto = project if job.cells else None
        matched.append(restore.restore(start, settings.num_inference_steps, schedule, onto, settings.projection_interval))
        plain.append(restore.restore(start.plain(y[i : i + 1]), 1, schedule))

    prompts = [job.prompt for job in jobs]
    samples = torch.cat(pipe.run(matched, prompts, settings.guidance_scale, watch))
    means = torch.cat(pipe.run(plain, prompts, watch=watch)) if any(job.cells for job in jobs) else y
    return means, samples


def finished(job: Job, estimate: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The sample with the estimate's low frequencies, and both within what a JPEG says."""
    sample = sample - restore.low_pass((sample - estimate)[None])[0]
    return tuple(within(picture[None], job.cells, ROUNDS)[0].clamp(-1, 1) for picture in (estimate, sample))


def within(x: Tensor, cells: jpeg.Cells | None, rounds: int) -> Tensor:
    """x [1, 3, H, W] brought into the cells, which may cover less than all of it, the rest being padding."""
    if cells is None:
        return x
    inside = jpeg.project(x[0, :, : cells.height, : cells.width], cells.to(x.device), rounds)
    x = x.clone()
    x[0, :, : cells.height, : cells.width] = inside
    return x


def cells_of(job: Job, rows: slice, columns: slice) -> jpeg.Cells | None:
    """The cells in a tile, as far as the picture goes."""
    if job.cells is None:
        return None
    bottom, right = min(rows.stop, job.cells.height), min(columns.stop, job.cells.width)
    return job.cells.window(rows.start, columns.start, bottom - rows.start, right - columns.start)


def noise_field(shape: tuple[int, int, int], seed: int) -> Tensor:
    """Standard normal numbers [2, C, h, w] that all tiles of a picture share."""
    channels, height, width = shape
    return randomness.normals(2 * channels * height * width, randomness.START, seed).view(2, channels, height, width)
