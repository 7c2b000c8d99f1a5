"""Profiles of hypothesis: few examples, always the same; many and new ones when asked.

python -m pytest tests/properties --hypothesis-profile=thorough
"""

from __future__ import annotations

from hypothesis import HealthCheck
from hypothesis import settings

from tests.properties.clear import EXAMPLES
from tests.properties.clear import THOROUGH

# Data frames are slow to make, and most of them are refused; fixtures make folders only.
COMMON = settings(
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)
settings.register_profile("quick", COMMON, derandomize=True, max_examples=EXAMPLES)
settings.register_profile("thorough", COMMON, max_examples=THOROUGH)
if settings.get_current_profile_name() != "thorough":
    settings.load_profile("quick")
