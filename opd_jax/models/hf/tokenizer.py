"""Which tokenizer a directory holds, so that two models are only compared token by token where a token is one thing.

Models of one family may pad their vocabulary differently for the same tokenizer (Qwen2.5: 151,936 rows up to 3B,
152,064 above). No token has an id in the padding, so the valid vocabulary of two models is the shorter of the two:
who compares their logits cuts both to `[..., : min(student_vocab, teacher_vocab)]` before the softmax, which is the
same as setting what lies beyond to minus infinity, in the student too.
"""

from pathlib import Path
from typing import Any

from opd_jax.config import ConfigError, fingerprint
from opd_jax.models.hf.tensor_files import MissingFile, read_json


def tokenizer_fingerprint(directory: str | Path) -> str:
    """SHA-256 of the tokens with their ids, added ones included, and of the merges in their order, in 64 digits.

    The same for `tokenizer.json` as for the `vocab.json` and `merges.txt` it was made from, however the JSON is laid
    out. Not covered: normalisation, pre-tokenisation and chat template, which change the ids that a text gets but not
    what an id means.

    Raises:
      ConfigError: no tokenizer in the directory (then it is a FileNotFoundError too), or a file that is not JSON.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").exists():
        tokenizer = read_json(directory / "tokenizer.json")
        vocabulary, merges = _vocabulary(tokenizer["model"]["vocab"]), tokenizer["model"].get("merges") or []
        vocabulary |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    elif (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        vocabulary = read_json(directory / "vocab.json")
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for i, line in enumerate(lines) if line and not (i == 0 and line.startswith("#version"))]
    else:
        raise MissingFile(
            f"{directory} holds no tokenizer.json, nor vocab.json with merges.txt; write them with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    vocabulary |= _added_tokens(directory)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return fingerprint({"tokens": sorted([i, token] for token, i in vocabulary.items()), "merges": merges})


def check_same_tokenizer(student_directory: str | Path, teacher_directory: str | Path) -> str:
    """The fingerprint that both directories share.

    Raises:
      ConfigError: they differ; with both fingerprints.
    """
    student, teacher = tokenizer_fingerprint(student_directory), tokenizer_fingerprint(teacher_directory)
    if student != teacher:
        raise ConfigError(
            f"student {student_directory} and teacher {teacher_directory} have different tokenizers ({student} and "
            f"{teacher}); choose a teacher with the student's"
        )
    return student


def _vocabulary(stored: Any) -> dict[str, int]:
    """Unigram models list pairs of a token and its score."""
    return dict(stored) if isinstance(stored, dict) else {token: i for i, (token, _) in enumerate(stored)}


def _added_tokens(directory: Path) -> dict[str, int]:
    added = {}
    if (directory / "added_tokens.json").exists():
        added |= read_json(directory / "added_tokens.json")
    if (directory / "tokenizer_config.json").exists():
        decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {token["content"]: int(i) for i, token in decoder.items()}
    return added
