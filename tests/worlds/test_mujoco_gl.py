"""Which OpenGL MuJoCo is given: the first that draws, and the next where it does not."""

import os
import subprocess
import sys

import drawing
import pytest

from opd_jax.config import ConfigError
from opd_jax.worlds import mujoco_gl

drawing.needed("mujoco")

PICTURE = """
import sys
import mujoco
from opd_jax.worlds import mujoco_gl
mujoco_gl.BACKENDS = tuple(sys.argv[1].split(","))
chosen = mujoco_gl.choose()  # after MuJoCo was imported, which has read the variable
scene = '<geom size=".2"/><geom pos=".3 0 0" size=".1" group="2"/><camera name="c" pos="0 0 1"/>'
model = mujoco.MjModel.from_xml_string(f'<mujoco><worldbody><light pos="0 0 2"/>{scene}</worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
seen = []
for hidden in ((), (2,)):
    camera = mujoco_gl.Camera(model, 32, hidden=hidden)
    seen.append(camera.picture(data, "c"))
    camera.close()
assert seen[0].shape == (32, 32, 3) and seen[0].std() > 10
assert (seen[0][:, 20:] != seen[1][:, 20:]).any() and (seen[0][:, :16] == seen[1][:, :16]).all()
print("chosen", chosen)
"""


@pytest.fixture
def unset(monkeypatch):
    """As in a process of which nobody has said what draws; what `choose` sets is taken back."""
    here = os.environ.get("MUJOCO_GL")
    if not here:
        pytest.skip("MuJoCo chooses by itself on this system")
    monkeypatch.setenv("MUJOCO_GL", here)
    monkeypatch.delenv("MUJOCO_GL")
    mujoco_gl.choose.cache_clear()
    yield here
    mujoco_gl.choose.cache_clear()


def chosen(backends: str) -> str:
    ran = subprocess.run([sys.executable, "-c", PICTURE, backends], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.split()[-1]


def test_what_is_chosen_draws(unset):
    assert chosen(",".join(mujoco_gl.BACKENDS)) in mujoco_gl.BACKENDS


def test_where_the_first_is_broken_the_next_draws(unset, monkeypatch):
    assert chosen(f"broken,{unset}") == unset
    monkeypatch.setattr(mujoco_gl, "BACKENDS", ("broken", unset, "never tried"))
    assert mujoco_gl.choose() == os.environ["MUJOCO_GL"] == unset
    monkeypatch.delenv("MUJOCO_GL")
    mujoco_gl.choose.cache_clear()
    monkeypatch.setattr(mujoco_gl, "BACKENDS", ("broken", "worse"))
    with pytest.raises(ConfigError, match="MuJoCo cannot draw with MUJOCO_GL=broken, worse: apt-get install"):
        mujoco_gl.choose()
    assert "MUJOCO_GL" not in os.environ


def test_missing_renderer_is_one_line(unset, monkeypatch):
    """One that was asked for is not replaced by another."""
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nothing")  # as where the library is missing
    with pytest.raises(ConfigError, match="MuJoCo cannot draw with MUJOCO_GL=osmesa: apt-get install") as caught:
        mujoco_gl.choose()
    assert "\n" not in str(caught.value)


def test_tests_that_draw_are_skipped_or_fail(monkeypatch):
    def broken():
        raise ConfigError("nothing draws")

    monkeypatch.setattr(mujoco_gl, "choose", broken)
    monkeypatch.delenv("OPD_JAX_MUST_DRAW", raising=False)
    with pytest.raises(pytest.skip.Exception, match="nothing draws"):
        drawing.needed("mujoco")
    monkeypatch.setenv("OPD_JAX_MUST_DRAW", "1")
    with pytest.raises(ConfigError, match="nothing draws"):
        drawing.needed("mujoco")
    with pytest.raises(ImportError):
        drawing.needed("no_such_package")
