"""How `make docs` makes a site of these pages and of the docstrings. Nothing is fetched, to build or to read."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "olmo2-export"
author = "the authors of olmo2-export"
html_title = "olmo2-export"

extensions = ["myst_parser", "sphinx.ext.apidoc", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# A page per room of both packages, written into docs/api/, which git ignores.
apidoc_modules = [
    {
        "path": ROOT / package,
        "destination": f"api/{package}",
        # the workers import the peers
        "exclude_patterns": [str(ROOT / "*/__main__.py"), str(ROOT / "*/bench/workers*")],
        "separate_modules": False,
        "module_first": True,
    }
    for package in ("runtimes", "olmo2_export")
]

autodoc_member_order = "bysource"
autodoc_default_options = {"ignore-module-all": True}  # a name is explained where it is defined
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
default_role = "code"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings: list[str] = []

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_sourcelink = False
html_copy_source = False
exclude_patterns = ["static", "api/*/modules.rst"]


_COLON = "\ue000"


def texts(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make the first page of the README, and the changelog of CHANGELOG.md: so their links are right in both places."""
    origins = {"index": ROOT / "README.md", "changelog": ROOT / "CHANGELOG.md"}
    if docname not in origins:
        return
    app.env.note_dependency(str(origins[docname]))
    text = origins[docname].read_text(encoding="utf-8")
    text = text.replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    source[0] = text + source[0] if docname == "index" else text


def plain(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Take a docstring as plain text: * and | and _ are themselves, and what is indented stands as it is written."""
    sections = re.compile(r"(Args|Returns|Raises|Yields|Attributes):\s*$")
    text, inside, before, out = False, False, "", list[str]()
    for line in lines:
        indented = line.startswith("    ")
        if not indented and line.strip():
            inside = bool(sections.match(line))
        if indented and not inside and not text and not before.strip():
            out += ["::", ""]
            text = True
        elif not indented and line.strip():
            text = False
        if not text:
            line = "".join(
                part if index % 2 else re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", part)
                for index, part in enumerate(re.split(r"(`[^`]*`)", line))
            )
        out.append(line)
        before = line
    if what in ("attribute", "data"):
        out = [line.replace(":", _COLON) for line in out]
    lines[:] = out


def colons(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Give an attribute its colons back: napoleon takes the word before the first for a type."""
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def foreign(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Leave out what a module imports from other libraries."""
    home = str(getattr(obj, "__module__", "")).partition(".")[0]
    called = inspect.isclass(obj) or inspect.isroutine(obj)
    return True if called and home not in ("runtimes", "olmo2_export") else None


def setup(app: Sphinx) -> None:
    """Connect the above; a docstring before napoleon reads its sections."""
    app.add_lexer("import-order", TextLexer)
    app.connect("source-read", texts)
    app.connect("autodoc-skip-member", foreign)
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("autodoc-process-docstring", colons, priority=900)
