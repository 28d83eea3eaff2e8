"""Image compression with pretrained diffusion models, as diffusers pipelines."""

from importlib import import_module

from diffusers_compress.contract import CODECS, DEFAULT

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved at first use, so that a shell command answers without loading torch.
_DEFINED_IN = {
    **{codec.pipeline.partition(":")[2]: codec.pipeline.partition(":")[0].partition(".")[2] for codec in CODECS.values()},
    "VarianceHead": "models.variance_head",
    "WienerUNet": "models.wiener_unet",
    "HyperPrior": "models.hyperprior",
    "HyperEncoder": "models.hyper_encoder",
    "BaseEstimator": "models.base_estimator",
    "ParameterNetwork": "models.hyperprior",
    "CDCContextModel": "models.cdc_context",
    "CDCScheduler": "diffusion.cdc_scheduler",
    "CDCUNet": "models.cdc_unet",
    "UQDMNetwork": "models.uqdm_network",
    "UQDMScheduler": "diffusion.uqdm_scheduler",
    "CompressOutput": "outputs",
    "DecompressOutput": "outputs",
    "RoundTripOutput": "outputs",
    "BitstreamError": "errors",
    "NotABitstream": "errors",
    "UnsupportedVersion": "errors",
    "Corrupt": "errors",
    "WrongModel": "errors",
    "LimitExceeded": "errors",
    # diffusers looks its base classes up in the library that a saved component names: see _diffusers.py
    "ModelMixin": "_diffusers",
    "SchedulerMixin": "_diffusers",
}
__all__ = ["__version__", "embedded_model"]
__all__.extend(_DEFINED_IN)


def embedded_model(codec: str = DEFAULT) -> str:
    """Folder of the small Stable-Diffusion model that ships with the package, for `from_pretrained`, or of what was trained over it for
    this codec, such as "perco"."""
    return CODECS[codec].embedded_model()


def __getattr__(name: str):
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_DEFINED_IN[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
