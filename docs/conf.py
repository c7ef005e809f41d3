"""The site: ``make docs`` builds it into docs/_build."""

from __future__ import annotations

import inspect
from typing import Any

import r2_kernels

project = "r2_kernels"
version = release = r2_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Range regularization of all weights in one fused pass", "page_width": "1100px"}
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Docstrings are Markdown in spirit: what stands in them between bars or asterisks is meant as it is.
_PLAIN = str.maketrans({"|": "\\|", "*": "\\*"})


def _as_text(app: Any, what: str, name: str, owner: object, options: Any, lines: list[str]) -> None:
    code_indent = None  # of the line that announced a block of code
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if code_indent is not None and line and indent <= code_indent:
            code_indent = None
        if code_indent is None and "``" not in line:
            lines[index] = line.translate(_PLAIN)
        if line.endswith("::"):
            code_indent = indent


def _without_inherited(app: Any, what: str, name: str, owner: object, skip: bool, options: Any) -> bool | None:
    """Leave out what torch's base classes bring along."""
    module = getattr(inspect.unwrap(owner) if callable(owner) else owner, "__module__", "r2_kernels")
    return True if isinstance(module, str) and module.startswith("torch") else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _as_text)
    app.connect("autodoc-skip-member", _without_inherited)
