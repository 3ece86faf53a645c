"""Tests of simulators that draw are skipped where nothing can; with OPD_JAX_MUST_DRAW set, as by CI, they fail."""

import importlib.util
import os

import pytest

from opd_jax.config import ConfigError
from opd_jax.worlds import mujoco_gl


def needed(package: str = "metaworld") -> None:
    """Skips the test, or the module where it is called by that, unless the package is there and pictures are drawn."""
    try:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"no {package} is installed")
        mujoco_gl.choose()
    except (ImportError, ConfigError) as error:
        if os.environ.get("OPD_JAX_MUST_DRAW"):
            raise
        pytest.skip(f"{error}; pip install 'opd_jax[metaworld]'", allow_module_level=True)
