"""The lm-eval adapter: its numbers equal those of `hg-scale evaluate`."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hg_scale.commands.main import main
from hg_scale.config.schema import ModelConfig
from hg_scale.data.protocol import SlidingWindows, Tokens
from hg_scale.data.tokenizer import ByteTokenizer
from hg_scale.evaluation.loaded_model import LoadedModel
from hg_scale.evaluation.scoring import score_windows
from hg_scale.model.hourglass import Hourglass
from tests.runs import TINY, train_in
from tests.shared import ROOT
from tests.world import Worlds

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    config = ModelConfig(
        hierarchy="1@1 1@2 1@1", d_model=32, heads=2, d_ff=64, sequence_length=32, vocab_size=257,
        pooling="average", upsampling="linear", positions="rotary",
    )  # fmt: skip
    model = Hourglass(config)
    return LoadedModel(model.eval(), Path("model"), 0, None, lambda: ByteTokenizer(documents=True))


def request(*arguments: object) -> SimpleNamespace:
    return SimpleNamespace(args=arguments)


def test_rolling_likelihood_equals_that_of_evaluate(loaded: LoadedModel) -> None:
    from hg_scale.evaluation.harness import HarnessModel

    texts = [b"short", b"the quick brown fox jumps over", b""]
    found = HarnessModel(loaded).loglikelihood_rolling([request(t.decode()) for t in texts])
    for text, nats in zip(texts, found, strict=True):
        tokens = Tokens(np.frombuffer(text, np.uint8))
        losses = score_windows(
            loaded.model, tokens, len(text), SlidingWindows(32, 32), start_token=256
        )
        assert nats == pytest.approx(-losses.nats.sum(), rel=1e-5)


def test_texts_longer_than_a_window_count_each_byte_once(loaded: LoadedModel) -> None:
    from hg_scale.evaluation.harness import HarnessModel

    uniform = Hourglass(loaded.model.config)
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.weight"))
    torch.nn.init.zeros_(uniform.get_parameter("head.linear.bias"))
    model = HarnessModel(LoadedModel(uniform.eval(), Path("u"), 0, None, loaded.open_tokenizer), 3)
    texts = ["a" * n for n in (1, 31, 32, 33, 100)]
    found = model.loglikelihood_rolling([request(text) for text in texts])
    assert found == pytest.approx([-len(t) * log(257) for t in texts], rel=1e-6)
    found = [nats for nats, _ in model.loglikelihood([request("b" * 50, text) for text in texts])]
    assert found == pytest.approx([-len(t) * log(257) for t in texts], rel=1e-6)


def test_likelihoods_of_context_and_continuation_add_up(loaded: LoadedModel) -> None:
    from hg_scale.evaluation.harness import HarnessModel

    model = HarnessModel(loaded)
    context, end = "the quick", " brown fox"
    ((nats, greedy),) = model.loglikelihood([request(context, end)])
    total, head = model.loglikelihood_rolling([request(context + end), request(context)])
    assert nats == pytest.approx(total - head, rel=1e-5)
    assert not greedy
    (text,) = model.generate_until([request(context, {"until": ["\n\n"], "max_gen_toks": 5})])
    if len(model.encode(text)) == 5 and "�" not in text:
        ((_, greedy),) = model.loglikelihood([request(context, text)])
        assert greedy
    stop = text[2:4]
    (cut,) = model.generate_until([request(context, {"until": [stop], "max_gen_toks": 5})])
    assert cut == text[: text.index(stop)]


@pytest.mark.parametrize("space", [" ", "\n", "\t", " \n\n"])
def test_white_space_between_counts_with_the_continuation(loaded: LoadedModel, space: str) -> None:
    from hg_scale.evaluation.harness import HarnessModel

    model = HarnessModel(loaded)
    found, expected = model.loglikelihood(
        [request("the" + space, "fox"), request("the", space + "fox")]
    )
    assert found == expected


@pytest.mark.parametrize(("limit", "kept"), [(5, 27), (31, 1), (40, 16)])
def test_a_long_context_leaves_room_for_the_answer(
    loaded: LoadedModel, limit: int, kept: int
) -> None:
    """The answer continues the end of the context, up to where the window is full."""
    from hg_scale.evaluation.harness import HarnessModel

    context = "the quick brown fox jumps over the lazy dog. " * 3
    options = {"until": ["\n\n\n"], "max_gen_toks": limit}
    (text,) = HarnessModel(loaded).generate_until([request(context, options)])
    ids, generated = list(context.encode())[-kept:], []
    with torch.inference_mode():
        while len(ids) + len(generated) <= 32 and len(generated) < limit:
            generated.append(int(loaded.model(torch.tensor([ids + generated]))[0, -1].argmax()))
            if generated[-1] == 256:
                break
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    expected = decoder.decode(bytes(token for token in generated if token < 256))
    assert expected and text.startswith(expected)


def test_custom_task_offline(worlds: Worlds, corpus: Path, tmp_path: Path) -> None:
    """By the command, on an export, with lm-eval in offline mode."""
    (tmp_path / "tiny.json").write_text(json.dumps({**TINY, "data": {"path": str(corpus)}}))
    arguments = ("--config", str(tmp_path / "tiny.json"), "--run", str(tmp_path / "run"))
    steps = ("--set", "training.steps=60", "--set", "optimizer.learning_rate=0.01")
    assert train_in(worlds, 1, tmp_path, *arguments, *steps).code == 0
    assert main(["convert", "export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    questions = [
        {"question": "the quick brown", "choices": [" fox jumps", " qqzzvvx"], "answer": 0},
        {"question": "jumps over the", "choices": [" zzxxqqv", " lazy dog"], "answer": 1},
    ] * 5
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "fox.yaml").write_text(
        "task: fox\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'questions.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    command = [
        sys.executable, "-m", "hg_scale", "harness", str(tmp_path / "export"), "--tasks", "fox",
        "--include-path", str(tmp_path / "tasks"), "--json", str(tmp_path / "out.json"),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, **offline},
    )
    assert done.returncode == 0, done.stderr
    assert "fox" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["fox"]["acc,none"] == 1.0

    (tmp_path / "tasks" / "gone.yaml").write_text(
        (tmp_path / "tasks" / "fox.yaml").read_text().replace("task: fox", "task: gone")
        .replace("dataset_path: json", "dataset_path: nobody/nothing").replace("  data_files", "#")
        .replace("    test:", "#").replace("dataset_kwargs:\n", "")
    )  # fmt: skip
    command[command.index("fox")] = "gone"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env={**os.environ, **offline},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "the data of gone cannot be loaded" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", ","), "--tasks: expected comma-separated names"),
        (("--tasks", "piqa", "--batch", "0"), "--batch: expected 1 or more"),
        (("--tasks", "piqa", "--limit", "0"), "--limit: expected 1 or more"),
        (("--tasks", "piqa", "--fewshot", "-1"), "--fewshot: expected 0 or more"),
        (("--tasks", "piqa", "--include-path", "/nowhere"), "is not a folder"),
        (("--tasks", "piqa", "--json", "/nowhere/r.json"), "cannot be written"),
    ],
)
def test_invalid_options_are_reported_before_the_model_is_loaded(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["harness", "nowhere", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
