"""Options declared once, as fields of frozen dataclasses, and read from the command line and from TOML."""

import argparse
import dataclasses
import difflib
import logging
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError

logger = logging.getLogger(__name__)


def option(
    default: Any,
    help: str,
    *,
    choices: Iterable[Any] | None = None,
    nargs: str | int | None = None,
    metavar: str | tuple[str, ...] | None = None,
    parse: Callable[[str], Any] | None = None,
    required: bool = False,
    remote: bool = False,
    positional: bool = False,
) -> Any:
    """Return a dataclass field that is a command line option of the same name.

    The annotation gives the type: bool is a flag; int, float, str, Path and `X | None` take one value; `tuple[X, ...]`
    takes any number and `tuple[X, X]` exactly two. `parse` turns one word into the value and raises ValueError.
    remote: a path that may be a file on the Hugging Face hub; it is the local one once options are parsed. positional:
    given without its name.
    """
    details = {"help": help, "choices": tuple(choices) if choices is not None else None, "nargs": nargs}
    return dataclasses.field(
        default=default,
        metadata={
            **details,
            "metavar": metavar,
            "parse": parse,
            "required": required,
            "remote": remote,
            "positional": positional,
        },
    )


@dataclasses.dataclass(frozen=True)
class ConfigFileOptions:
    """options from a file"""

    config_file: Path | None = option(
        None, "TOML file with any of these options (name = value, sections are ignored); the command line wins"
    )


def suggest(word: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'x'?" for the known word nearest to `word`, or "" when none is near."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"did you mean '{lowered[near[0]]}'?" if near else ""


def parse_options(
    doc: str | None,
    *groups: type,
    argv: Sequence[str] | None = None,
    below: Callable[[Mapping[str, Any]], tuple[str, Mapping[str, Any]]] | None = None,
) -> tuple[Any, ...]:
    """Return one frozen instance of each group, from the command line and, below it, from --config_file.

    doc: the script's docstring, shown by --help. below: given these, returns where more values come from, and values by
    name that count where nothing else is given. Raises UserError for anything that is not a valid option or value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(doc, *groups)
    argv = _mend_stray_dashes(argv, parser)
    given = vars(parser.parse_args(argv))
    if given.get("config_file"):
        given = {**_read_config_file(Path(given["config_file"]), groups), **given}
    if below:
        where, values = below(given)
        given = {**_checked_options(where, values, groups), **given}
    fields = {field.name: field for group in groups for field in dataclasses.fields(group)}
    needed = {name: field for name, field in fields.items() if field.metadata["required"]}
    needed = {name: field for name, field in needed.items() if given.get(name, ()) == ()}
    missing = [name if field.metadata["positional"] else f"--{name}" for name, field in needed.items()]
    if missing:
        raise UserError(f"{', '.join(missing)}: required, but not given", fix="--help lists the options")
    for name, field in fields.items():
        if field.metadata["remote"] and isinstance(given.get(name), Path):
            from utils.hub_files import local_path  # by whoever names such a file alone

            given[name] = local_path(given[name], f"--{name}")
    return tuple(
        group(**{field.name: given[field.name] for field in dataclasses.fields(group) if field.name in given})
        for group in groups
    )


def make_parser(doc: str | None, *groups: type) -> argparse.ArgumentParser:
    """Return the parser of a script; its namespace holds only what was typed, the defaults stay with the groups."""
    summary, _, rest = (doc or "").strip().partition("\n")
    parser = _Parser(
        description=summary,
        epilog=textwrap.dedent(rest).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [options]",
    )
    for group in (*groups, ConfigFileOptions):
        heading = parser.add_argument_group((group.__doc__ or group.__name__).strip().splitlines()[0])
        for field in dataclasses.fields(group):
            if field.metadata["positional"]:
                heading.add_argument(field.name, **_argument(group, field))
                continue
            # What is on by default has a name that turns it off.
            names = [f"--{field.name}", f"--no_{field.name}"][: 2 if field.default is True else 1]
            heading.add_argument(*names, **_argument(group, field))
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors that name the nearest option."""

    def error(self, message: str) -> typing.NoReturn:
        fix = "--help lists the options"
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            words = message[len(prefix) :].split()
            unknown = next((word for word in words if word.startswith("-")), words[0])
            message = f"{unknown.split('=')[0]}: unknown option" if unknown.startswith("-") else f"{message}"
            fix = suggest(unknown.split("=")[0], self._option_string_actions) or fix
        elif match := re.match(r".*invalid choice: '(.*)' \(choose from (.*)\)", message):
            fix = suggest(match[1], match[2].replace("'", "").split(", ")) or fix
        raise UserError(message.removeprefix("argument "), fix)


def _mend_stray_dashes(argv: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Join `-- word` to `--word` where that is an option: a blank after the dashes is a common slip."""
    mended: list[str] = []
    for word in argv:
        if mended and mended[-1] == "--" and f"--{word.split('=')[0]}" in parser._option_string_actions:
            mended[-1] = f"--{word}"
            logger.warning("'-- %s' was read as '--%s'", word, word)
        else:
            mended.append(word)
    return mended


def _argument(group: type, field: dataclasses.Field) -> dict[str, Any]:
    """Return the keywords of argparse's add_argument for one option."""
    details = field.metadata
    scalar, length = _value_type(group, field)
    empty = field.default is False or field.default in (None, (), "")
    shown = "" if empty else f" (default: {_shown(field.default)})"
    keywords: dict[str, Any] = {"help": (details["help"] + shown).replace("%", "%%")}
    if scalar is bool:
        return {**keywords, "action": _Switch, "nargs": 0}
    keywords["type"] = _named(details["parse"] or (_path if scalar is Path else scalar), scalar)
    if details["choices"]:
        keywords["choices"] = details["choices"]
    if length is not None:
        keywords["nargs"] = details["nargs"] or ("*" if length is Ellipsis else length)
        keywords["action"] = _StoreTuple
    default_metavar = None if details["choices"] else _METAVARS.get(scalar, "VALUE")
    keywords["metavar"] = details["metavar"] or default_metavar
    return {name: value for name, value in keywords.items() if value is not None}


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


class _Switch(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value_type(group: type, field: dataclasses.Field) -> tuple[type, Any]:
    """Return the type of one value and the number of values: None for one, Ellipsis for any, or 2, 3, ..."""
    annotation = typing.get_type_hints(group)[field.name]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is tuple:
        parts = typing.get_args(annotation)
        return parts[0], Ellipsis if parts[-1] is Ellipsis else len(parts)
    return annotation, None


def _named(read: Callable[[str], Any], scalar: type) -> Callable[[str], Any]:
    """Give a reader the name that argparse puts into "invalid ... value"."""

    def reader(word: str) -> Any:
        try:
            return read(word)
        except ValueError as error:
            text = str(error) if read is not scalar else f"'{word}' is not {_ARTICLES.get(scalar, 'valid')}"
            raise argparse.ArgumentTypeError(text) from None

    return reader


_ARTICLES = {int: "a whole number", float: "a number"}


def _path(word: str) -> Path:
    if not word:  # Path("") is the working directory, which nobody means by a shell variable that is not set
        raise ValueError("the path is empty")
    return Path(word)


def _read_config_file(path: Path, groups: Sequence[type]) -> dict[str, Any]:
    """Return the options in a TOML file, checked like typed ones; tables are flattened, the last one wins."""
    import toml  # by whoever reads such a file alone: bench/gpu.py runs where it is not installed

    path = path if path.suffix.lower() == ".toml" else path.with_name(path.name + ".toml")
    try:
        content = toml.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config_file {path}: no such file", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config_file {path}: cannot be read ({error})") from None
    except (toml.TomlDecodeError, IndexError) as error:
        raise UserError(f"--config_file {path}: not valid TOML ({error})") from None
    flat: dict[str, Any] = {}
    for name, value in content.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return _checked_options(f"--config_file {path}", flat, groups)


def _checked_options(where: str, values: Mapping[str, Any], groups: Sequence[type]) -> dict[str, Any]:
    known = {field.name: (group, field) for group in groups for field in dataclasses.fields(group)}
    checked = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{where}: unknown option '{name}'", suggest(name, known))
        checked[name] = _checked(f"{where}: {name}", value, *known[name])
    return checked


def given_options(group: Any) -> dict[str, Any]:
    """Return the options of a group that are not at their defaults, as JSON and TOML can hold them.

    Paths become absolute, to mean the same from everywhere.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value.absolute()) if isinstance(value, Path) else value

    fields = ((field, getattr(group, field.name)) for field in dataclasses.fields(group))
    return {field.name: plain(value) for field, value in fields if value != field.default}


def _checked(where: str, value: Any, group: type, field: dataclasses.Field) -> Any:
    """Return a TOML value as the option's type, or raise UserError."""
    scalar, length = _value_type(group, field)
    if length is None:
        return _checked_scalar(where, value, scalar, field)
    values = value if isinstance(value, list) else [value]
    if length is not Ellipsis and len(values) != length:
        raise UserError(f"{where}: needs {length} values, got {len(values)}")
    return tuple(_checked_scalar(where, item, scalar, field) for item in values)


def _checked_scalar(where: str, value: Any, scalar: type, field: dataclasses.Field) -> Any:
    read = field.metadata["parse"] or (_path if scalar is Path and isinstance(value, str) else None)
    if read:
        try:
            value = read(str(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{where} = {value!r}: {error}") from None
    elif scalar is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    elif not isinstance(value, scalar) or (scalar is int and isinstance(value, bool)):
        raise UserError(f"{where} = {value!r}: must be {_TOML_NAMES[scalar]}, not {_toml_name(value)}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        near = suggest(str(value), map(str, choices))
        raise UserError(f"{where} = {value!r}: choose from {', '.join(map(str, choices))}", near)
    return value


_TOML_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    Path: "a path in quotes",
}


def _toml_name(value: Any) -> str:
    return _TOML_NAMES.get(type(value), "a list" if isinstance(value, list) else type(value).__name__)
