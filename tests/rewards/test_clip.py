"""CLIP score and PickScore against transformers, on a small random checkpoint."""

import numpy as np
import pytest
from PIL import Image

from opd_jax.config import ConfigError
from opd_jax.rewards import clip

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a cat", "two red dogs on a long wall", "x", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.save_pretrained(folder)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=size | ids | {"vocab_size": len(words), "max_position_embeddings": 16},
        vision_config=size | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
        logit_scale_init_value=float(np.log(50.0)),
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3)).astype(np.uint8) for size in ((24, 24), (40, 64), (64, 40), (32, 32))]


@torch.no_grad()
def cosine(folder, image, prompt):
    """By the features of one picture and one prompt, with the steps of preprocessing written out."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    short = min(image.shape[:2])
    height, width = (int(side * 32 / short) for side in image.shape[:2])
    picture = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), np.float64)
    top, left = (height - 32) // 2, (width - 32) // 2
    picture = picture[top : top + 32, left : left + 32] / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.tensor(((picture - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)
    letters = ["<|startoftext|>"]
    for word in prompt.split():
        letters += [*word[:-1], word[-1] + "</w>"]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([*letters[:15], "<|endoftext|>"])
    one = model.get_image_features(pixels).pooler_output[0].double()
    other = model.get_text_features(torch.tensor([ids])).pooler_output[0].double()
    return float(one @ other / one.norm() / other.norm())


def test_scores_are_those_of_transformers(folder):
    wanted = np.array([cosine(folder, image, prompt) for image, prompt in zip(images(), PROMPTS)])
    assert np.ptp(wanted) > 0.05
    for batch_size in (1, 3, 8):
        score = clip.clip_score(folder, batch_size=batch_size)(images(), PROMPTS)
        np.testing.assert_allclose(score, 50 * wanted / 100, atol=1e-5)
    pick = clip.pick_score(str(folder))
    np.testing.assert_allclose(pick(images(), PROMPTS, [None] * 4), 50 * wanted / 26, atol=2e-5)
    assert all(type(score) is float for score in pick(images(), PROMPTS)) and pick([], []) == []


def test_a_model_is_known_by_its_weights(folder, tmp_path):
    import shutil

    first = clip.clip_score(folder)
    assert (first.name, len(first.version)) == ("clip", 16)
    assert clip.pick_score(folder).version == first.version and clip.pick_score(folder).name == "pickscore"
    shutil.copytree(folder, tmp_path / "other")
    assert clip.clip_score(tmp_path / "other").version == first.version
    model = transformers.CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.logit_scale += 1e-3
    model.save_pretrained(tmp_path / "other")
    assert clip.clip_score(tmp_path / "other").version != first.version


def test_a_processor_may_lie_elsewhere(folder, tmp_path):
    import shutil

    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / "model")
    with pytest.raises(ConfigError, match="is not read") as error:
        clip.pick_score(tmp_path / "model")
    assert "\n" not in str(error.value)
    elsewhere = clip.pick_score(tmp_path / "model", processor=folder)
    assert elsewhere(images(), PROMPTS) == clip.pick_score(folder)(images(), PROMPTS)


def test_what_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"clip: path=/nowhere holds no config\.json"):
        clip.clip_score("/nowhere")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("nothing")
    with pytest.raises(ConfigError, match=r"clip: path=.* is not read") as error:
        clip.clip_score(tmp_path)
    assert "\n" not in str(error.value)
