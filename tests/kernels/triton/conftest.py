"""Without Triton there is nothing to test here; what is compiled does not reach the user's cache."""

import pytest

pytest.importorskip("triton")


@pytest.fixture(autouse=True, scope="session")
def _own_triton_cache(tmp_path_factory):
    from triton import knobs

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield
