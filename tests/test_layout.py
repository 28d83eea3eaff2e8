"""The house stays as it was drawn: imports run downward only, files are short, no machine's paths."""

import ast
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from diffusers_compress.contract import CODECS

ROOT = Path(__file__).parents[1]


def package_files():
    """(module, path): the module is the name below the package, a folder's standing for all its files."""
    package = ROOT / "diffusers_compress"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        if name != "__init__":
            yield name, path
    for path in sorted((ROOT / "pipelines").glob("*.py")):
        yield "pipelines", path


FILES = list(package_files())
IDS = [str(path.relative_to(ROOT)) for _, path in FILES]


def imported_names(source):
    """Full dotted names of what a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that a pipeline's file also works alone"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_keep_to_the_contracts(monkeypatch):
    """Those of pyproject.toml: layers, codecs that do not know each other, rooms of outside libraries."""
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


def root_names(source):
    """What a file takes from the package's root that is no module of it: its public names."""
    names = [name.split(".") for name in imported_names(source)]
    return {parts[1] for parts in names if parts[0] == "diffusers_compress" and len(parts) == 2} - {module for module, _ in FILES}


@pytest.mark.parametrize(("module", "path"), FILES, ids=IDS)
def test_pipelines_and_public_names_are_imported_at_the_top_alone(module, path):
    """import-linter sees neither: a pipeline is found by its name in `contract.CODECS`, a public name by the root's `__getattr__`."""
    source = path.read_text(encoding="utf-8")
    assert not any(name.startswith("diffusers_compress.pipelines") for name in imported_names(source))
    assert module == "cli" or not root_names(source)


@pytest.mark.parametrize(("module", "path"), FILES, ids=IDS)
def test_a_pipeline_imports_no_codec_but_its_own(module, path):
    codecs = {name.split(".")[2] for name in imported_names(path.read_text(encoding="utf-8")) if ".codecs." in name}
    assert module != "pipelines" or codecs <= {path.stem}


# What is shared names no codec, but for these.
NAMES_CODECS = {
    "calibration": "measures a model for the codecs that read the result",
    "cli/__init__": "lists the verbs",
    "cli/refine": "the verb of one codec",
}


def codecs_named(source):
    """The codecs that a file names in its code: their modules, pipelines, numbers and keys; comments and docstrings may name any."""
    keys = {key.lower() for key in CODECS} | {codec.name.lower() for codec in CODECS.values()}
    tree, words = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
        elif isinstance(node, (ast.Name, ast.Attribute)):
            words.add(node.id if isinstance(node, ast.Name) else node.attr)
    for name in imported_names(source):
        words.update(name.split("."))
    return keys & {word.lower().removesuffix("pipeline") for word in words}


@pytest.mark.parametrize(("module", "path"), FILES, ids=IDS)
def test_shared_code_names_no_codec(module, path):
    inside = path.relative_to(ROOT / "diffusers_compress").with_suffix("").as_posix() if module != "pipelines" else ""
    if not {module, inside} & {"codecs", "contract", "pipelines", *NAMES_CODECS}:
        assert codecs_named(path.read_text(encoding="utf-8")) == set()


def test_every_exception_is_one():
    package = ROOT / "diffusers_compress"
    assert all(codecs_named((package / f"{module}.py").read_text(encoding="utf-8")) for module in NAMES_CODECS)


def test_the_format_needs_the_standard_library_alone():
    package = ROOT / "diffusers_compress"
    for path in [package / "errors.py", package / "contract.py", *(package / "format").glob("*.py")]:
        outside = {name.split(".")[0] for name in imported_names(path.read_text(encoding="utf-8"))} - sys.stdlib_module_names
        assert outside <= {"diffusers_compress"}, path


def test_the_package_itself_imports_the_standard_library_alone():
    source = (ROOT / "diffusers_compress" / "__init__.py").read_text(encoding="utf-8")
    outside = {name for name in imported_names(source) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.rpartition(".")[0] for name in outside} == {"diffusers_compress.contract"}


@pytest.mark.parametrize(("module", "path"), FILES, ids=IDS)
def test_files_are_short(module, path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (260 if module == "pipelines" else 400)


def runs(source, length=6):
    """Each run of so many lines, white space folded, outside imports and constructors; blank lines, comments and lone brackets do not count."""
    lines, passed_over = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(node, ast.FunctionDef) and node.name == "__init__":
            passed_over.update(range(node.lineno - 1, node.end_lineno))
    parts = [[]]
    for number, line in enumerate(lines):
        if number in passed_over:
            parts.append([])
        elif re.search(r"\w", line) and not line.strip().startswith("#"):
            parts[-1].append(" ".join(line.split()))
    return {tuple(part[i : i + length]) for part in parts for i in range(len(part) - length + 1)}


def test_pipelines_have_no_six_lines_in_common_but_constructors():
    """What they share is in the mixins: `compress` passes rates on to `read_pictures`, `decompress` what every codec takes to `read_files`."""
    found = {
        path.name: runs(path.read_text(encoding="utf-8"))
        for module, path in FILES
        if module == "pipelines" and path.parent != ROOT
    }
    for one, other in combinations(found, 2):
        shared = found[one] & found[other]
        assert not shared, f"{one} and {other} share\n" + "\n".join(min(shared))


def test_the_checks_see_what_they_forbid():
    assert len(runs("\n".join(f"a{i} = {i}\n\n# b" for i in range(7)))) == 2
    assert runs("def __init__(self):\n" + "\n".join(f"    a{i} = {i}" for i in range(7))) == set()
    assert root_names("def f():\n    from diffusers_compress import images, DiffCPipeline") == {"DiffCPipeline"}
    assert list(imported_names("if x:\n    import constriction.stream")) == ["constriction.stream"]
    named = "from diffusers_compress.codecs.diffc import drift\nx = RELIC if key == 'perco' else 'a diffc file'"
    assert codecs_named(named) == {"diffc", "relic", "perco"} and codecs_named('"""As in Relic."""\nx = images') == set()


def text_files():
    for pattern in ("*.md", "*.toml", ".ci/run", "*/**/*.py", "*/**/*.md", "*/**/*.json"):
        for path in ROOT.glob(pattern):
            hidden = any(part.startswith(".") for part in path.relative_to(ROOT).parts)
            if path != Path(__file__) and (not hidden or pattern == ".ci/run"):
                yield path


def test_no_machine_paths_and_no_registry_hosts():
    forbidden = re.compile(r"""(?:^|[\s"'`(=:])/(?:work|home|root|opt|mnt|srv|Users|tmp)/|pypi\.org|pythonhosted\.org""")
    assert forbidden.search('open("/home/me/photo.png")')
    for path in text_files():
        found = forbidden.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path} holds {found[0]!r}"
