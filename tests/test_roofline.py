"""The roofline: what is read off machine code, and the arithmetic."""

import json

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton")

from decoquant_compile.bench import cli, cuda, roofline
from decoquant_compile.bench.attention import SHAPES, Settings, Shape
from decoquant_compile.bench.timing import Row
from decoquant_compile.kernels.triton.build import TARGETS, Loop, Statistics

SHAPE = SHAPES["llama8b"]


@pytest.fixture(autouse=True)
def _own_triton_cache(tmp_path_factory):
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.getbasetemp() / "roofline")
        yield


def found(*, registers=128, shared=0, warps=1, **instructions):
    """A kernel whose only loop has these instructions in a turn."""
    return Statistics(registers, 0, shared, warps, instructions, (Loop(0, 100, instructions),))


def gpu(**figures):
    default = {
        "name": "g", "target": "sm_90", "bandwidth": 1e12, "multiprocessors": 100, "clock": 1e9, "issue": 4,
        "integer": 2, "registers": 65536, "shared": 228 * 1024, "warps": 64, "source": "",
    }  # fmt: skip
    return roofline.Gpu(**default | figures)


def test_bytes_of_a_token():
    """Of 128 channels of keys and values at 4 bits, two gains in float16, and two numbers that 8 heads share."""
    assert roofline.stored_bytes(4, 8, 128) == 2 * (64 + 2 + 1 / 8)
    assert roofline.stored_bytes(8, 1, 64) == 2 * (64 + 2 + 1)


def test_the_slowest_is_the_limit():
    """A token takes 132.25 bytes: 13.225 ns of a hundredth of the bandwidth."""
    point = roofline.predict(gpu(), 4, SHAPE, found(IMMA=64, FFMA=192))
    assert (point.bound, point.share, point.instructions, point.integer) == ("memory", 1, 4, 0)
    assert point.speedup == pytest.approx(512 / 132.25)
    point = roofline.predict(gpu(), 4, SHAPE, found(IMMA=64, FFMA=64 * 105))
    assert (point.bound, point.instructions) == ("issue", 106)
    assert point.share == pytest.approx(13.225 / (106 / 4))
    point = roofline.predict(gpu(), 4, SHAPE, found(IMMA=64, PRMT=64 * 50, FFMA=64 * 20))
    assert (point.bound, point.integer) == ("integer pipe", 50)
    assert point.share == pytest.approx(13.225 / (50 / 2))


def test_all_warps_of_a_program_count_and_second_names_do_not():
    point = roofline.predict(gpu(), 4, SHAPE, found(warps=4, IMMA=16, LDGSTS=16, **{"LDGSTS.128": 16}))
    assert (point.instructions, point.asynchronous) == (4 * 32 / 64, 16)


def test_vector_instructions_of_amd_share_a_pipe():
    point = roofline.predict(
        gpu(target="gfx942", integer=1), 4, SHAPE, found(v_mfma_i32_32x32x16_i8=64, v_fma_f32=64 * 20, s_nop=64)
    )
    assert (point.bound, point.integer, point.instructions) == ("vector pipe", 20, 22)
    assert point.share == pytest.approx(13.225 / 20)


@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        (found(registers=255), 8),
        (found(registers=130), 15),  # in eights: 136
        (found(registers=16), 64),
        (found(registers=16, warps=4), 16),
        (found(registers=16, shared=75 * 1024), 3),
    ],
)
def test_programs_of_a_multiprocessor(kernel, programs):
    assert roofline.programs(gpu(), kernel) == programs


def test_a_kernel_without_the_loop_is_refused():
    with pytest.raises(ValueError, match="4 bits for sm_90 has no loop with products of codes"):
        roofline.predict(gpu(), 4, SHAPE, found(HMMA=3))


def test_every_gpu_has_a_target():
    assert {gpu.target for gpu in roofline.GPUS.values()} == set(TARGETS)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_of_a_kernel_as_built(target):
    kernel = roofline.build(target, 2, Shape("tiny", 1, 2, 1, 32))
    turn = roofline.loop(kernel)
    if target == "sm_90":
        # 16 x 8 x 32 products in an instruction: of 64 tokens and 4 rows in two limbs with 64 places of keys (32 are
        # channels, the rest fills words up to four) and with 32 channels of values.
        assert turn["IMMA"] == 64 * 8 * (64 + 32) // (16 * 8 * 32)
    for gpu in roofline.GPUS.values():
        if gpu.target == target:
            point = roofline.predict(gpu, 2, Shape("tiny", 1, 2, 1, 32), kernel)
            assert 0 < point.integer < point.instructions
            assert 0 < point.share <= 1


@pytest.fixture
def quick(monkeypatch):
    """Builds nothing."""
    monkeypatch.setattr(
        roofline,
        "build",
        lambda target, *_: found(**{"v_mfma_i32" if target == "gfx942" else "IMMA": 64, "FFMA": 192}),
    )


def page(*arguments):
    result = CliRunner().invoke(cli.main, ["roofline", *map(str, arguments)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


@pytest.mark.usefixtures("quick")
def test_the_page(tmp_path):
    files = tmp_path / "a.md", tmp_path / "a.json"
    page("--bits", "4,2", "--out", files[0], "--out", files[1])
    text = files[0].read_text()
    for target in TARGETS:  # once, though two GPUs share one
        assert text.count(f"| {target} | 4 | 132.2 | 0.258 |") == 1
    for gpu in roofline.GPUS.values():
        assert f"| {gpu.name} | 4 |" in text
        assert gpu.source in text
    document = json.loads(files[1].read_text())
    assert [(p["gpu"], p["bits"]) for p in document["points"]] == [(g, b) for g in roofline.GPUS for b in (4, 2)]
    if not torch.cuda.is_available():
        assert text.count("| not measured |") == 10
        assert all(point["measured"] is None for point in document["points"])


@pytest.mark.usefixtures("quick")
def test_what_was_measured_stands_beside_its_gpu(monkeypatch):
    def measure(shape, context, settings, _tell):
        assert (shape, context) == (SHAPE, roofline.CONTEXT)
        assert settings == Settings(bits=(4, 2), families=("attend",))
        return [
            Row(shape.name, context, 0, "attend-4", [1.0, 2.0, 9.0], nbytes=int(4.8e12)),
            Row(shape.name, context, 0, "attend-2", note="no room"),
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(cuda, "measure", measure)
    points = roofline.run(SHAPE, (4, 2), lambda _: None)
    assert {(p.gpu, p.bits): p.measured for p in points if p.measured is not None} == {("H200", 4): 0.5}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A1000", None),
    ],
)
def test_a_gpu_is_known_by_its_name(monkeypatch, name, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    here = roofline.present()
    assert (here.name if here else None) == gpu


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", "16,4"), "'16': a cache of 16 bits has no codes"),
        (("--out", "page.png"), "expected a name that ends in .json or .md"),
        (("--shape", "huge"), "'huge' is no shape"),
    ],
)
def test_bad_options_are_refused(arguments, message):
    result = CliRunner().invoke(cli.main, ["roofline", *arguments])
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
