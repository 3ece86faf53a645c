"""Private distillation, end to end on a user's own files: what is written, what is not, resume, and what is refused."""

import json
import math
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dp_models, dp_opd
from experiments import dp, dp_methods, dp_records, dp_stages, export, reasoning_models, stages
from experiments import dp_models as pretraining
from experiments.dp_records import Texts
from opd_jax import config as config_lib
from opd_jax import privacy, report, rng
from opd_jax.config import ConfigError
from opd_jax.metrics import read_metrics
from opd_jax.models.gpt2 import GPT2
from opd_jax.models.hf import save_gpt2
from opd_jax.worlds import functions

MESH = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
MARKER = "zqxjkvbpyg"


def config_of(variant="tiny", **changes):
    config = dp_opd.get_config(variant).copy_and_resolve_references()
    with config.unlocked():
        for key, value in changes.items():
            *path, last = key.split("__")
            part = config
            for name in path:
                part = part[name]
            part[last] = value
    return config


# ---- records ---------------------------------------------------------------------------------------------------------


def test_rows_are_functions_of_their_own_records_and_nobody_is_nothing():
    encoded = [(np.arange(10, 20, dtype=np.int32), 6), (np.arange(30, 33, dtype=np.int32), 1)]
    texts = dp_records.texts_of(encoded, tokens=6, prompt_tokens=4)
    np.testing.assert_array_equal(texts.tokens, [[12, 13, 14, 15, 16, 17], [30, 31, 32, 0, 0, 0]])
    assert (texts.prompt.tolist(), texts.length.tolist()) == ([4, 1], [6, 3])
    alone = dp_records.texts_of(encoded[1:], tokens=6, prompt_tokens=4)
    np.testing.assert_array_equal(alone.tokens[0], texts.tokens[1])
    batch = texts.rows(np.array([1, -1]))
    assert [batch[key].tolist() for key in ("prompt", "length", "index")] == [[1, 1], [3, 0], [1, -1]]
    rollout = dp_records.as_rollout({key: jnp.array(value) for key, value in batch.items()})
    np.testing.assert_array_equal(rollout.response, [[False, True, True, False, False, False], [False] * 6])


# ---- a user's own files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """Directories of GPT-2 and files of records; each private one has the marker in it."""
    folder = tmp_path_factory.mktemp("mine")
    for seed, name in enumerate(("student", "teacher")):
        module = GPT2(
            vocab_size=functions.VOCABULARY, max_positions=32, width=16 * (seed + 1), num_layers=1, num_heads=2
        )
        params = jax.device_get(jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])
        save_gpt2(module, params, folder / name)
        functions.save_tokenizer(folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | {"eos_token_id": functions.EOS}))
    for name, word in (("private", MARKER), ("public", "public"), ("held_out", "other")):
        lines = [json.dumps({"prompt": f"def {word}{i}", "continuation": f"{word} {i}"}) for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def own(folder, **changes):
    paths = {"student__path": str(folder / "student"), "teacher__path": str(folder / "teacher")}
    paths |= {"data": str(folder / "private.jsonl"), "public_data": str(folder / "public.jsonl")}
    paths |= {"eval__path": str(folder / "held_out.jsonl"), "eval__released": True}
    return config_of(
        **paths | {"opd__batch_size": 6, "opd__micro_batch": 2, "privacy__test_seed": -1, "opd__lora_rank": 0} | changes
    )


def test_from_files_to_a_private_model_and_nothing_private_is_left_behind(mine, tmp_path, capsys):
    arms = {"dp_opd": {}, "dp_lightning": {"stored": True}, "public_only": {"private": False, "data": "public"}}
    config = own(mine, arms=arms)
    dp.validate(config, MESH)
    dp.run(config, tmp_path, MESH)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["private"] and [row["model"] for row in summary["table"]][2:] == sorted(arms)
    assert {row["model"]: row["epsilon"] for row in summary["table"]} | {"public_only": 0.0, "dp_opd": 2.0} == {
        row["model"]: row["epsilon"] for row in summary["table"]
    }
    lines = read_metrics(tmp_path, "dp_opd_seed0")
    assert [line["private"] for line in lines] == [1.0, 1.0] and 0 < lines[0]["epsilon"] < lines[1]["epsilon"] <= 2.0
    allowed = {"stage", "step", "seconds", "epsilon", "delta", "private", "noised_norm", "noise_norm", "peak_memory"}
    assert {key for line in lines for key in line if not key.startswith("seconds/")} == allowed, (
        "what is not is a release"
    )
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path, "public_only_seed0"))
    config_lib.save(tmp_path / "config.json", config)
    (tmp_path / "versions.json").write_text(json.dumps([config_lib.versions()]))
    assert export.export(tmp_path, tmp_path / "exported") == "dp_opd_seed0"
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Epsilon 2 at delta 0.0001, by the accountant `pld`" in card and "epsilon 2.0, private" in card
    assert "NOT PRIVATE" not in card
    export.export(tmp_path, tmp_path / "public", "public_only_seed0")
    assert "has not learnt from them: epsilon 0" in (tmp_path / "public" / "README.md").read_text()
    secret = (tmp_path / "secret").read_bytes()
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    for path in (path for path in tmp_path.rglob("*") if path.is_file() and path.name != "secret"):
        written = path.read_bytes()
        assert MARKER.encode() not in written, path
        assert secret not in written and secret.hex().encode() not in written, path
    assert MARKER not in "".join(capsys.readouterr())
    assert (tmp_path / "models" / "dp_opd" / "model.safetensors").exists()


class Killed(Exception):
    pass


def run_arm(mine, workdir, kill_at=None, here="here"):
    """`dp_opd` for four steps, killed before an update if wanted."""
    config = own(mine, arms={"dp_opd": {}}, opd__steps=4, save_every=2, privacy__test_seed=3)
    experiment = dp_stages.Experiment(config, dp_stages.of_directories(config, MESH), workdir, MESH)
    experiment.here = here
    place, taken = experiment.place, iter(range(100))

    def placed(batch):
        if next(taken) == kill_at:
            raise Killed
        return place(batch)

    experiment.place = placed
    return experiment.arm("dp_opd", 0)


def test_a_killed_run_goes_on_as_if_it_had_not_been_and_pays_once(mine, tmp_path):
    whole = run_arm(mine, tmp_path / "whole")
    with pytest.raises(Killed):
        run_arm(mine, tmp_path / "parts", kill_at=3)  # after its checkpoint at 2 and the third update
    parts = run_arm(mine, tmp_path / "parts")
    assert parts.sha256 == whole.sha256
    logged = [
        [line["epsilon"] for line in read_metrics(tmp_path / name, "dp_opd_seed0")] for name in ("whole", "parts")
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 4


def test_elsewhere_steps_taken_again_are_paid_again_and_the_run_ends_early(mine, tmp_path):
    with pytest.raises(Killed):
        run_arm(mine, tmp_path, kill_at=3)
    run_arm(mine, tmp_path, here="there")
    lines = read_metrics(tmp_path, "dp_opd_seed0")
    assert len(lines) < 4 and lines[-1]["epsilon"] <= 2.0  # the fourth step and the third once more: one too many


def test_continuations_of_a_record_are_its_own(mine):
    """Another record beside it, nobody beside it: the same continuation, to the rounding of the logits."""
    config = own(mine)
    setup = dp_stages.of_directories(config, MESH)
    experiment = dp_stages.Experiment(config, setup, mine, MESH)
    student, texts = setup.student, setup.texts["private"]
    drawn = [
        dp_methods.continuations(
            student.functions.decode,
            student.params,
            {k: jnp.array(v) for k, v in texts.rows(np.array(some)).items()},
            rng.stream(0, "x"),
            init_cache=student.functions.init_cache,
            sampling_copy=student.functions.sampling_copy,
            how=experiment.sampler,
        )
        for some in ([3, 5], [3, -1])
    ]
    np.testing.assert_array_equal(drawn[0].tokens[0], drawn[1].tokens[0])
    assert drawn[0].response[1].any() and not drawn[1].response[1].any() and drawn[1].length[1] == 0


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy__epsilon": 0.0}, "privacy.epsilon=0.0"),
        ({"privacy__delta": 0.5}, "privacy.delta=0.5"),
        ({"privacy__accountant": "own"}, "privacy.accountant='own'"),
        ({"teacher__provenance": "private"}, "voids the guarantee"),
        ({"teacher__provenance": ""}, "teacher.provenance=''"),
        ({"teacher__path": "somewhere"}, "teacher.path=somewhere"),
        ({"data": "records.jsonl"}, "student.path=''"),
        ({"tokens": 1_000}, "tokens=1000"),
        ({"prompt_tokens": 24}, "prompt_tokens=24"),
        ({"opd__on_policy": 1.5}, "on_policy=1.5"),
        ({"opd__beta": -0.1}, "beta=-0.1"),
        ({"opd__clip_norm": 0.0}, "clip_norm=0.0"),
        ({"opd__rollouts": 2}, "rollouts=2 with stored=True (arm dp_lightning)"),
        ({"opd__data": "public"}, "there is nothing to protect"),
        ({"opd__teacher_share": 0.5}, "teacher_share=0.5"),
        ({"opd__epsilon": -1.0}, "epsilon=-1.0"),
        ({"opd__temperature": 2.0}, "temperature=2.0"),
        ({"opd__steps": 0}, "steps=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"opd__ghost": True}, "ghost=True with lora_rank=4"),
    ],
)
def test_what_is_refused_before_anything_is_read(changes, says):
    with pytest.raises(ConfigError) as error:
        dp.validate(config_of(**changes), MESH)
    assert says in str(error.value)


def test_records_for_perplexities_must_be_said_to_be_free(mine):
    with pytest.raises(ConfigError, match=r"eval\.released=True"):
        dp.validate(own(mine, eval__released=False), MESH)


def test_a_delta_above_one_over_the_records(mine, tmp_path):
    with pytest.raises(ConfigError, match=r"delta=0\.009"):
        config = own(mine, privacy__delta=9e-3)
        config.opd.batch_size = 2
        many = dp_stages.of_directories(config, MESH)
        texts = Texts(*(np.repeat(column, 10, axis=0) for column in many.texts["private"]))
        dp.check_setup(config, many._replace(texts=many.texts | {"private": texts}))


# ---- what is shipped, and the guide ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["default", "tiny", "seeds", "paper"])
def test_every_variant_is_a_config_of_known_arms(variant):
    config = dp_opd.get_config(None if variant == "default" else variant)
    assert config.arms and config.privacy.epsilon == 2.0
    if variant != "paper":
        dp.validate(config, MESH)
    assert (config.privacy.test_seed >= 0) == (variant == "tiny")


def test_the_shipped_models_are_those_of_their_config():
    for name, recipe in pretraining.recipes(dp_models.get_config()).items():
        made = reasoning_models.load(stages.SHIPPED / f"functions_{name}.safetensors", recipe)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(made.params))


def test_noise_of_the_default_is_what_the_accountant_asks_for():
    config = dp_opd.get_config()
    rate = config.opd.batch_size / 7_970
    noise = privacy.noise_multiplier(2.0, config.privacy.delta, rate, config.opd.steps)
    assert privacy.epsilon_spent(noise, config.privacy.delta, rate, config.opd.steps) <= 2.0 and 0.5 < noise < 2.0


def test_ghost_norms_of_a_tied_student_are_refused(mine):
    config = own(mine, opd__ghost=True)
    with pytest.raises(ConfigError, match="its head is tied to its embeddings"):
        dp.check_setup(config, dp_stages.of_directories(config, MESH))


def test_the_curve_has_an_arm_once_with_all_its_budgets():
    config = config_of()
    with config.unlocked():
        config.arms.update({"dp_opd_8": {"epsilon": 8.0}, "dp_opd_1": {"epsilon": 1.0}})
    values = {
        "dp_opd": 30.0,
        "dp_opd_8": report.Estimate(20.0, 1.0),
        "dp_opd_1": 40.0,
        "opd_not_private": 1.0,
        "student": 50.0,
    }
    rows = [{"model": name, "private ↓": value} for name, value in values.items()]
    assert dp.by_epsilon(config, rows) == {"dp_opd": ([1.0, 2.0, 8.0], [40.0, 30.0, 20.0])}
