"""LIBERO without its assets: initial states, numbers of the protocol, and what is said where something is missing."""

import importlib.util
import os
import pickle
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import drawing
import numpy as np
import pytest
import torch

from opd_jax.config import ConfigError
from opd_jax.sampling import host_simulator
from opd_jax.worlds import libero

installed = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason=libero.INSTALL)
STATES = np.random.default_rng(0).normal(size=(50, 92))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def archive(path, pickled: bytes):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    return path


def test_initial_states_are_read_without_torch(tmp_path):
    torch.save(STATES, tmp_path / "one.pruned_init")
    np.testing.assert_array_equal(libero.read_initial_states(tmp_path / "one.pruned_init"), STATES)
    old = pickle.dumps(STATES, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's, that numpy.core has another name now
        np.testing.assert_array_equal(libero.read_initial_states(archive(tmp_path / "old", old)), STATES)


def test_malicious_states_are_refused(tmp_path):
    torch.save([STATES, Evil(tmp_path / "made")], tmp_path / "evil")
    with pytest.raises(ConfigError, match=r"evil: it asks for posix.mkdir; install them again: pip install"):
        libero.read_initial_states(tmp_path / "evil")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content", [pickle.dumps(STATES[0]), pickle.dumps({"a": 1}), pickle.dumps(STATES.astype(int)), b"\x80\x02", b""]
)
def test_other_files_are_refused_in_one_line(tmp_path, content):
    with pytest.raises(ConfigError, match=r"initial states .*install them again") as caught:
        libero.read_initial_states(archive(tmp_path / "other", content))
    assert "\n" not in str(caught.value)
    for path in (tmp_path / "none", tmp_path / "text"):
        (tmp_path / "text").write_text("states")
        with pytest.raises(ConfigError, match="install them again"):
            libero.read_initial_states(path)


def test_protocol_is_that_of_the_published_numbers():
    assert libero.HORIZONS == {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
    assert (libero.SETTLE, libero.STATES, libero.OFFICIAL) == (10, 50, (256, False))
    assert libero.Libero.idle.tolist() == [0, 0, 0, 0, 0, 0, -1]


def test_axis_angle_is_scipy_s():
    from scipy.spatial.transform import Rotation

    for quaternion in np.random.default_rng(1).normal(size=(20, 4)):
        quaternion /= np.linalg.norm(quaternion)
        turned = Rotation.from_rotvec(libero.axis_angle(quaternion)).as_matrix()
        np.testing.assert_allclose(turned, Rotation.from_quat(quaternion).as_matrix(), atol=1e-9)
    assert not libero.axis_angle(np.array([0, 0, 0, 1.0])).any()


def test_words_are_the_name_without_the_scene():
    assert libero.instruction("put_the_bowl_on_the_stove") == "put the bowl on the stove"
    name = "KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    assert libero.instruction(name) == "close the top drawer of the cabinet"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name: a table of tasks, their fixed states, and environments of a few lines."""
    root = tmp_path / "site" / "libero" / "libero"
    (root / "benchmark").mkdir(parents=True)
    (root.parent / "__init__.py").touch()
    (root / "benchmark" / "__init__.py").write_text("raise ImportError('no torch')")
    table = "libero_task_map = {'libero_goal': ['turn_on_the_stove']}"
    (root / "benchmark" / "libero_suite_task_map.py").write_text(table)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv("LIBERO_ASSET_PATH", raising=False)
    importlib.invalidate_caches()
    ours = lambda: [name for name in sys.modules if name.split(".")[0] == "libero"]
    before = {name: sys.modules.pop(name) for name in ours()}
    yield root
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def whole(package):
    """The same with all that an episode needs."""
    (package / "envs").mkdir()
    shutil.copy(Path(__file__).with_name("libero_stand_in.py"), package / "envs" / "__init__.py")
    (package / "assets" / "scenes").mkdir(parents=True)
    (package / "init_files" / "libero_goal").mkdir(parents=True)
    torch.save(STATES / 10, package / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init")
    return package


def test_missing_parts_are_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="suite='moon': choose spatial, object, goal, 10, 90"):
        libero.Libero(0, suite="moon")
    if importlib.util.find_spec("libero") is None:
        with pytest.raises(ConfigError, match=r"not installed: pip install .* --no-deps rlinf-libero==0.1.3"):
            libero.Libero(0)


def test_missing_parts_of_the_package_are_one_line(package):
    with pytest.raises(ConfigError, match="task=1: libero_goal has 1; give 0 to 0"):
        libero.Libero(1, suite="goal")
    with pytest.raises(
        ConfigError, match=r"assets are not in .*run libero-download-assets \(400 MB\), or set LIBERO_ASSET"
    ):
        libero.Libero(0, suite="goal")
    (package / "assets" / "scenes").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"initial states .*turn_on_the_stove.pruned_init"):
        libero.Libero(0, suite="goal")


def test_assets_elsewhere_are_used(package, tmp_path, monkeypatch):
    """A link is left where the package looks; an empty folder and a link to others give way, what is full does not."""
    one, two, own = tmp_path / "one", tmp_path / "two", package / "assets"
    for folder in (one, two):
        (folder / "scenes").mkdir(parents=True)
    monkeypatch.setenv("LIBERO_ASSET_PATH", str(tmp_path / "three"))
    with pytest.raises(ConfigError, match=r"LIBERO_ASSET_PATH=.*three: has no folder scenes"):
        libero.check()
    own.mkdir()
    for there in (one, one, two):
        monkeypatch.setenv("LIBERO_ASSET_PATH", str(there))
        libero.check()
        assert own.is_symlink() and own.resolve() == there
    assert sorted(path.name for path in package.iterdir()) == ["assets", "benchmark"]  # nothing else is left
    monkeypatch.delenv("LIBERO_ASSET_PATH")
    libero.check()
    own.unlink()
    (own / "scenes").mkdir(parents=True)
    monkeypatch.setenv("LIBERO_ASSET_PATH", str(one))
    with pytest.raises(ConfigError, match=r"assets cannot become a link .*or unset LIBERO_ASSET_PATH") as caught:
        libero.check()
    assert (own / "scenes").is_dir() and "\n" not in str(caught.value)


def test_a_mujoco_of_which_states_slide_is_refused(whole, monkeypatch):
    drawing.needed("mujoco")
    import mujoco

    for version in ("3.4.0", "3.10.1", "4.0.0"):
        monkeypatch.setattr(mujoco, "__version__", version)
        with pytest.raises(ConfigError, match=f"mujoco {version}: .* before 3.4: pip install mujoco==3.3.0"):
            libero.Libero(0, suite="goal")
    monkeypatch.setattr(mujoco, "__version__", "3.3.7")
    libero.Libero(0, suite="goal").close()


PROTOCOLS = (libero.OFFICIAL._replace(size=64), libero.FAST._replace(size=64))


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=["official", "fast"])
def test_an_episode_of_a_stand_in(whole, protocol):
    drawing.needed("mujoco")
    simulator = libero.Libero(0, suite="goal", protocol=protocol)
    assert isinstance(simulator, host_simulator.Simulator)
    inner = simulator._environment
    assert (simulator.instruction, simulator.horizon) == ("turn on the stove", 300)
    assert inner.how["bddl_file_name"] == str(whole / "bddl_files/libero_goal/turn_on_the_stove.bddl")
    assert inner.how["camera_heights"] == inner.how["camera_widths"] == 64
    assert inner.how["use_camera_obs"] is not protocol.fast

    for seed in (3, 49):  # a test scene is the fixed state of its number
        simulator.reset(seed, "test")
        np.testing.assert_array_equal(inner.states.pop(), STATES[seed] / 10)
        np.testing.assert_allclose(simulator.observe()["proprioception"][0], STATES[seed, 0] / 10, rtol=1e-6)
    for seed in (50, -1):
        with pytest.raises(ConfigError, match=f"seed={seed}: a task has 50 test scenes; give 0 to 49"):
            simulator.reset(seed, "test")
    simulator.reset(50, "train")  # a training scene is drawn, and by no seed that the test has
    assert not inner.states and inner.seeded == 100

    seen = simulator.observe()
    assert seen["images"].shape == (2, 64, 64, 3) and seen["images"].dtype == np.uint8
    hand = [inner.data.qpos[0], 2, 3, 0, 0, np.pi, 0.04, -0.04]
    np.testing.assert_allclose(seen["proprioception"], np.float32(hand), rtol=1e-6)
    assert not simulator.success()
    simulator.step(simulator.idle)
    simulator.step(np.array([1, 0, 0, 0, 0, 0, 1], np.float32))
    assert simulator.success()
    simulator.reset(3, "test")
    assert not simulator.success()
    simulator.close()
    assert inner.closed


def test_pictures_of_both_protocols_are_turned_alike(whole):
    """By half a turn from what the camera sees: what is red lies right of the middle, and is seen left of it."""
    drawing.needed("mujoco")
    pictures = []
    for protocol in PROTOCOLS:
        simulator = libero.Libero(0, suite="goal", protocol=protocol)
        simulator.reset(0, "test")
        simulator.step(np.array([0.45 - STATES[0, 0] / 10, 0, 0, 0, 0, 0, 1]))
        pictures.append(simulator.observe()["images"])
        simulator.close()
    np.testing.assert_array_equal(*pictures)
    red, green = (np.argwhere(pictures[0][0][..., i] > 100).mean(0) for i in (0, 1))
    assert red[1] < 30 and abs(green[1] - 31.5) < 2  # columns
    assert abs(red[0] - 31.5) < 2 and green[0] < 25  # rows: what is behind is above


@installed
@pytest.mark.parametrize("suite", libero.HORIZONS)
def test_package_has_tasks_and_states(suite):
    names = libero.tasks(suite)
    assert len(names) == (90 if suite == "90" else 10)
    for name in names:
        states = libero.read_initial_states(
            libero._package() / "init_files" / f"libero_{suite}" / f"{name}.pruned_init"
        )
        assert len(states) == libero.STATES
