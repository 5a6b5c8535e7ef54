"""``python -m decoquant_compile.quality``."""

import sys

try:
    from decoquant_compile.quality.cli import main
except ModuleNotFoundError as missing:
    package = (missing.name or "").partition(".")[0]
    if package not in ("click", "transformers"):
        raise
    sys.exit(f"the measurement of quality needs {package}: pip install 'decoquant-compile[quality]'")

if __name__ == "__main__":
    main(prog_name="python -m decoquant_compile.quality")
