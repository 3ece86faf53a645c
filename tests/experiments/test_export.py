"""Exported models: other libraries load them and agree, and the card says where they come from."""

import collections
import json
import math
import sys
import tracemalloc
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from configs import domains_models, dp_models, dp_opd, flow_opd, opd, uni_opd, vla_opd
from experiments import domains, export, reasoning_models, reasoning_stores, scenes, stages
from opd_jax import config as config_lib
from opd_jax.checkpoint import params_sha256
from opd_jax.config import ConfigError
from opd_jax.models import lora
from opd_jax.models.decoder import Decoder
from opd_jax.models.gpt2 import GPT2
from opd_jax.models.hf import load_openvla, load_vlm, save_decoder, save_gpt2
from opd_jax.worlds import domains as world

sys.path.append(str(Path(__file__).parents[1] / "models"))

from tiny_openvla import OpenVla

OWN = Path(export.__file__).parents[1]
FILES = "experiments", "opd_jax/models/hf", "opd_jax/models/lora", "opd_jax/checkpoint", "opd_jax/tensors"
THAT_HOLD = tuple(str(OWN / file) for file in FILES)  # parameters; at every return of theirs devices are looked at
ROW = {"model": "arm", "right \u2191": 0.25, "seconds": 3}


@pytest.fixture
def run_of(tmp_path):
    """A finished run, as the experiments leave one, with one student of given parameters."""

    def make(config, params):
        workdir = tmp_path / "run"
        workdir.mkdir()
        config_lib.save(workdir / "config.json", config)
        sha = params_sha256(params)
        (workdir / "versions.json").write_text(json.dumps([config_lib.versions()]))
        (workdir / "summary.json").write_text(json.dumps({"table": [ROW], "params_sha256": sha}))
        made = stages.Made(params, "r" * 64, sha, 3.0, 640)
        stages.save(stages.path_of("arm_seed0", workdir, made.recipe), made, {"stage": "arm_seed0"})
        return workdir

    return make


def random_like(params, scale=0.1):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(x + scale * rng.standard_normal(x.shape), jnp.float32), params)


def shipped(name):
    return jax.tree.map(jnp.asarray, reasoning_models.load(stages.SHIPPED / f"{name}.safetensors").params)


def exported(workdir, out):
    """The stage that is exported, while no device ever holds more than a few constants."""
    before, most = {id(array) for array in jax.live_arrays()}, 0

    def look(frame, event, _):
        nonlocal most
        if event == "return" and frame.f_code.co_filename.startswith(THAT_HOLD):
            held = collections.Counter()
            for array in (array for array in jax.live_arrays() if id(array) not in before):
                size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
                held.update(dict.fromkeys(array.sharding.device_set, size))
            most = max(most, *held.values(), 0)

    sys.setprofile(look)
    try:
        made = export.export(workdir, out)
    finally:
        sys.setprofile(None)
    assert most < 1024, f"{most} bytes on one device"
    return made


def params_of(module, scale=1.0):
    numbers = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return jax.tree.map(lambda x: (scale * numbers.standard_normal(x.shape)).astype(np.float32), shapes)


def logits_of(directory, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def test_a_student_of_the_reasoning_world(run_of, tmp_path):
    config = opd.get_config("tiny")
    module, params = reasoning_stores.world_model("student", config.student)
    params, tokens = random_like(params, 0.01), np.array([[5, 9, 3, 7, 11]])
    assert exported(run_of(config, params), tmp_path / "out") == "arm_seed0"
    own = module.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits_of(tmp_path / "out", tokens), own, atol=1e-4 * np.abs(own).max())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("sum 3 4").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("library_name: transformers", "right \u2191 0.25", "640 samples", "`" + "r" * 64 + "`", '"teachers"'):
        assert said in card
    assert config_lib.load(tmp_path / "out" / "opd_jax_config.json").experiment == "reasoning"
    assert not (tmp_path / "out.part").exists()


def test_what_a_private_student_learnt_as_an_adapter_is_merged(run_of, tmp_path):
    config = dp_opd.get_config().unlock()
    config.arms.arm = {"lora_scale": 0.5}  # its own, and the stage's name
    base = shipped("functions_student")
    adapter = random_like(lora.init(jax.random.key(0), base, config.opd.lora_layers, 2, r"^layers/"))
    exported(run_of(config, adapter), tmp_path / "out")
    tokens = np.array([[3, 17, 40, 8]])
    module = Decoder(**dp_models.get_config().models.student.model)
    own = module.apply({"params": lora.merge(base, adapter, 0.5)}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits_of(tmp_path / "out", tokens), own, atol=1e-4 * np.abs(own).max())


def test_a_student_that_reads_pictures(run_of, tmp_path):
    module = domains.module_of(domains_models.get_config().models.student.model)
    params = jax.device_get(domains.init(module, domains.bank_of([]), jax.random.key(0)))
    exported(run_of(uni_opd.get_config(), params), tmp_path / "out")
    _, again = load_vlm(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    problem = next(
        one for one in domains.draw(domains.PICTURED[0], 9, 0, (1,)) if world.WORDS[world.IMAGE] in one.prompt
    )
    bank, tokens = domains.bank_of([problem]), domains.encode(problem, 0)[None]
    params = jax.tree.map(jnp.asarray, params)
    own = module.apply({"params": params}, jnp.asarray(tokens), jax.tree.map(jnp.asarray, bank))
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor(np.where(tokens >= len(world.WORDS), world.IMAGE, tokens))
    seen = {"pixel_values": torch.tensor(bank.patches[0]), "image_grid_thw": torch.tensor([[1, *bank.grid[0]]])}
    with torch.no_grad():
        theirs = model(input_ids=ids, mm_token_type_ids=(ids == world.IMAGE).int(), **seen).logits.numpy()
    np.testing.assert_allclose(theirs, own, rtol=0, atol=1e-4 * np.abs(own).max())
    blind = module.apply({"params": params}, jnp.asarray(ids.numpy()), jax.tree.map(jnp.zeros_like, bank))
    assert np.abs(blind - own).max() > 0.1 * np.abs(own).max(), "the picture matters"


STUDENTS = {
    "gpt2": (GPT2(vocab_size=64, max_positions=16, width=32, num_layers=2, num_heads=4), save_gpt2),
    "moe": (Decoder(64, 32, 24, 2, 4, 2, 12, qk_norm=True, num_experts=6, experts_per_token=2), save_decoder),
    "qwen2": (Decoder(64, 32, 48, 2, 4, 2, 8, qkv_bias=True), save_decoder),
}


@pytest.mark.parametrize("learnt", ["all", "adapter"])
@pytest.mark.parametrize("family", STUDENTS)
def test_a_student_that_began_with_a_directory(run_of, tmp_path, family, learnt):
    """Transformers has the logits of what was trained, or of the directory's model with the adapter merged."""
    (module, save), tokens = STUDENTS[family], np.array([[3, 17, 40, 8, 9]])
    base = params = params_of(module, 0.3)
    save(module, base, tmp_path / "source")
    config = dp_opd.get_config().unlock()
    config.student.path = str(tmp_path / "source")
    if learnt == "adapter":
        made = lora.init(jax.random.key(0), base, r"attn/.*kernel$", 2, r"^layers/")
        made = random_like(made, 0.3)
        params = lora.merge(base, made, config.opd.lora_scale)
    exported(run_of(config.lock(), made if learnt == "adapter" else params), tmp_path / "out")
    own, before = (
        module.apply({"params": jax.tree.map(jnp.asarray, tree)}, jnp.asarray(tokens)) for tree in (params, base)
    )
    np.testing.assert_allclose(logits_of(tmp_path / "out", tokens), own, rtol=0, atol=1e-4 * np.abs(own).max())
    if learnt == "adapter":
        assert np.abs(before - own).max() > 0.1 * np.abs(own).max()


def test_a_flow_student_is_a_transformer_and_an_adapter(run_of, tmp_path):
    config = flow_opd.get_config()
    module, base = scenes.module(config), shipped("scenes_base")
    adapter = random_like(lora.init(jax.random.key(0), base, r"attn/to_[qkv]/kernel$", 2))
    exported(run_of(config, adapter), tmp_path / "out")
    model = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    model.load_lora_adapter(str(tmp_path / "out"), weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    x, t = draw(2, *scenes.SHAPE), np.array([0.2, 0.9], np.float32)
    context, pooled = draw(2, 5, module.joint_attention_dim), draw(2, module.pooled_projection_dim)
    own = module.apply(
        {"params": lora.merge(base, adapter, config.lora.scale)}, *map(jnp.asarray, (x, t, context, pooled))
    )
    with torch.no_grad():
        latents, *rest = (torch.tensor(value) for value in (x.transpose(0, 3, 1, 2), context, pooled, 1000 * t))
        theirs = model(latents, *rest, return_dict=False)[0].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(theirs, own, rtol=0, atol=1e-4 * np.abs(own).max())
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_a_robot_policy_that_began_with_a_directory(run_of, tmp_path):
    """What the run has changed, in the layout of its source, with what of it a run does not touch."""
    OpenVla().save(tmp_path / "source")
    before = load_openvla(tmp_path / "source")
    config = vla_opd.get_config().unlock()
    config.policy.horizon = before.module.horizon
    config.student = {"path": str(tmp_path / "source")}
    params = random_like(jax.tree.map(np.asarray, before.params))  # no program for each shape
    exported(run_of(config.lock(), params), tmp_path / "out")
    after = load_openvla(tmp_path / "out")
    assert after.module == before.module and after.config["norm_stats"] == before.config["norm_stats"]
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.unused), (params, before.unused))
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_says_what_was_spent_of_private_records():
    """All that an arm has, as its row says; else what a stage alone has."""
    said = lambda config, about, *epsilons: export.privacy_of(config, about, [("", {"epsilon": e}) for e in epsilons])
    config, alone = dp_opd.get_config(), {"epsilon": 1.0, "delta": 5e-5}
    assert said(config, alone, 8.0)[0].startswith("Epsilon 8 at delta 0.0001, by the accountant `pld`")
    assert said(config, alone)[0].startswith("Epsilon 1 at delta 5e-05,")
    assert said(config, {}, "none") == [
        "No epsilon bounds what it tells of them: it has learnt from them without noise."
    ]
    assert said(config, {}, 0.0) == ["It has not learnt from them: epsilon 0."]
    assert said(opd.get_config(), {}) == []
    assert [line.startswith("NOT PRIVATE") for line in said(dp_opd.get_config("tiny"), alone)] == [False, False, True]


def test_what_cannot_be_exported_is_one_line(run_of, tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        export.export(tmp_path / "none", tmp_path / "out")
    config = opd.get_config("tiny")
    workdir = run_of(config, {"other": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match="--stage=sft: not made; there are arm_seed0"):
        export.export(workdir, tmp_path / "out", "sft")
    with pytest.raises(ConfigError, match="a student's can be exported"):
        export.export(workdir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="holds something already"):
        export.export(workdir, tmp_path / "out")
    config_lib.save(workdir / "config.json", vla_opd.get_config())
    with pytest.raises(ConfigError, match="experiment=vla: no other library loads its models"):
        export.export(workdir, tmp_path / "new")
    config_lib.save(workdir / "config.json", config)
    (workdir / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has not finished; give --stage, of arm_seed0"):
        export.export(workdir, tmp_path / "new")


# ---- memory ----------------------------------------------------------------------------------------------------------

LARGE = Decoder(1024, 512, 512, 4, 8, 8, 64, qk_norm=True)


@pytest.mark.parametrize("learnt", ["all", "adapter"])
def test_no_device_holds_a_parameter_nor_the_host_a_model(run_of, tmp_path, learnt):
    params = params_of(LARGE)
    save_decoder(LARGE, params, tmp_path / "source")
    config = dp_opd.get_config().unlock()
    config.student.path = str(tmp_path / "source")
    if learnt == "adapter":
        params = jax.device_get(lora.init(jax.random.key(0), params, r"^layers/mlp", 2, r"^layers/"))
    workdir = run_of(config.lock(), params)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params_of(LARGE))]
    tracemalloc.start()
    try:
        exported(workdir, tmp_path / "out")
        assert max(sizes) < tracemalloc.get_traced_memory()[1] < sum(sizes) / 2
    finally:
        tracemalloc.stop()
