"""Plans: what a run holds and needs, FLOPs by hand, errors of one line, and a TPU's compiler where it is installed."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import domains_models, dp_opd, flow_opd, lightning_opd, opd, uni_opd, vla_opd
from experiments import plan, plan_flow, plan_language, plan_models, plan_steps, plan_uni, plan_vla
from opd_jax import chips, cost, sharding
from opd_jax.chips import CHIPS, Topology
from opd_jax.config import ConfigError
from opd_jax.models.mmdit import MMDiT


def tiny(only, mesh, module=lightning_opd, **arm):
    """A config's `tiny` with one arm, on a mesh."""
    config = module.get_config("tiny")
    with config.unlocked():
        config.arms = {only: config.arms[only]}
        config.arms[only].update(arm)
        config.mesh = mesh
    return config


def cpus(count, memory=1e9):
    return Topology(CHIPS["h100"]._replace(memory=memory), jax.devices()[:count], False)


def mesh_of(config, where):
    return sharding.make_mesh(dict(config.mesh), where.devices)


def priced(config, name, where, *chosen):
    """Steps of an arm by name, as compiled."""
    mesh = mesh_of(config, where)
    steps = plan.plan_of(config).steps(config, mesh, name)
    return {step.name: plan.priced(step, mesh, where) for step in steps if not chosen or step.name in chosen}


# ---- models ----------------------------------------------------------------------------------------------------------


def test_public_models_have_the_size_in_their_name():
    billions = {"qwen3-0.6b": 0.6, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19, "qwen3-32b": 32.8}
    billions |= {"qwen3-30b-a3b": 30.5, "llama-3-8b": 8.03, "gpt2": 0.124, "gpt2-large": 0.774, "distilgpt2": 0.082}
    assert billions.keys() == {*plan_models.DECODERS, *plan_models.GPT2S}
    for name, expected in billions.items():
        shapes = plan_steps.shapes_of(plan_models.language_model_of(name, "--student"), jnp.bfloat16)
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e9 == pytest.approx(expected, rel=0.01)


def test_names_come_from_flags_then_config_then_variant():
    config = uni_opd.get_config("paper")
    with config.unlocked():
        config.teachers.code.path = "theirs"
    plan_models.named(config, "paper", "mine", "")
    assert config.student.path == "mine"
    assert [config.teachers[name].path for name in ("code", "mathematics")] == ["theirs", "qwen3-4b"]
    plan_models.named(config, "paper", "", "both")
    assert {part.path for part in config.teachers.values()} == {"both"} and config.student.path == "mine"


def test_the_bytes_of_a_device_are_those_of_its_parts():
    config = tiny("online", {"fsdp": 8})
    made = plan_language.setup_of(config, mesh_of(config, cpus(8)))
    tree = {
        "embed_tokens": {"embedding": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16)},
        "norm": {"scale": jnp.zeros(32)},
    }
    assert plan_steps.bytes_of(made.places.params(tree)) == 64 * 32 * 2 // 8 + 32 * 4


# ---- language --------------------------------------------------------------------------------------------------------


def test_an_online_arm_fits_or_does_not(capsys):
    """Every step is compiled and counted once; the table says what is held meanwhile."""
    where, config = cpus(2), tiny("online", {"data": 2})
    assert plan.plan_run(config, where)
    said = capsys.readouterr().out
    assert "AN ESTIMATE" in said and "whole run" in said and "not planned: SFT" in said and " NO " not in said
    params = plan_language.setup_of(config, mesh_of(config, where)).params
    own, taught = (plan_steps.bytes_of(params[name]) for name in ("student", "teacher"))
    found = priced(config, "online", where)
    assert list(found) == ["sample", "label", "update"]
    counters = 3 * 4  # of the step, and of Adam and its schedule
    assert found["update"].step.held == taught
    assert found["sample"].step.held == pytest.approx(taught + 3 * own, abs=counters)  # two moments, and the average
    assert found["label"].step.held == pytest.approx(4 * own, abs=counters)
    records = 2 * 2 * (20 + 12)  # of a device: two prompts, two answers each, padded tokens
    assert found["update"].memory.arguments == pytest.approx(4 * own, rel=0.01, abs=32 * records)
    assert found["sample"].step.trips == 12 and found["sample"].step.times == config.opd.steps
    few = [one._replace(needed=2.0) for one in found.values()]
    assert not any(one.fits(1.0) for one in few)
    assert plan.hours(few) == pytest.approx(sum(one.roofline.seconds * 2 for one in few) / 3600)
    dollars = 6 * plan.hours(few)
    tokens = few[-1].step.count * few[-1].step.times
    for words in ("6.00 dollars an hour for 2 chips", f"{tokens / dollars:,.3g} tokens per dollar"):
        assert words in plan.summary(few, 2, 3.0)


def test_attention_is_planned_as_the_chips_have_it(capsys):
    config = tiny("online", {"data": 1})
    with config.unlocked():
        config.compute.update({"attention": "flash", "dtype": "bfloat16"})
    on_gpu = config.copy_and_resolve_references()
    tpu = cpus(1)._replace(exact=True)
    plan.with_kernels(config, tpu)
    assert config.compute.attention == "splash"
    plan.with_kernels(on_gpu, cpus(1))
    assert on_gpu.compute.attention == "" and "planned as XLA's" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"compute\.attention='cudnn': no kernel of tpu; choose 'flash'"):
        with config.unlocked():
            config.compute.attention = "cudnn"
        plan.with_kernels(config, tpu)


def test_an_offline_arm_has_a_store_to_write():
    config = tiny("lightning", {"data": 2})
    with config.unlocked():
        config.problems.count = 10
    steps = plan_language.steps(config, mesh_of(config, cpus(2)), "lightning")
    assert [step.name for step in steps] == ["store: sample", "store: label", "store: reference", "update"]
    assert [step.times for step in steps] == [3, 3, 3, config.opd.steps]  # in waves of 4 slots


def test_rewards_and_stored_answers_need_no_teachers_labels():
    """One update of as many records is of the same products, whatever the sampled tokens' loss."""
    said = {"online": ["sample", "label", "update"], "grpo": ["sample", "update"], "sft": ["update"]}
    found = {}
    for method, names in said.items():
        config = tiny("grpo", {"data": 1}, method=method, batch_size=4, group=4 if method == "grpo" else 1)
        config.arms.grpo.batch_size //= config.arms.grpo.group
        mesh = mesh_of(config, cpus(1))
        steps = plan_language.steps(config, mesh, "grpo")
        assert [step.name for step in steps] == names
        found[method] = plan.priced(steps[-1], mesh, cpus(1))
    setup = plan_language.setup_of(config, mesh)
    assert {one.step.held for one in found.values()} == {plan_steps.bytes_of(setup.params["teacher"])}
    assert {one.step.count for one in found.values()} == {4 * setup.longest}
    assert len({one.cost.flops for one in found.values()}) == 1 and found["sft"].cost.flops > 0


# ---- every experiment ------------------------------------------------------------------------------------------------

STEPS = {
    (opd, "online"): ["sample", "label", "update"],
    (opd, "off_policy"): ["label", "update"],
    (lightning_opd, "grpo"): ["sample", "update"],
    (flow_opd, "flow_opd"): ["sample", "label", "update"],
    (flow_opd, "offline"): ["sample", "update"],
    (dp_opd, "dp_opd"): ["sample", "label", "update"],
    (dp_opd, "dp_lightning"): ["store: sample", "store: label", "update"],
    (uni_opd, "sampled"): ["sample", "charts: label", "logic: label", "update"],
    (vla_opd, "vla_opd"): ["act", "update"],
    (vla_opd, "opd_then_grpo"): ["act", "update"],
}


@pytest.mark.parametrize(("module", "name"), STEPS, ids=lambda value: getattr(value, "__name__", value))
def test_every_experiment_has_steps_that_are_lowered(module, name):
    config = tiny(name, {"data": 2}, module)
    mesh = mesh_of(config, cpus(2))
    made = plan.plan_of(config)
    steps = made.steps(config, mesh, name)
    assert [step.name for step in steps] == STEPS[module, name] and name in made.names(config)
    assert made.heading(config, mesh) and made.NOT_PLANNED
    with jax.set_mesh(mesh):
        lowered = steps[-1].lower()
    assert "donated" in str(lowered.args_info) and steps[-1].count > 0
    more = max(made.parts(config, name))
    made.with_parts(config, name, more)
    with pytest.raises(ConfigError, match="does not split over 2 devices"):
        made.steps(config, mesh, name)


PAPERS = [
    (lightning_opd, "online", 3),
    (lightning_opd, "lightning", 4),
    pytest.param(flow_opd, "flow_opd", 3, marks=pytest.mark.slow),  # 24 blocks that are not scanned
    (dp_opd, "dp_opd", 3),
    (dp_opd, "private_teacher", 2),
    (uni_opd, "uni_opd_multi", 4),
    (vla_opd, "vla_opd", 4),  # a copy in bfloat16 too
    (vla_opd, "grpo", 3),  # no teacher
]


@pytest.mark.parametrize(("module", "name", "count"), PAPERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_paper_variant_has_steps(module, name, count):
    """Shapes alone; what they need is printed in docs/scale.md."""
    config = module.get_config("paper")
    plan_models.named(config, "paper", "", "")
    made = plan.plan_of(config)
    steps = made.steps(config, sharding.make_mesh({"data": 1}, jax.devices()[:1]), name)
    assert len(steps) == count and name in made.names(config)


def test_alike_specialists_are_planned_once(monkeypatch):
    monkeypatch.setitem(plan_models.MMDITS, "sd3.5-medium", plan_models.MMDITS["sd3.5-medium"].clone(num_layers=1))
    config = flow_opd.get_config("paper")
    plan_models.named(config, "paper", "", "")
    assert plan_flow.names(config) == ["grpo_geneval", *config.arms]
    steps = plan_flow.steps(config, sharding.make_mesh({"data": 1}, jax.devices()[:1]), "grpo_geneval")
    assert {step.times for step in steps} == {3 * config.grpo.steps}
    assert [step.name for step in steps] == ["sample", "reference", "decode", "update"]
    with config.unlocked():
        config.teachers.ocr.steps = 7
    assert plan_flow.names(config) == ["grpo_geneval", "grpo_ocr", *config.arms]


def test_a_teacher_of_several_domains_is_read_and_held_once():
    config = tiny("sampled", {"data": 2}, uni_opd)
    with config.unlocked():
        config.settings.multi = {"logic": "strong", "code": "strong"}
    steps = plan_uni.steps(config, mesh_of(config, cpus(2)), "sampled")
    assert [(step.name, step.times) for step in steps][1:-1] == [("strong: label", 2 * config.opd.steps)]
    setup = plan_uni.Setup(config, mesh_of(config, cpus(2)))
    assert setup.teacher("strong") is setup.teacher("strong")
    assert steps[-1].held == plan_steps.bytes_of(setup.teacher("strong").params, setup.bank)


def test_grpo_of_a_policy_has_no_teacher():
    config = tiny("vla_opd", {"data": 1}, vla_opd, teacher="sft_many")
    mesh = mesh_of(config, cpus(1))
    distilled = plan_vla.steps(config, mesh, "vla_opd")
    rewarded = plan_vla.steps(tiny("opd_then_grpo", {"data": 1}, vla_opd, teacher="sft_many"), mesh, "opd_then_grpo")
    own = plan_steps.bytes_of(plan_vla.Setup(config, mesh).params(trained=True))
    assert [step.name for step in distilled] == ["act", "label", "update"]
    assert [step.name for step in rewarded] == ["act", "update"]
    assert [one.held - other.held for one, other in zip(distilled[::2], rewarded)] == [own, own]


def test_a_published_policy_is_held_as_it_was_before():
    """OpenVLA-7B, from shapes: a copy in 16 bits, and a teacher that is stored so."""
    config = vla_opd.get_config("paper")
    plan_models.named(config, "paper", "", "")
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    own = plan_steps.bytes_of(plan_vla.Setup(config, mesh).params(trained=True))
    held = {step.name: step.held / own for step in plan_vla.steps(config, mesh, "vla_opd")}
    assert held["update"] == 1.5  # and its first parameters
    assert held["copy"] == pytest.approx(4.5) and held["act"] == pytest.approx(5.5)  # two moments, and the average
    assert held["label"] == pytest.approx(5)


def test_a_policys_copy_is_whole_over_fsdp():
    config = tiny("opd_then_grpo", {"fsdp": 2}, vla_opd)
    mesh = mesh_of(config, cpus(2))
    setup = plan_vla.Setup(config, mesh)
    params = setup.params(trained=True)
    assert plan_steps.bytes_of(setup.to_act(params)) == 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert [step.name for step in plan_vla.steps(config, mesh, "opd_then_grpo")] == ["copy", "act", "update"]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_flops_of_the_mmdits_update_are_those_counted_by_hand(monkeypatch):
    """Adapters of rank r on a frozen transformer: no gradient of its kernels, none into the first block."""
    w, heads, d, r, side, text, pooled, embedding = 16, 2, 8, 3, 8, 5, 6, 12
    sizes = {"num_layers": 2, "num_heads": heads, "head_dim": d, "joint_attention_dim": embedding}
    model = MMDiT(2, 16, 16, **sizes, pooled_projection_dim=pooled, pos_embed_max_size=4, dual_attention_layers=(0,))
    monkeypatch.setitem(plan_models.MMDITS, "tiny", model)
    monkeypatch.setattr(plan_flow, "CLIP_TOKENS", text - 1)
    config = flow_opd.get_config("paper")
    with config.unlocked():
        config.pipeline.update({"path": "tiny", "resolution": 8 * side, "remat": "", "max_sequence_length": 1})
        config.pipeline.dtype = "float32"
        config.lora.rank, config.teachers = r, {"one": config.teachers.geneval}
        config.sampler.steps = 3
        config.opd.update({"prompts": 2, "group": 1, "micro_batches": 2})
        config.tasks = ("geneval",)
    found = priced(config, "flow_opd", cpus(1), "update")["update"]

    rows = 2 * 2 * 2  # of velocities: two records at two states, with and without their prompt
    x, c, seen = rows * (side // 2) ** 2, rows * text, (side // 2) ** 2
    dense = lambda count, wide, high: 2 * count * wide * high
    attend = lambda count: 2 * 2 * rows * heads * count**2 * d
    embedders = dense(rows, 256, w) + dense(rows, pooled, w) + 2 * dense(rows, w, w)
    once = dense(x, 2 * 2 * 16, w) + dense(c, embedding, w) + embedders
    modulations = dense(rows, w, (9 + 6 + 6 + 2 + 2) * w)  # two of the first block, two of the last, and the last
    joint = [(x, 4, c, 4), (x, 4, c, 3)]  # dense layers of image and text in each block; the last has no text out
    forward = once + modulations + dense(x, w, 2 * 2 * 16)
    adapter = lambda count, kinds: kinds * 2 * dense(count, w, r)
    for image, n, words, m in joint:
        forward += n * dense(image, w, w) + m * dense(words, w, w) + attend(seen + text)
        forward += adapter(image, n) + adapter(words, m) + 2 * dense(image, w, 4 * w)
    forward += 4 * dense(x, w, w) + attend(seen)  # the second attention of the first block
    forward += 2 * dense(c, w, 4 * w)  # only the first block's text goes on

    backward = dense(x, w, 2 * 2 * 16) + 2 * attend(seen + text) * 2
    backward += 2 * 2 * dense(x, w, 4 * w) + 2 * dense(c, w, 4 * w)  # the MLPs
    backward += 2 * dense(x, w, w) + dense(c, w, w)  # attention's outputs
    backward += 3 * (dense(x, w, w) + dense(c, w, w))  # queries, keys and values of the last block alone
    for image, n, words, m in joint:  # of both factors, and of what is between them
        backward += 3 * n * dense(image, w, r) + 3 * m * dense(words, w, r)
    backward += 2 * dense(x, w, r) + dense(c, w, r) + 3 * (dense(x, w, r) + dense(c, w, r))  # into their inputs
    assert found.cost.flops == forward + backward


def test_flops_of_a_policys_labels_are_those_counted_by_hand():
    config = tiny("vla_opd", {"data": 1}, vla_opd, teacher="sft_many", micro_batches=2)
    with config.unlocked():
        config.policy.points = 0
    found = priced(config, "vla_opd", cpus(1), "label")["label"]
    setup = plan_vla.Setup(config, mesh_of(config, cpus(1)))
    seen, w = setup.observation(1), config.policy.width
    cameras, words, hand = seen.images.shape[1], seen.instruction.shape[1], seen.proprioception.shape[1]
    dense = lambda count, wide, high: 2 * count * wide * high
    patches, vit = (setup.module.towers[0].image_size // 8) ** 2, 64
    tower = dense(patches, 3 * 8 * 8, vit)
    tower += 2 * (dense(patches, vit, (3 + 1) * vit) + 2 * 2 * patches**2 * vit + 2 * dense(patches, vit, 256))
    projector = dense(cameras * patches, vit, w) + dense(cameras * patches, w, w) + dense(1, hand, w) + dense(1, w, w)
    actions = 8 * 7 if setup.module.action_dim == 7 else 8 * setup.module.action_dim
    length = words + 1 + cameras * patches + 1 + actions
    decoder = dense(length, w, 4 * w) + 2 * 2 * length**2 * w + 3 * dense(length, w, 3 * w)
    each = cameras * tower + projector + decoder + dense(actions, w, 256)
    assert found.step.count == 4 * setup.decisions
    assert found.cost.flops == found.step.count * each


def test_flops_of_a_private_update_do_not_depend_on_its_parts():
    """Its loop ends with the records, so the plan says how often it runs."""

    def each(micro_batch):
        config = tiny("dp_opd", {"data": 1}, dp_opd, micro_batch=micro_batch)
        found = priced(config, "dp_opd", cpus(1), "update")["update"]
        return found.cost.flops / found.step.count

    assert each(2) == each(4)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_step_that_the_compiler_refuses_says_what_it_needs():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 121.50G of 95.74G hbm. Exceeded"
    assert plan.exhausted(message) == 121.5 * chips.GIB
    message = "E1000: the total memory required for HLO temporaries (210.33G) exceeds available HBM (95.73G)"
    assert plan.exhausted(message) == 210.33 * chips.GIB
    assert plan.exhausted("INTERNAL: another reason") is None


def test_the_last_program_of_a_dump_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no program"):
        plan.dumped(tmp_path)
    (tmp_path / "m.after_optimizations_before_buffer_assignment.txt").write_text("before")
    assert plan.dumped(tmp_path) == "before"
    (tmp_path / "m.after_optimizations.txt").write_text("last")
    assert plan.dumped(tmp_path) == "last"
    (tmp_path / "m.after_codegen.txt").write_text("with cycles")
    assert plan.dumped(tmp_path) == "with cycles"


def test_search_compiles_real_programs_and_says_what_it_leaves_out(capsys):
    where, config = cpus(2), tiny("online", {"data": -1})
    assert plan.search(config, where, 7, 3.0)
    said = capsys.readouterr().out
    assert "AN ESTIMATE" in said and "6.00 dollars an hour for 2 chips" in said
    lines = [line for line in said.splitlines() if line.startswith("| online")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert sorted(row[1:5] for row in rows) == [["1", "2", "1", "1"], ["2", "1", "1", "1"]]
    assert [row[7] for row in rows] == sorted((row[7] for row in rows), key=float), "the fastest first"
    assert "not finished, --programs are spent: online on sequence=2\n" in said
    assert "not tried, --programs are spent: online on tensor=2\n" in said
    assert "7 programs compiled, of at most 7" in said


def test_search_takes_the_fewest_parts_that_fit(capsys, monkeypatch):
    config = tiny("online", {"data": -1})

    def steps(config, mesh, name):
        parts = config.arms[name].micro_batches
        if dict(mesh.shape).get("sequence", 1) > 1:
            raise ConfigError("tokens do not split")
        return [(name, mesh.shape, parts) for name in ("sample", "update")]

    def counted(step, mesh, where):
        name, shape, parts = step
        needed = 0.6e9 if name == "sample" else 1.5e9 / parts / shape.get("data", 1) if "fsdp" not in shape else 2e9
        one = plan_steps.Step(name, None, 0, 3600, 1, "tokens", True)
        return plan.Priced(one, None, needed, cost.Cost(0.0, 0.0, {}), chips.Roofline(1.0 * parts, 0.0, 0.0), 0.0)

    monkeypatch.setattr(plan_language, "steps", steps)
    monkeypatch.setattr(plan, "priced", counted)
    assert not plan.search(config, cpus(2, memory=1.0), 60, 0.0)
    assert "nothing fits of what was tried" in capsys.readouterr().out
    found = plan.Search(config, cpus(2), 60)
    found.try_all()
    assert [(*(a for a in sharding.AXES if row[a] > 1), row["micro_batches"], row["hours"]) for row in found.rows] == [
        ("data", 1, 2.0),
        ("tensor", 2, 4.0),
    ]
    most = max(plan_language.parts(config, "online"))
    assert found.others == {
        f"do not fit: update, with up to {most} micro_batches": ["online on fsdp=2"],
        "refused: tokens do not split": ["online on sequence=2"],
    }


def test_search_tries_the_axes_that_an_experiment_splits_by_the_simplest_first():
    count = lambda module, only, plan_of: len(plan.meshes(tiny(only, {"data": 2}, module), plan_of, cpus(8)))
    assert count(flow_opd, "flow_opd", plan_flow) == 10
    assert count(vla_opd, "vla_opd", plan_vla) == 10
    assert count(uni_opd, "sampled", plan_uni) == 10, "its student reads pictures, whose rows are whole"
    assert count(lightning_opd, "online", plan_language) == 20
    shapes = plan.meshes(tiny("online", {"data": 2}), plan_language, cpus(8))
    first = ["data=8", "fsdp=8", "sequence=8", "tensor=8", "data=4 x fsdp=2"]
    assert [plan.along(shape) for shape in shapes[:5]] == first


def planned(module, only, **arm):
    config = tiny(only, {"data": 2}, module, **arm)
    return plan.plan_of(config).steps(config, mesh_of(config, cpus(2)), only)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: plan_models.decoder_of("qwen9", "--student"), "--student=qwen9: neither a directory"),
        (lambda: plan_models.pipeline_of(""), "pipeline.path='': neither a diffusers directory"),
        (lambda: plan_models.policy_of("pi9"), "student.path='pi9': its sizes are read in a run alone"),
        (lambda: planned(uni_opd, "offline"), "method 'offline' cannot be planned yet"),
        (lambda: planned(vla_opd, "sft_many"), "method 'sft' cannot be planned yet"),
        (lambda: planned(lightning_opd, "online", micro_batches=4), "micro-batch=1: does not split over 2 devices"),
        (lambda: planned(uni_opd, "sampled", batch_size=7), "prompts=7: does not split over 2 devices"),
        (lambda: odd_tokens(), "problems.prompt_tokens + sampler.max_new_tokens=31: does not split over 2 devices"),
        (lambda: plan.checked(domains_models.get_config("tiny"), "h100:2"), "has no plan"),
        (lambda: plan.checked(opd.get_config("tiny"), None), "no --topology"),
        (lambda: plan_models.named(flow_opd.get_config("tiny"), "tiny", "qwen3-8b", ""), "no such model"),
        (lambda: plan_language.steps(without_names(), mesh_of(without_names(), cpus(2)), "online"), "--student='': "),
    ],
)
def test_mistakes_are_told_in_one_line(wrong, message):
    with pytest.raises(ConfigError) as error:
        wrong()
    assert message in str(error.value) and "\n" not in str(error.value)


def odd_tokens():
    config = tiny("online", {"sequence": 2})
    with config.unlocked():
        config.problems.prompt_tokens, config.sampler.max_new_tokens = 20, 11
    return plan_language.steps(config, mesh_of(config, cpus(2)), "online")


def without_names():
    config = tiny("online", {"data": 2})
    with config.unlocked():
        config.problems.path = "problems.jsonl"
    return config


@pytest.mark.parametrize(("teacher", "code"), [("qwen3-0.6b", 0), ("qwen3-32b", 1)])
def test_the_command_ends_with_0_if_all_fits_and_1_if_not(teacher, code):
    flags = ["--config=configs/lightning_opd.py:tiny", "--config.only=('online',)", "--topology=h100:1"]
    flags += ["--steps=label", "--student=qwen3-0.6b", f"--teacher={teacher}"]
    done = subprocess.run([sys.executable, "experiments/plan.py", *flags], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("| label"))
    assert row.split("|")[-2].strip() == ("NO" if code else "yes")


def test_the_command_ends_with_2_after_a_mistake():
    flags = ["--config=configs/domains_models.py:tiny", "--topology=v5p:4x4x4"]
    done = subprocess.run([sys.executable, "experiments/plan.py", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: experiment='domains_models'"), done.stderr
    assert done.stderr.count("\n") == 1


# ---- TPUs ------------------------------------------------------------------------------------------------------------


def test_a_step_is_compiled_for_tpus_that_are_not_here():
    pytest.importorskip("libtpu")
    where = chips.topology("v5e:2x2")
    assert len(where.devices) == 4 and where.exact
    config = tiny("online", {"fsdp": 4}, batch_size=4)
    found = priced(config, "online", where, "label")["label"]
    assert found.fits(where.chip.memory) and found.cost.flops > 0 and found.cost.collectives
