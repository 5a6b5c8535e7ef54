"""Inductor places our launches in the graph of a rewritten model, without copies."""

import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("fake_cuda.py")


def calls(wrapper):
    """The generated function that runs the graph."""
    return wrapper[wrapper.index("    def call(self, args):") :]


@pytest.mark.parametrize("shapes", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_launches_are_placed_without_copies(shapes):
    run = subprocess.run([sys.executable, SCRIPT, shapes], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    body = calls(run.stdout)
    for kernel in ("plan", "fold", "split", "exact", "combine"):
        assert len(re.findall(rf"\b{kernel}_\w+\.run\(", body)) == 2, kernel  # one for each layer
    assert "decoquant.attend" not in body.replace("Original ATen: [", "")
    states = re.findall(r"store_v3\.default\((arg\d+_1),", body)
    assert len(states) == len(set(states)) == 4
    # What is mutated and read are the inputs themselves: no clone, no other view of them
    for state in states:
        assert not re.search(rf"(clone|copy_|reinterpret_tensor)\w*\({state}\b(?!\s*=)", body), state
        assert len(re.findall(rf"\w+\.run\(.*\b{state}\b", body)) >= 2
    # The largest buffer is far below a dense cache of one layer, 2 x 2 x 1024 x 64
    sizes = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", body)
    assert sizes
    for size in sizes:
        count = 1
        for number in filter(None, size.split(",")):
            count *= int(number)
        assert count < 2 * 2 * 1024 * 64, size
