# SPDX-License-Identifier: Apache-2.0
"""Pictures of MuJoCo's simulators: a renderer that works on this machine, and quick ones. Imports no JAX.

MuJoCo takes its OpenGL from the environment variable MUJOCO_GL, read when it is imported. Shadows, reflections and
multisampling take most of the time of a picture on a CPU; `Camera(fast=True)` leaves them out.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

GEOMETRIES = 10_000  # of a scene, at most
BACKENDS = ("egl", "osmesa", "glfw")  # a GPU or Mesa without a screen; a CPU without a screen; a screen
PROBE = (
    "import mujoco; m = mujoco.MjModel.from_xml_string('<mujoco/>'); r = mujoco.Renderer(m, 8, 8);"
    "r.update_scene(mujoco.MjData(m)); r.render(); print('drawn')"
)
REMEDY = "apt-get install libosmesa6 (or, with a GPU, libegl1 and the driver's libraries)"


@functools.cache
def choose() -> str:
    """Sets MUJOCO_GL, unless it is set, to the first of `BACKENDS` that draws here; for processes started later too.

    Returns:
        Its value. A backend is tried in a process of its own, which takes half a second.

    Raises:
        ConfigError: none draws, or the one that was set does not.
    """
    if "MUJOCO_GL" not in os.environ and not sys.platform.startswith("linux"):
        return ""  # MuJoCo's own choice
    asked = os.environ.get("MUJOCO_GL")
    for backend in [asked] if asked else BACKENDS:
        tried = subprocess.run(
            [sys.executable, "-c", PROBE], env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, text=True
        )
        if "drawn" in tried.stdout:
            os.environ["MUJOCO_GL"] = backend
            if "mujoco.gl_context" in sys.modules and not asked:  # it has read the variable already
                importlib.reload(sys.modules["mujoco.gl_context"])
            return backend
    from opd_jax.config import ConfigError  # imports jax

    raise ConfigError(f"MuJoCo cannot draw with MUJOCO_GL={asked or ', '.join(BACKENDS)}: {REMEDY}")


class Camera:
    """Pictures of one simulator, all of one size.

    Args:
        model: a `mujoco.MjModel` as it was compiled; `fast` sets the quality of its offscreen buffers.
        size: height and width.
        fast: without shadows, reflections and multisampling.
        hidden: groups of geometries that are not drawn, such as those for contacts only.
    """

    def __init__(self, model, size: int, fast: bool = True, hidden: Sequence[int] = ()):
        import mujoco

        self._mujoco, self._model, self._size, self._fast = mujoco, model, size, fast
        if fast:
            model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 64
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._canvas = _canvas_of(model)
        self._scene, self._option = mujoco.MjvScene(model, maxgeom=GEOMETRIES), mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._option.geomgroup[list(hidden)] = 0

    def picture(self, data, name: str) -> UInt8[np.ndarray, "H W 3"]:
        self._view.fixedcamid = self._model.camera(name).id
        everything = self._mujoco.mjtCatBit.mjCAT_ALL
        self._mujoco.mjv_updateScene(self._model, data, self._option, None, self._view, everything, self._scene)
        if self._fast:
            flags, dear = self._scene.flags, self._mujoco.mjtRndFlag
            flags[dear.mjRND_SHADOW] = flags[dear.mjRND_REFLECTION] = 0
        return self._canvas.draw(self._scene, self._size)

    def close(self) -> None:
        self._canvas = self._scene = None


class _Canvas:
    """Where pictures are drawn, with all that is uploaded for it: meshes, textures, buffers."""

    def __init__(self, model):
        import mujoco
        from mujoco import gl_context  # which `choose` may have loaded anew

        self._mujoco = mujoco
        self._gl = gl_context.GLContext(model.vis.global_.offwidth, model.vis.global_.offheight)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        weakref.finalize(self, _free, self._gl, self._context)

    def draw(self, scene, size: int) -> UInt8[np.ndarray, "H W 3"]:
        self._gl.make_current()
        whole, picture = self._mujoco.MjrRect(0, 0, size, size), np.empty((size, size, 3), np.uint8)
        self._mujoco.mjr_render(whole, scene, self._context)
        self._mujoco.mjr_readPixels(picture, None, whole, self._context)
        return picture[::-1]  # the first row that OpenGL gives is the lowest


def _free(gl, context) -> None:
    with contextlib.suppress(Exception):  # when the interpreter ends, OpenGL may have ended before
        gl.make_current()
        context.free()
        gl.free()


_canvases: weakref.WeakValueDictionary[bytes, _Canvas] = weakref.WeakValueDictionary()


def _canvas_of(model) -> _Canvas:
    """One for all models that are the same to the byte, as those of a task are: making it takes .3 s and 60 MB."""
    import mujoco

    content = np.zeros(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, content)
    digest = hashlib.sha256(content).digest()
    canvas = _canvases.get(digest) or _Canvas(model)
    _canvases[digest] = canvas
    return canvas
