"""A saved cache comes back as it was, in this process or another; a file that does not fit is refused."""

import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import decoquant_compile
from decoquant_compile import CacheTensor
from decoquant_compile.dims import Stacking
from decoquant_compile.kernels.format import Format
from decoquant_compile.takeover import Claim, take_over
from tests.end_to_end.harness import SMALL, feed, packing, static_cache
from tests.end_to_end.models import hugging_face, prompts

BHSD, BSHD = (0, 1, 2, 3), (0, 2, 1, 3)
SIZES = (2, 3, 40, 16)
PROMPT, STEPS = 40, 4


def dense(dims=BHSD, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([SIZES[dims.index(i)] for i in range(4)], generator=generator).to(dtype)


def packed(dims=BHSD, seed=0, bits=4, role="key", dtype=torch.bfloat16):
    tensor = dense(dims, seed, dtype)
    take_over([Claim(tensor, dims, Format(role, bits, SIZES[3], dtype, 2, 8))], lengths=[None], masks=[None])
    return tensor


def fresh(dims=BHSD, dtype=torch.bfloat16):
    return torch.zeros([SIZES[dims.index(i)] for i in range(4)], dtype=dtype)


def same_state(one, other):
    return (
        type(one) is type(other) is CacheTensor
        and one._dims == other._dims
        and one._state.format == other._state.format
        and torch.equal(one._state.buffer, other._state.buffer)
    )


class Layer:
    """As Hugging Face's: tensors come with the first use, and tokens are counted in a tensor and in a number."""

    __slots__ = ("__dict__", "seen")

    def __init__(self, slots=SIZES[2]):
        self.keys = self.values = None
        self.slots, self.count, self.seen, self.ready = slots, torch.tensor(0), 0, False

    def fill(self, seed):
        self.keys, self.values = packed(seed=seed), packed(seed=seed + 1, role="value", bits=3)
        self.count.fill_(7)
        self.seen, self.ready, self.dtype, self.device = 7, True, self.keys.dtype, self.keys.device
        return self


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize("dims", [BHSD, BSHD])
@pytest.mark.parametrize("bits", [16, 8, 5, 4, 3, 2])
def test_states_come_back_bit_for_bit(path, dims, bits):
    before = [packed(dims, 0, bits), packed(dims, 1, bits, "value")]
    after = [fresh(dims), fresh(dims)]
    decoquant_compile.save(before, path)
    tensors = list(after)
    assert decoquant_compile.load(after, path) is after
    assert all(a is b for a, b in zip(after, tensors, strict=True)), "a tensor of the cache was replaced"
    assert all(map(same_state, before, after))
    assert all(map(torch.equal, before, after))


def test_everything_that_a_cache_counts_comes_back(path):
    before = SimpleNamespace(layers=[Layer().fill(0), Layer().fill(2)], shared={"length": 7, 3: torch.ones(2)})
    after = SimpleNamespace(layers=[Layer(), Layer()], shared={"length": 0, 3: torch.zeros(2)})
    counts = [layer.count for layer in after.layers]
    decoquant_compile.save(before, path)
    decoquant_compile.load(after, path)
    for one, other, count in zip(before.layers, after.layers, counts, strict=True):
        assert same_state(one.keys, other.keys)
        assert same_state(one.values, other.values)
        assert other.count is count
        assert int(count) == 7
        assert other.seen == 7
        assert type(other.seen) is int
        assert other.ready is True
        assert (other.dtype, other.device) == (one.dtype, one.device)
    assert after.shared["length"] == 7
    assert torch.equal(after.shared[3], torch.ones(2))


def test_buffers_of_a_module(path):
    def module(cache):
        outer = nn.Module()
        outer.inner = nn.Module()
        outer.inner.register_buffer("cache", cache)
        return outer

    before, after = module(packed()), module(fresh())
    decoquant_compile.save(before, path)
    decoquant_compile.load(after, path)
    assert same_state(before.inner.cache, after.inner.cache)
    assert after.inner.cache is dict(after.named_buffers())["inner.cache"]


def test_tensors_in_a_tuple(path):
    before, after = (packed(), torch.ones(2), 3), (fresh(), torch.zeros(2), 3)
    decoquant_compile.save(before, path)
    decoquant_compile.load(after, path)
    assert same_state(before[0], after[0])
    assert torch.equal(after[1], torch.ones(2))


def test_a_loaded_cache_can_be_written_and_restored(path):
    before, after = [packed()], [fresh()]
    decoquant_compile.save(before, path)
    decoquant_compile.load(after, path)
    expected = before[0].dense()
    for cache in (before, after):
        cache[0][:, :, 3] = 1.0
    assert same_state(before[0], after[0])
    decoquant_compile.restore(after)
    assert type(after[0]) is torch.Tensor
    assert not torch.equal(after[0], expected)
    assert torch.equal(after[0], before[0].dense())


def test_the_file_is_as_large_as_the_cache(path):
    before = Layer().fill(0)
    decoquant_compile.save(before, path)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert header < 4096
    assert path.stat().st_size == header + decoquant_compile.nbytes(before).total


def test_a_cache_that_is_not_packed_is_not_saved(path):
    with pytest.raises(ValueError, match="no packed tensor"):
        decoquant_compile.save([dense()], path)
    assert not path.exists()


def test_what_has_no_name_of_its_own_is_not_saved(path):
    handle = packed()
    with pytest.raises(ValueError, match=r"\[0\] and \[1\] are one tensor|\[1\] and \[0\] are one tensor"):
        decoquant_compile.save([handle, handle], path)
    with pytest.raises(ValueError, match=r"\[1\] is a view"):
        decoquant_compile.save([handle, handle[:, :, 2:4]], path)
    for nameless in ({torch.ones(1)}, {(0, 1): torch.ones(1)}):
        with pytest.raises(TypeError, match="under no name"):
            decoquant_compile.save({"a": handle, "b": nameless}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"k": torch.zeros(1, 3, 40, 16).bfloat16(), "n": 0}, r"\['k'\] is \(2, 3, 40, 16\).*\(1, 3, 40, 16\)"),
        (lambda: {"k": torch.zeros(SIZES), "n": 0}, r"bfloat16 in the file and .* torch\.float32 in this cache"),
        (lambda: {"k": 5, "n": 0}, "tensor in the file and a int"),
        (lambda: {"k": fresh(), "n": 2}, r"\['n'\] is 3 in the file and 2 in this cache"),
        (lambda: {"k": packed(), "n": 0}, "packed already; load into a fresh cache"),
        (lambda: {"k": torch.zeros(2, *SIZES).bfloat16()[0], "n": 0}, "does not cover its storage"),
        (lambda: {"k": fresh().to("meta"), "n": 0}, "on meta in this cache; load with device='meta'"),
    ],
)
def test_a_cache_that_does_not_fit_is_left_as_it_was(path, make, message):
    cache = make()
    decoquant_compile.save({"n": 3, "k": packed()}, path)
    kind = type(cache["k"])
    number = cache["n"]
    with pytest.raises(ValueError, match=message):
        decoquant_compile.load(cache, path)
    assert type(cache["k"]) is kind
    assert cache["n"] == number


def test_a_cache_of_another_structure(path):
    decoquant_compile.save([Layer().fill(0), Layer().fill(2)], path)
    with pytest.raises(ValueError, match=r"the file has \[1\]\.\w+, this cache has not"):
        decoquant_compile.load([Layer()], path)
    with pytest.raises(ValueError, match=r"\.slots is 40 in the file and 64 in this cache"):
        decoquant_compile.load([Layer(64), Layer(64)], path)
    with pytest.raises(ValueError, match=r"this cache has \[2\]\.\w+, the file has not"):
        decoquant_compile.load([Layer(), Layer(), Layer()], path)


def test_files_that_are_not_saved_caches(path):
    with pytest.raises(FileNotFoundError, match=r"cache\.safetensors"):
        decoquant_compile.load([fresh()], path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a saved cache, or damaged"):
        decoquant_compile.load([fresh()], path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"not written by decoquant_compile\.save"):
        decoquant_compile.load([fresh()], path)
    decoquant_compile.save([packed()], path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a saved cache, or damaged"):
        decoquant_compile.load([fresh()], path)


def rewrite(path, change):
    """Change the tensors, or the metadata, of a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    layout = json.loads(metadata["layout"])
    change(tensors, metadata, layout)
    metadata["layout"] = json.dumps(layout) if metadata["layout"] else ""
    save_file(tensors, path, metadata)


def change_version(_tensors, metadata, _layout):
    metadata["decoquant_compile"] = "0"


def change_format_version(_tensors, _metadata, layout):
    version, key = layout["packed"]["[0]"][0].split(":", 1)
    layout["packed"]["[0]"][0] = f"{version}0:{key}"


def shorten(tensors, _metadata, _layout):
    tensors["[0]"] = tensors["[0]"][:-1].clone()


def drop_layout(_tensors, metadata, _layout):
    metadata["layout"] = ""


def drop_packed(_tensors, _metadata, layout):
    del layout["packed"]


def section(name, index, value):
    def change(tensors, _metadata, _layout):
        form = Format("key", 4, SIZES[3], torch.bfloat16, 2, 8)
        getattr(form.layout(*SIZES[:3]).views(tensors["[0]"]), name)[index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_version, "has version 0, this package reads version 1"),
        (change_format_version, "another version of this package"),
        (shorten, "is damaged"),
        (drop_layout, "is damaged"),
        (drop_packed, "layout is incomplete"),
        (section("header", 1, SIZES[2] + 1), "is damaged"),
        (section("header", 0, -1), "is damaged"),
        (section("epochs", (1, 5), 200), "is damaged"),
        (section("rows", (0, 1), 100), "is damaged"),
        (section("rows", (0, 0), -2), "is damaged"),
        (section("sink_positions", (1, 0), SIZES[2]), "is damaged"),
        (section("window_positions", (1, 3), -2), "is damaged"),
    ],
)
def test_damaged_files(path, change, message):
    decoquant_compile.save([packed()], path)
    rewrite(path, lambda *_: None)
    decoquant_compile.load([fresh()], path)
    rewrite(path, change)
    cache = [fresh()]
    with pytest.raises(ValueError, match=message):
        decoquant_compile.load(cache, path)
    assert type(cache[0]) is torch.Tensor


def packed_stack(dims=BHSD):
    """Keys and values of two layers in one tensor."""
    tensor = torch.randn(2, 2, *SIZES).to(torch.bfloat16)
    forms = [Format(role, 4, SIZES[3], torch.bfloat16, 2, 8) for role in ("key", "value")] * 2
    claims = [Claim(tensor, dims, form, Stacking((0, 0), (2, 2)), i) for i, form in enumerate(forms)]
    take_over(claims, lengths=[None] * 4, masks=[None] * 4)
    return tensor


def test_a_tensor_of_many_caches(path):
    tensor, into = packed_stack(), torch.zeros(2, 2, *SIZES, dtype=torch.bfloat16)
    decoquant_compile.save([tensor], path)
    assert path.stat().st_size < decoquant_compile.nbytes(tensor).total + 4096
    decoquant_compile.load([into], path)
    (new,) = decoquant_compile.load([None], path)
    for loaded in (into, new):
        assert all(map(same_state, loaded._parts.handles, tensor._parts.handles))
        assert torch.equal(loaded + 0, tensor + 0)
    assert loaded.shape == tensor.shape


@pytest.mark.parametrize("into", ["a tensor", "nothing"])
@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((1, axes) for axes in ([9, 0], [0.5, 0], "ab", [-1, 0], [0], [0, 0, 0], None)),
        *((2, counts) for counts in ([-2, -2], [2, 3], [4], [0, 0], ["2", 2])),
        (3, []),
        (3, 7),
    ],
)
def test_damaged_tensors_of_many_caches(path, into, at, value):
    decoquant_compile.save({"first": packed(), "stack": packed_stack()}, path)

    def change(_tensors, _metadata, layout):
        layout["packed"]["['stack']"][at] = value

    rewrite(path, change)
    stack = torch.zeros(2, 2, *SIZES, dtype=torch.bfloat16) if into == "a tensor" else None
    cache = {"first": fresh(), "stack": stack}
    with pytest.raises(ValueError, match="is damaged"):
        decoquant_compile.load(cache, path)
    assert type(cache["first"]) is torch.Tensor
    assert not cache["first"].any()


def test_a_part_of_other_dims_is_damage(path):
    decoquant_compile.save([packed_stack()], path)
    rewrite(path, lambda _tensors, _metadata, layout: layout["packed"]["[0]"][3][1].__setitem__(4, [0, 2, 1, 3]))
    with pytest.raises(ValueError, match="is damaged"):
        decoquant_compile.load([None], path)


def what_follows(model, cache):
    """Logits of the tokens after the prompt, decoded one by one on the packed cache."""
    compiled = torch.compile(model.forward, backend="decoquant", options={"bits": 4, **SMALL})
    return feed(compiled, prompts(1, PROMPT + STEPS)[:, PROMPT:], [1] * STEPS, cache)


@torch.no_grad()
def go_on_from(path):
    """In a process of its own: load a cache and print what follows."""
    model = hugging_face("llama")
    cache = decoquant_compile.load(static_cache(model, early=False), path)
    held = decoquant_compile.nbytes(cache).packed
    print(json.dumps({"packed": held, "logits": what_follows(model, cache).flatten().tolist()}))  # noqa: T201


@torch.no_grad()
def test_another_process_goes_on_from_the_file(path):
    model = hugging_face("llama")
    cache = static_cache(model)
    with packing(bits=4, **SMALL):
        feed(torch.compile(model.forward), prompts(1, PROMPT), [PROMPT], cache)
    decoquant_compile.save(cache, path)
    held = decoquant_compile.nbytes(cache).packed
    root = str(pathlib.Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, __file__, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    assert there["packed"] == held
    here = what_follows(model, cache).flatten()
    torch.testing.assert_close(torch.tensor(there["logits"]), here, rtol=0, atol=1e-5)


if __name__ == "__main__":
    go_on_from(sys.argv[1])
