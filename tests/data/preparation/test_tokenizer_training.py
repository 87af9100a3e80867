import json
import subprocess
import sys

import numpy as np
import pytest

from hg_scale.data.errors import DataError
from hg_scale.data.preparation.documents import TextFormat
from hg_scale.data.preparation.tokenizer_training import TokenizerTraining, train_tokenizer
from hg_scale.data.progress import ProgressBar
from hg_scale.data.tokenizer import SentencePieceTokenizer
from tests.data.conftest import prose
from tests.shared import ROOT


def train(source, output, size=600, model="bpe", **options):
    return train_tokenizer(
        TokenizerTraining((source,), output, size, model, **options), ProgressBar()
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(6):
        texts = [prose(300, seed=10 * number + n) for n in range(10)]
        lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
        (folder / f"{number}.jsonl").write_text(lines)
    return folder


@pytest.mark.timeout(120)
def test_a_large_model_comes_back_from_the_child_process(tmp_path):
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, 9)) for _ in range(12_000)]
    (tmp_path / "text").write_text("\n".join(words))
    trained = train(tmp_path / "text", tmp_path / "m.model", size=6000)
    assert trained.tokenizer.vocab_size == 6000
    assert (tmp_path / "m.model").stat().st_size > 1 << 16


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_same_input_same_model_which_reproduces_every_text(source, tmp_path, model):
    form = TextFormat("body")
    trained = train(source, tmp_path / "one", model=model, format=form)
    train(source, tmp_path / "two", model=model, format=form)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    tokenizer = SentencePieceTokenizer.read(tmp_path / "one", documents=True)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.round_trips) == (600, 1, True)
    text = prose(2000, seed=77).encode() + b"\xff\0 \t\xe2\x96\x81"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # The text of JSON lines was trained on, not their keys.
    size = sum(len(json.loads(line)["body"].encode())
               for path in source.iterdir() for line in path.read_text().splitlines())  # fmt: skip
    assert trained.sample_bytes == size and trained.sample_tokens < size / 2


def test_the_sample_depends_on_the_seed(source, tmp_path):
    form = TextFormat("body")
    sizes = []
    for seed, name in [(0, "a"), (0, "b"), (1, "c")]:
        trained = train(source, tmp_path / name, size=400, format=form, sample_bytes=60_000,
                        seed=seed)  # fmt: skip
        sizes.append(trained.sample_bytes)
    assert all(40_000 < size < 65_000 for size in sizes)  # of 121,632
    models = [(tmp_path / name).read_bytes() for name in "abc"]
    assert models[0] == models[1] != models[2]


@pytest.mark.parametrize(
    ("size", "message"),
    [(50_000, "the sample gives at most [0-9]+ pieces"), (200, "alone take [0-9]+ pieces|failed")],
)
def test_unsuitable_vocabulary_sizes_are_reported(source, tmp_path, size, message):
    with pytest.raises(DataError, match=message) as caught:
        train(source, tmp_path / "m", size=size, model="unigram", format=TextFormat("body"))
    assert "\n" not in str(caught.value) and not (tmp_path / "m").exists()


def test_user_errors_exit_with_2_and_one_line(source, tmp_path):
    (tmp_path / "there").touch()
    script = str(ROOT / "data_prep" / "train_tokenizer.py")
    for options, message in [
        (["--output", tmp_path / "there"], "already exists"),
        (["--output", tmp_path / "no" / "m"], "no such folder"),
        (["--output", tmp_path / "m"], "has no field 'text' (it has: body)"),
        (["--output", tmp_path / "m", "--input", tmp_path / "x"], "no such file or folder"),
        (["--output", tmp_path / "m", "--input", tmp_path / "there"], "contains no text"),
    ]:
        command = [sys.executable, script, "--input", source, "--vocab-size", "600", *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr and done.stderr.count("\n") == 1
