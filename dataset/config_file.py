"""The dataset file as it is read: TOML or JSON, where each key stands, and what is wrong with it in one line."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import toml
import voluptuous as vol

from dataset.config_keys import BACKSLASHES, IMAGE, LISTS, VIDEO
from utils.errors import UserError
from utils.options import suggest

HELP = "see docs/dataset_config.md"
# What the two readers raise for text that is not of their language: toml has no one class for it.
_UNREADABLE = (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError)


class ConfigFile:
    """A dataset file whose findings are one line with file, table, line, key, value and the nearest valid key.

    Tables are named "[general]", "[[datasets]] 1", "[[validation]] 1" ..., and "" for the top.
    """

    def __init__(self, path: Path):
        self.path = path
        suffix = path.suffix.lower()
        if suffix not in (".toml", ".json"):
            raise UserError(f"--dataset_config {path}: must be a .toml or .json file")
        try:
            self.text = path.read_text(encoding="utf-8-sig")
            read = toml.loads if suffix == ".toml" else _json
            self.content = read(self.text)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
        except _UNREADABLE as error:
            line = "".join(self.text.splitlines()[max(0, getattr(error, "lineno", 0) - 1) :][:1])
            fix = BACKSLASHES if "\\" in line else f"texts and paths stand in quotes; {HELP}"
            why = "nested too deeply" if isinstance(error, RecursionError) else _shown(str(error), 200)
            raise UserError(f"{path}: is not valid {suffix[1:].upper()} ({why})", fix) from None
        self._lines = dict((_toml_lines if suffix == ".toml" else _json_lines)(self.text))
        if not isinstance(self.content, dict):
            raise UserError(f"{path}: must be a table with the key datasets", HELP)

    def check(self, schema: Any, content: Any, table: str) -> Any:
        """Return the content as the schema converts it, or raise UserError with everything that is wrong."""
        try:
            return vol.Schema(schema)(content)
        except vol.MultipleInvalid as error:
            found = [self._finding(finding, content, table, schema) for finding in error.errors]
            raise UserError(
                "; ".join(problem for problem, _ in found), next((fix for _, fix in found if fix), "")
            ) from None

    def check_keys(
        self,
        content: Mapping[str, Any],
        table: str,
        schema: Mapping[str, Callable[[Any], Any]],
        elsewhere: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Return the checked values of one table; a key that is known elsewhere is told apart from a typo."""
        for key in content:
            if key in elsewhere and key not in schema:
                home = "image datasets" if key in IMAGE else "video datasets"
                if table == "[general]":
                    home = "a [[datasets]] entry, not in [general]"
                raise UserError(f"{self.place(table, key)}: belongs in {home}")
        return self.check({vol.Optional(key): check for key, check in schema.items()}, content, table)

    def place(self, table: str, key: str) -> str:
        """Return "data.toml: [[datasets]] 1, line 7: key"."""
        line, key = self._lines.get((table, key)), _shown(key) or '""'
        inside = ", ".join(part for part in (table, f"line {line}" if line else "") if part)
        return f"{self.path}: {inside}: {key}" if inside else f"{self.path}: {key}"

    def _finding(self, error: vol.Invalid, content: Any, table: str, schema: Mapping) -> tuple[str, str]:
        key = str(error.path[0]) if error.path else ""
        place = self.place(table, key)
        if "extra keys" in error.msg:
            known = [str(name) for name in schema]
            # A typo in the key of the source may have made a video dataset one of pictures.
            nearest = suggest(key, [*known, *VIDEO] if table else known)
            return f"{place}: unknown key", nearest or f"the keys are {', '.join(known)}"
        if "required key" in error.msg or error.msg.startswith("length"):
            return f"{self.path}: has no [[datasets]] entry", HELP
        if error.msg.startswith("expected"):
            return f"{place}: must be {f'[[{key}]] tables' if key in LISTS else 'a table'}", ""
        value = _shown(json.dumps(content.get(key), default=str, ensure_ascii=False))
        return f"{place} = {value}: {error.msg}", ""


def _shown(text: str, length: int = 80) -> str:
    """Return what stands in the file so that a terminal can print it, and not at any length."""
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= length else text[: length - 3] + "..."


def _json(text: str) -> Any:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(content := dict(pairs)) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {twice} stands there twice")
        return content

    return json.loads(text, object_pairs_hook=table)


Lines = dict[tuple[str, str], int]


def _toml_lines(text: str) -> Lines:
    """Return the line of each (table, key). Of keys in inline tables nothing is known."""
    lines: Lines = {}
    table, entries = "", Counter()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if match := re.match(rf"\[\s*\[\s*({'|'.join(LISTS)})\s*\]\s*\]", line):
            entries[match[1]] += 1
            table = f"[[{match[1]}]] {entries[match[1]]}"
        elif line.startswith("[") and "=" not in line:
            table = line.split("]")[0] + "]"
            lines.setdefault(("", table.strip("[] ")), number)
        elif "=" in line:
            lines.setdefault((table, line.split("=")[0].strip().strip("\"'")), number)
    return lines


def _json_lines(text: str) -> Lines:
    """Return the line of each (table, key) of a JSON text that has been read without an error."""
    lines: Lines = {}
    number, path, key, entries = 1, [], "", Counter()  # path: the keys of the tables and lists around, "" for a list
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]\n]', text):
        token = match[0]
        if match[2] is not None:
            key = json.loads(f'"{match[1]}"')
            tables = {(name, ""): f"[[{name}]] {entries[name]}" for name in LISTS}
            table = {(): "", ("general",): "[general]", **tables}.get(tuple(path[1:]))
            if table is not None:
                lines.setdefault((table, key), number)
        elif token in ("{", "["):
            path.append(key)
            key = ""
            if token == "{" and len(path) == 3 and path[2] == "":
                entries[path[1]] += 1
        elif token in ("}", "]"):
            path.pop()
            key = ""
        number += token.count("\n")
    return lines
