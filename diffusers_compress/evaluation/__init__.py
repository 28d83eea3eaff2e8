"""Codecs on a folder of pictures, measured through files: each picture is written, read back, decoded and compared.

A report's folder holds everything: `rows.csv` and `rows.parquet` (one row a picture and rate), `files/` (what the codecs wrote),
`decoded/` (what came of them), and `rows.jsonl`, where a run that was stopped goes on.
"""

from diffusers_compress.evaluation.codec import Codec, parse_codec, parse_rate, split_codecs
from diffusers_compress.evaluation.rows import write_rows
from diffusers_compress.evaluation.run import evaluate, set_figures

__all__ = ["Codec", "evaluate", "parse_codec", "parse_rate", "set_figures", "split_codecs", "write_rows"]
