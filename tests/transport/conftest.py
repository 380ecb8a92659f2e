"""The suite's asserts explain themselves only if pytest may rewrite them."""

import pytest

pytest.register_assert_rewrite("coordlib.testing.suites.transport")
