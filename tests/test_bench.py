import gc
import json
import runpy
import subprocess
import sys

import pytest
import torch
import transformers
from click.testing import CliRunner

import decoquant_compile
from decoquant_compile.bench import attention, cli, decode, memory, prefill, report
from decoquant_compile.bench.attention import TEMPLATE, Shape, Step, fill
from decoquant_compile.bench.timing import Row, interleave, on_threads, relate
from decoquant_compile.kernels.cpu.native import Kernels
from decoquant_compile.kernels.format import END, Format
from decoquant_compile.kernels.state import CacheState

TINY = "1x4x2x32"


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def measure(*arguments, out):
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return json.loads(out.read_text())


# --------------------------------------------------------------------------------------------------------------- timing


def test_ratios_compare_with_the_fastest_of_the_base_arms():
    rows = [
        Row("s", 1, 1, "slow", [4.0, 9.0, 5.0]),
        Row("s", 1, 1, "fast", [2.0, 2.0, 30.0]),
        Row("s", 1, 1, "ours", [1.0, 0.5, 0.5]),
        Row("s", 1, 1, "missing"),
    ]
    relate(rows, {"one": ("slow",), "best": ("slow", "fast", "missing"), "none": ("missing",)})
    assert [row.ratios for row in rows] == [
        {"one": 1.0, "best": 0.4},
        {"one": 2.5, "best": 1.0},
        {"one": 10.0, "best": 4.0},
        {},
    ]


def test_statistics_of_a_row():
    row = Row("s", 1, 1, "a", [float(n) for n in reversed(range(1, 12))], nbytes=12)
    assert (row.median, row.p10, row.speed) == (6.0, 2.0, 2.0)
    empty = Row("s", 1, 1, "a", nbytes=12)
    assert (empty.median, empty.p10, empty.speed) == (None, None, None)


def test_arms_are_interleaved_and_warm_up_calls_are_not_counted():
    calls, collecting = [], []

    def call(name):
        calls.append(name)
        collecting.append(gc.isenabled())

    seconds = interleave({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=20, warm_up=2)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 20, "b": 20}
    assert all(time >= 0 for times in seconds.values() for time in times)
    rounds = [tuple(calls[at : at + 2]) for at in range(0, len(calls), 2)]
    assert len(rounds) == 22
    assert set(rounds) == {("a", "b"), ("b", "a")}
    assert not any(collecting)
    assert gc.isenabled()


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    with on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with pytest.raises(KeyError), on_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", [(3, 5), (2**20,), (0, 4)])
def test_huge_tensors_are_aligned_and_hold_what_is_written(shape):
    tensor = memory.huge(shape, torch.bfloat16)
    assert tensor.shape == shape
    assert tensor.dtype == torch.bfloat16
    assert tensor.is_contiguous()
    assert tensor.numel() == 0 or tensor.data_ptr() % 2**21 == 0
    view = tensor.fill_(3.0)[1:]
    del tensor
    assert (view == 3).all()


def test_a_ring_gives_the_item_used_longest_ago():
    ring = memory.Ring("abc")
    assert "".join(ring.next() for _ in range(7)) == "abcabca"


def test_a_ring_has_the_bytes_asked_for():
    assert memory.copies(100, 250) == 3
    assert memory.copies(250, 250) == 1
    assert memory.copies(1000, 250) == 1


def test_lack_of_memory_is_stated(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 2**30)
    assert memory.lack(2**30) == ""
    assert memory.lack(2**31) == "needs 2.0 GiB of memory, 1.0 GiB are available"


# ----------------------------------------------------------------------------------------------------- synthetic caches


def filled(role, bits, context, tokens, heads=2, head_dim=32, batch=2):
    form = Format(role, bits, head_dim, torch.bfloat16)
    state = CacheState.empty(form, batch, heads, context, "cpu")
    fill(state, tokens, torch.Generator().manual_seed(3))
    return state


@pytest.mark.parametrize("role", ["key", "value"])
@pytest.mark.parametrize("bits", [16, 8, 5, 4, 3, 2])
def test_a_filled_cache_repeats_tokens_that_were_really_encoded(role, bits):
    tokens, context = 3 * TEMPLATE + 70, 3 * TEMPLATE + 71
    state = filled(role, bits, context, tokens)
    read = state.read().float()
    random = torch.randn(2, 2, TEMPLATE, 32, generator=torch.Generator().manual_seed(3))
    limit = {16: 0.01, 8: 0.02, 5: 0.1, 4: 0.2, 3: 0.3, 2: 0.5}[bits]
    for block in range(3):
        part = read[:, :, block * TEMPLATE : (block + 1) * TEMPLATE]
        assert (part - random).norm() / random.norm() < limit
    first, second = read[:, :, 200:900], read[:, :, TEMPLATE + 200 : TEMPLATE + 900]
    assert torch.equal(first, second)
    assert (read[:, :, tokens:] == 0).all()
    sections = state.format.layout(2, 2, context).views(state.buffer)
    assert sections.header[END] == tokens
    if bits != 16:
        assert sorted(sections.window_positions[0].tolist()) == list(range(tokens - 64, tokens))
        assert sections.sink_positions[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [1, 63, 500, TEMPLATE, TEMPLATE + 1, 2 * TEMPLATE + 63, 2 * TEMPLATE + 64])
def test_a_cache_is_filled_to_any_length(tokens):
    state = filled("key", 4, tokens + 1, tokens, batch=1, heads=1)
    norms = state.read()[0, 0].float().norm(dim=-1)
    assert (norms[:tokens] > 0).all()
    assert norms[tokens] == 0


def test_a_decoding_step_after_the_fill_does_not_fit_again():
    state = filled("key", 4, 2500, 2400, batch=1)
    sections = state.format.layout(1, 2, 2500).views(state.buffer)
    scales = sections.scales.clone()
    state.write(torch.randn(1, 2, 1, 32).bfloat16(), torch.tensor([2400]))
    assert torch.equal(sections.scales, scales)


@pytest.mark.parametrize("bits", [16, 4, 2])
def test_the_operator_agrees_with_dense_attention_over_a_filled_cache(bits):
    shape = Shape("tiny", 2, 6, 3, 32)
    context = 2 * TEMPLATE + 200
    key, value = (filled(role, bits, context, context - 1, heads=3) for role in ("key", "value"))
    step = Step.random(shape, context)
    assert step.error(key, value) < 5e-3
    step.mask[..., context // 2 :] = False
    assert step.error(key, value) > 5e-2  # an attention to something else is noticed


# ---------------------------------------------------------------------------------------------------------- attention


def test_attention_writes_all_rows_and_a_picture(tmp_path):
    out, picture = tmp_path / "a.json", tmp_path / "a.png"
    result = measure(
        "attention", "--shape", TINY, "--context", "70,1k", "--bits", "4,16", "--threads", "1,2",
        "--arms", "sdpa,torch,attend,step,read", "--rounds", "3", "--ring", "1", "--out", picture, out=out,
    )  # fmt: skip
    assert result["benchmark"] == "attention"
    assert {"cpu", "instructions", "cores", "huge_pages", "torch", "huge_bytes"} <= result["machine"].keys()
    assert result["settings"]["contexts"] == [70, 1024]
    arms = {"sdpa-bf16", "sdpa-fp32", "torch-fold", "torch-eager", "torch-gqa", "read-bf16"}
    arms |= {f"{family}-{bits}" for family in ("attend", "step", "read") for bits in (4, 16)}
    points = {(row["context"], row["threads"], row["arm"]) for row in result["rows"]}
    assert points == {(context, threads, arm) for context in (70, 1024) for threads in (1, 2) for arm in arms}
    medians = {(row["context"], row["threads"], row["arm"]): row["median"] for row in result["rows"]}
    for row in result["rows"]:
        at = row["context"], row["threads"]
        assert len(row["seconds"]) == 3
        assert sorted(row["seconds"])[1] == row["median"]
        assert row["ratios"]["SDPA bf16"] == pytest.approx(medians[*at, "sdpa-bf16"] / row["median"])
        best = min(medians[*at, arm] for arm in ("torch-fold", "torch-eager", "torch-gqa"))
        assert row["ratios"]["best torch"] == pytest.approx(best / row["median"])
        assert (row["note"] == "best torch") == (row["arm"].startswith("torch") and row["median"] == best)
        assert row["bytes_per_second"] == pytest.approx(row["nbytes"] / row["median"])
        assert (row["error"] is not None) == row["arm"].startswith("attend")
        assert row["error"] is None or row["error"] < 5e-3
    dense = {row["arm"]: row["nbytes"] for row in result["rows"] if row["context"] == 1024}
    assert dense["sdpa-bf16"] == 2 * 2 * 1024 * 32 * 2
    assert dense["attend-4"] < dense["attend-16"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_as_inductor_compiles_it(tmp_path):
    result = measure(
        "attention", "--shape", TINY, "--context", "64", "--arms", "sdpa,inductor", "--rounds", "3", "--ring", "1",
        out=tmp_path / "a.json",
    )  # fmt: skip
    assert [row["arm"] for row in result["rows"]] == ["sdpa-bf16", "inductor-bf16", "sdpa-fp32"]
    assert all(len(row["seconds"]) == 3 and "Inductor" in row["ratios"] for row in result["rows"])


def test_attention_says_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 0)
    result = measure(
        "attention", "--shape", TINY, "--context", "64", "--bits", "4", "--rounds", "3", out=tmp_path / "a.json"
    )
    assert result["rows"]
    assert all(row["seconds"] == [] and "GiB of memory" in row["note"] for row in result["rows"])


def test_attention_puts_the_number_of_threads_back(tmp_path):
    before = torch.get_num_threads()
    arguments = ("attention", "--shape", TINY, "--context", "64", "--arms", "sdpa", "--rounds", "3", "--ring", "1")
    measure(*arguments, "--threads", before + 1, out=tmp_path / "a.json")
    assert torch.get_num_threads() == before


def test_read_shares_compare_with_the_same_bytes():
    rows = [
        Row("s", 1, 1, "attend-4", [4.0], 20),
        Row("s", 1, 1, "read-4", [2.0], 20),
        Row("s", 1, 1, "read-bf16", [1.0], 80),
        Row("s", 1, 1, "sdpa-bf16", [10.0], 80),
        Row("s", 1, 1, "torch-fold", [8.0], 80),
    ]
    attention.compare(rows)
    assert [row.read_share for row in rows] == [0.5, None, None, 0.1, 0.125]


# --------------------------------------------------------------------------------------------------------------- decode


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def gemma():
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setitem(decode.MODELS, "tiny", llama)
    monkeypatch.setitem(decode.MODELS, "hybrid", gemma)


@pytest.mark.usefixtures("models")
def test_decode_writes_all_rows_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "_installed", lambda package: package == "torch")
    picture = tmp_path / "d.png"
    result = measure(
        "decode", "--shape", "tiny", "--context", "1500", "--bits", "4", "--rounds", "3", "--out", picture,
        out=tmp_path / "d.json",
    )  # fmt: skip
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["inductor", "decoquant-4", "hf-quanto", "hf-hqq", "hf-fp8"]
    for arm in ("inductor", "decoquant-4", "hf-fp8"):
        row = rows[arm]
        assert (len(row["seconds"]), row["note"]) == (3, "")
        assert row["tokens_per_second"] == pytest.approx(1 / row["median"])
        assert row["ratios"]["Inductor"] == pytest.approx(rows["inductor"]["median"] / row["median"])
    for arm in ("hf-quanto", "hf-hqq"):
        assert (rows[arm]["seconds"], rows[arm]["note"]) == ([], "not installed")
    dense = 2 * 2 * 16 * 2 * 1507
    assert rows["inductor"]["nbytes"] == pytest.approx(dense, rel=1e-3)
    assert rows["decoquant-4"]["nbytes"] < 0.6 * dense  # head size 16: the gains weigh more than usual
    assert rows["hf-fp8"]["nbytes"] == pytest.approx(dense / 2, rel=0.01)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("models")
def test_decode_says_why_another_cache_does_not_run():
    settings = decode.Settings(arms=("hf",), rounds=3)
    rows = {row.arm: row for row in decode.measure(decode.load("hybrid"), "hybrid", 100, settings, lambda _: None)}
    assert "full attention" in rows["hf-fp8"].note
    assert rows["hf-fp8"].seconds == []


def test_a_static_cache_is_filled_up_to_its_length():
    cache = decode.static_cache(gemma(), 100, 5)
    window, full = cache.layers
    assert window.keys.shape[2] == 32
    assert full.keys.shape[2] == 105
    assert (window.keys.float().norm(dim=-1) > 0).all()
    assert (full.values[:, :, :100].float().norm(dim=-1) > 0).all()
    assert (full.values[:, :, 100:] == 0).all()
    assert [int(layer.cumulative_length) for layer in cache.layers] == [100, 100]
    assert window.cumulative_length_int == 100


@pytest.mark.usefixtures("models")
def test_decode_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 0)
    settings = decode.Settings(arms=("inductor", "decoquant"))
    rows = decode.measure(decode.load("tiny"), "tiny", 100, settings, lambda _: None)
    assert [(row.arm, row.seconds) for row in rows] == [("inductor", []), ("decoquant-4", [])]
    assert all("GiB of memory" in row.note for row in rows)


@pytest.mark.usefixtures("models")
def test_the_resident_set_of_one_arm():
    answer = decode.resident("tiny", 100, "hf-fp8", 1)
    assert answer["peak"] >= answer["resident"] > 2**26
    assert answer["cache"] == pytest.approx(2 * 2 * 16 * 100, rel=0.1)


def test_resident_sets_come_from_processes_of_their_own(monkeypatch):
    rows = [Row("llama1b", 512, 2, "inductor", [1.0]), Row("llama1b", 512, 2, "hf-fp8"), Row("gemma", 9, 1, "x", [1.0])]
    commands = []

    def process(command, **_):
        commands.append(command[3:])
        if "gemma" in command:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no more\n")
        return subprocess.CompletedProcess(command, 0, 'loading\n{"resident": 7, "peak": 8, "cache": 9}\n', "")

    monkeypatch.setattr(subprocess, "run", process)
    decode.measure_resident(rows, lambda _: None)
    assert commands == [["resident", "llama1b", "512", "inductor", "2"], ["resident", "gemma", "9", "x", "1"]]
    assert (rows[0].resident, rows[0].peak, rows[1].resident, rows[2].resident) == (7, 8, None, None)
    assert rows[2].note == "no resident set: MemoryError: no more"


def test_resident_sets_are_shown_and_drawn(tmp_path):
    rows = [Row("tiny", context, 1, "inductor", [1.0], resident=2**30, peak=2**31) for context in (64, 128)]
    (first, _) = report.tables("decode", rows)
    assert [column.header for column in first.columns][-3:] == ["resident MiB", "peak MiB", "note"]
    assert [next(iter(first.columns[at].cells)).plain for at in (-3, -2)] == ["1024", "2048"]
    picture = tmp_path / "d.png"
    report.write(picture, report.document("decode", {}, {}, rows), rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------------------- prefill


@pytest.mark.usefixtures("models")
def test_prefill_writes_all_rows_and_a_picture(tmp_path):
    picture = tmp_path / "p.png"
    result = measure(
        "prefill", "--shape", "tiny", "--context", "1500", "--bits", "4,16", "--rounds", "3", "--out", picture,
        out=tmp_path / "p.json",
    )  # fmt: skip
    assert result["benchmark"] == "prefill"
    assert (result["settings"]["bits"], result["settings"]["contexts"]) == ([4, 16], [1500])
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ["inductor", "decoquant-4", "decoquant-16", "store-4", "store-16"]
    base = rows["inductor"]["median"]
    for arm, row in rows.items():
        assert (len(row["seconds"]), row["note"]) == (3, "")
        assert row["tokens_per_second"] == pytest.approx(1500 / row["median"])
        if arm.startswith("store"):
            assert row["ratios"] == {}
            assert row["prefill_share"] == pytest.approx(row["median"] / base)
        else:
            assert row["ratios"] == {"Inductor": pytest.approx(base / row["median"])}
            assert row["prefill_share"] is None
    dense = 2 * 2 * 16 * 2 * 1500
    assert rows["inductor"]["nbytes"] == pytest.approx(dense, rel=1e-3)
    assert rows["decoquant-4"]["nbytes"] < 0.6 * dense
    for bits in (4, 16):  # the cache holds its length as well
        assert rows[f"decoquant-{bits}"]["nbytes"] == pytest.approx(rows[f"store-{bits}"]["nbytes"], rel=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


@torch.no_grad()
@pytest.mark.parametrize("context", [32, 100])  # a sliding window that the prompt fills, and one that it runs over
def test_the_writes_of_a_prefill_are_those_of_the_rewritten_graph(monkeypatch, context):
    calls, store = [], Kernels.store

    def spy(self, state, new, positions, query, mask, *sizes_and_format):
        layouts = [None if x is None else (x.shape, x.dtype) for x in (state, new, query)]
        calls.append(repr((layouts, positions.tolist(), mask.tolist(), sizes_and_format)))
        return store(self, state, new, positions, query, mask, *sizes_and_format)

    monkeypatch.setattr(Kernels, "store", spy)
    torch.compiler.reset()
    model, whole, writes = gemma().eval(), decode.Arm("decoquant-4", None), decode.Arm("store-4", None)
    prefill._whole(whole, model, context)()
    assert decoquant_compile.nbytes(whole.cache).packed > 0
    of_the_graph = sorted(calls)
    calls.clear()
    prefill._writes(writes, model, context)()
    assert len(of_the_graph) == 4
    assert sorted(calls) == of_the_graph


@torch.no_grad()
def test_every_prefill_takes_a_new_cache_over_and_none_compiles_again():
    torch.compiler.reset()
    arm = decode.Arm("decoquant-4", None)
    call = prefill._whole(arm, llama().eval(), 100)
    call()
    first = arm.cache
    with torch.compiler.set_stance("fail_on_recompile"):
        call()
    assert arm.cache is not first
    assert decoquant_compile.nbytes(arm.cache).packed == decoquant_compile.nbytes(first).packed > 0


def test_an_arm_that_rewrote_nothing_says_so():
    cache = decode.empty_cache(llama(), 16)
    assert decode.Arm("decoquant-4", cache).note() == "nothing was rewritten"
    assert decode.Arm("inductor", cache).note() == ""


@pytest.mark.usefixtures("models")
def test_prefill_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 0)
    rows = prefill.measure(decode.load("tiny"), "tiny", 100, prefill.Settings(threads=(1, 2)), lambda _: None)
    arms = ["inductor", "decoquant-4", "store-4"]
    assert [(row.threads, row.arm) for row in rows] == [(threads, arm) for threads in (1, 2) for arm in arms]
    assert all(row.seconds == [] and "GiB of memory" in row.note for row in rows)


def test_the_table_of_prefills_shows_the_share_of_the_writes():
    rows = [Row("gemma", 512, 1, *arm) for arm in (("inductor", [2.0]), ("decoquant-4", [2.5]), ("store-4", [0.25]))]
    prefill.compare(rows)
    (table,) = report.tables("prefill", rows)
    shown = {column.header: [cell.plain for cell in column.cells] for column in table.columns}
    assert shown == {
        "arm": ["inductor", "decoquant-4", "store-4"],
        "median s": ["2.0000", "2.5000", "0.2500"],
        "tokens/s": ["256.00", "204.80", "2048.00"],
        "x Inductor": ["1.00", "0.80", ""],
        "of prefill": ["", "", "12.5%"],
        "note": ["", "", ""],
    }


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention", "--shape", "llama9b"), "'llama9b' is no shape"),
        (("attention", "--shape", "1x3x2x64"), "3 query heads are no multiple of 2 KV heads"),
        (("attention", "--shape", "1x0x2x64"), "is no shape"),
        (("decode", "--shape", "llama9b"), "'llama9b' is not one of llama1b, gemma"),
        (("attention", "--context", "-512"), "'-512' is no context length"),
        (("attention", "--context", "512,1"), "'1' is no context length"),
        (("decode", "--context", "32m"), "'32m' is no context length"),
        (("attention", "--context", ""), "'' is no context length"),
        (("attention", "--arms", "sdpa,flash"), "'flash' is not one of sdpa, inductor"),
        (("decode", "--arms", "eager"), "'eager' is not one of inductor, decoquant, hf"),
        (("attention", "--bits", "4,7"), "'7' is not one of 16, 8, 5, 4, 3, 2"),
        (("attention", "--threads", "0"), "'0': expected an integer from 1 to 9999"),
        (("attention", "--rounds", "0"), "0 is not in the range"),
        (("attention", "--pages", "giant"), "'giant' is not one of 'huge', 'default'"),
        (("attention", "--out", "result.csv"), "expected a name that ends in .json or .png"),
        (("decode", "--out", "no/such/folder/a.json"), "there is no folder"),
        (("prefill", "--shape", "llama8b"), "'llama8b' is not one of llama1b, gemma"),
        (("prefill", "--context", "2m"), "'2m' is no context length"),
        (("prefill", "--bits", "4,6"), "'6' is not one of 16, 8, 5, 4, 3, 2"),
        (("prefill", "--threads", "two"), "'two': expected an integer from 1 to 9999"),
        (("prefill", "--rounds", "2"), "2 is not in the range"),
        (("prefill", "--out", "result.txt"), "expected a name that ends in .json or .png"),
        (("prefill", "--arms", "inductor"), "No such option"),
        (("train",), "No such command 'train'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_what_an_interrupted_run_has_measured_is_written(tmp_path, monkeypatch):
    def measured(shape, context, _settings, _tell):
        if context == 128:
            raise KeyboardInterrupt
        return [Row(shape.name, context, 1, "sdpa-bf16", [1.0])]

    monkeypatch.setattr(attention, "measure", measured)
    out = tmp_path / "a.json"
    result = run("attention", "--context", "64,128", "--out", out)
    assert result.exit_code == 1
    assert [row["context"] for row in json.loads(out.read_text())["rows"]] == [64]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    for name in [name for name in sys.modules if name.startswith("decoquant_compile.bench")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match=r"needs psutil: pip install 'decoquant-compile\[bench\]'"):
        runpy.run_module("decoquant_compile.bench", run_name="bench")
