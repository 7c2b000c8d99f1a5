"""The compiled engine, which setup.cfg has no words for; without a C compiler it is left out."""

from setuptools import Extension
from setuptools import setup

# Not all of -ffast-math: infinities and NaN must stay what they are, diverged trials are known by
# them. Sums are vectorized where the code says so (omp simd).
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros"]

HEADERS = ("mlp_engine", "mlp_engine_twice", "mlp_pieces", "mlp_products", "mlp_team")

setup(
    ext_modules=[
        Extension(
            "optuna_nnhp.training._mlp_engine",
            ["optuna_nnhp/training/mlp_engine.c"],
            depends=[f"optuna_nnhp/training/{name}.h" for name in HEADERS],
            extra_compile_args=FLAGS,
            optional=True,
        )
    ]
)
