"""What a run would need and take, before it is paid for: every step compiled for a topology, from shapes alone.

    python experiments/plan.py --config=configs/lightning_opd.py:paper --topology=v5p:4x4x4
    python experiments/plan.py --config=configs/lightning_opd.py:qwen3_0p6b --topology=h100:1 --price=3

Exit code 0: every step fits the memory of a chip; 1: one does not; 2: something is wrong with the command. See
`docs/scale.md`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: TPUs are compiled for by name

import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags
from ml_collections import config_flags

from experiments import plan_models, plan_steps
from opd_jax import chips, cost, report, sharding
from opd_jax import config as config_lib
from opd_jax.chips import GIB, Roofline, Topology
from opd_jax.config import ConfigError
from opd_jax.cost import Cost, Memory

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file under configs/, with `:variant` if wanted.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips to plan for, such as v5p:4x4x4, v6e:2x2 or h100:8.")
_STUDENT = flags.DEFINE_string("student", "", "A public name, such as qwen3-8b, or a directory; default the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "As --student.")
_STORED = flags.DEFINE_integer("stored", 0, "Problems of an offline arm's store; default those of the config.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes and micro_batches, and list those that fit by time.")
_STEPS = flags.DEFINE_list("steps", [], "Names of steps to plan alone, such as label,update; a run's hours are theirs.")
_PRICE = flags.DEFINE_float("price", 0.0, "Dollars per chip and hour.")


class Priced(NamedTuple):
    """A step as compiled."""

    step: plan_steps.Step
    memory: Memory | None  # None: refused by the compiler, which then says only what is needed
    needed: float  # bytes of one device, with what the run holds meanwhile
    cost: Cost
    roofline: Roofline
    compiled_in: float  # seconds

    def fits(self, available: float) -> bool:
        return self.needed <= available


def priced(step: plan_steps.Step, mesh, where: Topology) -> Priced:
    """Compiles a step and counts."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        # A TPU's program is read as its compiler writes it: jaxlib may be too old to read the program itself.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if where.exact else None
        compiled, needed = None, None
        try:
            with jax.set_mesh(mesh):
                compiled = step.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if (needed := exhausted(str(error))) is None:
                raise
        text = dumped(Path(folder)) if options else compiled.as_text()
    counted = cost.cost_of(text, step.trips, mesh.size)
    memory = cost.memory_of(compiled) if compiled else None
    line, needed = chips.roofline(counted, where.chip, step.float32), (needed or memory.peak) + step.held
    done = Priced(step, memory, needed, counted, line, time.time() - began)
    said = f"{needed / GIB:.2f} GiB, {line.seconds:.3g} seconds at least; compiled in {done.compiled_in:.0f}"
    print(f"{step.name}: {said}", file=sys.stderr, flush=True)
    return done


def dumped(folder: Path) -> str:
    """The optimised program in a folder of `xla_dump_to`; where buffers found no place, as it was before."""
    for last in ("after_optimizations", "after_optimizations_before_buffer_assignment"):
        if found := sorted(folder.glob(f"*.{last}.txt"), key=lambda file: file.stat().st_size):
            return found[-1].read_text()
    raise FileNotFoundError(f"the compiler wrote no program to {folder}")


def exhausted(message: str) -> float | None:
    """Bytes that a program would need, from the TPU compiler's refusal; None if it refuses for another reason.

    It may name temporaries alone: then there are the arguments beside them.
    """
    used = r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm|HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"
    if match := re.search(used, message):
        number, unit = [group for group in match.groups() if group is not None]
        return float(number) * 1024 ** "_KMGT".index(unit or "_")
    return None


def plan_arm(setup, name: str, stored: int, where: Topology) -> list[Priced]:
    steps = plan_steps.plan(setup, name, stored)
    chosen = [step for step in steps if step.name.split()[-1] in _STEPS.value] if _STEPS.value else steps
    if not chosen:
        raise ConfigError(f"--steps={','.join(_STEPS.value)}: arm {name} has {', '.join(one.name for one in steps)}")
    return [priced(step, setup.mesh, where) for step in chosen]


def memory_table(steps: list[Priced], where: Topology) -> str:
    """GiB of one device."""
    gib = lambda size: None if size is None else round(size / GIB, 2)
    rows = []
    for one in steps:
        memory = one.memory
        parts = ("arguments", "output", "aliased", "temporary", "code")
        row = {"GiB per device": one.step.name}
        row |= {part: gib(getattr(memory, part)) if memory else None for part in parts}
        row |= {"held": gib(one.step.held), "peak": gib(one.needed), "of": gib(where.chip.memory)}
        rows.append(row | {"fits": "yes" if one.fits(where.chip.memory) else "NO"})
    return report.format_table(rows)


def time_table(steps: list[Priced]) -> str:
    """Counts of one device and one run of each step, and the least seconds it can take."""
    rows = []
    for one in steps:
        row = {"per device": one.step.name, "TFLOP": one.cost.flops / 1e12, "GB of HBM": one.cost.bytes / 1e9}
        row |= {"GB sent": one.cost.sent / 1e9, "seconds": one.roofline.seconds, "bound by": one.roofline.bound}
        row |= {"tokens/s": one.step.tokens / one.roofline.seconds, "times": one.step.times}
        rows.append({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    return report.format_table(rows)


def collective_lines(steps: list[Priced]) -> list[str]:
    lines = []
    for one in steps:
        kinds = one.cost.collectives.items()
        said = [f"{kind} {traffic.count:,.0f} x, {traffic.bytes / 1e9:.3g} GB" for kind, traffic in kinds]
        lines.append(f"{one.step.name}: {'; '.join(said) or 'none'}")
    return lines


def hours(steps: list[Priced]) -> float:
    """Of the whole arm, at the roofline."""
    return sum(one.step.times * one.roofline.seconds for one in steps) / 3600


def summary(steps: list[Priced], devices: int, price: float) -> str:
    total = hours(steps)
    learned = steps[-1].step.tokens * steps[-1].step.times
    line = f"whole run: {total:.3g} hours at least, {learned / (3600 * total):,.0f} tokens learnt from per second"
    if price:
        dollars = total * devices * price
        line += f"; {dollars:,.0f} dollars, {learned / dollars:,.0f} tokens per dollar"
    return line


def setup_of(config, mesh) -> plan_steps.Setup:
    models = plan_models.student_and_teacher(config, _variant(), _STUDENT.value, _TEACHER.value)
    return plan_steps.Setup(config, mesh, *models)


def _variant() -> str:
    spec = next((arg for arg in sys.argv if re.match(r"--?config=", arg)), "")
    return spec.partition("=")[2].partition(":")[2]


def stored_problems(config) -> int:
    """Of an offline arm's store: the flag, the config, its file, else one for each record that is learnt from."""
    path = Path(config.problems.path or ".")
    lines = len(path.read_text().splitlines()) if path.is_file() else 0
    return _STORED.value or config.problems.count or lines or config.opd.steps * config.opd.batch_size


def plan_run(config, where: Topology) -> bool:
    """Prints the plan of every arm; whether all of it fits."""
    mesh = sharding.make_mesh(dict(config.mesh), where.devices)
    setup, fit = setup_of(config, mesh), True
    print(heading(setup, where))
    for name in config.arms:
        steps = plan_arm(setup, name, stored_problems(config), where)
        print(f"\narm {name}\n\n{memory_table(steps, where)}\n\n{time_table(steps)}\n")
        print("\n".join(["sent per device", *collective_lines(steps)]))
        print(summary(steps, len(where.devices), _PRICE.value))
        print(f"compiled in {sum(one.compiled_in for one in steps):.0f} seconds", flush=True)
        fit &= all(one.fits(where.chip.memory) for one in steps)
    return fit


def heading(setup: plan_steps.Setup, where: Topology) -> str:
    count = lambda name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(setup.params[name])) / 1e9
    kind = lambda name: jax.tree.leaves(setup.params[name])[0].dtype
    sizes = " x ".join(f"{name}={size}" for name, size in setup.mesh.shape.items())
    lines = [
        f"{len(where.devices)} x {where.chip.name}, mesh {sizes}",
        f"student {count('student'):.3g} B parameters, {kind('student')}; teacher {count('teacher'):.3g} B, "
        f"{kind('teacher')}; products in {setup.config.compute.dtype}, remat {setup.config.compute.remat}",
        f"prompts of {setup.room} tokens, answers of {setup.longest}: the most there can be",
    ]
    if not where.exact:
        lines.append("AN ESTIMATE: compiled for CPUs in place of GPUs; temporaries and bytes differ, FLOPs do not")
    return "\n".join(lines)


def search(config, where: Topology) -> bool:
    """Prints the meshes and micro_batches that fit, fastest first; whether there is one."""
    devices, found, chip = len(where.devices), [], where.chip.memory
    for model in [n for n in range(1, devices + 1) if devices % n == 0]:
        try:
            mesh = sharding.make_mesh({"data": devices // model, "model": model}, where.devices)
        except ConfigError:  # the sides of the torus are others
            continue
        for name in config.arms:
            for parts in divisors(config, name):
                with config.unlocked():
                    config.arms[name].micro_batches = parts
                try:
                    steps = plan_steps.plan(setup_of(config, mesh), name, stored_problems(config))
                except ConfigError:
                    break  # more parts are smaller, and divide no better
                done = [priced(step, mesh, where) for step in steps[-1:]]
                if not done[0].fits(chip):
                    continue
                done = [*(priced(step, mesh, where) for step in steps[:-1]), *done]
                if all(one.fits(chip) for one in done):
                    peak = max(one.needed for one in done) / GIB
                    row = {"arm": name, "data": devices // model, "model": model, "micro_batches": parts}
                    found.append(row | {"peak GiB": round(peak, 2), "hours": float(f"{hours(done):.3g}")})
                break  # fewer parts read the parameters less often: the first that fits is the fastest
    found.sort(key=lambda row: row["hours"])
    remedy = "take more chips, shorter answers or --config.compute.remat=True"
    print(report.format_table(found) if found else f"nothing fits: {remedy}")
    return bool(found)


def divisors(config, name: str) -> list[int]:
    """Numbers of micro-batches to try: powers of two that divide the records of an update."""
    recipe = plan_steps.arm_recipe(config, name)
    records = recipe.batch_size * (recipe.group if recipe.method == "online" else 1)
    return [2**k for k in range(records.bit_length()) if records % 2**k == 0]


def checked(config, topology: str | None):
    """Raises: ConfigError: no topology, or a config that cannot be planned."""
    if topology is None:
        raise ConfigError("no --topology; give one, such as --topology=v5p:4x4x4 or h100:8")
    if config.get("experiment") != "reasoning":
        raise ConfigError(
            f"experiment={config.get('experiment')!r} cannot be planned yet; the configs that can be are "
            "configs/lightning_opd.py and configs/opd.py"
        )
    return config


def main(argv) -> None:
    if argv[1:]:
        raise ConfigError(f"cannot use {' '.join(argv[1:])!r}: flags begin with --, as in --topology=v5p:4x4x4")
    config = checked(_CONFIG.value, _TOPOLOGY.value)
    config_lib.keep_arms(config)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    kind, count = chips.parse(_TOPOLOGY.value)
    if kind not in chips.TPUS:
        jax.config.update("jax_num_cpu_devices", count)
    where = chips.topology(_TOPOLOGY.value)
    sys.exit(0 if (search if _SEARCH.value else plan_run)(config, where) else 1)


if __name__ == "__main__":
    config_lib.run(main)
