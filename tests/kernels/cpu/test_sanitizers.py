"""No kernel leaves its buffers or relies on undefined behaviour."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from decoquant_compile.kernels.cpu import build

SCRIPT = pathlib.Path(__file__).with_name("sanitized.py")
USABLE = build.usable()


def library(name):
    """Path of one of g++'s own libraries, None where it is not installed."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = pathlib.Path(found.stdout.strip())
    return str(path.resolve()) if path.is_absolute() else None


@pytest.fixture(scope="module")
def environment():
    # The sanitizer must come first of all libraries, and its hooks for exceptions need the C++ library.
    preloaded = [library(name) for name in ("libasan.so", "libstdc++.so")]
    if None in preloaded:
        pytest.skip("needs g++ and its sanitizers")
    return {**os.environ, "LD_PRELOAD": ":".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++"}


def run(level, what, environment):
    command = [sys.executable, SCRIPT, level, str(what)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)


@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=() if level == USABLE[0] else pytest.mark.slow) for level in USABLE]
)
def test_random_cases_are_clean(level, environment):
    done = run(level, 100, environment)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.endswith("finished 100\n")


def test_an_overrun_would_be_found(environment):
    done = run(USABLE[0], "overrun", environment)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "decoquant_dequantise" in done.stderr
