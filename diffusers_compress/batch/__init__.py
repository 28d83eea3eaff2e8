"""Whole datasets to files and back: grouped by size, over many processes, restartable.

    find_inputs --> groups of like size --> read ahead --> one call of the pipeline --> write --> manifest

The groups follow from the whole sorted list of inputs and whole groups (or whole tar shards) are dealt to the processes, so the
files depend neither on how many processes there are nor on where an earlier run was killed. A file appears under its name when it
is complete, its line in the manifest after that.
"""

from diffusers_compress.batch.codec import decoder, encoder
from diffusers_compress.batch.job import run
from diffusers_compress.batch.manifest import picture_lines
from diffusers_compress.batch.walk import find_inputs

__all__ = ["decoder", "encoder", "find_inputs", "picture_lines", "run"]
