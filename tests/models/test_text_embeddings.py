"""Stored text embeddings against diffusers' encode_prompt; what is refused; writing after a kill."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from tiny_sd3 import make_pipeline

from opd_jax.config import ConfigError
from opd_jax.models.hf import text_embeddings
from opd_jax.models.hf.text_embeddings import Settings, open_embeddings, write
from opd_jax.models.hf.text_encoders import TextEncoders

PROMPTS = ["a red cat", "A Photo of two cats, blurred.", "", "a cat " * 60, "blue!"]
LENGTH = 12  # of T5: shorter than two of the prompts
SETTINGS = Settings(LENGTH, dtype="float32", shard_size=2)


@pytest.fixture(scope="module", params=[True, False], ids=["t5", "no_t5"])
def pipeline(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sd3")
    return directory, make_pipeline(directory, t5=request.param)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sd3")
    make_pipeline(directory)
    return directory


def test_rows_are_those_of_diffusers(pipeline, tmp_path):
    directory, peer = pipeline
    with torch.no_grad():
        context, null_context, pooled, null_pooled = (
            value.numpy() for value in peer.encode_prompt(PROMPTS, None, None, max_sequence_length=LENGTH)
        )
    stored = write(tmp_path, directory, PROMPTS, SETTINGS, batch_size=2)
    assert len(stored) == len(PROMPTS)
    rows = stored.rows(np.array([4, 0, 3, 2, 1, 0]))
    assert rows.context.shape == (6, 77 + LENGTH, 40)
    order = [4, 0, 3, 2, 1, 0]
    np.testing.assert_allclose(rows.context, context[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.pooled, pooled[order], rtol=0, atol=1e-5)
    np.testing.assert_allclose(stored[3].context, context[3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(stored.null.context, null_context[:1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(stored.null.pooled, null_pooled[:1], rtol=0, atol=1e-5)
    assert np.abs(context[0] - context[1]).max() > 0.1
    assert np.abs(pooled[0] - null_pooled[0]).max() > 0.1
    again = open_embeddings(tmp_path, PROMPTS, LENGTH, directory)
    assert again.about == stored.about
    assert (again.rows([1]).context == stored.rows([1]).context).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_type_rounds_and_nothing_else(directory, tmp_path, dtype):
    exact = write(tmp_path / "exact", directory, PROMPTS[:2], SETTINGS).rows([0, 1])
    rows = write(tmp_path / dtype, directory, PROMPTS[:2], SETTINGS._replace(dtype=dtype)).rows([0, 1])
    assert rows.context.dtype == rows.pooled.dtype == jnp.dtype(dtype)
    assert (rows.context == exact.context.astype(rows.context.dtype)).all()
    assert (rows.pooled == exact.pooled.astype(rows.pooled.dtype)).all()


def test_encoders_can_compute_in_bfloat16(directory, tmp_path):
    exact = write(tmp_path / "exact", directory, PROMPTS[:1], SETTINGS)[0].context
    rough = write(tmp_path / "rough", directory, PROMPTS[:1], SETTINGS._replace(compute_dtype="bfloat16"))[0].context
    assert 0 < np.linalg.norm(rough - exact) < 0.1 * np.linalg.norm(exact)


def test_encoders_in_shards_give_the_same(directory, tmp_path):
    copy, whole = tmp_path / "copy", write(tmp_path / "whole", directory, PROMPTS[:1], SETTINGS)
    shutil.copytree(directory, copy)
    (copy / "text_encoder_3" / "model.safetensors").unlink()
    encoder = transformers.T5EncoderModel.from_pretrained(directory / "text_encoder_3")
    encoder.save_pretrained(copy / "text_encoder_3", max_shard_size="30KB")
    parts = write(tmp_path / "parts", copy, PROMPTS[:1], SETTINGS)
    assert (parts[0].context == whole[0].context).all()
    assert parts.about.encoders != whole.about.encoders
    next((copy / "text_encoder_3").glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        write(tmp_path / "parts", copy, PROMPTS[:1], SETTINGS)


def test_a_kill_loses_one_shard(directory, tmp_path, monkeypatch):
    whole = write(tmp_path / "whole", directory, PROMPTS, SETTINGS).rows(range(5))
    encoded, encode = [], TextEncoders.__call__

    def killed_in_the_second_shard(self, prompts, *rest):
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(prompts)
        return encode(self, prompts, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TextEncoders, "__call__", killed_in_the_second_shard)
        write(tmp_path / "killed", directory, PROMPTS, SETTINGS)
    with pytest.raises(ConfigError, match=r"2 shards missing, shard-00001-of-00003\.safetensors first"):
        open_embeddings(tmp_path / "killed", PROMPTS, LENGTH)
    (tmp_path / "killed" / ".shard-00001-of-00003.safetensors.7.tmp").write_bytes(b"half of a shard")

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "__call__", lambda self, p, n: encoded.append(p) or encode(self, p, n))
        rows = write(tmp_path / "killed", directory, PROMPTS, SETTINGS).rows(range(5))
        assert encoded == [PROMPTS[:2], PROMPTS[2:4], [PROMPTS[4], ""]]
        patch.setattr(TextEncoders, "__init__", None)  # nothing is missing: no encoder is loaded
        write(tmp_path / "killed", directory, PROMPTS, SETTINGS)
    assert not list((tmp_path / "killed").glob(".*"))
    assert (rows.context == whole.context).all()
    assert (rows.pooled == whole.pooled).all()


def test_another_store_is_refused(directory, tmp_path):
    write(tmp_path / "store", directory, PROMPTS, SETTINGS)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    file = other / "tokenizer_3" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"noted": 1}))
    tuned = tmp_path / "tuned"
    shutil.copytree(directory, tuned)
    tensors = load_file(tuned / "text_encoder" / "model.safetensors")
    tensors["text_projection.weight"][0, 0] += 1
    save_file(tensors, tuned / "text_encoder" / "model.safetensors", {"format": "pt"})
    for prompts, length, pipeline, message in [
        ([*PROMPTS[:4], "green"], LENGTH, None, "prompts: "),
        ([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]], LENGTH, None, "prompts: "),
        (PROMPTS[:4], LENGTH, None, "count: 5 -> 4; prompts: "),
        (PROMPTS, LENGTH + 1, None, r"\(settings.max_sequence_length: 12 -> 13\)"),
        (PROMPTS, LENGTH, other, "encoders: "),
        (PROMPTS, LENGTH, tuned, "encoders: "),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_embeddings(tmp_path / "store", prompts, length, pipeline)
        with pytest.raises(ConfigError, match=message):
            settings = SETTINGS._replace(max_sequence_length=length)
            write(tmp_path / "store", pipeline or directory, prompts, settings)
    with pytest.raises(ConfigError, match="shard_size: 2 -> 3"):
        write(tmp_path / "store", directory, PROMPTS, SETTINGS._replace(shard_size=3))
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"prompt {index} of 5"):
            open_embeddings(tmp_path / "store", PROMPTS, LENGTH).rows([0, index])
    shard = tmp_path / "store" / "shard-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=f"{shard.name} is corrupt"):
        open_embeddings(tmp_path / "store", PROMPTS, LENGTH)
    with pytest.raises(ConfigError, match="holds no text embeddings"):
        open_embeddings(tmp_path / "nowhere", PROMPTS, LENGTH)


def test_mistakes_are_one_line(directory, tmp_path, monkeypatch):
    wrong = Settings(513, dtype="int8", compute_dtype="float64", shard_size=0)
    with pytest.raises(ConfigError) as error:
        write(tmp_path, directory, [], wrong)
    words = (
        "prompts=[]",
        "max_sequence_length=513",
        "shard_size=0",
        "settings.dtype='int8'",
        "compute_dtype='float64'",
    )
    assert all(word in line for word, line in zip(words, str(error.value).splitlines(), strict=True))
    with pytest.raises(ConfigError, match=r"dtype=float16: cannot hold 1e\+05"):
        text_embeddings._stored([np.array([1e5], np.float32)], "float16")

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ConfigError, match=r"pip install torch==2\.13\.0"):
            write(tmp_path, directory, PROMPTS, SETTINGS)

    index = directory / "model_index.json"
    content = json.loads(index.read_text())
    for change, message in [
        ({"_class_name": "FluxPipeline"}, "_class_name='FluxPipeline'"),
        ({"text_encoder": [None, None]}, "text_encoder=None; it must be 'CLIPTextModelWithProjection'"),
        ({"text_encoder_3": ["transformers", "GemmaModel"]}, "text_encoder_3='GemmaModel'"),
    ]:
        copy = tmp_path / "copy"
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        (copy / "model_index.json").write_text(json.dumps(content | change))
        with pytest.raises(ConfigError, match=message):
            write(tmp_path / "store", copy, PROMPTS, SETTINGS)
    index = copy / "model_index.json"
    index.write_text(json.dumps(content))
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder_2/model\.safetensors is absent"):
        write(tmp_path / "store", copy, PROMPTS, SETTINGS)
    file = copy / "text_encoder_3" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 27}))
    shutil.copy(directory / "text_encoder_2" / "model.safetensors", copy / "text_encoder_2")
    with pytest.raises(ConfigError, match=r"CLIP's widths \[12, 16\] exceed the context's, 27"):
        write(tmp_path / "store", copy, PROMPTS, SETTINGS)
