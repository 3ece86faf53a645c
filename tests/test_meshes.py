"""Every method of language models on meshes of eight devices: tokens, losses, places, and what is never made whole.

Private methods are in `test_meshes_private.py`, Flow-OPD and VLA-OPD in `experiments/test_flow_meshes.py` and
`experiments/test_vla_meshes.py`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import (
    ALONE,
    HOW,
    LANGUAGE,
    MESHES,
    NEW,
    PROBLEMS,
    ROOM,
    SEQUENCE,
    STUDENT,
    TEACHER,
    TENSOR,
    V,
    on_one_device,
    params_of,
    placed,
    rows,
    sampled,
    student,
    teacher,
)  # fmt: skip
from ml_collections import ConfigDict

from configs import dp_opd, flow_opd, opd, uni_opd, vla_opd
from experiments import dp, language, reasoning, token_methods, uni_methods, vla
from experiments import flow_opd as flow_experiment
from experiments import uni_opd as uni_opd_experiment
from experiments.recipes import arm_recipe
from experiments.uni_methods import Judged
from experiments.uni_setup import Model
from opd_jax import cost, optim, sharding
from opd_jax.checkpoint import Checkpoints
from opd_jax.config import ConfigError
from opd_jax.losses import cross_entropy
from opd_jax.losses.lightning_opd import LightningLabels
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import load_decoder, save_decoder, stacks

SETTINGS = {"learning_rate": 1e-2, "warmup": 0, "weight_decay": 0.0, "b2": 0.999, "micro_batches": 2, "steps": 2}
SETTINGS |= {"group": 2, "clip": 0.3, "weighting": "unit", "divergence": "sampled", "batch_size": 8}


@pytest.mark.parametrize("shape", MESHES)
def test_the_same_tokens_are_sampled(shape):
    expected = on_one_device()
    found = sampled(sharding.make_mesh(shape))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.behavior_logp, expected.behavior_logp, rtol=1e-5, atol=2e-6)
    assert expected.response.any(1).all() and len(np.unique(expected.tokens[expected.response])) > 10


# ---- the copy that sampling reads ------------------------------------------------------------------------------------


def answering(shape, copy, dtype):
    """`(answer, parameters, prompts, key)` on a mesh."""
    mesh = None if shape is None else sharding.make_mesh(shape)
    model = language.functions(STUDENT.clone(dtype=dtype), LANGUAGE.vocab_size, copy)
    batch = [token_methods.prompt(PROBLEMS, ROOM, index) for index in range(8)]
    batch = rows(jax.tree.map(lambda *leaves: np.stack(leaves), *batch), mesh)
    return token_methods.answer(model, HOW), placed(params_of(STUDENT), mesh), batch, jax.random.key(1)


def gathered_bytes(shape, copy):
    """What a device sends in all-gathers for every token, and once."""
    answer, *arguments = answering(shape, copy, jnp.float32)
    text = answer.func.lower(*answer.args, *arguments, **answer.keywords).compile().as_text()
    one, two = (cost.cost_of(text, trips, 8).collectives["all-gather"].bytes for trips in (1, 2))
    return two - one, 2 * one - two


@pytest.mark.parametrize("shape", [{"fsdp": 8}, TENSOR], ids=["fsdp8", "data2-fsdp2-tensor2"])
def test_parameters_are_gathered_once_and_not_for_every_token(shape):
    n, tensor = shape["fsdp"], shape.get("tensor", 1)
    matrices = [leaf for leaf in jax.tree.leaves(params_of(STUDENT)) if leaf.ndim > 1 and min(leaf.shape[-2:]) > 3]
    all_of_them = sum(4 * leaf.size for leaf in matrices) // tensor * (n - 1) // n
    each, once = gathered_bytes(shape, copy=True)
    assert once == all_of_them
    assert each <= 16, "what a row's logits are summed up to, over tensor"
    before, _ = gathered_bytes(shape, copy=False)
    assert before > 0.7 * all_of_them, "or the test sees nothing"


@pytest.mark.parametrize("shape", [None, TENSOR], ids=["one device", "data2-fsdp2-tensor2"])
def test_a_copy_in_bfloat16_changes_no_bit(shape):
    of = lambda answer, *arguments: jax.device_get(answer(*arguments))
    found, expected = (of(*answering(shape, copy, jnp.bfloat16)) for copy in (True, False))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len(np.unique(found.tokens)) > 10


# ---- losses ----------------------------------------------------------------------------------------------------------


def lightning(recipe, taught):
    method, optimizer = token_methods.lightning(student, recipe)
    read = lambda model, params, rollout: token_methods.logp_of(model.hidden, params, rollout, head_fn=model.head)

    def label(params, rollout):
        return LightningLabels(read(teacher, params, rollout), read(student, taught["start"], rollout))

    return method._replace(label=label), optimizer


def uni(divergence, recipe, taught):
    """Uni-OPD from two teachers, with verdicts that are given."""
    made = arm_recipe(uni_opd.get_config("tiny"), "uni_opd_multi")
    made.unlock()
    made.update(SETTINGS | {"divergence": divergence, "widths": ()})
    heads = None
    if divergence != "sampled":
        models = {task: Model(teacher, taught["teacher"], "", TEACHER) for task in range(2)}
        heads = uni_methods.heads_of(models)
    update, optimizer = uni_methods.update_of(student, made, heads)

    def label(params, rollout):
        count = len(rollout.length)
        given = token_methods.read(teacher.hidden, params, rollout, head_fn=teacher.head)
        outcome, task = np.arange(count, dtype=np.float32) % 2, np.arange(count, dtype=np.int32) // 2 % 2
        return Judged(given.logp, *rows((outcome, given.hidden, task), taught["mesh"]))

    return token_methods.Method(None, label, update), optimizer


METHODS = {
    "opd": lambda recipe, taught: token_methods.online(student, teacher, taught["teacher"], HOW, recipe),
    "exact opd": lambda recipe, taught: token_methods.online(
        student, teacher, taught["teacher"], HOW, recipe | {"divergence": "reverse_kl"}
    ),
    "off-policy": lambda recipe, taught: token_methods.off_policy(student, teacher, taught["teacher"], recipe),
    "lightning": lightning,
    "grpo": lambda recipe, taught: token_methods.grpo(student, LANGUAGE, PROBLEMS, HOW, recipe),
    "sft": lambda recipe, taught: token_methods.sft(student, recipe),
    "uni-opd": functools.partial(uni, "sampled"),
    "exact uni-opd": functools.partial(uni, "reverse_kl"),
}


class Recipe(ConfigDict):
    def __or__(self, other):
        return Recipe(self.to_dict() | other)


def start(name, mesh):
    """`(method, state, rollout, labels)` of a method at its first update."""
    taught = {"teacher": placed(params_of(TEACHER, 1), mesh), "start": placed(params_of(STUDENT), mesh), "mesh": mesh}
    method, optimizer = METHODS[name](Recipe(SETTINGS), taught)
    rollout = rows(on_one_device(), mesh)
    state = placed(optim.init_state(placed(params_of(STUDENT), mesh), optimizer), mesh)
    return method, state, rollout, method.label(taught["teacher"], rollout)


@functools.cache
def losses_on_one_device(name):
    return two_updates(*start(name, None))[0]


def two_updates(method, state, rollout, labels):
    losses = []
    for _ in range(2):
        state, metrics = method.update(state, rollout, labels, jax.random.key(2))
        losses.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return losses, state


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_one_device(name, shape):
    """And of the second update, which knows the gradient of the first; the state stays where it is put."""
    check_losses(name, shape)


@pytest.mark.parametrize("shape", ALONE)
def test_losses_are_those_of_one_device_along_every_axis_alone(shape):
    check_losses("exact opd", shape)


def check_losses(name, shape):
    on_one_device()
    expected = losses_on_one_device(name)
    mesh = sharding.make_mesh(shape)
    method, state, rollout, labels = start(name, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    old = state.params["layers"]["mlp"]["up_proj"]["kernel"]
    losses, state = two_updates(method, state, rollout, labels)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-6)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert old.is_deleted(), "the state is donated"


MOE = STUDENT.clone(num_experts=4, experts_per_token=2, normalize_experts=True)


def forward_and_gradient_of_experts(mesh):
    """Hidden states, and the gradient of the loss of SFT."""
    model = language.functions(MOE, LANGUAGE.vocab_size)
    supervise = cross_entropy.supervise(model.hidden, head_fn=model.head)

    @jax.jit
    def both(params, rollout):
        loss = lambda params: supervise(params, rollout, None, None).total.sum()
        return model.hidden(params, rollout.tokens, None), jax.grad(loss)(params)

    return jax.device_get(both(placed(params_of(MOE), mesh), rows(on_one_device(), mesh)))


@functools.cache
def experts_on_one_device():
    return forward_and_gradient_of_experts(None)


@pytest.mark.parametrize("shape", [*MESHES[:2], *ALONE])
def test_experts_are_those_of_one_device(shape):
    on_one_device()
    expected = experts_on_one_device()
    found = forward_and_gradient_of_experts(sharding.make_mesh(shape))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


# ---- what devices exchange -------------------------------------------------------------------------------------------


def gathered(name, shape):
    """The shapes that all-gathers make in a method's update."""
    on_one_device()
    mesh = sharding.make_mesh(shape)
    method, *arguments = start(name, mesh)
    lowered = method.update.func.lower(*method.update.args, *arguments, jax.random.key(2))
    lines = [line for line in lowered.compile().as_text().splitlines() if re.search(r" all-gather(-start)?\(", line)]
    results = [re.split(r" all-gather(?:-start)?\(", line.split(" = ", 1)[1])[0] for line in lines]
    found = [tuple(map(int, dims.split(","))) for one in results for dims in re.findall(r"\[([\d,]+)\]", one)]
    assert found, "parameters at least are gathered over fsdp"
    return found


@pytest.mark.parametrize("name", ["exact opd", "lightning"])
def test_no_head_embedding_or_logits_are_gathered_over_tensor(name):
    whole = {V, LANGUAGE.vocab_size, LANGUAGE.vocab_size + 1}  # as stored, cut to the vocabulary, and that padded
    assert not [shape for shape in gathered(name, TENSOR) if whole & set(shape)]


@pytest.mark.parametrize("name", ["exact opd", "lightning"])
def test_of_the_tokens_of_a_row_only_keys_and_values_are_gathered(name):
    length = ROOM + NEW
    rows_of = [shape for shape in gathered(name, SEQUENCE) if length in shape and len(shape) > 2]
    heads = STUDENT.num_kv_heads * STUDENT.head_dim
    assert rows_of and all(math.prod(shape[shape.index(length) + 1 :]) <= heads for shape in rows_of), rows_of


# ---- what is never whole ---------------------------------------------------------------------------------------------

LARGE = Decoder(512, 128, 448, 3, 8, 4, 16)
PARTS = {"fsdp": 4, "tensor": 2}


def shapes_of_large():
    """Of every matrix, and of one layer of it."""
    shapes = jax.eval_shape(LARGE.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    whole = {leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim > 1 and min(leaf.shape[-2:]) > 3}
    return whole | {shape[1:] for shape in whole if len(shape) == 3}


WHOLE = shapes_of_large()


def nothing_whole():
    """That no device holds a whole matrix, nor as much of one."""
    wrong = [a.shape for a in jax.live_arrays() if a.shape in WHOLE and 8 * a.addressable_shards[0].data.size > a.size]
    assert not wrong, wrong


def watched(function, seen):
    """The same, with a look at all devices at each call and after it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        nothing_whole()
        out = function(*args, **kwargs)
        nothing_whole()
        seen.append(getattr(out, "nbytes", 0))
        return out

    return call


def test_no_matrix_is_ever_whole_on_a_device(tmp_path, monkeypatch):
    """Loading, the state, an update, a checkpoint and back, and an export."""
    params = params_of(LARGE)
    save_decoder(LARGE, params, tmp_path / "model")
    mesh, read, written = sharding.make_mesh(PARTS), [], []
    monkeypatch.setattr(stacks, "read_stack", watched(stacks.read_stack, read))
    monkeypatch.setattr(stacks, "_on_host", watched(stacks._on_host, written))
    module, loaded = load_decoder(tmp_path / "model", mesh=mesh)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert len(read) > 40 and max(read) == largest // 8, "the host holds one device's part of one parameter"

    model = language.functions(module, 512)
    method, optimizer = token_methods.sft(model, Recipe(SETTINGS))
    state = placed(optim.init_state(loaded, optimizer), mesh)
    nothing_whole()
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    rollout = rows(on_one_device(), mesh)
    lowered = method.update.func.lower(*method.update.args, state, rollout, None, jax.random.key(0))
    made = re.findall(r"= \w+\[([\d,]+)\]", lowered.compile().as_text())
    stacked = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(params["layers"]) if leaf.shape in WHOLE}
    assert not stacked & set(made), "an update holds at most one layer of a matrix"
    state, _ = method.update(state, rollout, None, jax.random.key(0))
    nothing_whole()

    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        nothing_whole()
        restored = checkpoints.restore(state)[0]
    nothing_whole()
    for leaf, place in zip(jax.tree.leaves(restored), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)

    save_decoder(module, restored.params, tmp_path / "again")
    nothing_whole()
    assert written
    again = load_decoder(tmp_path / "again", mesh=mesh)[1]
    jax.tree.map(np.testing.assert_array_equal, again, state.params)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_tokens_that_do_not_split_are_refused():
    config = opd.get_config("tiny").copy_and_resolve_references()
    config.problems.prompt_tokens, config.sampler.max_new_tokens = 20, 11
    says = r"problems.prompt_tokens \+ sampler.max_new_tokens=31: does not split over 2 devices; use 30 or 32"
    with pytest.raises(ConfigError, match=says):
        reasoning.validate(config, sharding.make_mesh({"data": 4, "sequence": 2}))


def of_arm(name: str) -> str:
    """How a line begins that is about an arm, among others perhaps."""
    return rf"arms? (\w+, )*{name}(, \w+)*"


REFUSED = {  # experiment, config, what changes, and the part that is wrong
    "language": (reasoning, opd, {"opd.batch_size": 8, "opd.micro_batches": 2}, of_arm("online")),
    "sft": (reasoning, opd, {"sft.batch_size": 8, "sft.micro_batches": 2}, "sft"),
    "uni": (uni_opd_experiment, uni_opd, {"opd.batch_size": 8, "opd.micro_batches": 4}, of_arm("uni_opd_multi")),
    "vla": (vla, vla_opd, {"opd.batch_size": 8, "opd.micro_batches": 4}, of_arm("vla_opd")),
    "flow": (flow_experiment, flow_opd, {"opd.prompts": 8, "opd.group": 1, "opd.micro_batches": 2}, of_arm("flow_opd")),
    "specialists": (
        flow_experiment,
        flow_opd,
        {"grpo.prompts": 8, "grpo.group": 2, "grpo.micro_batches": 4},
        "grpo of ocr",
    ),
    "dp": (dp, dp_opd, {"opd.micro_batch": 4}, of_arm("dp_opd")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_micro_batches_that_do_not_split_are_refused(name):
    """With the line of a plan, before anything is loaded; and no other is said of the same config on one device."""
    experiment, module, changes, where = REFUSED[name]
    config = module.get_config("tiny").copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(changes)
    says = rf"{where}: records of a micro-batch.*=\d+: does not split over 8 devices; use 8"
    with pytest.raises(ConfigError, match=says):
        experiment.validate(config, sharding.make_mesh({"data": 8}))
    experiment.validate(config, jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))
    if "micro_batch" not in (batch := next(iter(changes))):  # that itself does not split: of each mistake one line
        config.update_from_flattened_dict({batch: 12})
        with pytest.raises(ConfigError) as error:
            experiment.validate(config, sharding.make_mesh({"data": 8}))
        (line,) = (line for line in str(error.value).splitlines() if re.match(f"{where}: ", line))
        assert "=12: does not split over 8 devices; use 8 or 16" in line
