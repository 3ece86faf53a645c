# SPDX-License-Identifier: Apache-2.0
"""The time grid of a diffusers pipeline, from its `scheduler` directory."""

from pathlib import Path

from opd_jax.config import ConfigError
from opd_jax.models.hf.tensor_files import read_json

CLASS_NAME, FILE = "FlowMatchEulerDiscreteScheduler", "scheduler_config.json"
# What another value of these would do is not in `flow.time_grid`, whose double shift knows 1000 training times
FIXED = {
    "num_train_timesteps": 1000, "use_dynamic_shifting": False, "invert_sigmas": False, "shift_terminal": None,
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False,
}  # fmt: skip
DYNAMIC = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}  # unused without it


def load_shift(directory: str | Path) -> float:
    """A flow model's shift: `flow.time_grid(steps, shift, double_shift=True)` are the scheduler's sigmas.

    Args:
        directory: a local directory, such as the `scheduler` folder of a Stable Diffusion 3.5 snapshot (shift 3).

    Raises:
        ConfigError: naming the file that is absent (then it is a FileNotFoundError too) or not JSON, another class of
            schedulers, or a key whose value would give another grid, such as `use_dynamic_shifting`.
    """
    file = Path(directory) / FILE
    config = read_json(file)
    if config.get("_class_name") != CLASS_NAME:
        raise ConfigError(f"{file} has _class_name={config.get('_class_name')!r}; only {CLASS_NAME!r} is known")
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{file} has {key}={config[key]!r}; only {value!r} is supported, give another's")
    if unknown := sorted(key for key in config.keys() - FIXED.keys() - DYNAMIC if key != "shift" and key[0] != "_"):
        raise ConfigError(f"{file} has unknown keys {unknown}; remove them if they do not change the sigmas")
    return float(config.get("shift", 1.0))
