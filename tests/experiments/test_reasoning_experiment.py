"""The experiment on language models: what is refused before it starts, its pieces, and a user's own directories."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import serving

from configs import lightning_opd, opd, reasoning_models
from experiments import language, reasoning, reasoning_stages, stages, token_methods
from experiments import reasoning_models as pretraining
from opd_jax import rng, sharding
from opd_jax.checkpoint import load_params
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics
from opd_jax.models.decoder import Decoder
from opd_jax.models.hf import load_decoder, save_decoder
from opd_jax.sampling.tokens import SamplingParams
from opd_jax.teachers import store
from opd_jax.worlds import reasoning as world

MODELS = tuple(reasoning_models.get_config().order)


def mesh_of(devices):
    return jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))


def changed(config, **values):
    """A copy of a config in which `a__b=1` sets `a.b`."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for key, value in values.items():
            *path, last = key.split("__")
            node = config
            for part in path:
                node = node[part]
            node[last] = value
    return config


# ---- shipped models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_are_small_and_of_the_config(name):
    path = stages.SHIPPED / f"reasoning_{name}.safetensors"
    assert path.stat().st_size < 8 * 2**20
    made = pretraining.load(path, pretraining.recipes(reasoning_models.get_config())[name])
    assert made.seconds > 0
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(made.params))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "student"])
def test_the_first_steps_of_a_shipped_model_made_again_have_its_losses(name, tmp_path):
    config = reasoning_models.get_config()
    pretraining.pretrain(config, name, None, tmp_path, tmp_path / "checkpoints", mesh_of(2), stages.FIRST)
    losses = [line["loss"] for line in read_metrics(tmp_path, name)]
    expected = load_params(stages.SHIPPED / f"reasoning_{name}.safetensors")[1]["first_losses"]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [lightning_opd, opd])
@pytest.mark.parametrize("variant", ["default", "tiny"])
def test_the_configs_are_valid(module, variant):
    reasoning.validate(module.get_config(variant), mesh_of(2))


@pytest.mark.parametrize("variant", ["paper", "qwen3_0p6b"])
def test_real_models_need_paths(variant):
    with pytest.raises(ConfigError, match=r"(?s)student.path=''.*teachers.own.path=''"):
        reasoning.validate(lightning_opd.get_config(variant), mesh_of(2))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"problems__levels": ()}, "problems.levels="),
        ({"opd__clip": -1.0}, "clip=-1.0"),
        ({"opd__steps": 0}, "steps=0"),
        ({"eval__problems": 0}, "eval.problems=0"),
        ({"sft__decay_steps": 9}, "sft: steps=2: give 9 or more, warmup + decay_steps, or lower these"),
        ({"arms__online": {"stps": 3}}, "arms.online.stps: opd has no such setting; did you mean 'steps'?"),
        ({"seeds": ()}, "seeds="),
    ],
)
def test_what_would_fail_later_is_refused_first(changes, says):
    with pytest.raises(ConfigError) as error:
        reasoning.validate(changed(opd.get_config("tiny"), **changes), mesh_of(2))
    assert says in str(error.value)


def test_a_model_that_is_not_there_is_not_pretrained():
    for order, says in ((("nobody",), "order: there is no 'nobody'; choose of "), ((), "order=(): choose of ")):
        with pytest.raises(ConfigError) as error:
            pretraining.validate(changed(reasoning_models.get_config("tiny"), order=order), mesh_of(2))
        assert says in str(error.value)


def test_labels_of_another_teacher_are_refused_unless_allowed():
    config = lightning_opd.get_config("tiny")
    mixed = {"method": "lightning", "teacher": "other"}
    wrong = changed(config, arms__mixed=mixed)
    with pytest.raises(ConfigError, match="arm mixed: teacher 'other' labels, but 'own' wrote the SFT data"):
        reasoning.validate(wrong, mesh_of(2))
    reasoning.validate(changed(wrong, allow_inconsistent_teacher=True), mesh_of(2))
    reasoning.validate(changed(config, arms__mixed=mixed | {"residual": True}), mesh_of(2))


def test_all_mistakes_are_named_at_once():
    config = changed(
        lightning_opd.get_config("tiny"),
        opd__divergence="kl",
        opd__batch_size=5,
        sampler__top_p=1.5,
        problems__levels=(1, 9),
        arms__grpo__group=1,
    )
    with pytest.raises(ConfigError) as error:
        reasoning.validate(config, mesh_of(2))
    for line in (
        "divergence='kl' (arms grpo, ",
        "batch_size=5: does not split over 2 devices",
        "top_p=1.5",
        "levels=(1, 9)",
        "group=1 (arm grpo)",
    ):
        assert line in str(error.value)


def test_a_served_teacher_cannot_give_exact_divergences():
    config = changed(opd.get_config("tiny"), teachers__own__url="http://localhost:1")
    with pytest.raises(ConfigError, match=r"arms .*reverse_kl: a served teacher gives log-probs of samples only"):
        reasoning.validate(config, mesh_of(2))


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_packed_rows_hold_whole_records():
    row = language.packed_row(np.random.default_rng(0), 256, ("steps",), (1, 2, 3))
    for segment in range(1, row["segment_ids"].max() + 1):
        mine = row["segment_ids"] == segment
        tokens, response = row["tokens"][mine], row["response"][mine]
        problem = world.parse(world.decode(tokens[~response]))
        assert not problem.is_test
        assert world.decode(tokens[response]) == world.solution(problem, "steps")
        assert tokens[-1] == world.EOS
        assert response[-1]
    assert not row["tokens"][row["segment_ids"] == 0].any()


def test_outcomes_are_by_the_problem_an_answer_is_of():
    own, problems = language.reasoning_language(), language.reasoning_problems(3, 0, (1,))
    solutions = [world.solution(world.parse(world.decode(ids))) for ids in problems.ids]
    texts = [solutions[2], solutions[0], solutions[1]]
    encoded = [np.concatenate([problems.ids[i], world.encode(text)]) for i, text in zip((2, 0, 0), texts)]
    width = max(map(len, encoded))
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in encoded])
    starts, lengths = [len(problems.ids[i]) for i in (2, 0, 0)], [len(row) for row in encoded]
    place = np.arange(width)[None]
    response = (place >= np.array(starts)[:, None]) & (place < np.array(lengths)[:, None])
    rollout = SimpleNamespace(tokens=tokens, response=response, group=np.array([2, 0, 0]))
    right = language.outcomes(own, problems, rollout)
    assert right[:2].tolist() == [1, 1]
    assert right[2] == float(problems.answers[1] == problems.answers[0])
    unknown = language.Problems(problems.ids, ["", "", ""])
    assert np.isnan(language.outcomes(own, unknown, rollout)).all()


def test_padding_of_the_vocabulary_is_never_sampled():
    module = Decoder(world_size := len(world.WORDS), 32, 64, 1, 1, 1, 32, tie_embeddings=True)
    params = jax.jit(module.init)(rng.stream(0, "x"), jnp.zeros((1, 1), jnp.int32))["params"]
    model = language.functions(module, 7)
    problems = language.Problems([np.array([1, 2]), np.array([3])], ["", ""])
    how = SamplingParams(30)
    rollout = language.answer_all(model, params, problems, 4, how, rng.stream(0, "y"), slots=2, mesh=None)
    assert rollout.tokens[rollout.response].max() < 7 < world_size


def test_settings_can_be_chosen_on_training_problems(tmp_path):
    for held_out in (True, False):
        config = changed(lightning_opd.get_config("tiny"), eval__held_out=held_out)
        asked = reasoning_stages.Experiment(config, tmp_path, mesh_of(2)).problems["eval"].ids
        assert {world.parse(world.decode(ids)).is_test for ids in asked} == {held_out}


# ---- a user's directories --------------------------------------------------------------------------------------------


@pytest.fixture
def directories(tmp_path):
    """A student and a teacher of the Qwen3 family with one tokenizer, vocabularies padded differently, and problems."""
    world.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps({"eos_token_id": world.EOS}))
    for name, vocabulary, width in (("student", 96, 32), ("teacher", 128, 64)):
        module = Decoder(vocabulary, width, 2 * width, 2, width // 16, width // 32, 16, qk_norm=True)
        params = jax.jit(module.init)(rng.stream(0, name), jnp.zeros((1, 1), jnp.int32))["params"]
        save_decoder(module, params, tmp_path / name, like=tmp_path / "tokenizer")
    for split, test in (("problems", False), ("held_out", True)):
        own = language.reasoning_problems(8, 0, (1, 2), test)
        lines = [json.dumps({"prompt": world.decode(i), "answer": a}) for i, a in zip(own.ids, own.answers)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def own_config(directories, **values):
    paths = {
        "student__path": str(directories / "student"),
        "teachers__own__path": str(directories / "teacher"),
        "problems__path": str(directories / "problems.jsonl"),
        "eval__path": str(directories / "held_out.jsonl"),
        "sft__path": "",
        "problems__template": "{prompt}",
        "problems__chat": False,
        "problems__prompt_tokens": world.PROMPT_TOKENS,
    }
    small = {"sampler__max_new_tokens": 8, "sampler__slots": 4, "shard": 4, "save_every": 1, "sft__steps": 2}
    small |= {"sft__batch_size": 4, "sft__micro_batches": 1, "sft__warmup": 0, "sft__decay_steps": 0, "opd__steps": 2}
    small |= {"opd__batch_size": 4, "opd__micro_batches": 2, "arms__online__batch_size": 4, "arms__online__group": 2}
    return changed(lightning_opd.get_config("paper"), **(paths | small | values))


def test_own_directories_from_answers_to_a_model_that_transformers_loads(directories, tmp_path):
    config = own_config(directories)
    mesh = sharding.make_mesh({"data": 8})
    with pytest.raises(ConfigError, match="batch_size=4: does not split over 8 devices"):
        reasoning.validate(config, mesh)
    config = changed(config, mesh__data=2)
    mesh = mesh_of(2)
    jax.set_mesh(jax.sharding.Mesh(mesh.devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,)))
    mesh = jax.sharding.get_mesh()
    reasoning.validate(config, mesh)
    workdir = tmp_path / "run"
    workdir.mkdir()
    reasoning.run(config, workdir, mesh)
    table = {row["model"]: row for row in json.loads((workdir / "summary.json").read_text())["table"]}
    assert {"lightning", "online", "SFT (own)", "teacher: own"} <= set(table)
    assert table["lightning"]["teacher tokens"] > 0
    (directory,) = (workdir / "stores").glob("rollouts_*")
    about = store.load_manifest(directory).about
    assert about.teacher == about.sft_teacher
    import transformers

    exported = workdir / "models" / "lightning"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert theirs.config.vocab_size == 96
    module, params = load_decoder(exported)
    tokens = jnp.arange(12)[None]
    import torch

    logits = theirs(torch.arange(12)[None]).logits.detach().numpy()
    np.testing.assert_allclose(module.apply({"params": params}, tokens), logits, atol=1e-4)
    lines = read_metrics(workdir, "lightning_seed0")
    np.testing.assert_allclose(lines[0]["importance_ratio"], 1, atol=1e-5, err_msg="pi_S = pi_ref before any update")


@pytest.fixture
def serve(directories):
    """The teacher's directory behind a server."""
    module, params = load_decoder(directories / "teacher")
    with serving(lambda tokens: module.apply({"params": params}, tokens)[..., : len(world.WORDS)]) as url:
        yield url


def test_a_served_teacher_labels_as_the_same_one_in_this_process(directories, serve, tmp_path, monkeypatch):
    monkeypatch.delenv("http_proxy", raising=False)
    mesh, metrics = sharding.make_mesh({"data": 8}), {}
    small = {"sampler__slots": 8, "opd__batch_size": 8, "opd__micro_batches": 1, "sft__batch_size": 8, "sft__steps": 0}
    small["compute__dtype"] = "float32"  # as the server
    for name, url in (("here", ""), ("served", serve)):
        config = own_config(directories, **small, teachers__own__url=url)
        with config.unlocked():
            config.arms = {"lightning": {"method": "lightning"}, "online": {"method": "online"}}
        reasoning.validate(config, mesh)
        workdir = tmp_path / name
        workdir.mkdir()
        own = reasoning_stages.Experiment(config, workdir, mesh)
        for arm in config.arms:
            own.arm(arm, 0)
        metrics[name] = [line["loss"] for line in read_metrics(workdir) if "loss" in line]
    np.testing.assert_allclose(metrics["served"], metrics["here"], rtol=1e-4)


def test_another_tokenizer_is_refused(directories, tmp_path):
    path = directories / "teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["sum"], vocabulary["max"] = vocabulary["max"], vocabulary["sum"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="different tokenizers"):
        reasoning_stages.Experiment(own_config(directories), tmp_path, mesh_of(1))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", 'line 2: not a JSON object with "prompt"'),
        ('{"text": "x"}', "line 2"),
        (json.dumps({"prompt": "a" * 99}), "line 2: 99 tokens; give 1 to 48"),
    ],
)
def test_a_bad_line_of_problems_is_named(directories, line, says):
    path = directories / "problems.jsonl"
    path.write_text('{"prompt": "compute: 1+1"}\n' + line)
    tokenizer = language.load_tokenizer(str(directories / "student"))
    with pytest.raises(ConfigError, match=says):
        language.read_problems(str(path), tokenizer, "{prompt}", False, 48)


def test_logp_of_is_what_the_sampler_said():
    module = Decoder(len(world.WORDS), 32, 64, 2, 1, 1, 32, qk_norm=True, tie_embeddings=True)
    params = jax.jit(module.init)(rng.stream(0, "x"), jnp.zeros((1, 1), jnp.int32))["params"]
    model = language.functions(module, module.vocab_size)
    problems = language.reasoning_problems(4, 0, (1,))
    how = SamplingParams(10, (world.EOS,), temperature=0.7)
    rollout = language.answer_all(model, params, problems, 48, how, rng.stream(0, "y"), slots=2, mesh=None)
    logp = token_methods.logp_of(model.hidden, params, rollout, head_fn=model.head)
    np.testing.assert_allclose(logp, rollout.behavior_logp, atol=2e-5)
    tripled = jax.tree.map(lambda leaf: np.concatenate([leaf] * 3)[:10], rollout)
    many = token_methods.logp_of_many(model, params, tripled, slots=4, mesh=mesh_of(2))
    assert many.shape == tripled.tokens.shape  # 10 records in parts of 4
    np.testing.assert_allclose(many, np.concatenate([logp] * 3)[:10], atol=1e-5)
