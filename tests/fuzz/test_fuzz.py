"""Random attention modules: what is rewritten equals plain PyTorch at 16 bits, what is not is left as it came."""

import os

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzz.check import check, smallest
from tests.fuzz.modules import LAYOUTS, NEVER, PRODUCTS, Case, cases, seeded_case

CASES = int(os.environ.get("DECOQUANT_FUZZ_CASES", "2000"))  # of the long run
FIRST = int(os.environ.get("DECOQUANT_FUZZ_FIRST", "0"))  # the seed of its first case


def assert_right(case, **how):
    result = check(case, **how)
    assert not result.wrong, f"{result.wrong}\n{case}\nsmallest: {smallest(case, lambda c: check(c, **how).wrong)}"
    return result


@pytest.mark.parametrize("write", ["index_copy", "index_put", "slice", "narrow", "cat", "append"])
@pytest.mark.parametrize("form", ["sdpa", "matmul"])
def test_plain_forms_are_rewritten(write, form):
    """Otherwise the sweeps would show nothing."""
    result = assert_right(Case(batch=2, heads=2, groups=2, write=write, form=form))
    assert (result.rewritten, result.reasons) == (2, [])


# Where each of them has an effect.
MISSES = {twist: Case(form="matmul", batch=2, heads=2, groups=2, twists=(twist,)) for twist in NEVER}


@pytest.mark.parametrize("twist", sorted(MISSES))
def test_near_misses_are_never_rewritten(twist):
    result = assert_right(MISSES[twist])
    assert not result.rewritten
    assert result.reasons


@seed(6)
@settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_sample(case):
    assert_right(case)


@pytest.mark.parametrize("number", range(12))
def test_uniform_sample(number):
    assert_right(seeded_case(number))


@pytest.mark.parametrize(
    "case",
    [
        Case(heads=2, groups=2, layout="BSHD", write="slice", read="prefix"),
        Case(heads=2, twists=("returns keys",)),
        Case(batch=2, heads=2, layout="BSHD", twists=("one pair",)),
    ],
)
def test_inductor(case):
    assert_right(case, inductor=True)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_long_run():
    """`DECOQUANT_FUZZ_CASES` cases, from seed `DECOQUANT_FUZZ_FIRST` on; all that are wrong are named."""
    results = {number: check(seeded_case(number)) for number in range(FIRST, FIRST + CASES)}
    wrong = [f"{n}: {r.wrong}\n{seeded_case(n)}" for n, r in results.items() if r.wrong]
    assert not wrong, "\n".join(wrong)
    valid = [r for r in results.values() if not r.invalid]
    assert len(valid) > 0.9 * CASES
    assert sum(bool(r.rewritten) for r in valid) > 0.2 * CASES


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", PRODUCTS)
@pytest.mark.parametrize("write", ["index_copy", "slice"])
def test_inductor_sweep(layout, form, write):
    assert_right(Case(batch=2, heads=2, groups=2, layout=layout, form=form, write=write), inductor=True)
