"""The guides: settings have the defaults that are printed, and what is named or linked is there."""

import importlib
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDES = {  # and the config whose settings it lists
    "flow_opd": "flow_opd", "language_models": "lightning_opd", "uni_opd": "uni_opd", "dp_opd": "dp_opd",
    "vla_opd": "vla_opd",
}  # fmt: skip


def settings(guide: str) -> list[tuple[list[str], list[str]]]:
    """Keys and defaults of each row; `a.b`, `.c` are a.b and a.c. What is in parentheses is a remark."""
    section = (DOCS / f"{guide}.md").read_text().split("\n## Settings\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    found = []
    for names, defaults in rows:
        first, *others = re.findall(r"`([^`]+)`", names)
        parent = first.rsplit(".", 1)[0]
        keys = [first, *(parent + other if other.startswith(".") else other for other in others)]
        found.append((keys, re.sub(r" \([^)]*\)", "", defaults).strip().split(", ")))
    return found


def value_of(config: ConfigDict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def same(printed: str, value) -> bool:
    if printed in ("none", "nothing"):
        return not value and value is not False and value != 0
    if isinstance(value, (bool, str)):
        return printed == str(value)
    return float(printed) == value


@pytest.mark.parametrize("guide", GUIDES)
def test_defaults_are_those_of_the_config(guide):
    config = importlib.import_module(f"configs.{GUIDES[guide]}").get_config()
    rows = settings(guide)
    assert len(rows) > 10
    for keys, defaults in rows:
        values = [value_of(config, key) for key in keys]
        if len(keys) == 1 and isinstance(values[0], ConfigDict) and values[0]:
            values, defaults = sorted(values[0]), sorted(defaults)
        elif len(keys) == 1 and isinstance(values[0], tuple) and values[0]:
            values = list(values[0])
        assert len(defaults) == len(values), (keys, defaults, values)
        for printed, value in zip(defaults, values):
            assert same(printed, value), (keys, defaults, values)


def test_files_on_the_map_are_there():
    """A name without a directory is in that of the name before it."""
    rows = [line.split("|")[2] for line in (DOCS / "map.md").read_text().splitlines() if line.startswith("| ")]
    seen = 0
    for row in rows:
        folder = ROOT
        for name in re.findall(r"`([^`]+)`", row):
            path = ROOT / name if "/" in name else folder / name
            folder, seen = path.parent, seen + 1
            assert list(path.parent.glob(path.name)), (name, row)
    assert seen > 100


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """To files, and to headings as GitHub names them."""

    def anchors(path: Path) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
