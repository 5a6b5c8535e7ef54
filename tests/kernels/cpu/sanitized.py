"""Random cases under AddressSanitizer and UndefinedBehaviorSanitizer; test_sanitizers.py runs it as a script.

Usage: sanitized.py LEVEL (CASES | overrun)
"""

import sys
from random import Random

import cases
import torch

from decoquant_compile.kernels import reference
from decoquant_compile.kernels.cpu import build, native

OPTIONS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g0")


def run(kernels: native.Kernels, seed: int) -> None:
    """One attention, some writes, and what they leave; every tensor has memory of its own, without a byte to spare."""
    random = Random(seed)
    torch.set_num_threads(random.choice((1, 1, 3)))
    attention = cases.attention(random)
    writer = cases.Writer(random)
    attention.result(kernels)
    for _ in range(4):
        writer.write().apply(kernels, writer.state)
        state = writer.state
        shape = state.batch, state.heads, state.slots
        got = kernels.dequantise(state.buffer, *shape, state.format.key())
        torch.testing.assert_close(
            got, reference.dequantise(state.buffer, *shape, state.format), rtol=1e-2, atol=1e-2, equal_nan=True
        )
        first, length = random.randrange(state.slots + 2), random.randrange(1, state.slots + 300)
        kernels.dequantise_stretch(state.buffer, *shape, first, length, state.format.key())


def overrun(kernels: native.Kernels) -> None:
    """Reads a state of 64 slots as one of 65, past the checks of Python: a harness that works does not survive it."""
    small, large = (native.bind("v4:key:16:64:float32:0:0", 1, 1, slots) for slots in (64, 65))
    buffer = torch.zeros(small.nbytes, dtype=torch.uint8)
    buffer.view(torch.int64)[1] = 65  # END
    out = torch.empty(65 * 64)
    kernels._dequantise(large.layout, buffer.data_ptr(), 0, 65, out.data_ptr(), 0, 1)


def main() -> None:
    level, what = sys.argv[1:]
    kernels = native.Kernels(level, build.load(level, extra=OPTIONS))  # type: ignore[arg-type]
    if what == "overrun":
        overrun(kernels)
    else:
        for seed in range(int(what)):
            run(kernels, seed)
    print(f"finished {what}")  # noqa: T201


if __name__ == "__main__":
    main()
