"""Low-bit KV caches for any PyTorch model, by compiling it (DecoQuant, arXiv 2405.12591).

    model.forward = torch.compile(model.forward, backend=decoquant_backend, options={"bits": 4})

or, for whatever is compiled inside the block:

    with decoquant_compile.enable(bits=4) as session:
        model.generate(...)
    print(session.report())
"""

from decoquant_compile.backend import decoquant_backend
from decoquant_compile.explain import explain
from decoquant_compile.handle import CacheTensor
from decoquant_compile.options import Options
from decoquant_compile.report import Report
from decoquant_compile.saved import load, save
from decoquant_compile.session import Session, enable
from decoquant_compile.takeover import Bytes, nbytes, restore

__all__ = [
    "Bytes",
    "CacheTensor",
    "Options",
    "Report",
    "Session",
    "decoquant_backend",
    "enable",
    "explain",
    "load",
    "nbytes",
    "restore",
    "save",
]
