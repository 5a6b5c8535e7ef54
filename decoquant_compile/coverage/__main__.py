"""``python -m decoquant_compile.coverage``."""

import sys

try:
    from decoquant_compile.coverage.cli import main
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    if package not in ("click", "transformers"):
        raise
    sys.exit(f"the coverage table needs {package}: pip install 'decoquant-compile[bench]'")

if __name__ == "__main__":
    main(prog_name="python -m decoquant_compile.coverage")
