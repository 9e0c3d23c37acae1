import io
import json

import pytest
import sentencepiece
import torch

from tests import tiny
from utils.errors import UserError
from wan import tokenizer as module
from wan.tokenizer import clean, load_tokenizer, tokenize

PROMPTS = [
    "a red circle moves left",
    "  the   BLUE square\tturns\n\nslowly ",
    "naïve 女孩 🙂 snow",
    "",
    "&lt;b&gt; green &amp;amp; yellow",
]


def write_json_twin(pieces: sentencepiece.SentencePieceProcessor, folder) -> None:
    """The same tokenizer as a tokenizer.json, as the repository of umT5 ships both."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    rules = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    rules.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    rules.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "spiece.model").write_bytes(tiny.sentencepiece_model())
    return path


@pytest.fixture(scope="module")
def pieces(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))


def test_recorded_prompts_are_cleaned_and_cut_as_by_the_original(golden):
    rows = json.loads((golden / "text.json").read_text(encoding="utf-8"))["prompts"]
    tokenizer = load_tokenizer(golden / "tokenizer")
    for length, ids_key, mask_key in ((16, "ids_max16", "mask_max16"), (512, "ids", None)):
        ids, mask = tokenize(tokenizer, [row["prompt"] for row in rows], length)
        assert ids.shape == mask.shape == (len(rows), length)
        for row, row_ids, row_mask in zip(rows, ids, mask, strict=True):
            assert clean(row["prompt"]) == row["clean"]
            if mask_key:
                assert (row_ids.tolist(), row_mask.tolist()) == (row[ids_key], row[mask_key])
            else:
                assert row_ids[row_mask.bool()].tolist() == row[ids_key]
                assert (row_ids[~row_mask.bool()] == tokenizer.pad).all()


def test_a_bare_sentencepiece_model_gives_sentencepiece_and_an_end_token(folder, pieces):
    tokenizer = load_tokenizer(folder / "spiece.model")
    ids, mask = tokenize(tokenizer, PROMPTS)
    for prompt, row, valid in zip(PROMPTS, ids, mask.bool(), strict=True):
        assert row[valid].tolist() == [*pieces.encode(clean(prompt)), pieces.eos_id()]
        assert (row[~valid] == pieces.pad_id()).all()
    assert pieces.unk_id() not in ids  # what the vocabulary lacks is spelt in bytes


def test_a_sentencepiece_model_and_the_folder_with_its_json_twin_agree(folder, pieces, tmp_path):
    write_json_twin(pieces, tmp_path)
    bare, twin = load_tokenizer(folder / "spiece.model"), load_tokenizer(tmp_path)
    assert (twin.pad, twin.end, twin.size) == (bare.pad, bare.end, bare.size) == (0, 1, pieces.get_piece_size())
    for got, want in zip(tokenize(twin, PROMPTS), tokenize(bare, PROMPTS), strict=True):
        assert torch.equal(got, want)


def test_a_folder_may_be_that_of_an_official_repository(folder, tmp_path):
    inside = tmp_path / "google" / "umt5-xxl"
    inside.mkdir(parents=True)
    (inside / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    assert load_tokenizer(tmp_path).ids("red") == load_tokenizer(folder).ids("red")


def test_long_prompts_are_cut_and_still_end_in_the_end_token(folder):
    tokenizer = load_tokenizer(folder)
    ids, mask = tokenize(tokenizer, ["red " * 600])
    assert ids.shape == (1, 512) and mask.all()
    assert ids[0, -1] == tokenizer.end and tokenizer.end not in ids[0, :-1]


def test_special_tokens_take_the_names_that_the_configuration_gives_them(pieces, tmp_path):
    write_json_twin(pieces, tmp_path)
    names = {"pad_token": {"content": pieces.id_to_piece(5)}, "eos_token": pieces.id_to_piece(7)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.pad, tokenizer.end) == (5, 7)


def test_without_a_path_the_cache_of_the_hub_is_used(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--Wan-AI--Wan2.1-T2V-14B" / "snapshots" / "abc" / "google" / "umt5-xxl"
    snapshot.mkdir(parents=True)
    (snapshot / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    refs = tmp_path / "models--Wan-AI--Wan2.1-T2V-14B" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_tokenizer().ids("red") == load_tokenizer(folder).ids("red")


def test_without_cache_or_network_one_line_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="google/umt5-xxl is not on this machine") as caught:
        load_tokenizer()
    text = str(caught.value)
    assert "ownload tokenizer.json or spiece.model" in text
    assert "--t5_tokenizer" in text and "\n" not in text


def test_nothing_is_tried_again_when_the_network_is_down(tmp_path, monkeypatch):
    calls = []

    def fail(url, **_):
        calls.append(url)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(UserError, match="Name or service not known"):
        load_tokenizer()
    assert len(calls) == 1


def model_without_end() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["red green blue"] * 50),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        eos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("spiece.model", lambda: b"not a model", "not a tokenizer that can be read"),
        ("tokenizer.json", lambda: b"{}", "not a tokenizer that can be read"),
        ("spiece.model", model_without_end, "no token for padding or the end"),
        ("readme.txt", lambda: b"hello", "holds neither tokenizer.json nor spiece.model"),
    ],
)
def test_a_folder_with_something_else_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(caught.value).startswith("--t5_tokenizer") and module.REPOSITORY in str(caught.value)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="--t5_tokenizer .*spiece.model: no such file"):
        load_tokenizer(tmp_path / "spiece.model")
