"""Build the compiled engines; without a C compiler the package is installed without them."""

import os
from pathlib import Path

from setuptools import Extension
from setuptools import setup

# Only some of -ffast-math: diverged trials are detected by infinities and NaN, which -ffast-math
# does not keep. Sums are vectorized only where the code says `omp simd`.
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros"]
FLAGS += os.environ.get("ENGINE_CFLAGS", "").split()  # more flags, as .ci/sanitize needs them

CSRC = "optuna_nnhp/engine/csrc"
HEADERS = [str(path) for path in sorted(Path(CSRC).glob("*.h"))]

setup(
    ext_modules=[
        Extension(
            f"optuna_nnhp.engine._{name}_engine",
            [f"{CSRC}/{name}.c"],
            depends=HEADERS,
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name in ("mlp", "gpt")
    ]
)
