"""The command `eval`."""

import shlex
from importlib.util import find_spec
from pathlib import Path

from diffusers_compress.cli.loading import device_of, model_source
from diffusers_compress.cli.options import Anchor, Codecs, Device, Dtype, Every, Jobs, Metrics, Models, Pictures, Rates, Report
from diffusers_compress.cli.terminal import UsageError, progress, quieten_libraries, say
from diffusers_compress.contract import DEFAULT


def eval_command(
    folder: Pictures,
    out: Report,
    codec: Codecs = DEFAULT,
    bpp: Rates = "0.02,0.05,0.1",
    metrics: Metrics = "",
    model: Models = None,
    every: Every = 1,
    jobs: Jobs = 1,
    anchor: Anchor = "",
    device: Device = None,
    dtype: Dtype = "float32",
):
    """Measure codecs on a folder of pictures, through files: tables, plots, crops and one page, report.html."""
    from diffusers_compress import evaluation
    from diffusers_compress.evaluation.report import markdown, notes_of, quality_table, summarise, write_report
    from diffusers_compress.metrics import PICTURE_METRICS, SET_METRICS, WITHOUT_WEIGHTS

    for library in ("bjontegaard", "matplotlib"):
        if find_spec(library) is None:
            raise ValueError(f'the report needs {library}: pip install "diffusers_compress[eval]"')
    quieten_libraries()
    names = [*PICTURE_METRICS, *SET_METRICS] if metrics == "all" else metrics.split(",") if metrics else list(WITHOUT_WEIGHTS)
    models = {model_source(name): Path(name).name if Path(name).exists() else name for name in model or []}
    codecs = [
        evaluation.parse_codec(text, *known) for text in evaluation.split_codecs(codec) for known in (models or {"": ""}).items()
    ]
    codecs = list(dict.fromkeys(codecs))  # a baseline has no model
    if anchor and anchor not in [known.label for known in codecs]:
        raise UsageError(f"--anchor is {anchor!r}, permitted are {', '.join(known.label for known in codecs)}")
    rates = [evaluation.parse_rate(text) for text in bpp.split(",")]
    device = device_of(device)
    with progress("evaluating") as show:
        of_pictures = tuple(name for name in names if name not in SET_METRICS)
        rows = evaluation.evaluate(folder, out, codecs, rates, of_pictures, device, dtype, every, jobs, show)
    evaluation.write_rows(out, rows)
    figures = evaluation.set_figures(folder, out, rows, [name for name in names if name in SET_METRICS])
    given = {"--codec": codec, "--bpp": bpp, "--metrics": ",".join(names), "--every": every, "--jobs": jobs}
    words = [str(folder), "--out", str(out), *(str(word) for option in given.items() for word in option)]
    command = shlex.join(["diffusers-compress", "eval", *words, *(word for name in model or [] for word in ("--model", name))])
    page = write_report(folder, out, rows, command, figures, anchor)
    for line in markdown(*quality_table(summarise(rows, figures))).splitlines():
        say(out, line)
    for note in notes_of(out, rows, figures):
        say(out, f"note: {note}")
    say(out, f"{page}: {len(rows)} rows, also in {out / 'rows.csv'}")
