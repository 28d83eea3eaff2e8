"""The rows of a run on disk."""

import csv
import io
import json
from importlib.util import find_spec
from pathlib import Path

from diffusers_compress.files import write_file


def read_rows(out: Path) -> dict:
    """Rows of earlier runs by codec, rate and picture. A last line that was cut is left out."""
    rows, path = {}, out / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["codec"], row["target_bpp"], row["picture"]] = row
    if lines:
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows.values()).encode(), overwrite=True)
    return rows


def printable(value):
    """Text with what is no Unicode, such as bytes in a file's name, as escapes."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def write_rows(out: Path, rows: list[dict]):
    """`rows.csv`, and `rows.parquet` where pyarrow is there."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: printable(value) for name, value in row.items()} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(out / "rows.csv", text.getvalue().encode(), overwrite=True)
    if find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), out / "rows.parquet")
