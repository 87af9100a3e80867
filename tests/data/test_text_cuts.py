"""Tokens of long text are sentencepiece's own, wherever it is cut."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from hg_scale.data import text_cuts
from hg_scale.data import tokenizer as module
from hg_scale.data.tokenizer import SentencePieceTokenizer
from tests.data.conftest import prose

SYMBOL = "new york"  # user-defined, with a space inside
WORDS = ["ka", "to", "ren2", "a", "ﬁne", "Ｗide", "漢字", "é", "e\u0301", SYMBOL, "…", "▁", "x" * 9]
GAPS = [" ", " ", " ", "  ", "   ", "\n", " \t", "\u3000", ", ", ""]
KINDS = [
    (kind, dummy, extra, rule)
    for kind in ("unigram", "bpe")
    for dummy, extra, rule in [
        (True, True, "nmt_nfkc"), (True, False, "identity"), (False, True, "nmt_nfkc_cf"),
        (False, False, "identity"), (False, False, "nfkc"),
    ]
]  # fmt: skip


def train(kind, dummy, extra, rule, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(4000).split("\n")), model_writer=model, model_type=kind,
        vocab_size=400, add_dummy_prefix=dummy, remove_extra_whitespaces=extra,
        normalization_rule_name=rule, minloglevel=2, hard_vocab_limit=False,
        **{"byte_fallback": True} | options,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def models():
    """Return the models of `KINDS`, each trained once."""
    return {key: train(*key, user_defined_symbols=["<sep>"]) for key in KINDS}


@pytest.fixture
def short_parts(monkeypatch):
    """Cut after a few bytes."""
    monkeypatch.setattr(module, "_LONGEST", 24)
    monkeypatch.setattr(module, "_LONGEST_UNIGRAM", 24)


def whole(model, text):
    """Return the ids of sentencepiece alone."""
    return sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


texts = st.lists(
    st.sampled_from(WORDS) | st.sampled_from(["<sep>", "k", "0"]), min_size=30, max_size=60
).flatmap(lambda words: st.lists(
    st.sampled_from(GAPS), min_size=len(words), max_size=len(words)
).map(lambda gaps: "".join(w + g for w, g in zip(words, gaps, strict=True))))  # fmt: skip


@pytest.mark.parametrize("key", KINDS, ids=str)
def test_parts_have_the_tokens_of_the_whole(models, short_parts, key):
    tokenizer = SentencePieceTokenizer(models[key], documents=True)
    parts = 0

    @settings(deadline=None, derandomize=True, max_examples=60)
    @given(text=texts)
    def check(text):
        nonlocal parts
        if tokenizer.round_trips:
            text = text.replace("▁", "_")  # spelt in bytes, unlike sentencepiece
        parts += len(list(tokenizer._split_long(text.encode())))
        assert tokenizer.encode(text).tolist() == whole(models[key], text)

    check()
    assert parts > 200


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {"user_defined_symbols": [SYMBOL], "split_by_whitespace": False},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False},
    ],
    ids=str,
)
def test_models_whose_pieces_span_spaces_are_not_cut_inside_them(short_parts, kind, options):
    model = train(kind, True, True, "nmt_nfkc", **options)
    tokenizer = SentencePieceTokenizer(model, documents=True)
    random = np.random.default_rng(0)
    for _ in range(20):
        words = random.choice([*WORDS, "Ω", "Ψ"], 60).tolist()
        text = "".join(w + g for w, g in zip(words, random.choice(GAPS, 60).tolist(), strict=True))
        assert tokenizer.encode(text).tolist() == whole(model, text)


@pytest.mark.parametrize("change", ["no piece for a space", "spaces behind words"])
def test_models_that_give_a_space_another_meaning_are_not_cut(short_parts, change):
    proto = sentencepiece_model_pb2.ModelProto.FromString(
        train("unigram", True, True, "identity", byte_fallback=False)
    )
    if change == "spaces behind words":
        proto.trainer_spec.treat_whitespace_as_suffix = True
    else:
        for piece in proto.pieces:
            piece.piece = piece.piece.replace("▁", "\ue000")
    model = proto.SerializeToString()
    text = "Q Q0 ka to Q Q Q " * 9 + "ka"  # unknown, beside an unknown space
    tokenizer = SentencePieceTokenizer(model, documents=True)
    assert tokenizer.encode(text).tolist() == whole(model, text)
    assert tokenizer.last_cut(text.encode(), 0, 99) is None


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_long_text_of_a_model_that_puts_a_space_in_front(models, kind):
    """Longer than a call of sentencepiece for a BPE model, with the limits as they are."""
    model = models[kind, True, True, "nmt_nfkc"]
    text = prose(60_000, seed=3)
    tokenizer = SentencePieceTokenizer(model, documents=True)
    assert (len(list(tokenizer._split_long(text.encode()))) > 4) == (kind == "bpe")
    assert tokenizer.encode(text).tolist() == whole(model, text)


def test_text_without_words_is_cut_by_a_lossless_model_only(models):
    cuts = {}
    for dummy in (False, True):
        model = models["bpe", dummy, False, "identity"]
        tokenizer = SentencePieceTokenizer(model, documents=True)
        assert tokenizer.round_trips != dummy
        cuts[dummy] = tokenizer.last_cut("字元字元字元".encode(), 0, 11)
    assert cuts == {False: 9, True: None}  # between characters, and not at all


def test_the_last_cut_is_found_far_before_the_end(models):
    tokenizer = SentencePieceTokenizer(models["bpe", True, True, "nmt_nfkc"], documents=True)
    data = b"one two" + b"\xe6\xbc\xa2" * (3 * text_cuts._SCANNED)
    assert tokenizer.last_cut(data, 0, len(data)) == 3
    assert tokenizer.last_cut(data, 3, len(data)) is None
    assert tokenizer.last_cut(b"ab cd", 0, 2) == 2 and tokenizer.last_cut(b"ab cd", 0, 1) is None
