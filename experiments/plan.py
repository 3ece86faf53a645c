"""What a run would need and take, before it is paid for: every step compiled for a topology, from shapes alone.

    python experiments/plan.py --config=configs/lightning_opd.py:paper --topology=v5p:4x4x4
    python experiments/plan.py --config=configs/flow_opd.py:paper --topology=v6e:2x4 --search
    python experiments/plan.py --config=configs/lightning_opd.py:qwen3_0p6b --topology=h100:1 --price=3

Exit code 0: every step fits the memory of a chip; 1: one does not; 2: something is wrong with the command. See
`docs/scale.md`.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs: TPUs are compiled for by name

import importlib
import importlib.metadata
import itertools
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

from experiments import plan_models
from experiments.plan_steps import Plan, Step
from opd_jax import chips, cost, report, sharding
from opd_jax import config as config_lib
from opd_jax.chips import GIB, Roofline, Topology
from opd_jax.config import ConfigError
from opd_jax.cost import Cost, Memory
from opd_jax.models import attention

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file under configs/, with `:variant` if wanted.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Chips to plan for, such as v5p:4x4x4, v6e:2x2 or h100:8.")
_STUDENT = flags.DEFINE_string("student", "", "A public name, such as qwen3-8b, or a directory; default the config's.")
_TEACHER = flags.DEFINE_string("teacher", "", "As --student.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes and micro_batches; list those that fit, by time.")
_STEPS = flags.DEFINE_list("steps", [], "Names of steps to plan alone, such as label,update; a run's hours are theirs.")
_PROGRAMS = flags.DEFINE_integer("programs", 60, "Programs that --search compiles at most.", lower_bound=1)
_PRICE = flags.DEFINE_float("price", 0.0, "Dollars per chip and hour.")

PLANS = {  # by a config's experiment
    "reasoning": "plan_language",
    "uni_opd": "plan_uni",
    "flow_opd": "plan_flow",
    "dp": "plan_dp",
    "vla": "plan_vla",
}


class Priced(NamedTuple):
    """A step as compiled."""

    step: Step
    memory: Memory | None  # None: refused by the compiler, which then says only what is needed
    needed: float  # bytes of one device, with what the run holds meanwhile
    cost: Cost
    roofline: Roofline
    compiled_in: float  # seconds
    expected: float | None = None  # seconds of a run, by the compiler's own estimate

    def fits(self, available: float) -> bool:
        return self.needed <= available


def priced(step: Step, mesh, where: Topology) -> Priced:
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
    done = Priced(step, memory, needed, counted, line, time.time() - began, chips.expected(counted, where.chip))
    said = f"{needed / GIB:.2f} GiB, {line.seconds:.3g} seconds at least; compiled in {done.compiled_in:.0f}"
    print(f"{step.name}: {said}", file=sys.stderr, flush=True)
    return done


def dumped(folder: Path) -> str:
    """The program in a folder of `xla_dump_to`, with its cycles; where buffers found no place, as it was before."""
    for last in ("after_codegen", "after_optimizations", "after_optimizations_before_buffer_assignment"):
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


def chosen(steps: list[Step], name: str) -> list[Step]:
    """Those that `--steps` names."""
    few = [step for step in steps if step.name.split()[-1] in _STEPS.value] if _STEPS.value else steps
    if not few:
        raise ConfigError(f"--steps={','.join(_STEPS.value)}: arm {name} has {', '.join(one.name for one in steps)}")
    return few


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
    """Counts of one device and one run of each step, the least seconds it can take, and what its compiler expects."""
    rows = []
    for one in steps:
        row = {"per device": one.step.name, "TFLOP": one.cost.flops / 1e12, "GB of HBM": one.cost.bytes / 1e9}
        row |= {"GB sent": one.cost.sent / 1e9, "seconds": one.roofline.seconds, "bound by": one.roofline.bound}
        row |= {} if one.expected is None else {"XLA's estimate": one.expected}
        row |= {"a second": f"{one.step.count / one.roofline.seconds:.4g} {one.step.unit}", "times": one.step.times}
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
    total, last = hours(steps), steps[-1].step
    learned = last.count * last.times
    line = f"whole run: {total:.3g} hours at least, {learned / (3600 * total):,.3g} {last.unit} learnt from per second"
    if price:
        an_hour = devices * price
        dollars = total * an_hour
        line += f"; {an_hour:,.2f} dollars an hour for {devices} chips, {dollars:,.0f} for the run"
        line += f", {learned / dollars:,.3g} {last.unit} per dollar"
    return line


def plan_of(config) -> Plan:
    return importlib.import_module(f"experiments.{PLANS[config.experiment]}")


def plan_run(config, where: Topology) -> bool:
    """Prints the plan of every arm; whether all of it fits."""
    mesh = sharding.make_mesh(dict(config.mesh), where.devices)
    plan, fit = plan_of(config), True
    print("\n".join(heading(plan, config, mesh, where)))
    for name in plan.names(config):
        steps = [priced(step, mesh, where) for step in chosen(plan.steps(config, mesh, name), name)]
        print(f"\narm {name}\n\n{memory_table(steps, where)}\n\n{time_table(steps)}\n")
        print("\n".join(["sent per device", *collective_lines(steps)]))
        print(summary(steps, len(where.devices), _PRICE.value))
        print(f"compiled in {sum(one.compiled_in for one in steps):.0f} seconds", flush=True)
        fit &= all(one.fits(where.chip.memory) for one in steps)
    return fit


def heading(plan: Plan, config, mesh, where: Topology) -> list[str]:
    sizes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
    lines = [f"{len(where.devices)} x {where.chip.name}, mesh {sizes}", *plan.heading(config, mesh)]
    return [*lines, *provenance(plan, where)]


def provenance(plan: Plan, where: Topology) -> list[str]:
    compiler = "libtpu" if where.exact else "jaxlib"
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("jax", compiler))
    lines = [f"not planned: {plan.NOT_PLANNED}", f"{', '.join(versions)}; {time.strftime('%d %B %Y')}"]
    if not where.exact:
        lines.append("AN ESTIMATE: compiled for CPUs in place of GPUs; temporaries and bytes differ, FLOPs do not")
    return lines


# ---- search ----------------------------------------------------------------------------------------------------------


def meshes(config, plan: Plan, where: Topology) -> list[dict[str, int]]:
    """To try: all ways to lay the devices along the axes that split something of the experiment, the simplest first."""
    axes, count = plan.axes(config), len(where.devices)
    sizes = [n for n in range(count, 0, -1) if count % n == 0]
    shapes = (dict(zip(axes, shape)) for shape in itertools.product(sizes, repeat=len(axes)))
    simple = lambda shape: (sum(n > 1 for n in shape.values()), shape.get("sequence", 1) * shape.get("tensor", 1))
    return sorted((shape for shape in shapes if math.prod(shape.values()) == count), key=simple)


def along(shape: dict[str, int]) -> str:
    """`data=2 x tensor=4`."""
    return " x ".join(f"{name}={size}" for name, size in shape.items() if size > 1) or "one device"


class Search:
    """What a search has found, and of what it has not, why."""

    def __init__(self, config, where: Topology, programs: int):
        self.config, self.where, self.plan = config, where, plan_of(config)
        self.left, self.rows, self.others = programs, [], {}

    def compiled(self, step: Step, mesh) -> Priced | None:
        """None: no more are to be compiled."""
        if not self.left:
            return None
        self.left -= 1
        return priced(step, mesh, self.where)

    def try_all(self) -> None:
        for shape in meshes(self.config, self.plan, self.where):
            for name in self.plan.names(self.config):
                found = self.tried(shape, name)
                if isinstance(found, str):
                    self.others.setdefault(found, []).append(f"{name} on {along(shape)}")
                else:
                    self.rows.append({"arm": name} | shape | found)
        self.rows.sort(key=lambda row: row["hours"])

    def tried(self, shape: dict[str, int], name: str) -> dict | str:
        """The fewest micro_batches that fit, for they read the parameters least often; or why there are none."""
        memory, plan, why = self.where.chip.memory, self.plan, ""
        try:
            mesh = sharding.make_mesh(shape, self.where.devices)
            for parts in plan.parts(self.config, name) or [1]:
                plan.with_parts(self.config, name, parts)
                *before, update = plan.steps(self.config, mesh, name)
                done = []
                for step in (update, *before):
                    if (one := self.compiled(step, mesh)) is None:
                        return f"not {'finished' if done or why else 'tried'}, --programs are spent"
                    done.append(one)
                    if not one.fits(memory):
                        why = f"do not fit: {one.step.name}, with up to {parts} micro_batches"
                        break
                if done[-1].fits(memory):
                    peak = max(one.needed for one in done) / GIB
                    return {"micro_batches": parts, "peak GiB": round(peak, 2), "hours": hours(done)}
                if len(done) > 1:  # what the parts of an update do not change
                    return f"do not fit: {one.step.name}"
        except ConfigError as error:  # more parts are smaller, and divide no better
            return why or f"refused: {error}"
        return why


def search(config, where: Topology, programs: int, price: float) -> bool:
    """Prints the meshes and micro_batches that fit, fastest first, and the others; whether there is one that does."""
    found = Search(config, where, programs)
    print("\n".join([f"{len(where.devices)} x {where.chip.name}", *provenance(found.plan, where)]), flush=True)
    found.try_all()
    an_hour = len(where.devices) * price
    rows = [row | {"hours": f"{row['hours']:.3g}"} for row in found.rows]
    if price:
        rows = [row | {"dollars": f"{one['hours'] * an_hour:,.0f}"} for row, one in zip(rows, found.rows)]
    remedy = "take more chips, smaller batches, or a `remat` that keeps less"
    print(report.format_table(rows) if rows else f"nothing fits of what was tried: {remedy}")
    if price:
        print(f"{an_hour:,.2f} dollars an hour for {len(where.devices)} chips")
    for why, which in found.others.items():
        print(f"{why}: {'; '.join(which)}")
    print(f"{programs - found.left} programs compiled, of at most {programs}")
    return bool(rows)


def checked(config, topology: str | None):
    """Raises: ConfigError: no topology, or a config that cannot be planned."""
    if topology is None:
        raise ConfigError("no --topology; give one, such as --topology=v5p:4x4x4 or h100:8")
    if config.get("experiment") not in PLANS:
        raise ConfigError(f"experiment={config.get('experiment')!r} has no plan; those that have: {', '.join(PLANS)}")
    return config


def with_kernels(config, where: Topology) -> None:
    """`attention` as a run on these chips has it; cuDNN's cannot be compiled here, and is planned as XLA's.

    Raises: ConfigError: they have no such kernel.
    """
    platform = "tpu" if where.exact else "gpu"
    for name in ("compute", "pipeline", "student"):
        if not (part := config.get(name)) or not part.get("attention"):
            continue
        if wrong := attention.mistake(part.attention, part.dtype, platform):
            raise ConfigError(f"{name}.{wrong}")
        with config.unlocked():
            part.attention = attention.FLASH["tpu"] if where.exact else ""
        if not where.exact:
            print(f"{name}.attention: planned as XLA's, for cuDNN's kernel cannot be compiled here")


def variant_of(arguments: list[str]) -> str:
    """What stands behind the colon of `--config=FILE:variant`."""
    spec = next((arg for arg in arguments if re.match(r"--?config=", arg)), "")
    return spec.partition("=")[2].partition(":")[2]


def main(argv) -> None:
    if argv[1:]:
        raise ConfigError(f"cannot use {' '.join(argv[1:])!r}: flags begin with --, as in --topology=v5p:4x4x4")
    config = checked(_CONFIG.value, _TOPOLOGY.value)
    config_lib.keep_arms(config)
    plan_models.named(config, variant_of(sys.argv), _STUDENT.value, _TEACHER.value)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    kind, count = chips.parse(_TOPOLOGY.value)
    if kind not in chips.TPUS:
        jax.config.update("jax_num_cpu_devices", count)
    where = chips.topology(_TOPOLOGY.value)
    with_kernels(config, where)
    if _SEARCH.value:
        sys.exit(0 if search(config, where, _PROGRAMS.value, _PRICE.value) else 1)
    sys.exit(0 if plan_run(config, where) else 1)


if __name__ == "__main__":
    config_lib.run(main)
