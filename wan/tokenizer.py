"""Prompts to token ids: cleaning, and the SentencePiece tokenizer of umT5 from a file or the Hugging Face hub."""

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
from torch import Tensor

from utils.errors import UserError, first_line
from utils.files import require_file

OPTION = "--t5_tokenizer"
REPOSITORY = "google/umt5-xxl"
FILES = ("tokenizer.json", "spiece.model")
# Where the tokenizer may be in the Hugging Face cache: its own repository, and a copy in an official one.
_CACHED = [(REPOSITORY, file) for file in FILES]
_CACHED += [("Wan-AI/Wan2.1-T2V-14B", f"{REPOSITORY}/{file}") for file in FILES]
_FETCH = (
    f"download tokenizer.json or spiece.model of huggingface.co/{REPOSITORY} (the official Wan repositories hold them "
    f"too, in the folder {REPOSITORY}) and give {OPTION} FILE"
)


@dataclass(frozen=True)
class Tokenizer:
    """Cuts text into tokens."""

    ids: Callable[[str], list[int]]  # the ids of a text, without the end token
    size: int  # ids are smaller than this
    pad: int
    end: int


def clean(text: str) -> str:
    """Return a prompt with mojibake and HTML entities undone and every run of white space made one blank."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], max_length: int = 512) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B max_length], int64, of cleaned prompts that end in the end token; mask: 0 at padding."""
    rows = [[*tokenizer.ids(clean(prompt))[: max_length - 1], tokenizer.end] for prompt in prompts]
    ids = torch.tensor([row + [tokenizer.pad] * (max_length - len(row)) for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids, (torch.arange(max_length) < lengths).long()


def load_tokenizer(path: Path | str | None = None) -> Tokenizer:
    """Return the tokenizer of a file (tokenizer.json or spiece.model) or of a folder that holds one.

    Without a path: of google/umt5-xxl, from the Hugging Face cache or hub. Raises UserError when there is none.
    """
    file = _from_hub() if path is None else _find(Path(path))
    return _from_json(file) if file.suffix == ".json" else _from_sentencepiece(file)


def _find(path: Path) -> Path:
    """Return the tokenizer's file: the path, or one in that folder, which may also be a whole official repository."""
    if not path.is_dir():
        return require_file(path, OPTION, "a tokenizer: its folder, tokenizer.json or spiece.model")
    for folder in (path, path / REPOSITORY):
        for name in FILES:
            if (folder / name).is_file():
                return require_file(folder / name, OPTION, "a tokenizer")
    raise UserError(f"{OPTION} {path}: the folder holds neither {' nor '.join(FILES)}", _FETCH)


def _from_hub() -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    for repository, file in _CACHED:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    try:
        # Asked first because it fails at once where the download would try again for half a minute.
        get_hf_file_metadata(hf_hub_url(REPOSITORY, FILES[0]), timeout=10)
        return Path(hf_hub_download(REPOSITORY, FILES[0]))
    except Exception as error:  # of several network libraries, or of the hub; the cure is one
        raise UserError(f"the tokenizer {REPOSITORY} is not on this machine ({first_line(error)})", _FETCH) from None


def _from_json(path: Path) -> Tokenizer:
    """Return the tokenizer as the file describes it: transformers 5 would build one of its own from the vocabulary."""
    from tokenizers import Tokenizer as Rules

    try:
        rules = Rules.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise _unreadable(path, error) from None
    rules.no_truncation()
    rules.no_padding()
    names = _special_names(path.with_name("tokenizer_config.json"))
    special = {role: rules.token_to_id(name) for role, name in names.items()}
    if None in special.values():
        absent = ", ".join(names[role] for role, id in special.items() if id is None)
        raise UserError(f"{OPTION} {path}: has no token {absent}, so it is not umT5's", _FETCH)
    return Tokenizer(
        ids=lambda text: rules.encode(text, add_special_tokens=False).ids,
        size=rules.get_vocab_size(with_added_tokens=True),
        pad=special["pad_token"],
        end=special["eos_token"],
    )


def _special_names(config: Path) -> dict[str, str]:
    """Return how the padding and the end token are called, by the configuration beside a tokenizer.json if any."""
    names = {"pad_token": "<pad>", "eos_token": "</s>"}
    try:
        given = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return names
    for role in names:
        name = given.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        names[role] = name or names[role]
    return names


def _from_sentencepiece(path: Path) -> Tokenizer:
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise _unreadable(path, error) from None
    if pieces.eos_id() < 0 or pieces.pad_id() < 0:
        raise UserError(f"{OPTION} {path}: has no token for padding or the end, so it is not umT5's", _FETCH)
    return Tokenizer(ids=pieces.encode, size=pieces.get_piece_size(), pad=pieces.pad_id(), end=pieces.eos_id())


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{OPTION} {path}: not a tokenizer that can be read ({first_line(error, most=120)})", _FETCH)
