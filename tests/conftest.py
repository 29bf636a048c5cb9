"""Settings of the whole suite: eight CPU devices, and no silent broadcasting."""

import os

FLAG = "--xla_force_host_platform_device_count=8"
if FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# The long suite: some of it is known to fail, and CONTRIBUTING.md says so. It runs with
# `make contract`, and belongs in the default run as soon as it is green and quick.
if not os.environ.get("OPTCLIP_LONG"):
    collect_ignore_glob = [
        "parity/*",
        "test_contract_*.py",
        "test_faults.py",
        "test_laws.py",
        "test_speed.py",
    ]


def pytest_collection_modifyitems(items):
    """Sends tests that share a compiled program to one worker (--dist loadgroup)."""
    for item in items:
        params = (getattr(item, "callspec", None) and item.callspec.params) or {}
        if "name" in params:
            wide = "x64" in item.fixturenames
            group = (item.path.stem, params["name"], params.get("dtype"), wide)
            item.add_marker(pytest.mark.xdist_group("-".join(map(str, group))))


@pytest.fixture
def x64():
    """Turns float64 on for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
