"""The stages of private distillation, each made once: students, private teachers and what they write, and scores."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import dp_models as models_config
from experiments import dp_methods, dp_models, dp_records, language, reasoning_models, stages
from experiments.dp_records import Texts
from experiments.language import LanguageModel
from experiments.reasoning_stages import sampling_params
from experiments.recipes import arm_recipe
from opd_jax import data, privacy, rng, sharding
from opd_jax.checkpoint import params_sha256
from opd_jax.config import command_line
from opd_jax.models import decoder, gpt2, lora
from opd_jax.models.decoder import Decoder, partition_rules
from opd_jax.models.gpt2 import GPT2
from opd_jax.models.hf import check_same_tokenizer, load_decoder, load_gpt2, save_decoder, save_gpt2
from opd_jax.privacy import Ledger, Mechanism, PoissonBatches
from opd_jax.worlds import functions, records


class Model(NamedTuple):
    functions: LanguageModel
    params: Any
    sha256: str
    module: Decoder | GPT2


def place(tree, mesh):
    """Parameters of either family, or a state that holds trees of them, by their rules; an adapter's stay whole."""
    return sharding.shard_params(tree, mesh, partition_rules(mesh, decoder.RULES + gpt2.RULES))


class Setup(NamedTuple):
    """Records and models."""

    texts: dict[str, Texts]  # private, public; and held out of each
    student: Model
    teacher: Model
    eos: int
    pad: int
    start: tuple[int, ...]  # what synthetic texts begin with


def of_world(config, mesh) -> Setup:
    """Functions; models are shipped, or, where `config.shipped` is False, random ones of their shapes."""
    models = models_config.get_config()
    whole = lambda records: dp_records.texts_of(
        [functions.encode(record, functions.TOKENS) for record in records], config.tokens, config.prompt_tokens
    )
    texts = {
        "private": whole(functions.private_records()[: config.records or None]),
        "public": whole(functions.public_records()[: config.records or None]),
        "private, held out": whole(functions.private_records("held_out")[: config.eval.records]),
        "public, held out": whole(functions.public_records("held_out")[: config.eval.public_records]),
    }

    def load(name: str) -> Model:
        module = Decoder(**models.models[name].model)
        if config.shipped:
            path = stages.SHIPPED / f"functions_{name}.safetensors"
            params = reasoning_models.load(path, dp_models.recipes(models)[name]).params
        else:
            params = jax.jit(module.init)(rng.stream(0, name), jnp.zeros((1, 1), jnp.int32))["params"]
        own = language.functions(module, functions.VOCABULARY)
        return Model(own, place(params, mesh), params_sha256(params), module)

    start = functions.encode(functions.Record(config.synthetic.prompt, ""), 16)
    return Setup(
        texts, load("student"), load("teacher"), functions.EOS, functions.PAD,
        tuple(start[0][: start[1]].tolist()),
    )  # fmt: skip


def of_directories(config, mesh) -> Setup:
    """A user's records and Hugging Face directories."""
    directory, dtype = config.student.path, jnp.float32 if jax.default_backend() == "cpu" else None
    check_same_tokenizer(directory, config.teacher.path)
    tokenizer = language.load_tokenizer(directory)
    own = language.directory_language(directory, tokenizer)
    files = {"private": config.data, "public": config.public_data, "private, held out": config.eval.path}
    texts = {
        name: dp_records.texts_of(
            [records.encode(record, tokenizer, config.tokens) for record in records.read_records(path)],
            config.tokens,
            config.prompt_tokens,
        )
        for name, path in files.items()
        if path
    }

    def load(directory: str) -> Model:
        kind = json.loads((Path(directory) / "config.json").read_text()).get("model_type")
        module, params = (load_gpt2 if kind == "gpt2" else load_decoder)(directory, mesh=mesh, dtype=dtype)
        return Model(language.functions(module, own.vocab_size), params, params_sha256(params), module)

    start = records.encode(records.Record(config.synthetic.prompt, ""), tokenizer, config.tokens)
    return Setup(
        texts,
        load(directory),
        load(config.teacher.path),
        own.stop_ids[0],
        own.pad_id,
        tuple(start[0][: start[1]].tolist()),
    )


def multiple_of(recipe, mesh) -> int:
    """What the room of a Poisson batch is a multiple of."""
    return recipe.micro_batch * sharding.record_parts(mesh)


def teacher_recipe(config, arm) -> ConfigDict:
    """How the private teacher of an arm is fine-tuned, for its share of the budget."""
    changes = {"own_weight": 1.0, "on_policy": 0.0, "stored": False, "rollouts": 1}
    changes |= {"teacher_share": 1 - arm.teacher_share, "epsilon": arm.epsilon or config.privacy.epsilon}
    return ConfigDict(config.opd.to_dict() | changes | config.private_teacher.to_dict())


class Experiment:
    """The stages of a config on a setup."""

    def __init__(self, config, setup: Setup, workdir: Path, mesh):
        self.config, self.setup, self.workdir, self.mesh = config, setup, workdir, mesh
        seed = config.privacy.test_seed
        self.secret = privacy.open_secret(workdir, seed if seed >= 0 else None)
        self.here = privacy.environment()
        self.about = {"command": command_line()}
        self.place = functools.partial(sharding.shard_batch, mesh=mesh)

    @property
    def sampler(self):
        longest = self.config.tokens - self.config.prompt_tokens
        return sampling_params(self.config.sampler, longest, (self.setup.eos,), self.setup.pad)

    # ---- private training ----

    def mechanism(self, recipe) -> Mechanism:
        """What the steps of an arm spend: all of the budget, or what a private teacher has left of it."""
        part, share = self.config.privacy, 1 - recipe.teacher_share
        epsilon, delta = (recipe.epsilon or part.epsilon) * share, part.delta * share
        rate = recipe.batch_size / self.setup.texts["private"].count
        noise = privacy.noise_multiplier(epsilon, delta, rate, recipe.steps, part.accountant)
        return Mechanism(epsilon, delta, noise, rate)

    def private_batches(self, stage: str, mechanism: Mechanism, recipe, rows) -> PoissonBatches:
        count = self.setup.texts["private"].count
        room = privacy.capacity(count, mechanism.sampling_rate, multiple_of(recipe, self.mesh))
        ledger = Ledger(self.workdir, stage, self.here)
        return PoissonBatches(rows, count, mechanism, room, self.secret, ledger, self.place)

    def train(self, stage: str, recipe, seed: int, start, made: tuple, batches, settings, *upstream: str):
        """`stages.trained`; private where batches are, with what has been spent in every line and in the file."""
        paid, (method, optimizer) = isinstance(batches, PoissonBatches), made
        about = self.about | {"private": paid and not self.secret.is_test}
        if paid:
            mechanism, plain = batches.mechanism, method.update
            about |= mechanism._asdict()

            def update(*args):
                state, metrics = plain(*args)
                spent = {"epsilon": batches.epsilon, "delta": mechanism.delta}
                return state, metrics | spent | {"private": float(not self.secret.is_test)}

            method = method._replace(update=update)
        return stages.trained(
            stage,
            self.workdir,
            stages.recipe_of(settings, *upstream),
            (method, optimizer),
            start,
            batches,
            recipe,
            batches.seed() if paid else seed,
            place=functools.partial(place, mesh=self.mesh),
            about=about,
            averaged=True,
            offload=self.config.offload,
            save_every=self.config.save_every,
        )

    # ---- stages ----

    def arm(self, name: str, seed: int) -> stages.Made:
        """One student."""
        recipe, setup, stage = arm_recipe(self.config, name), self.setup, f"{name}_seed{seed}"
        teacher, upstream = setup.teacher, [setup.student.sha256]
        if recipe.teacher == "private":
            made = self.private_teacher(recipe, seed)
            teacher = teacher._replace(params=place(made.params, self.mesh), sha256=made.sha256)
        upstream.append(teacher.sha256)
        texts = self.synthetic(made, seed) if recipe.data == "synthetic" else setup.texts[recipe.data]
        rows = self.stored_rows(texts, teacher, seed, stage) if recipe.stored else texts.rows
        mechanism = self.mechanism(recipe) if recipe.private else None
        if mechanism:
            batches = self.private_batches(stage, mechanism, recipe, rows)
        else:
            row = lambda i: {key: value[0] for key, value in rows(np.array([i])).items()}
            batches = data.epochs(row, texts.count, recipe.batch_size, seed, self.place)
        trained, start = self.trained(setup.student, recipe, stage)
        made = dp_methods.method(
            trained, teacher.functions, teacher.params, self.sampler, recipe, mechanism,
            recipe.batch_size,
        )  # fmt: skip
        settings = {"arm": recipe.to_dict(), "seed": seed, "tokens": (self.config.tokens, self.config.prompt_tokens)}
        settings |= {"records": texts.count, "data": self.config.data, "how": self.sampler._asdict()}
        settings |= {"privacy": self.config.privacy.to_dict()}
        made = self.train(stage, recipe, seed, start, made, batches, settings, *upstream)
        return made._replace(params=self.merged(setup.student, recipe, made.params))

    def private_teacher(self, arm, seed: int) -> stages.Made:
        """The teacher, fine-tuned by DP-SGD on whole records, prompts too, for an arm's share of the budget."""
        setup, share, epsilon = self.setup, arm.teacher_share, arm.epsilon or self.config.privacy.epsilon
        stage = f"private_teacher_{share}_of_{epsilon}_seed{seed}"
        recipe = teacher_recipe(self.config, arm)
        mechanism, texts = self.mechanism(recipe), setup.texts["private"]
        whole = texts._replace(prompt=np.ones_like(texts.prompt))
        batches = self.private_batches(stage, mechanism, recipe, whole.rows)
        trained, start = self.trained(setup.teacher, recipe, stage)
        made = dp_methods.method(
            trained, setup.teacher.functions, setup.teacher.params, self.sampler, recipe, mechanism,
            recipe.batch_size,
        )  # fmt: skip
        settings = {"arm": recipe.to_dict(), "seed": seed, "tokens": self.config.tokens, "records": texts.count}
        settings |= {"data": self.config.data, "privacy": self.config.privacy.to_dict()}
        made = self.train(stage, recipe, seed, start, made, batches, settings, setup.teacher.sha256)
        return made._replace(params=self.merged(setup.teacher, recipe, made.params))

    def trained(self, model: Model, recipe, stage: str) -> tuple[LanguageModel, Any]:
        """What a stage trains, and from where: an adapter on the model, or all of it where `lora_rank` is 0."""
        if not recipe.lora_rank:
            return model.functions, model.params
        start = lora.init(rng.stream(0, stage), model.params, recipe.lora_layers, recipe.lora_rank, r"^layers/")
        vocab_size = model.functions.head(model.params).shape[1]
        return dp_methods.adapted(model.module, vocab_size, model.params, recipe.lora_scale), start

    def merged(self, model: Model, recipe, params):
        """Whole parameters of what a stage has trained."""
        if not recipe.lora_rank:
            return params
        return jax.device_get(lora.merge(model.params, place(params, self.mesh), recipe.lora_scale))

    def synthetic(self, teacher: stages.Made, seed: int) -> Texts:
        """Texts that a private teacher writes from a public beginning; a function of what is released, so free."""
        part, setup = self.config.synthetic, self.setup
        start = np.pad(np.array(setup.start, np.int32), (0, self.config.tokens - len(setup.start)))
        count = part.count
        begun = Texts(np.tile(start, (count, 1)), np.full(count, len(setup.start), np.int32), np.zeros(count, np.int32))
        return self.continued(setup.teacher.functions, teacher.params, begun, rng.stream(part.seed + seed, "synthetic"))

    def continued(self, model: LanguageModel, params, texts: Texts, key) -> Texts:
        """Every record's prompt, continued by a model; kept in memory alone, for prompts may be private."""
        params, parts = place(params, self.mesh), []
        for number, batch in enumerate(dp_records.in_batches(texts, self.mesh)):
            drawn = dp_methods.continuations(
                model.decode, params, batch, rng.at_step(key, number),
                init_cache=model.init_cache, sampling_copy=model.sampling_copy, how=self.sampler,
            )  # fmt: skip
            parts.append((np.asarray(drawn.tokens), np.asarray(drawn.length)))
        tokens, length = (np.concatenate(column)[: texts.count] for column in zip(*parts))
        return Texts(tokens, texts.prompt, length)

    def stored_rows(self, texts: Texts, teacher: Model, seed: int, stage: str):
        """Rows with the first student's continuation beside the record's own, and the teacher's states of both."""
        student = self.setup.student
        key = privacy.key_of(self.secret.derive("stored", stage, str(seed)))
        both = {"own_": texts, "student_": self.continued(student.functions, student.params, texts, key)}
        states = {
            name: dp_records.states_of(teacher.functions, teacher.params, some, self.mesh)
            for name, some in both.items()
        }

        def rows(indices: np.ndarray) -> dict[str, np.ndarray]:
            batch = {"index": indices.astype(np.int32)}
            for name, some in both.items():
                row = some.rows(indices) | {"states": states[name][indices]}
                batch |= {name + key: value for key, value in row.items() if key != "index"}
            return batch

        return rows

    def export(self, name: str, made: stages.Made) -> None:
        """A student as a Hugging Face directory, where it came from one; nothing of the secret is in it."""
        directory, like = self.workdir / "models" / name, self.config.student.path
        if like and not directory.exists():
            module = self.setup.student.module
            (save_gpt2 if isinstance(module, GPT2) else save_decoder)(module, made.params, directory, like=like)

    # ---- scores ----

    def score(self, model: LanguageModel, params) -> dict[str, float]:
        """Perplexity of held-out records."""
        params = place(params, self.mesh)
        names = {"private ↓": "private, held out", "public ↓": "public, held out"}
        return {
            column: dp_records.perplexity(model, params, self.setup.texts[name], self.mesh)
            for column, name in names.items()
            if name in self.setup.texts
        }
