"""The sources are clean under the tools that pyproject.toml configures."""

import pathlib
import subprocess
import sys

import decoquant_compile

ROOT = pathlib.Path(decoquant_compile.__file__).parent.parent


def run(*command, cwd=ROOT):
    result = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_check():
    run("ruff", "check", "--no-cache", ".")


def test_ruff_format():
    run("ruff", "format", "--no-cache", "--check", ".")


def test_mypy(tmp_path):
    """mypy does not read setuptools' `package-dir`: lay the package out as it is installed."""
    package = tmp_path / "decoquant_compile"
    package.mkdir()
    for path in (*(ROOT / "decoquant_compile").iterdir(), ROOT / "patterns", ROOT / "kernels"):
        (package / path.name).symlink_to(path)
    run("mypy", "--config-file", ROOT / "pyproject.toml", "--package", "decoquant_compile", cwd=tmp_path)
