"""Inductor places our launches in the graph of a rewritten model, without copies."""

import ast
import builtins
import math
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("fake_cuda.py")
KERNELS = ("plan", "fold", "split", "exact", "combine")


def undefined(source):
    """Names that a module uses and nowhere defines."""
    tree = ast.parse(source)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {*dir(builtins), "__file__"} | {node.id for node in names if isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(name.asname or name.name).split(".")[0] for name in node.names}
    return {node.id for node in names} - known


def kernel_sources(wrapper):
    """Sources of the Triton kernels that a wrapper brings along, by name."""
    for node in ast.walk(ast.parse(wrapper)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            yield node.args[0].value, node.args[1].value


@pytest.mark.parametrize("shapes", ["static", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_launches_are_placed_without_copies(shapes):
    run = subprocess.run([sys.executable, SCRIPT, shapes], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    wrapper = run.stdout
    body = wrapper[wrapper.index("    def call(self, args):") :]
    for kernel in KERNELS:
        assert len(re.findall(rf"\b{kernel}_\d+\.run\(", body)) == 2, kernel  # one for each layer
    assert "torch.ops.decoquant.attend" not in body
    states = re.findall(r"store_v3\.default\((arg\d+_1),", body)
    assert len(states) == len(set(states)) == 4
    for state in states:  # what is written and read are the inputs themselves
        assert not re.search(rf"(clone|copy_|reinterpret_tensor)\w*\({state}\b", body), state
        assert len(re.findall(rf"\w+\.run\(.*\b{state}\b", body)) >= 2
    # No buffer comes near the dense cache of one layer, 2 x 2 x 1024 x 64
    sizes = [ast.literal_eval(size) for size in re.findall(r"empty_strided_cuda\((\(\d[^)]*\))", body)]
    assert sizes
    assert max(map(math.prod, sizes)) < 2 * 2 * 1024 * 64 / 8

    sources = dict(kernel_sources(wrapper))
    assert set(sources) >= set(KERNELS)
    for name, source in sources.items():  # Inductor copies kernels with all that they refer to
        assert undefined(source) == set(), name
