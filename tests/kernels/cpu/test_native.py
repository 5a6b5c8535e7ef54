"""What stands between the operators and the C++: checks, the fallback without a compiler, threads."""

import ctypes
import functools
import warnings

import pytest
import torch

from decoquant_compile.kernels import cpu, ops, reference
from decoquant_compile.kernels.cpu import build, native
from decoquant_compile.kernels.format import Format
from decoquant_compile.kernels.state import CacheState
from tests.kernels.cpu.conftest import kernels_of

KEY, VALUE = Format("key", 4, 16, torch.float32), Format("value", 4, 24, torch.float32)
SLOTS = 64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def buffer(form=KEY, batch=2, heads=2, slots=SLOTS):
    return CacheState.empty(form, batch, heads, slots, "cpu").buffer


def write(**changed):
    """Operands of a good write, with some changed."""
    operands = {
        "state": buffer(),
        "new": normal(2, 2, 3, 16),
        "positions": torch.arange(3),
        "query": normal(2, 4, 3, 16),
        "mask": torch.ones(2, 1, 3, 8, dtype=torch.bool),
        "slots": SLOTS,
        "shift": 0,
        "first": 0,
        "form": KEY,
        "rows": None,
    }
    return operands | changed


def attention(**changed):
    """Operands of a good attention, with some changed."""
    operands = {
        "query": normal(2, 4, 3, 16),
        "key_state": buffer(),
        "value_state": buffer(VALUE),
        "key": normal(2, 2, 3, 16),
        "value": normal(2, 2, 3, 24),
        "positions": torch.arange(3),
        "mask": torch.ones(2, 1, 3, SLOTS, dtype=torch.bool),
        "scale": None,
        "softcap": None,
        "slots": SLOTS,
        "first": 0,
        "length": SLOTS,
        "key_form": KEY,
        "value_form": VALUE,
        "sink": None,
    }
    return operands | changed


def keyed(operands):
    """Formats as keys, as the C++ takes them."""
    return [x.key() if isinstance(x, Format) else x for x in operands.values()]


def error_of(function, *operands):
    with pytest.raises((ValueError, IndexError)) as caught:
        function(*operands)
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"new": normal(2, 3, 16)},
        {"new": normal(2, 2, 3, 8)},
        {"new": normal(1, 2, 3, 16)},
        {"new": normal(2, 2, 4, 16)},
        {"positions": torch.arange(2)},
        {"positions": torch.arange(3).int()},
        {"positions": torch.arange(3)[None]},
        {"positions": torch.tensor([0, 64, 3])},
        {"positions": torch.tensor([0, -1, 2**40])},
        {"query": normal(2, 4, 2, 16)},
        {"query": normal(2, 3, 3, 16)},
        {"query": normal(4, 3, 16)},
        {"mask": torch.ones(2, 3, 8, dtype=torch.bool)},
        {"mask": torch.ones(3, 1, 3, 8, dtype=torch.bool)},
        {"rows": torch.ones(2, 2, dtype=torch.bool)},
        {"rows": torch.ones(2, 3)},
        {"shift": -1},
        {"slots": 63},
        {"slots": 65},
        {"slots": 0},
        {"state": buffer(VALUE)},
        {"state": buffer(heads=1)},
        {"state": buffer().float()},
        {"state": torch.zeros(2 * buffer().numel(), dtype=torch.uint8)[::2]},
        {"form": VALUE},
    ],
)
def test_wrong_writes_have_the_errors_of_the_oracle_and_change_nothing(native, changed):
    operands = write(**changed)
    before = operands["state"].clone()
    expected = error_of(reference.store, *operands.values())
    assert error_of(native.store, *keyed(operands)) == expected
    assert torch.equal(operands["state"], before)


@pytest.mark.parametrize(
    "changed",
    [
        {"query": normal(4, 3, 16)},
        {"query": normal(1, 4, 3, 16)},
        {"query": normal(2, 3, 3, 16)},
        {"query": normal(2, 4, 3, 24)},
        {"key": normal(2, 2, 3, 24)},
        {"key": normal(2, 2, 2, 16)},
        {"value": normal(2, 2, 3, 16)},
        {"value": normal(2, 1, 3, 24)},
        {"value": normal(2, 2, 24)},
        {"positions": torch.arange(2)},
        {"positions": torch.arange(3)[:, None]},
        {"mask": torch.ones(SLOTS, dtype=torch.bool)},
        {"mask": torch.ones(2, 1, 3, SLOTS + 1, dtype=torch.bool)},
        {"mask": torch.ones(2, 2, 3, SLOTS, dtype=torch.bool)},
        {"mask": torch.ones(2, 1, 2, SLOTS, dtype=torch.bool)},
        {"length": SLOTS - 1},
        {"sink": torch.zeros(2)},
        {"sink": torch.zeros(4, 1)},
        {"slots": SLOTS + 1},
        {"slots": SLOTS - 1},
        {"key_state": buffer(VALUE)},
        {"value_state": buffer()},
        {"value_state": buffer(VALUE, batch=1)},
        {"key_form": VALUE, "value_form": KEY},
        {"value_form": KEY, "value_state": buffer(), "value": normal(2, 2, 3, 16)},
    ],
)
def test_wrong_attentions_have_the_errors_of_the_oracle(native, changed):
    operands = attention(**changed)
    expected = error_of(reference.attend, *operands.values())
    assert error_of(native.attend, *keyed(operands)) == expected


@pytest.mark.parametrize(
    ("state", "shape", "form"),
    [
        (buffer(), (2, 2, 65), KEY),
        (buffer(), (1, 2, 64), KEY),
        (buffer(), (2, 2, 64), VALUE),
        (buffer().short(), (2, 2, 64), KEY),
        (buffer(), (2, 0, 64), KEY),
    ],
)
def test_wrong_reads_have_the_errors_of_the_oracle(native, state, shape, form):
    expected = error_of(reference.dequantise, state, *shape, form)
    assert error_of(native.dequantise, state, *shape, form.key()) == expected


@pytest.mark.parametrize(
    "key", ["v1:key:4:16:float32:4:64", "", "key", "v4:key:4:16:float64:4:64", "v2:key:7:16:float32:4:64"]
)
def test_states_of_another_format_are_refused(native, key):
    calls = [
        (native.store, [*keyed(write())[:8], key]),
        (native.attend, [*keyed(attention())[:-3], key, VALUE.key()]),
        (native.attend, [*keyed(attention())[:-3], KEY.key(), key]),
        (native.dequantise, [buffer(), 2, 2, SLOTS, key]),
    ]
    expected = error_of(Format.parse, key)
    for function, operands in calls:
        assert error_of(function, *operands) == expected


def test_the_good_operands_are_good(native):
    """Else the tests of errors above would show nothing."""
    native.store(*keyed(write()))
    native.attend(*keyed(attention()))


# ------------------------------------------------------------------------------------------------------------ operands


def strided(x):
    """The same values, no dimension contiguous."""
    return torch.stack((x, x), -1).flip(-1)[..., 0]


FORMS_OF_TENSORS = [
    lambda x: x,
    torch.nn.Parameter,
    strided,
    lambda x: x.double(),
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: torch.cat((x, x))[len(x) :],
]


@pytest.mark.parametrize("form", FORMS_OF_TENSORS)
def test_the_kernels_take_tensors_of_any_form(native, monkeypatch, form):
    """They compute the same, and never leave it to the oracle, which is slow."""
    expected, written = write(), buffer()
    native.store(*keyed(expected))
    attended = native.attend(*keyed(attention()))

    def slow(*args):
        raise AssertionError("the oracle was called")

    monkeypatch.setattr(reference, "store", slow)
    monkeypatch.setattr(reference, "attend", slow)
    with torch.no_grad():
        new = {name: form(write()[name]) for name in ("new", "query")}
        native.store(*keyed(write(state=written, positions=strided(torch.arange(3)), **new)))
        changed = {name: form(attention()[name]) for name in ("query", "key", "value")}
        got = native.attend(*keyed(attention(**changed, sink=form(torch.full((1, 4, 1, 1), -torch.inf))[0, :, 0, 0])))
    assert torch.equal(written, expected["state"])
    torch.testing.assert_close(got.to(attended.dtype), attended, rtol=1e-6, atol=1e-6)
    assert got.is_contiguous()


def test_masks_and_flags_of_any_form_are_taken(native, monkeypatch):
    monkeypatch.setattr(reference, "store", None)
    monkeypatch.setattr(reference, "attend", None)
    flags, mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool(), torch.zeros(2, 1, 3, SLOTS)
    mask[..., 5:] = -torch.inf
    states = []
    for of in (lambda x: x, strided):
        operands = write(mask=of(mask[..., :8]), rows=of(flags))
        native.store(*keyed(operands))
        states.append(operands["state"])
    masks = mask, strided(mask), mask.double(), mask == 0, strided(mask == 0), mask.expand(2, 4, 3, SLOTS)
    results = [native.attend(*keyed(attention(mask=mask))) for mask in masks]
    assert torch.equal(*states)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("name", ["shift", "first", "slots"])
def test_numbers_of_another_type_are_errors(native, name):
    with pytest.raises(TypeError):
        native.store(*keyed(write(**{name: "1"})))


# ------------------------------------------------------------------------------------------------------------- fallback


@pytest.fixture
def unchosen(monkeypatch):
    """Forgets which kernels were chosen, until the end of the test."""
    monkeypatch.setattr(cpu, "_kernels", [])
    monkeypatch.delenv("DECOQUANT_CPU", raising=False)
    build.detect.cache_clear()
    yield
    build.detect.cache_clear()


def through_operators():
    """Results of the three operators."""
    written, values = write(positions=torch.arange(60, 63)), write(state=buffer(VALUE), new=normal(2, 2, 3, 24))
    ops.store(*keyed(written))
    values |= {"query": None, "form": VALUE}
    ops.store(*keyed(values))
    attended = ops.attend(*keyed(attention(key_state=written["state"], value_state=values["state"])))
    return written["state"], attended, ops.dequantise(written["state"], 2, 2, SLOTS, KEY.key())


def through_the_oracle(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_kernels", [None])
        return through_operators()


def test_without_a_compiler_there_is_one_warning_and_the_right_result(unchosen, monkeypatch):
    calls = []

    def fail(level):
        calls.append(level)
        raise build.BuildError("no C++ compiler found (g++): install one")

    expected = through_the_oracle(monkeypatch)
    monkeypatch.setattr(build, "load", fail)
    with pytest.warns(
        RuntimeWarning, match=r"plain PyTorch operators, which are right but slow: no C\+\+ compiler"
    ) as caught:
        got = through_operators()
    assert len(caught) == 1
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        through_operators()
    assert cpu.kernels() is None
    assert calls == (["amx", "avx512"] if build.detect() == "amx" else [build.detect()])


def test_a_compiler_that_does_not_know_amx_builds_the_next_level(unchosen, monkeypatch):
    kernels_of("avx512")  # which skips if this machine lacks it
    load = build.load

    def old(level):
        if level == "amx":
            raise build.BuildError("unrecognized command line option '-mamx-int8'")
        return load(level)

    monkeypatch.setattr(build, "load", old)
    monkeypatch.setattr(build, "detect", functools.cache(lambda: "amx"))
    assert cpu.kernels().level == "avx512"


@pytest.mark.parametrize("level", build.LEVELS)
def test_operators_run_the_level_asked_for(unchosen, monkeypatch, level):
    kernels_of(level)  # which skips if this machine lacks it
    expected = through_the_oracle(monkeypatch)
    monkeypatch.setenv("DECOQUANT_CPU", level)
    build.detect.cache_clear()
    got = through_operators()
    assert cpu.kernels().level == level
    assert cpu.kernels() is cpu.kernels()
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("level", "message"), [("sse9", "expected amx, avx512, avx2, portable"), ("AVX2", "expected amx")]
)
def test_a_level_that_does_not_exist_is_an_error_each_time(unchosen, monkeypatch, level, message):
    monkeypatch.setenv("DECOQUANT_CPU", level)
    build.detect.cache_clear()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"DECOQUANT_CPU='{level}': {message}"):
            through_operators()


# -------------------------------------------------------------------------------------------------------------- threads


def test_kernels_run_on_the_threads_of_torch():
    """Another OpenMP runtime would bring a second pool, and both would wait for the same cores."""
    assert native.openmp_parallel() != 0


def test_the_number_of_threads_is_torchs(native, threads, monkeypatch):
    teams = []

    @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def parallel(body, data, team, flags):
        teams.append(team)
        body(data)

    monkeypatch.setattr(native, "_gomp_parallel", ctypes.cast(parallel, ctypes.c_void_p).value)
    slots = 4096
    state, values = buffer(slots=slots), buffer(VALUE, slots=slots)
    new = {"new": normal(2, 2, slots, 16), "positions": torch.arange(slots), "query": None, "mask": None}
    of_values = new | {"new": normal(2, 2, slots, 24), "form": VALUE}
    calls = [
        (native.store, keyed(write(state=state, slots=slots, **new))),
        (native.store, keyed(write(state=values, slots=slots, **of_values))),
        (native.dequantise, [state, 2, 2, slots, KEY.key()]),
        (
            native.attend,
            keyed(attention(key_state=state, value_state=values, slots=slots, length=slots, mask=None)),
        ),
    ]
    for function, operands in calls:
        for count in (1, 2, 3):
            threads(count)
            teams.clear()
            function(*operands)
            assert max(teams, default=1) == count, function


def test_read_reads_everything(native, threads):
    words = torch.randint(-(2**62), 2**62, (3 * 2**17 + 24,), generator=torch.manual_seed(0))
    expected = 0
    for word in words.tolist():
        expected ^= word
    for count in (1, 2):
        threads(count)
        assert native.read(words) == expected % 2**64
