"""What a fresh installation must hold."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys

import pytest
import torch

import decoquant_compile


def test_a_folder_named_kernels_does_not_shadow_the_package_of_that_name():
    import decoquant_compile.kernels

    spec = importlib.util.find_spec("kernels")
    ours = pathlib.Path(decoquant_compile.kernels.__file__).parent
    assert spec is None or spec.origin is None or ours not in pathlib.Path(spec.origin).parents


def test_the_backend_is_found_by_its_name():
    assert "decoquant" in torch.compiler.list_backends()
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="decoquant")
    assert entry.load() is decoquant_compile.decoquant_backend


def test_type_information_is_shipped():
    assert (pathlib.Path(decoquant_compile.__file__).parent / "py.typed").exists()


ROOT = pathlib.Path(decoquant_compile.__file__).parent.parent
SOURCES = sorted(p for folder in ("decoquant_compile", "patterns", "kernels") for p in (ROOT / folder).rglob("*.py"))
NAMED_TUPLE = {"_fields", "_replace", "_asdict"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def own_members(tree):
    """Private members of the classes that a module defines."""
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            match node:
                case ast.FunctionDef(name=name) | ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                    yield name
                case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]):
                    yield name


def private_names(tree, own):
    """Private names of PyTorch that a module imports or reaches into; ATen's operators have no private names."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (
                    n.name for n in names if n.name.startswith("torch.") and any(map(is_private, n.name.split(".")))
                )
            case ast.ImportFrom(module=str(module), names=names) if module.split(".")[0] == "torch":
                for parts in ([*module.split("."), n.name] for n in names):
                    if any(map(is_private, parts)):
                        yield ".".join(parts)
            case ast.Attribute(attr=name) if is_private(name):
                root, *_ = parts = ast.unparse(node).split(".")
                if root in ("torch", "Tensor"):
                    if parts[1] != "ops":
                        yield ".".join(parts)
                elif root not in ("aten", *sys.stdlib_module_names) and name not in own | NAMED_TUPLE:
                    yield ".".join(parts)
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ):
                if is_private(name) and name not in own:
                    yield ast.unparse(node)


def test_only_compat_knows_private_names_of_torch():
    trees = {path: ast.parse(path.read_text()) for path in SOURCES if path.name != "_compat.py"}
    own = {name for tree in trees.values() for name in own_members(tree)} | {"_decoquant_backend"}
    assert len(trees) > 20
    found = {path.name: names for path, tree in trees.items() if (names := sorted(set(private_names(tree, own))))}
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo",
        "import torch._dynamo.config as c",
        "from torch._C import _functorch",
        "from torch import _guards",
        "from torch.utils._pytree import tree_map",
        "torch._C._set_grad_enabled",
        "torch.utils._pytree.tree_map(f, x)",
        "Tensor._make_subclass",
        "node._dynamo_source",
        "x.untyped_storage()._cdata",
        "getattr(model, '_orig_mod', model)",
    ],
)
def test_private_names_are_recognised(source):
    assert list(private_names(ast.parse(source), {"_state"}))


@pytest.mark.parametrize(
    "source", ["torch.ops.aten._to_copy.default", "aten._softmax", "handle._state", "torch.__version__"]
)
def test_other_names_are_not(source):
    assert not list(private_names(ast.parse(source), {"_state"}))


@pytest.mark.parametrize(
    "module", ["kernels.ops", "kernels.codec", "patterns.match", "patterns.symbols", "_compat", "handle"]
)
def test_any_module_can_be_imported_first(module):
    subprocess.run([sys.executable, "-c", f"import decoquant_compile.{module}"], check=True, timeout=120)


@pytest.mark.parametrize("folder", ["patterns", "kernels"])
def test_patterns_and_kernels_stand_alone(folder):
    """They import each their own folder and `_compat`, nothing else of the package."""
    for path in (p for p in SOURCES if folder in p.relative_to(ROOT).parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("decoquant_compile"):
                names = {f"{node.module}.{n.name}" for n in node.names}
                ours = (f"decoquant_compile.{folder}.", "decoquant_compile._compat")
                assert all(name.startswith(ours) for name in names), path


def test_compat_depends_on_nothing_of_ours():
    assert "decoquant_compile" not in (ROOT / "decoquant_compile" / "_compat.py").read_text()
