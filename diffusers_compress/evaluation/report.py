"""Rows of an evaluation as tables, plots, crops, and one self-contained HTML page."""

import base64
import json
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from diffusers_compress import images
from diffusers_compress.files import png, skip_notes, write_file
from diffusers_compress.metrics import PICTURE_METRICS, SET_METRICS

METRICS = {**PICTURE_METRICS, **SET_METRICS}
LABELS = {name: metric.label for name, metric in METRICS.items()}
SECONDS = ("seconds", "denoiser_seconds", "autoencoder_seconds", "calls", "peak_mib")
CROP = 192  # pixels
MARKERS, DASHES = "os^Dv<>P*X", ("-", "--", "-.", ":")  # so that nobody needs the colours
MEANS = """<p>Means over the pictures. ↑ more is better, ↓ less is better, → 1 the nearer to 1. Drift, where a file tells it: how far the
decoder's last x_t lies from the encoder's (rms; noise and signal have about 1).</p>"""
TIMES = "<p>Wall seconds a picture, means. Of codecs whose rate is searched for, one encoding at the rate found.</p>"

# ------------------------------------------------------------------------------------------------------------------- tables


def metric_names(rows: list[dict]) -> list[str]:
    """The picture metrics that were asked for, in the table's order."""
    return [name for name in PICTURE_METRICS if any(name in row for row in rows)]


def mean(rows: list[dict], name: str) -> float | None:
    """Mean over all rows, None if one has no figure: a mean over other pictures would compare nothing."""
    values = [row.get(name) for row in rows]
    return None if not values or any(value is None for value in values) else float(np.mean(values))


def summarise(rows: list[dict], set_figures: dict | None = None) -> list[dict]:
    """One line a codec and rate: pictures, means of all figures, and how many pictures took more bits than the target."""
    groups = {}
    for row in rows:
        groups.setdefault((row["codec"], row["target_bpp"]), []).append(row)
    lines = []
    for (codec, target), mine in groups.items():
        line = {"codec": codec, "target_bpp": target, "pictures": len(mine), "over": sum(not row.get("reached") for row in mine)}
        names = ["bpp", "bytes", *metric_names(rows), *(f"{side}_{name}" for side in ("encode", "decode") for name in SECONDS)]
        line |= {name: mean(mine, name) for name in names}
        drifts = [row["drift"] for row in mine if row.get("drift") is not None]
        line |= {"drift": max(drifts)} if drifts else {}
        lines.append(line | (set_figures or {}).get((codec, target), {}))
    return lines


def measured(summary: list[dict]) -> list[str]:
    """The metrics that have a figure for some codec and rate, in the table's order."""
    return [name for name in METRICS if any(line.get(name) is not None for line in summary)]


def bd_rates(summary: list[dict], anchor: str, names: list[str]) -> list[dict]:
    """What `bd_rate` says of each codec against the anchor, a line a codec, by metric."""
    others = [codec for codec in dict.fromkeys(line["codec"] for line in summary) if codec != anchor]
    return [
        {"codec": codec, **{name: bd_rate(curve(summary, anchor, name), curve(summary, codec, name)) for name in names}}
        for codec in others
    ]


def bd_rate(anchor: tuple[list[float], list[float]], test: tuple[list[float], list[float]]) -> dict | str:
    """BD-rate in percent, the bits that `test` takes more for the same figure, and the share of the anchor's range it is over.

    Akima interpolation of log rate (Herglotz et al. 2022, package bjontegaard) over the range of figures that both curves cover;
    in words why there is none.
    """
    import bjontegaard

    for rates, figures in (anchor, test):
        if len(rates) < 2:
            return "no curve"
        if figures != sorted(set(figures)):
            return "not better with every bit"
    low, high = max(anchor[1][0], test[1][0]), min(anchor[1][-1], test[1][-1])
    if low >= high:
        return "no common range"
    percent = bjontegaard.bd_rate(*anchor, *test, method="akima", require_matching_points=False, min_overlap=0)
    return {"percent": float(percent), "share": (high - low) / (anchor[1][-1] - anchor[1][0])}


def curve(summary: list[dict], codec: str, name: str) -> tuple[list[float], list[float]]:
    """Mean rates, and mean figures turned so that higher is better, of a codec's different points, from low rate to high."""
    sign = 1 if METRICS[name].best > 0 else -1
    points = {(line["bpp"], sign * line[name]) for line in summary if line["codec"] == codec and line.get(name) is not None}
    rates, figures = zip(*sorted(points)) if points else ((), ())
    return list(rates), list(figures)


def cell(value, digits: int = 4) -> str:
    if value is None:
        return "n/a"
    return value if isinstance(value, str) else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def quality_table(summary: list[dict]) -> tuple[list[str], list[list[str]]]:
    names = measured(summary)
    drift = ["largest drift"] if any("drift" in line for line in summary) else []
    head = ["codec", "target bpp", "bpp", "over target", *(LABELS[name] for name in names), *drift]
    body = []
    for line in summary:
        over = f"{line['over']} of {line['pictures']}" if line["over"] else "none"
        body.append([line["codec"], cell(line["target_bpp"]), cell(line["bpp"]), over, *(cell(line.get(n)) for n in names)])
        body[-1] += [cell(line.get("drift"), 2) for _ in drift]
    return head, body


def direction(name: str) -> str:
    """An arrow: whether more or less of a metric is better."""
    return "→ 1" if name == "hf_ratio" else "↓" if METRICS[name].best == 0 else "↑"


def cost_table(summary: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Seconds a picture, split into the denoiser, the autoencoder and the rest (coding and all else)."""
    head = ["codec", "target bpp"]
    for side in ("encode", "decode"):
        head += [f"{side}, s", "denoiser", "autoencoder", "rest", "denoiser calls", "peak MiB"]
    body = []
    for line in summary:
        values = [line["codec"], cell(line["target_bpp"])]
        for side in ("encode", "decode"):
            total, denoiser, autoencoder, calls, peak = (line[f"{side}_{name}"] for name in SECONDS)
            rest = None if total is None else total - denoiser - autoencoder
            values += [*(cell(value, 3) for value in (total, denoiser, autoencoder, rest, calls)), cell(peak)]
        body.append(values)
    return head, body


def bd_table(lines: list[dict], anchor: str, names: list[str]) -> tuple[list[str], list[list[str]]]:
    head = [f"BD-rate against {anchor}", *(LABELS[name] for name in names)]
    body = []
    for line in lines:
        found = (line[name] for name in names)
        cells = [bd if isinstance(bd, str) else f"{bd['percent']:+.1f} % (over {bd['share']:.0%})" for bd in found]
        body.append([line["codec"], *cells])
    return head, body


def markdown(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(values) + " |" for values in [head, ["--"] * len(head), *body])


# -------------------------------------------------------------------------------------------------------- plots and pictures


def plots(out: Path, summary: list[dict], names: list[str]) -> list[Path]:
    """One plot a metric over the rate, as PNG and SVG; the paths of the SVG files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates, paths = sorted({line["target_bpp"] for line in summary}), []
    for name in names:
        figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
        for i, codec in enumerate(dict.fromkeys(line["codec"] for line in summary)):
            points = sorted(
                {(line["bpp"], line[name]) for line in summary if line["codec"] == codec and line.get(name) is not None}
            )
            if points:
                how = {"marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
                axes.plot(*zip(*points), **how, markersize=5, label=codec)
        axes.set(xscale="log", xlabel="bits per pixel", ylabel=f"{LABELS[name]} {direction(name)}")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        for suffix in (".png", ".svg"):
            path = out / "plots" / f"{name}{suffix}"
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        paths.append(path)
        pyplot.close(figure)
    return paths


def most_detailed(image: Image.Image, side: int = CROP) -> tuple[int, int, int, int]:
    """The box of this side, on a grid of half sides, whose luma varies most from pixel to pixel."""
    luma = np.asarray(image.convert("L"), dtype=float)
    change = np.abs(np.diff(luma, axis=0))[:, 1:] + np.abs(np.diff(luma, axis=1))[1:]
    tops, lefts = (range(0, max(1, size - side + 1), side // 2) for size in luma.shape)
    best = max(
        ((top, left) for top in tops for left in lefts), key=lambda at: change[at[0] : at[0] + side, at[1] : at[1] + side].sum()
    )
    return best[1], best[0], min(image.width, best[1] + side), min(image.height, best[0] + side)


def crops(folder: Path, out: Path, rows: list[dict], count: int = 3) -> list[tuple[str, list[tuple[str, Image.Image]]]]:
    """(picture, [(caption, crop)]): the original and each codec, for `count` pictures spread over the set, at the middle one of the rates
    that most codecs have.
    """
    codecs = {
        rate: {row["codec"] for row in rows if row["target_bpp"] == rate} for rate in sorted({row["target_bpp"] for row in rows})
    }
    most = max(map(len, codecs.values()))
    rates = [rate for rate in codecs if len(codecs[rate]) == most]
    rate = rates[len(rates) // 2]
    names = list(dict.fromkeys(row["picture"] for row in rows))
    found = []
    for name in [names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))]:
        original = images.to_output(images.to_tensor(images.open_image(folder / name))[0][None])[0]
        box = most_detailed(original)
        tiles = [("original", original.crop(box))]
        for row in rows:
            if (row["picture"], row["target_bpp"]) == (name, rate) and "decoded" in row:
                over = "" if row["reached"] else f", over the target of {rate:g}"
                caption = f"{row['codec']}, {row['bytes']:,} bytes, {row['bpp']:.4f} bpp{over}"
                tiles.append((caption, images.open_image(out / row["decoded"]).crop(box)))
        found.append((name, tiles))
    return found


# --------------------------------------------------------------------------------------------------------------------- page


STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll, .tiles { overflow-x: auto; }
/* A shadow at the right as long as there is more to the right (Lea Verou's scrolling shadows): phones show no scroll bar. */
.scroll { background: linear-gradient(to left, Canvas 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, #8888, transparent) right / 1rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8886; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; min-width: 4.5rem; } th:first-child, td:first-child { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; }
td:first-child { white-space: normal; min-width: 4.5rem; max-width: 9rem; overflow-wrap: break-word; }
.plots { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.plots img { max-width: 100%; height: auto; background: white; }
.tiles { display: flex; gap: .5rem; padding-bottom: .5rem; } .tiles figure { flex: none; width: 192px; }
.tiles img { width: 100%; image-rendering: pixelated; } .zoom:checked ~ .tiles figure { width: 576px; }
figure { margin: 0; } figcaption { font-size: .8rem; } dt { font-weight: bold; } dd { margin-bottom: .3rem; }
pre { white-space: pre-wrap; font-size: .85rem; }
"""


def picture_tag(data: bytes, kind: str, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def html_table(head: list[str], body: list[list[str]]) -> str:
    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)]
    lines += ["".join(f"<td>{escape(text).replace(':', ':<wbr>')}</td>" for text in values) for values in body]
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def write_report(
    folder: Path, out: Path, rows: list[dict], command: str, set_figures: dict | None = None, anchor: str = ""
) -> Path:
    """Plots, `summary.json` and `report.html` in `out`; the path of the page. `command` is what made the rows."""
    summary = summarise(rows, set_figures)
    names = measured(summary)
    compared = [name for name in names if name != "hf_ratio"]  # of which neither more nor less is better
    anchor = anchor or rows[0]["codec"]
    bd = bd_rates(summary, anchor, compared)
    write_file(out / "summary.json", json.dumps({"summary": summary, "anchor": anchor, "bd_rate": bd}, indent=1).encode(), True)

    head, body = quality_table(summary)
    arrows = {LABELS[name]: f"{LABELS[name]} {direction(name)}" for name in names}
    sections = ["<h2>Quality</h2>", html_table([arrows.get(label, label) for label in head], body), MEANS, "<dl>"]
    sections += [f"<dt>{escape(arrows[LABELS[name]])}</dt><dd>{escape(METRICS[name].about)}</dd>" for name in names]
    sections.append("</dl>")
    sections += ["<h2>Rate against distortion and realism</h2>", '<div class="plots">']
    sections += [
        picture_tag(path.read_bytes(), "svg+xml", f"{path.stem} over bits per pixel") for path in plots(out, summary, names)
    ]
    sections += ["</div>", "<h2>BD-rate</h2>", html_table(*bd_table(bd, anchor, compared))]
    sections += [
        "<p>Bits more (+) or less (-) for the same mean figure; in brackets, the share of the anchor's range compared.</p>"
    ]
    sections += ["<h2>Time and memory</h2>", html_table(*cost_table(summary)), TIMES]
    sections.append("<h2>Crops, at the same bytes</h2>")
    for number, (picture, tiles) in enumerate(crops(folder, out, rows)):
        figures = (f"<figure>{picture_tag(png(t), 'png', c)}<figcaption>{escape(c)}</figcaption></figure>" for c, t in tiles)
        zoom = f'<input type="checkbox" class="zoom" id="zoom{number}"> <label for="zoom{number}">three times as large</label>'
        sections.append(f'<section><h3>{escape(picture)}</h3>{zoom}<div class="tiles">{"".join(figures)}</div></section>')
    notes = notes_of(out, rows, set_figures) or ["none"]
    sections += ["<h2>Notes</h2><ul>", *(f"<li>{escape(note)}</li>" for note in notes), "</ul>"]
    sections += ["<h2>Made by</h2>", f"<pre>{escape(command)}\n\n{escape(software_text(out, rows))}</pre>"]

    page = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Codecs compared</title>'
    page += f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
    page += f"<h1>{len({row['picture'] for row in rows})} pictures, {len({row['codec'] for row in rows})} codecs</h1>"
    page += "<p>Every figure was taken on a file that was written, read back and decoded; "
    page += "bpp = 8 x bytes of the file / pixels of the original.</p>" + "".join(sections) + "</body></html>"
    write_file(out / "report.html", page.encode(errors="backslashreplace"), True)
    return out / "report.html"


def notes_of(out: Path, rows: list[dict], set_figures: dict | None = None) -> list[str]:
    """What is to know of the rows, each once: drift, metrics that are not there, pictures that were passed over."""
    notes = sorted({note for row in rows for note in row.get("note", "").split(" | ") if note})
    notes += sorted({figures["note"] for figures in (set_figures or {}).values() if "note" in figures})
    return notes + skip_notes(json.loads((out / "skipped.json").read_text()))


def software_text(out: Path, rows: list[dict]) -> str:
    """Versions, device and models, a line each."""
    facts = json.loads((out / "software.json").read_text())
    facts |= {"device": rows[0]["device"], "dtype": rows[0]["dtype"]}
    facts |= {f"code and model of {row['codec']}": row["state"] for row in rows}
    facts |= {f"fingerprint of {row['codec']}": row["fingerprint"] for row in rows if "fingerprint" in row}
    return "\n".join(f"{name} {value}" for name, value in facts.items())
