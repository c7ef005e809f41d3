"""English sentences that every machine has: the documentation strings of Python's standard library."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

from benchmarks.compression.text import python_files

SHORTEST, LONGEST = 30, 300  # characters
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sentences(folder: Path) -> dict[str, list[str]]:
    """Sentences by split, each once; whole files are training, validation or test.

    Raises:
        FileNotFoundError: no Python files in the folder.
    """
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, paths in python_files(folder).items():
        found[name] = []
        for path in paths:
            for sentence in _of_file(path):
                if sentence not in seen:
                    seen.add(sentence)
                    found[name].append(sentence)
    return found


def _of_file(path: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Old escapes in old sources.
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            return []
    documentation = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    paragraphs = [
        " ".join(paragraph.split())
        for text in documentation
        for paragraph in text.split("\n\n")
        if ">>>" not in paragraph
    ]
    split = [sentence for paragraph in paragraphs for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)]
    return [sentence for sentence in split if SHORTEST <= len(sentence) <= LONGEST]
