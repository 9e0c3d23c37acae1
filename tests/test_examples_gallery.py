"""The page of pictures shows what the gallery makes, by commands that it runs."""

import re
import shlex
from pathlib import Path

import pytest

from examples.tiny_world.gallery import SECTIONS
from tests.test_docs import commands, parsed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gallery.md"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_command_of_the_gallery_parses(section):
    assert {parsed(command) for command in section.commands} & {"wan_generate_video.py"}


def test_the_page_has_the_pictures_of_the_gallery_in_its_order():
    shown = re.findall(r"\]\(images/(gallery_[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert shown == [section.picture for section in SECTIONS]


def test_the_page_shows_the_commands_of_the_gallery_and_of_every_section_some():
    run = {tuple(shlex.split(command)): section.name for section in SECTIONS for command in section.commands}
    start = ["python", "-m", "examples.tiny_world.gallery"]
    shown = [words for command in commands(PAGE) if (words := tuple(shlex.split(command)))[:3] != tuple(start)]
    assert not [shlex.join(words) for words in shown if words not in run]
    text = PAGE.read_text(encoding="utf-8")
    for section in SECTIONS:
        part = text[: text.index(section.picture)].rpartition("\n## ")[2]
        assert "```bash" in part, section.name


def test_the_pictures_are_small():
    sizes = [(ROOT / "docs" / "images" / section.picture).stat().st_size for section in SECTIONS]
    assert max(sizes) < 150_000
    assert sum(sizes) < 1_500_000
