"""What a fresh installation must hold."""

import importlib.metadata
import importlib.util
import pathlib

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


def test_only_compat_imports_private_torch_modules():
    root = pathlib.Path(decoquant_compile.__file__).parent.parent
    private = ("torch._", "from torch._")
    for folder in ("decoquant_compile", "patterns", "kernels"):
        for path in (root / folder).glob("*.py"):
            if path.name == "_compat.py":
                continue
            lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
            assert not [line for line in lines if any(p in line for p in private)], path
