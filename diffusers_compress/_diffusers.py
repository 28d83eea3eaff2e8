"""The one private touch on diffusers: our package as a library that components load from.

A saved pipeline then names a component `["diffusers_compress", "HyperEncoder"]` instead of the full path of its module, so it
loads from the Hub too and outlives a moved file. Every module that defines a component takes its base class from here, and the
component is exported in `diffusers_compress/__init__.py`.
"""

from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

__all__ = ["ModelMixin", "SchedulerMixin"]

LOADABLE_CLASSES.setdefault("diffusers_compress", {})
