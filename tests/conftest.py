"""Workers side by side share the cores: OpenMP's threads would wait for each other, spinning.

Hypothesis draws the same cases in every run; `--hypothesis-profile default` draws others.
"""

import os

from hypothesis import settings

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))  # read when torch is imported

settings.register_profile("seeded", derandomize=True)
settings.load_profile("seeded")
