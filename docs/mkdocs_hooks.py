"""What mkdocs.yml needs beside docs/*.md: README.md and its like as pages, options of the command line from typer, links made to fit.

docs/*.md and README.md are written to be read where they lie. On the site all pages lie side by side, what is no page has no link, and a link
that names a file names its title.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ["FORMAT", "RESULTS", "BENCHMARKS", "ROBUSTNESS", "TRAINING", "SECURITY", "CONTRIBUTING", "CHANGELOG"]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """The pages that do not lie in docs/."""
    texts = {f"{name}.md": (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in PAGES}
    texts["index.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
    texts["cli_options.md"] = command_line()
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links and pictures as they are on the site."""

    def mended(match):
        text, target, anchor = match[1], match[2], match[3] or ""
        name = re.sub(r"^(\.\./|docs/)+", "", target)
        name = "index.md" if name == "README.md" else name
        file = files.get_file_from_path(name)
        if file and text.endswith(f"{Path(name).stem}.md") and name != "index.md":
            text = file.content_string.partition("\n")[0].removeprefix("# ")
        return f"[{text}]({name}{anchor})" if file else text

    return LINK.sub(mended, markdown)


def command_line():
    """All verbs with their arguments and options."""
    import typer
    from typer.cli import get_docs_for_click

    from diffusers_compress.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="diffusers-compress"), name="diffusers-compress")
    for name, verb in command.commands.items():  # the list at the top ends each line after 45 letters
        text = re.sub(rf"^\* `{name}`: .*", f"* `{name}`: {verb.get_short_help_str(limit=200)}", text, flags=re.MULTILINE)
    return "# Options of every verb\n\n" + text.partition("\n")[2]
