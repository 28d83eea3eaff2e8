"""What the codecs on latent diffusion models share: the network's inputs and outputs, the autoencoder, the model's identity."""

import inspect

import torch

from diffusers_compress import diffusion
from diffusers_compress.bitstream import CODECS, WrongModel
from diffusers_compress.fingerprint import fingerprint


class LatentCodecMixin:
    """For a `DiffusionPipeline` with the components vae, text_encoder, tokenizer, unet and scheduler, and `vae_scale_factor`."""

    @classmethod
    def from_pretrained(cls, *arguments, **options):
        """As diffusers', but weights come from safetensors alone unless the caller says otherwise: other formats can run code."""
        return super().from_pretrained(*arguments, **{"use_safetensors": True, **options})

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As diffusers', but a component that another codec added to the folder is passed over in silence."""
        known = inspect.signature(cls.__init__).parameters
        config_dict = {
            name: value
            for name, value in config_dict.items()
            if name in known or not (isinstance(value, (list, tuple)) and value[0] == "diffusers_compress")
        }
        return super().extract_init_dict(config_dict, **kwargs)

    def run(self, walks, prompts, guidance_scale=1.0):
        """Let the walks of `diffusion.run` share the network, each with its prompt."""
        return self.with_network(lambda network: diffusion.run(walks, network), prompts, guidance_scale)

    def with_network(self, loop, prompts, guidance_scale=1.0):
        """loop(network), where network(x_t [B, C, h, w], t [B], i [B]) is the UNet's output for pictures i, each with its prompt."""
        embeds = self.encode_prompt(prompts)
        empty = self.encode_prompt([""] * len(prompts)) if guidance_scale > 1 else None
        with self.progress_bar(total=0) as bar:

            def network(x_t, timesteps, active):
                bar.update()
                output = self.predict(x_t, timesteps, embeds[active])
                if empty is None:
                    return output
                # Ho & Salimans 2022, classifier-free guidance
                unguided = self.predict(x_t, timesteps, empty[active])
                return unguided + guidance_scale * (output - unguided)

            return loop(network)

    def predict(self, x_t, timesteps, prompt_embeds):
        """The UNet's output [B, C, h, w] in float32 for x_t [B, C, h, w] at one timestep each."""
        t = torch.tensor(timesteps, device=x_t.device)
        return self.unet(x_t.to(self.unet.dtype), t, prompt_embeds, return_dict=False)[0].float()

    def encode_prompt(self, prompts):
        """Text embeddings [B, tokens, dim]."""
        ids = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt"
        ).input_ids
        return self.text_encoder(ids.to(self._execution_device))[0].to(self.unet.dtype)

    def encode_picture(self, x):
        """Pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, H/8, W/8] in float32: the mean, not a draw."""
        mean = self.vae.encode(x.to(self._execution_device, self.vae.dtype)).latent_dist.mode().float()
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode_latent(self, x_0):
        """Scaled latents [B, C, h, w] to pictures [B, 3, 8h, 8w] in float32, about [-1, 1]."""
        z = x_0 / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        if not x.isfinite().all():
            raise ValueError("the model's output is not finite; load it with dtype float32 or bfloat16")
        return x

    def latent_shape(self, height, width):
        """[C, h, w] of a picture's latent."""
        return self.unet.config.in_channels, -(-height // self.vae_scale_factor), -(-width // self.vae_scale_factor)

    def fingerprint(self, own_components=None, own_config=None):
        """Four bytes that tell this model from others: signs of the weights, noise schedule, scale of the latents, a codec's own."""
        levels = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
        config = {name: self.scheduler.config.get(name) for name in levels}
        config["rescale_betas_zero_snr"] = bool(self.scheduler.config.get("rescale_betas_zero_snr"))
        config["scaling_factor"], config["shift_factor"] = self.vae.config.scaling_factor, self.vae.config.shift_factor
        components = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        missing = [name for name, component in components.items() if component is None]
        if missing:
            raise ValueError(f"this pipeline was loaded without its {' and '.join(missing)}; load the whole folder")
        return fingerprint(components | (own_components or {}), config | (own_config or {}))

    def relatives(self):
        """Fingerprints that this model had before something was added to it -> words for that."""
        return {}

    def check_model(self, headers, allow_other_model):
        """WrongModel if a file was made with other weights, unless that is allowed."""
        identity = self.fingerprint()
        for header in headers:
            if header.fingerprint != identity and not allow_other_model:
                raise WrongModel(self.mismatch(header, identity))

    def mismatch(self, header, identity):
        """What a file was made with, what is here, and what to do."""
        made_with, relatives = header.fingerprint, self.relatives()
        here = f"this is model {identity.hex()}, with latents of {list(self.latent_shape(header.height, header.width))} here"
        if made_with in relatives:
            return f"the file was made with this model {relatives[made_with]} ({made_with.hex()}); {here}; load it so"
        return (
            f"the {CODECS[header.codec]} file of {header.width}x{header.height} pixels was made with model {made_with.hex()}, {here}; "
            "`diffusers-compress info FILE --find FOLDER` looks for the right one; allow_other_model (--any-model) decodes to another picture"
        )


def check_rate_and_prompts(target_bpp, max_bytes, quality, prompts, pictures, max_prompt_bytes):
    """ValueError unless there is exactly one rate, in its range, and a prompt of permitted length for each picture."""
    rates = {"target_bpp": target_bpp, "max_bytes": max_bytes, "quality": quality}
    given = [name for name, value in rates.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of target_bpp, max_bytes and quality; given: {', '.join(given) or 'none'}")
    if not rates[given[0]] > 0:
        raise ValueError(f"{given[0]} must be above 0, not {rates[given[0]]}")
    if quality is not None and quality > 1:
        raise ValueError(f"quality must be in (0, 1], not {quality}")
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts were given for {len(pictures)} pictures")
    if any(len(prompt.encode()) > max_prompt_bytes for prompt in prompts):
        raise ValueError(f"a prompt may have at most {max_prompt_bytes} bytes")


def check_output(num_inference_steps, output_type):
    """ValueError for an argument of `decompress` out of its range."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")


def groups_of(batch_size, shapes):
    """Indices of equal shapes, in batches."""
    by_shape = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    return [same[k : k + batch_size] for same in by_shape.values() for k in range(0, len(same), batch_size)]
