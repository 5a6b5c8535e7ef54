import pytest
import torch
import transformers

from decoquant_compile.options import Options
from decoquant_compile.quality import measure, rivals
from decoquant_compile.quality.divergence import compare
from decoquant_compile.quality.emulate import Emulation, Ours
from decoquant_compile.quality.measure import NotPackedError, Setting
from decoquant_compile.quality.model import Heads, Subject
from tests.quality import tiny

SETTING = Setting(prompt=100, context=150, every=3)


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def subject():
    return Subject(tiny.model())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 260, (2, SETTING.context), generator=torch.Generator().manual_seed(0))


def distance(subject, ids, states):
    exact = measure.exact(subject, ids, SETTING)
    found = compare(exact, {"x": states}, SETTING.following(ids), subject.logits, subject.vocabulary)["x"]
    return found.kl.mean().item()


def test_positions_have_a_token_that_follows():
    setting = Setting(10, 15, 1)
    assert setting.positions.tolist() == [10, 11, 12, 13]
    assert setting.steps == 4
    assert setting.following(torch.arange(15)[None]).tolist() == [[11, 12, 13, 14]]
    assert Setting(10, 20, 4).positions.tolist() == [10, 14, 18]
    assert Setting(10, 20, 4, start=13).positions.tolist() == [13, 17]
    assert Setting(10, 20, 4, start=5).positions.tolist() == [10, 14, 18]


def test_without_quantisation_decoding_gives_the_exact_states(subject, ids):
    ticks = []
    states = measure.decoded(subject, ids, SETTING, {"bits": 16}, "compiled", lambda: ticks.append(1))
    assert len(ticks) == SETTING.steps
    torch.testing.assert_close(states, measure.exact(subject, ids, SETTING), rtol=1e-3, atol=1e-4)


def test_an_average_goes_by_the_slots_of_the_caches(subject, ids):
    """The budget is for all slots, and so may be the number of tokens that are compared on it."""
    one = distance(subject, ids, measure.decoded(subject, ids, SETTING, {"bits": 2.5}, "compiled"))
    other = distance(subject, ids, measure.decoded(subject, ids, SETTING, {"bits": 2.5}, "compiled", slots=400))
    assert one > 1e-5
    assert 0.5 < one / other < 2


@pytest.mark.parametrize("prefill", ["eager", "compiled"])
def test_the_real_operators_diverge_as_their_emulation_does(subject, ids, prefill):
    options = {"bits": 2, "window": 16}
    real = distance(subject, ids, measure.decoded(subject, ids, SETTING, options, prefill))
    scheme = Ours(Options(**options), queries=prefill == "compiled")
    control = distance(subject, ids, measure.emulate(subject, ids, SETTING, Emulation(scheme, SETTING.prompt)))
    assert control > 1e-5
    assert 0.5 < real / control < 2


def test_a_cache_that_was_not_packed_is_an_error(subject, ids):
    with pytest.raises(NotPackedError, match="layers 0, 1 of 2 were not packed"):
        measure.decoded(subject, ids, SETTING, {"max_rewrites": 0}, "eager")


def test_rivals_diverge_less_with_more_bits_and_tick_for_each_window(subject, ids):
    ticks = []

    def run(name):
        emulation = Emulation(rivals.parse(name), SETTING.prompt)
        return distance(subject, ids, measure.emulate(subject, ids, SETTING, emulation, lambda: ticks.append(1)))

    assert run("rtn:8") < run("rtn:4") < run("rtn:2")
    assert len(ticks) == 3 * len(ids)


def test_an_attention_that_the_emulation_does_not_know_is_refused(subject, ids, monkeypatch):
    measure.check_emulation(subject, ids[0, :32])
    attend = Emulation.attend
    doubled = lambda self, *args, **kwargs: (2 * attend(self, *args, **kwargs)[0], None)
    monkeypatch.setattr(Emulation, "attend", doubled)
    with pytest.raises(ValueError, match="only --bits can be measured"):
        measure.check_emulation(subject, ids[0, :32])


def test_each_side_of_each_layer_has_a_cost_below_that_of_all(subject, ids):
    scheme = rivals.parse("rtn:3")
    costs = measure.by_layer(subject, ids, SETTING, scheme, measure.exact(subject, ids, SETTING))
    assert [(cost.layer, cost.role) for cost in costs] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    all_of_them = distance(subject, ids, measure.emulate(subject, ids, SETTING, Emulation(scheme, SETTING.prompt)))
    assert all(0 < cost.divergence.kl.mean().item() < 1.2 * all_of_them for cost in costs)


def test_stored_bits_are_counted_from_the_live_cache():
    config = transformers.Gemma3TextConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
    )
    subject = Subject(tiny.model(transformers.Gemma3ForCausalLM, config))
    bits = measure.stored_bits(subject, {"key_bits": 4, "value_bits": 2}, 1024, torch.arange(50))
    # 3 bits, a gain for each token and head, 4 + 64 tokens in 16 bits, and room for growth
    floor = 3 + 16 / 32 + 16 * 68 / 1024
    assert floor < bits.full < 1.35 * floor
    assert bits.full < bits.held < 16  # of a window of 128 tokens more than half is exact
    assert subject.model.dtype == torch.float32


def test_bits_of_rivals_are_means_over_the_layers(subject):
    rival = rivals.parse("q4_0")
    assert measure.rival_bits(subject, rival, 512) == measure.Bits(4.5, None)
    subject = Subject(tiny.model())
    subject.heads = {0: Heads(1, 64, 64), 1: Heads(3, 64, 64)}
    rival = rivals.parse("rtn:4")
    expected = (1 * (4 + 16 / 64) + 3 * (4 + 16 / 192)) / 4
    assert measure.rival_bits(subject, rival, 512).full == pytest.approx(expected)
