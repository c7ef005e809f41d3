"""What is built, and whether what is shipped suffices to build it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_sdist_is_complete(tmp_path: Path) -> None:
    """Every source of the package, and the tests that hold a build of it to the specification."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "-d", tmp_path]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        shipped = {Path(*Path(name).parts[1:]).as_posix() for name in opened.getnames()}
    sources = [
        path.relative_to(ROOT).as_posix()
        for folder, suffixes in {
            "csrc": (".h", ".cpp", ".cu", ".cuh"),
            "r2_kernels": (".py",),
            "tests": (".py", ".h", ".cpp"),
        }.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes
    ]
    assert len(sources) > 100
    assert set(sources) <= shipped
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= shipped
    assert not any(name.endswith((".so", ".pyc")) for name in shipped)
