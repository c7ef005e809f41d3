"""The code in the README and in docs/ runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from r2_kernels import ops
from r2_kernels.penalties import PENALTIES

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block, id=f"{path.name}-{number}")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "documentation", "exec"), {"__name__": "documentation"})


def test_there_is_code_to_run() -> None:
    assert BLOCKS


def test_the_contract_is_that_of_the_operators() -> None:
    page = (ROOT / "docs" / "backend.md").read_text()
    documented = dict(re.findall(r"^(\w+)(\(.*\) -> .*)$", page, re.MULTILINE))
    assert documented == ops.SCHEMAS
    rows = dict(re.findall(r"^\| `(\w+)` \| (`\w+`(?:, `\w+`)*) \|$", page, re.MULTILINE))
    assert rows == {name: ", ".join(f"`{field}`" for field in rule.statistics) for name, rule in PENALTIES.items()}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", "-b", "html", "docs", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api.html").read_text()
    for name in ("RangeRegularizer", "soft_min_max", "AdamW", "use_backend"):
        assert f'<span class="pre">{name}</span>' in page
