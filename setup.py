"""The compiled engines, for which setup.cfg has no words; without a C compiler there are none."""

from setuptools import Extension
from setuptools import setup

# Not all of -ffast-math: infinities and NaN must stay what they are, diverged trials are known by
# them. Sums are vectorized where the code says so (omp simd).
FLAGS = ["-O3", "-std=gnu11", "-ffp-contract=fast", "-fopenmp-simd", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", "-fno-signed-zeros"]

SHARED = ("machines", "twice", "functions", "products")
PARTS = {
    "mlp": ("mlp_parts", "mlp_pieces", "mlp_engine", "mlp_team"),
    "gpt": ("gpt_parts", "gpt_pieces", "gpt_attention", "gpt_blocks", "gpt_muon"),
}

setup(
    ext_modules=[
        Extension(
            f"optuna_nnhp.engine._{name}_engine",
            [f"optuna_nnhp/engine/csrc/{name}_engine.c"],
            depends=[f"optuna_nnhp/engine/csrc/{header}.h" for header in (*SHARED, *parts)],
            extra_compile_args=FLAGS,
            optional=True,
        )
        for name, parts in PARTS.items()
    ]
)
