"""Finishers: students of a model that take a decoder from x_t to x_0 in one call or a few, in place of ten.

The coding loop stays with the base model, whose fingerprint the file names. A finisher comes after the last symbol and changes none. It
knows the timesteps that it was distilled at: x_t gets the noise that it lacks to the nearest noisier one of them, from the format's
generator, so that a file and a finisher give the same picture everywhere.

A finisher is another network of the same family, with a scheduler: a pipeline of diffusers with both, or what `load` finds.
"""

import copy
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import snapshot_download
from torch import Tensor

from diffusers_compress import loading
from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.weights import plain, stored

Source: TypeAlias = str | os.PathLike | DiffusionPipeline | None  # as `decompress` takes it

EMBEDDED = Path(__file__).parents[1] / "embedded" / "student"  # by the name "embedded"
LORA, SCHEDULER, ABOUT = "pytorch_lora_weights.safetensors", "scheduler_config.json", "finisher.json"
USUAL_STEPS = 4  # that Turbo, Lightning, Hyper-SD, DMD2 and schnell are distilled for
SAME_INPUTS = (
    *("in_channels", "out_channels", "addition_embed_type", "cross_attention_dim", "joint_attention_dim", "caption_channels"),
)


class Finisher(NamedTuple):
    """The pipeline with a student's network and scheduler in place of its own, and the timesteps that the student knows, rising.

    last_call_only: it gives pictures, not points of a trajectory, so that only the last call is its own. Those before are the model's.
    """

    pipe: Any
    timesteps: list[int]
    last_call_only: bool = False

    def way(self, t: int, num_steps: int) -> tuple[list[int], int]:
        """Timesteps over which the model itself goes down from t, and the number of the student's calls after that."""
        if not self.last_call_only:
            return [t], num_steps
        lowest = min(t, self.timesteps[0])
        return sorted({max(t - t * k // num_steps, lowest) for k in range(num_steps)}, reverse=True), 1

    def walk(self, x_t: Tensor, t: int, noise: NoiseSchedule, num_steps: int) -> solvers.Walk:
        """From x_t [1, ...] at timestep t of the base model's levels. ValueError if all that the student knows is less noisy."""
        own, ratio = self.pipe.noise_schedule(), float(noise.ratio[t])
        noisier = [s for s in self.timesteps if own.ratio[s] <= ratio * (1 + 1e-6)]
        if not noisier:
            most = self.timesteps[-1]
            raise ValueError(
                f"the finisher knows no timestep as noisy as this file's end: alpha/sigma is {ratio:.3g} there, and {own.ratio[most]:.3g} at "
                f"timestep {most}; decode without it"
            )
        known = self.timesteps[: self.timesteps.index(noisier[0]) + 1]
        count = min(num_steps, len(known))
        chosen = [known[len(known) * k // count - 1] for k in range(count, 0, -1)]
        return solvers.few_calls(x_t, noise.level(t), chosen, own, solvers.fresh_noise_of(self.pipe.scheduler))


def finisher_of(pipe: Any, source: Source) -> Finisher | None:
    """What finishes this pipeline's pictures, if anything is given. ValueError, which says why, if it cannot."""
    if source is None:
        return None
    name = pipe.family.network
    if isinstance(source, DiffusionPipeline):
        network, scheduler, about = getattr(source, name, None), source.scheduler, {}
        if network is None:
            raise ValueError(f"the finisher has no {name}, as {type(pipe.family).__name__} models have")
    elif isinstance(source, (str, os.PathLike)):
        network, scheduler, about = loaded(pipe, os.fspath(source))
    else:
        raise ValueError(f"finisher must be a folder, a Hub id or a pipeline, not {type(source).__name__}")
    check_inputs(pipe, network)
    student = copy.copy(pipe)  # with the same autoencoder and text encoders
    setattr(student, name, network)
    student.scheduler = scheduler
    student.noise_schedule()  # ValueError for another geometry of prediction
    least, most = about.get("timesteps", (0, math.inf))
    timesteps = [t for t in distilled_timesteps(scheduler) if least <= t <= most]
    return Finisher(student, timesteps, about.get("last_call_only", False))


def calls_of(num_inference_steps: int | None, usual: int, finisher: Finisher | None) -> int:
    """Network calls that finish a picture: a number that is given, or one of a finisher, or as many as the codec has."""
    return num_inference_steps or (usual if finisher is None else 1)


def check_inputs(pipe: Any, network: torch.nn.Module) -> None:
    """ValueError unless the network can be called as the pipeline's own is."""
    modules: list[Any] = [getattr(module, "_orig_mod", module) for module in (pipe.denoiser, network)]
    own, other = modules
    if pipe.family.network_class not in {kind.__name__ for kind in type(other).__mro__}:
        raise ValueError(f"the finisher is a {type(other).__name__}, the model a {type(own).__name__}")
    for name in SAME_INPUTS:
        if own.config.get(name) != other.config.get(name):
            raise ValueError(
                f"the finisher has {name} = {other.config.get(name)}, the model {own.config.get(name)}: it takes other inputs"
            )
    if other.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "the finisher takes the guidance scale as an input (time_cond_proj_dim), which is not supported; LoRAs do not"
        )
    places = [next(module.parameters()).device for module in (own, other)]
    if places[0] != places[1] and "meta" not in {place.type for place in places} and not hasattr(own, "_hf_hook"):
        raise ValueError(f"the finisher is on {places[1]}, the model on {places[0]}")


def distilled_timesteps(scheduler: SchedulerMixin) -> list[int]:
    """The timesteps that a student with this scheduler was distilled at, rising."""
    solvers.fresh_noise_of(scheduler)  # ValueError for a scheduler that is none of a student's
    config = scheduler.config
    if type(scheduler).__name__ in ("LCMScheduler", "TCDScheduler"):
        # Luo et al. 2023 (LCM), section 4.3: every k-th timestep
        stride = config.num_train_timesteps // config.original_inference_steps
        return [stride * k - 1 for k in range(1, config.original_inference_steps + 1)]
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{type(scheduler).__name__} shifts its timesteps by the picture's size (use_dynamic_shifting); give the finisher one that does not"
        )
    own = type(scheduler).from_config(config)
    own.set_timesteps(USUAL_STEPS)
    flow = type(scheduler).__name__.startswith("Flow")  # its times run from 1 to T
    return sorted({min(max(round(float(time)) - flow, 0), config.num_train_timesteps - 1) for time in own.timesteps})


# ----------------------------------------------------------------------------------------------------------------- loading


def loaded(pipe: Any, source: str) -> tuple[torch.nn.Module, SchedulerMixin, dict]:
    """`load`, once for a pipeline in one state."""
    denoiser = pipe.denoiser
    key = source, pipe.fingerprint(), denoiser.dtype, pipe._execution_device
    if getattr(pipe, "_loaded_finisher", (None,))[0] != key:
        pipe._loaded_finisher = key, load(pipe, source)
    return pipe._loaded_finisher[1]


def load(pipe: Any, source: str) -> tuple[torch.nn.Module, SchedulerMixin, dict]:
    """Network and scheduler of a finisher, and what `finisher.json` says: of students that we trained, the network that they started from,
    the least noisy and the noisiest timestep that they know, and `last_call_only`.

    Args:
        source: "embedded", the student of the embedded model; or [SCHEDULER@]PLACE, SCHEDULER being a class of diffusers without its last
            word (`LCM`, `TCD`, `EulerDiscrete`), which has the base's levels, and PLACE a folder or Hub id: a LoRA in diffusers' layout (or its
            file), a pipeline with the student's network, or nothing for the base's own network. Without SCHEDULER, the place's own.

    Raises:
        ValueError: for what is no finisher of this model.
    """
    kind, _, place = source.rpartition("@")
    if not kind.isidentifier():  # a path may have an @
        kind, place = "", source.removeprefix("@")
    place = str(EMBEDDED) if place == "embedded" else place
    folder = Path(place) if Path(place).exists() else fetched(place, pipe.family.network)
    about = about_student(pipe, folder, source) if place else {}
    network, dtype, lora = pipe.denoiser, pipe.denoiser.dtype, folder if folder.suffix == ".safetensors" else folder / LORA
    if place and lora.is_file():
        network = with_lora(pipe, lora)
    elif place and (folder / pipe.family.network / "config.json").is_file():
        class_of = type(getattr(network, "_orig_mod", network))
        try:
            network = class_of.from_pretrained(place, subfolder=pipe.family.network, torch_dtype=dtype, use_safetensors=True)
        except OSError as error:
            raise ValueError(f"finisher {place}: {loading.reason(error, place) or str(error).splitlines()[0]}") from error
        network = network.to(pipe._execution_device).requires_grad_(False).eval()
    elif place:
        raise ValueError(f"finisher {place}: neither {LORA} nor {pipe.family.network}/config.json is there")
    return network, scheduler_of(pipe, kind, folder if place else None, source), about


def about_student(pipe: Any, folder: Path, source: str) -> dict:
    """What the folder's `finisher.json` says, if there is one. ValueError if the student started from another network."""
    if not (folder / ABOUT).is_file():
        return {}
    about, here = json.loads((folder / ABOUT).read_text(encoding="utf-8")), network_fingerprint(pipe)
    if about["network"] != here:
        raise ValueError(f"finisher {source} was distilled from the network {about['network']}, this is {here}")
    return about


def network_fingerprint(pipe: Any) -> str:
    """Eight digits that tell the network, which students start from, from others."""
    return fingerprint({pipe.family.network: pipe.denoiser}, {}).hex()


def scheduler_of(pipe: Any, kind: str, folder: Path | None, source: str) -> SchedulerMixin:
    """The scheduler of this kind with the base's levels, or the folder's."""
    if kind:
        config = {**pipe.scheduler.config, "timestep_spacing": "trailing"}
    else:
        found = [path for path in (folder / SCHEDULER, folder / "scheduler" / SCHEDULER) if path.is_file()] if folder else []
        if not found:
            raise ValueError(f"finisher {source} names no scheduler; write LCM@{source}, TCD@{source} or EulerDiscrete@{source}")
        config = json.loads(found[0].read_text(encoding="utf-8"))
        kind = config.get("_class_name", "").removesuffix("Scheduler")
    class_of = getattr(diffusers, f"{kind}Scheduler", None)
    if class_of is None:
        raise ValueError(f"finisher {source}: diffusers has no {kind}Scheduler")
    return class_of.from_config(config)


def fetched(name: str, network: str) -> Path:
    """The small files of a repository on the Hub, and its LoRA if it has one; a file in it may be named, as OWNER/NAME/FILE."""
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    small = [LORA, ABOUT, SCHEDULER, f"scheduler/{SCHEDULER}", f"{network}/config.json"]
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=[file] if file else small))
    except Exception as error:  # noqa: BLE001 - whatever the Hub's client raises, one line
        raise ValueError(f"finisher {loading.reason(error, name) or f'{name}: no such folder or file'}") from error
    return folder / file if file else folder


def with_lora(pipe: Any, file: Path) -> torch.nn.Module:
    """A copy of the pipeline's network with the LoRA merged into its weights. ValueError if it is of another model."""
    from peft.utils import get_peft_model_state_dict

    base, name = pipe.denoiser, pipe.family.network
    own = getattr(base, "_orig_mod", base)
    if pipe.family.lora is None:
        raise ValueError(f"diffusers reads no LoRA of a {type(pipe.family).__name__} model; give the student's whole network")
    with torch.device("meta"):  # a new one, whatever hooks the base has
        network = type(own).from_config(own.config)
    values = {key: plain(key, tensor)[0].to(pipe._execution_device, copy=True) for key, tensor in stored(own).items()}
    try:
        network.load_state_dict(values, assign=True)
        reader = getattr(diffusers.loaders, pipe.family.lora)
        sizes = {"unet_config": own.config} if name == "unet" else {}
        read = reader.lora_state_dict(str(file), use_safetensors=True, **sizes)
        state, alphas = read if isinstance(read, tuple) else (read, None)
        if other := {key.partition(".")[0] for key in state} - {name}:
            raise ValueError(f"it changes {', '.join(sorted(other))}, where only {name} may be changed")
        if any("lora_A" in key for key in state):  # diffusers then takes all names for PEFT's, and passes over layers with others
            state = convert_unet_state_dict_to_peft(state)
        network.load_lora_adapter(state, prefix=name, network_alphas=alphas, adapter_name="finisher")
        if lost := sum("lora" in key for key in state) - len(get_peft_model_state_dict(network, adapter_name="finisher")):
            raise ValueError(f"{lost} of its {len(state)} tensors belong to no layer")
        network.fuse_lora(adapter_names=["finisher"])
        network.unload_lora()
    except (ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"finisher {file} does not fit this {type(own).__name__}: {str(error).splitlines()[0]}") from error
    return network.requires_grad_(False).eval()
