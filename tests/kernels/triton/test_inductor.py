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
WRITES = ("plan_write", "write_one")


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


def compiled(shapes):
    """The wrapper that Inductor generates, and the part of it that runs at each call."""
    run = subprocess.run([sys.executable, SCRIPT, shapes], capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stdout[run.stdout.index("    def call(self, args):") :]


def assert_no_copies(body, states):
    """What is written and read are the inputs themselves."""
    assert len(states) == len(set(states)) == 4
    for state in states:
        assert not re.search(rf"(clone|copy_|reinterpret_tensor)\w*\({state}\b", body), state


def test_launches_are_placed_without_copies():
    wrapper, body = compiled("static")
    for kernel in KERNELS:
        assert len(re.findall(rf"\b{kernel}_\d+\.run\(", body)) == 2, kernel  # one for each layer
    for kernel in WRITES:
        assert len(re.findall(rf"\b{kernel}_\d+\.run\(", body)) == 4, kernel
    assert "torch.ops.decoquant" not in body
    states = re.findall(r"\bwrite_one_\d+\.run\((arg\d+_1),", body)
    assert_no_copies(body, states)
    for state in states:
        assert len(re.findall(rf"\w+\.run\(.*\b{state}\b", body)) >= 4
    # No buffer comes near the dense cache of one layer, 2 x 2 x 1024 x 64
    sizes = [ast.literal_eval(size) for size in re.findall(r"empty_strided_cuda\((\(\d[^)]*\))", body)]
    assert sizes
    assert max(map(math.prod, sizes)) < 2 * 2 * 1024 * 64 / 8

    sources = dict(kernel_sources(wrapper))
    assert set(sources) >= {*KERNELS, *WRITES}
    for name, source in sources.items():  # Inductor copies kernels with all that they refer to
        assert undefined(source) == set(), name


@pytest.mark.slow
def test_operators_stay_whole_where_a_size_is_symbolic():
    _, body = compiled("dynamic")
    assert len(re.findall(r"attend_v4\.default\(", body)) >= 2
    assert_no_copies(body, re.findall(r"store_v\d+\.default\((arg\d+_1),", body))
