"""The attention benchmark on a GPU; without one, the same arms on the CPU in place of it."""

import pytest
import torch
from click.testing import CliRunner

from decoquant_compile.bench import attention, cli, cuda, report
from decoquant_compile.bench.attention import Settings, Shape
from decoquant_compile.bench.timing import wall

SHAPE = Shape("tiny", 2, 4, 2, 64)
ARMS = ("sdpa-bf16", "read-bf16", "attend-4", "step-4", "read-4")

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU in place of the device: nothing is captured, and memory is not told."""
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    monkeypatch.setattr(cuda, "lack", lambda _: "")
    monkeypatch.setattr(cuda, "peak_bytes", lambda call, _: [call(), None][1])
    monkeypatch.setattr(cuda.Captured, "of", lambda call: call)
    monkeypatch.setattr(cuda, "clock", lambda: wall)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(cuda, "flash", lambda q, c: torch.nn.functional.scaled_dot_product_attention(
        q, c[0], c[1], enable_gqa=True))  # fmt: skip


def measured(**settings):
    default = {"bits": (4,), "rounds": 3}
    return cuda.measure(SHAPE, 300, Settings(**default | settings), lambda _: None)


@pytest.mark.usefixtures("stand_in")
def test_the_arms_of_a_device():
    rows = measured()
    assert tuple(row.arm for row in rows) == ARMS
    for row in rows:
        assert (row.threads, row.note, len(row.seconds)) == (0, "", 3)
        assert row.nbytes > 0
        assert row.ratios["SDPA bf16"] > 0
    by_name = {row.arm: row for row in rows}
    assert by_name["sdpa-bf16"].nbytes == SHAPE.cache_bytes(300, torch.bfloat16)
    assert by_name["attend-4"].nbytes == by_name["step-4"].nbytes < by_name["sdpa-bf16"].nbytes
    assert by_name["attend-4"].error < 1e-2
    assert by_name["attend-4"].read_share > 0


@pytest.mark.usefixtures("stand_in")
def test_only_arms_that_are_asked_for():
    assert [row.arm for row in measured(families=("attend", "torch", "inductor"))] == ["attend-4"]
    assert [row.arm for row in measured(families=("sdpa",))] == ["sdpa-bf16"]


@pytest.mark.usefixtures("stand_in")
def test_what_does_not_run_says_why(monkeypatch):
    def refuse(*_):
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    monkeypatch.setattr(cuda, "flash", refuse)
    monkeypatch.setattr(cuda, "lack", lambda nbytes: "no room" if nbytes < 0 else "")
    first, *others = measured()
    assert (first.arm, first.note, first.seconds) == ("sdpa-bf16", "No available kernel. Aborting execution.", [])
    assert all(row.seconds for row in others)
    monkeypatch.setattr(cuda, "lack", lambda _: "no room")
    assert {(row.arm, row.note) for row in measured()} == {(arm, "no room") for arm in ARMS}


def test_a_graph_keeps_what_it_works_on():
    calls = []
    graph = type("Graph", (), {"replay": lambda _: calls.append("replayed")})()
    work = torch.zeros(3)
    arm = cuda.Captured(work.sum, graph)
    arm()
    assert calls == ["replayed"]
    assert arm.call() == 0


@no_gpu
def test_without_a_device_it_is_said_what_is_expected():
    result = CliRunner().invoke(cli.main, ["attention", "--device", "cuda"])
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "expected a CUDA device that PyTorch can use (torch.cuda.is_available()), found none" in text
    assert torch.__version__ in text


@pytest.mark.parametrize(
    ("device", "shapes", "contexts"),
    [
        ("cpu", ["llama8b"], [512, 4096, 32768]),
        ("cuda", ["1x32x8x128", "8x32x8x128", "32x32x8x128"], [4096, 32768, 131072]),
    ],
)
def test_each_device_has_its_own_sizes(monkeypatch, device, shapes, contexts):
    points = []

    def measure(shape, context, _settings, _tell):
        points.append((shape.name, context))
        return []

    monkeypatch.setattr(cuda, "require", lambda: None)
    monkeypatch.setattr(cuda if device == "cuda" else attention, "measure", measure)
    result = CliRunner().invoke(cli.main, ["attention", "--device", device])
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert points == [(shape, context) for shape in shapes for context in contexts]


@pytest.mark.usefixtures("stand_in")
def test_tables_name_the_gpu_and_its_memory():
    rows = measured(families=("sdpa", "attend"))
    for row in rows:
        row.peak = 3 * 2**20
    (table,) = report.tables("attention", rows)
    assert table.title == "tiny, 300 tokens, GPU"
    heads = [column.header for column in table.columns]
    assert [str(cell) for cell in table.columns[heads.index("peak MiB")].cells] == ["3", "3"]


class TestOnADevice:
    pytestmark = gpu

    def test_every_arm_runs(self):
        rows = cuda.measure(Shape("s", 2, 8, 2, 128), 4096, Settings(bits=(4, 16), rounds=3), lambda _: None)
        assert {row.note for row in rows} == {""}
        for row in rows:
            assert all(0 < seconds < 1 for seconds in row.seconds)
            assert row.peak > row.nbytes * 0.9

    def test_a_packed_cache_takes_less_memory(self):
        shape = Shape("s", 8, 32, 8, 128)
        settings = Settings(bits=(4,), rounds=3, families=("sdpa", "attend"))
        rows = {row.arm: row for row in cuda.measure(shape, 4096, settings, lambda _: None)}
        assert rows["attend-4"].peak < 0.4 * rows["sdpa-bf16"].peak
        assert rows["attend-4"].error < 1e-3

    def test_the_clock_measures_the_device(self):
        x = torch.zeros(2**28, device="cuda")
        clock = cuda.clock()
        clock(x.sum)
        assert x.nbytes / 20e12 < clock(x.sum) < x.nbytes / 0.1e12
