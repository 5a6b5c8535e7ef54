"""``python -m decoquant_compile.bench``."""

import sys

try:
    from decoquant_compile.bench.cli import main
except ModuleNotFoundError as missing:
    if missing.name not in ("click", "psutil", "transformers"):
        raise
    sys.exit(f"the benchmark needs {missing.name}: pip install 'decoquant-compile[bench]'")

if __name__ == "__main__":
    main(prog_name="python -m decoquant_compile.bench")
