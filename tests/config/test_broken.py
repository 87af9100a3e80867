"""Invalid configurations: every message names the key and what is valid."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.config import ConfigError, load_config, parse_config
from hg_scale.config.read import parse_value

# (dotted key at the start of the message, what the message contains, the invalid tree)
INVALID: list[tuple[str, str, dict[str, Any]]] = [
    # wrong type
    ("model.d_model", "integer", {"model": {"d_model": "512"}}),
    ("model.d_model", "integer", {"model": {"d_model": 51.5}}),
    ("model.heads", "integer", {"model": {"heads": None}}),
    ("model.heads", "integer", {"model": {"heads": [8, "8"]}}),
    ("model.heads", "integer", {"model": {"heads": [{"path": "a"}]}}),
    ("model.hierarchy", "string", {"model": {"hierarchy": 6}}),
    ("model.bias", "boolean", {"model": {"bias": "yes"}}),
    ("model.dropout", "number", {"model": {"dropout": "0.1"}}),
    ("model.window", "integer", {"model": {"window": "all"}}),
    ("model", "an object", {"model": 3}),
    ("data.path", "string", {"data": {"path": 5}}),
    ("data.sources", "list", {"data": {"sources": {"path": "a"}}}),
    ("data.sources", "at least 1", {"data": {"sources": []}}),
    ("data.sources", 'entry 1, weight = "3": expected a valid number',
     {"data": {"sources": [{"path": "a", "weight": "3"}]}}),
    ("data.sources", "entry 2, wieght = 3.0: unknown key; did you mean weight?",
     {"data": {"sources": [{"path": "a"}, {"path": "b", "wieght": 3.0}]}}),
    ("data.sources", "entry 1, path: missing", {"data": {"sources": [{"weight": 3.0}]}}),
    ("data.sources", "entry 1, when_exhausted = \"stop\": expected 'repeat' or 'retire'",
     {"data": {"sources": [{"path": "a", "when_exhausted": "stop"}]}}),
    ("data.sources", "have the name 'a'",
     {"data": {"sources": [{"path": "x/a"}, {"path": "y/a/"}]}}),
    ("data.path", "data.sources", {"data": {"path": "a", "sources": [{"path": "b"}]}}),
    ("data.on_fault", "'skip'", {"data": {"on_fault": "ignore"}}),
    ("data.workers", "greater", {"data": {"workers": -1}}),
    ("data.timeout", "greater", {"data": {"timeout": 0.0}}),
    ("optimizer.betas", "list", {"optimizer": {"betas": 0.9}}),
    ("optimizer.learning_rate", "number", {"optimizer": {"learning_rate": "4e-4"}}),
    ("training.steps", "integer", {"training": {"steps": 1e5 + 0.5}}),
    ("training.activation_checkpointing", "boolean", {"training": {"activation_checkpointing": 1}}),
    ("logging.wandb_project", "string", {"logging": {"wandb_project": True}}),
    ("deepspeed", "an object", {"deepspeed": []}),
    ("notes", "string", {"notes": ["a"]}),
    # wrong range
    ("model.d_model", "greater", {"model": {"d_model": 0}}),
    ("model.heads", "greater", {"model": {"heads": -1}}),
    ("model.d_ff", "greater", {"model": {"d_ff": [64, 0]}}),
    ("model.dropout", "less", {"model": {"dropout": 1.0}}),
    ("model.dropout", "greater", {"model": {"dropout": -0.1}}),
    ("model.norm_eps", "greater", {"model": {"norm_eps": 0.0}}),
    ("model.sequence_length", "greater", {"model": {"sequence_length": 0}}),
    ("model.window", "greater", {"model": {"window": 0}}),
    ("optimizer.learning_rate", "greater", {"optimizer": {"learning_rate": 0.0}}),
    ("optimizer.betas", "less", {"optimizer": {"betas": [0.9, 1.0]}}),
    ("optimizer.betas", "expected at least 2 entries, got 1", {"optimizer": {"betas": [0.9]}}),
    ("optimizer.betas", "expected at most 2 entries, got 3",
     {"optimizer": {"betas": [0.9, 0.9, 0.9]}}),
    ("optimizer.weight_decay", "greater", {"optimizer": {"weight_decay": -1.0}}),
    ("parallel.zero_stage", "less", {"parallel": {"zero_stage": 4}}),
    ("parallel.tensor", "greater", {"parallel": {"tensor": 0}}),
    ("training.steps", "greater", {"training": {"steps": 0}}),
    ("training.seed", "greater", {"training": {"seed": -1}}),
    ("logging.every", "greater", {"logging": {"every": 0}}),
    ("schema_version", "1", {"schema_version": 2}),
    # wrong name
    ("modle", "did you mean model?", {"modle": {}}),
    ("model.d_modle", "did you mean model.d_model?", {"model": {"d_modle": 8}}),
    ("training.d_model", "did you mean model.d_model?", {"training": {"d_model": 8}}),
    ("model.learning_rate", "optimizer.learning_rate", {"model": {"learning_rate": 1e-3}}),
    ("parallel.zero", "parallel.zero_stage", {"parallel": {"zero": 1}}),
    ("optimiser", "did you mean optimizer?", {"optimiser": {}}),
    ("MODEL", "did you mean model?", {"MODEL": {}}),
    ("model.", "did you mean model?", {"model.": {}}),
    ("optimizer.lr", "did you mean optimizer.learning_rate?", {"optimizer": {"lr": 1e-3}}),
    ("training.every", "did you mean checkpoint.every or logging.every?",
     {"training": {"every": 5}}),
    ("model.extends", "did you mean extends at the top of the file?",
     {"model": {"extends": "a.json"}}),
    ("model.notes", "did you mean notes at the top of the file?", {"model": {"notes": "a"}}),
    ("model.qqq", "known keys: hierarchy, vocab_size", {"model": {"qqq": 1}}),
    ('""', "known keys: schema_version, notes", {"": 1}),
    # dots inside a key
    ("model.d_model", 'write an object, {"model": {"d_model": 3}}; dots work with --set',
     {"model.d_model": 3}),
    ("deepspeed.bf16", 'write an object, {"deepspeed": {"bf16": 1}}', {"deepspeed.bf16": 1}),
    ("model.a.b", "known keys", {"model": {"a.b": 1}}),
    ("model.model.heads", "did you mean model.heads?", {"model": {"model.heads": 1}}),
    ("model.pooling", "'average'", {"model": {"pooling": "max"}}),
    ("model.upsampling", "'repeat'", {"model": {"upsampling": "nearest"}}),
    ("model.norm", "'rmsnorm'", {"model": {"norm": "batchnorm"}}),
    ("schedule.kind", "'wsd'", {"schedule": {"kind": "cosin"}}),
    ("training.precision", "'bf16'", {"training": {"precision": "fp16"}}),
    ("deepspeed.zero_optimisation", "zero_optimization", {"deepspeed": {"zero_optimisation": {}}}),
    # wrong hierarchy
    ("model.hierarchy", "blocks@factor", {"model": {"hierarchy": "2@1 8"}}),
    ("model.hierarchy", "factor 1", {"model": {"hierarchy": "2@2 8@3 2@1"}}),
    ("model.hierarchy", "both ways", {"model": {"hierarchy": "2@1 1@2 4@4 2@2 2@1"}}),
    ("model.hierarchy", "both ways", {"model": {"hierarchy": "2@1 2@1"}}),
    ("model.hierarchy", "multiple", {"model": {"hierarchy": "1@1 1@2 2@3 1@2 1@1"}}),
    ("model.hierarchy", "empty", {"model": {"hierarchy": ""}}),
    # wrong combination
    ("model.heads", "6 or 8", {"model": {"heads": 7, "d_model": 48}}),
    ("model.heads", "(with model.d_model = [512, 500], model.positions = ",
     {"model": {"d_model": [512, 500]}}),
    ("model.d_model", "needs 2 entries", {"model": {"d_model": [512, 512, 512]}}),
    ("model.sequence_length", "2046 or 2049", {"model": {"sequence_length": 2048}}),
    ("parallel.zero_stage", "pipeline", {"parallel": {"pipeline": 2, "zero_stage": 2}}),
    ("parallel.zero_stage", '(with training.precision = "bf16")', {"parallel": {"zero_stage": 0}}),
    ("parallel.pipeline", "12 blocks", {"parallel": {"pipeline": 13}}),
    ("model.heads", "parallel.tensor 3", {"parallel": {"tensor": 3}}),
    ("model.vocab_multiple", "multiple", {"parallel": {"tensor": 8}, "model": {"vocab_multiple": 4,
     "vocab_size": 12}}),
    ("training.global_batch_size", "6 or 9", {"training": {"micro_batch_size": 3}}),
    ("checkpoint.async", "boolean", {"checkpoint": {"async": "yes"}}),
    ("checkpoint.async_", "unknown key; did you mean checkpoint.async?",
     {"checkpoint": {"async_": True}}),
    ("checkpoint.keep_every", "keeps all; set both", {"checkpoint": {"keep_every": 10}}),
    ("checkpoint.keep_every", "nearest: 20 or 30",
     {"checkpoint": {"every": 10, "keep_last": 1, "keep_every": 25}}),
    ("schedule.warmup_steps", "less than", {"schedule": {"warmup_steps": 1000}}),
    ("schedule.decay_steps", "at most", {"schedule": {"kind": "wsd", "decay_steps": 2000}}),
    ("schedule.decay_steps", "such as", {"schedule": {"kind": "wsd"}}),
    ("schedule.cycle_steps", "cosine", {"schedule": {"kind": "rsqrt", "cycle_steps": 5}}),
    ("optimizer.weight_decay", '(with optimizer.name = "adam")', {"optimizer": {"name": "adam"}}),
    ("model.shorten_factor_choices", "at least 1", {"model": {"shorten_factor_choices": []}}),
    ("model.pooling", "even head width", {"model": {"hierarchy": "1@1 1@2 1@1",
        "d_model": [32, 30], "heads": [4, 2], "positions": ["rotary", "relative"],
        "sequence_length": 64}}),
    ("model.shared_position_bias", "attention pools", {"model": {"hierarchy": "1@1 1@2 1@1",
        "d_model": [32, 48], "heads": 4, "positions": ["relative", "rotary"],
        "shared_position_bias": True, "sequence_length": 64}}),
    ("model.shorten_factor_choices", "average", {"model": {"shorten_factor_choices": [2, 3],
     "pooling": "linear"}}),
    ("model.shorten_factor_choices", "flat", {"model": {"shorten_factor_choices": [2],
     "hierarchy": "2@1"}}),
    ("model.positions", "rotary", {"model": {"sequence_length": 30_000}}),
    ("model.dropout", "dropout 0, or a window", {"model": {"sequence_length": 30_000,
     "positions": "rotary", "dropout": 0.1, "pooling": "average", "upsampling": "repeat"}}),
    ("model.positions", "resampling attention", {"model": {"sequence_length": 30_000,
     "window": 256}}),
    ("deepspeed.zero_optimization.overlap_com", "did you mean deepspeed.zero_optimization.overlap",
     {"deepspeed": {"zero_optimization": {"overlap_com": True}}}),
    ("deepspeed.comms_logger.enabledd", "comms_logger.enabled",
     {"deepspeed": {"comms_logger": {"enabledd": True}}}),
    ("deepspeed.zero_optimization.offload_optimizer", "unknown key",
     {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}),
    ("deepspeed.bf16.check_grad_overflow", "unknown key",
     {"deepspeed": {"bf16": {"check_grad_overflow": False}}}),
    ("model.shared_position_bias", "false", {"model": {"shared_position_bias": True,
     "positions": "rotary"}}),
    ("deepspeed.bf16.enabled", "training.precision", {"deepspeed": {"bf16": {"enabled": False}}}),
    ("deepspeed.optimizer", "section optimizer", {"deepspeed": {"optimizer": {"type": "Adam"}}}),
    ("deepspeed.zero_optimization.stage", "zero_stage",
     {"deepspeed": {"zero_optimization": {"stage": 3}}}),
    # out of bounds
    ("model.vocab_size", "less", {"model": {"vocab_size": 10**12}}),
    ("model.d_ff", "less", {"model": {"d_ff": 10**12}}),
    ("model.norm_eps", "greater than or equal to", {"model": {"norm_eps": 1e-320}}),
    ("model.hierarchy", "1,000,000,002 blocks are too many; at most 1,000",
     {"model": {"hierarchy": "1@1 1000000000@2 1@1"}, "parallel": {"pipeline": 2}}),
    ("model.hierarchy", "67 entries are too many; at most 65",
     {"model": {"hierarchy": " ".join(["1@1"] * 67)}}),
    ("model.hierarchy", "blocks@factor", {"model": {"hierarchy": "1@" + "9" * 5000}}),
    ("model.shorten_factor_choices", "100,000,000 combinations, whose products have",
     {"model": {"hierarchy": " ".join(f"1@{f}" for f in [1, 2, 4, 8, 16, 32, 64, 128, 256, 128,
      64, 32, 16, 8, 4, 2, 1]), "sequence_length": 2048,
      "shorten_factor_choices": [*range(1, 11)]}}),
    ("training.steps", "less than or equal to 1000000000", {"training": {"steps": 10**400}}),
    ("training.global_batch_size", "less", {"training": {"global_batch_size": 10**400}}),
    ("optimizer.learning_rate", "less", {"optimizer": {"learning_rate": 1e308}}),
    ("optimizer.learning_rate_by_level", "less|greater",
     {"optimizer": {"learning_rate_by_level": [1e300, 1e-300]}}),
    ("optimizer.weight_decay", "less", {"optimizer": {"weight_decay": 1e308}}),
    ("optimizer.eps", "greater than or equal to", {"optimizer": {"eps": 1e-320}}),
    ("data.sources", "entry 1, weight = 1e+308: expected less than or equal to",
     {"data": {"sources": [{"path": "a", "weight": 1e308}, {"path": "b", "weight": 1e308}]}}),
    ("data.sources", "entry 2, weight = 1e-320: expected greater than or equal to",
     {"data": {"sources": [{"path": "a"}, {"path": "b", "weight": 1e-320}]}}),
    ("watchdog.first", "less than or equal to 10000000", {"watchdog": {"first": 1e14}}),
    ("watchdog.factor", "less", {"watchdog": {"factor": 1e300}}),
    ("parallel.timeout", "greater", {"parallel": {"timeout": 1e-9}}),
    ("schema_version", "expected 1", {"schema_version": True}),
    ("schema_version", "expected 1", {"schema_version": 1.0}),
    # remedies that are valid
    ("model.heads", "nearest valid: 256 or 512", {"model": {"heads": 500, "d_model": 1024}}),
    ("model.heads", "nearest valid: 3 or 6",
     {"model": {"heads": 5, "d_model": 36, "positions": "rotary"}}),
    ("model.heads", "nearest valid: 4 or 8",
     {"model": {"heads": 6, "d_model": 64}, "parallel": {"tensor": 4}}),
    ("model.heads", "parallel.tensor 4, got 2 at level 0; nearest valid: 4 or 8",
     {"model": {"heads": 2, "d_model": 64}, "parallel": {"tensor": 4}}),
    ("model.heads", "no number is valid with this d_model",
     {"model": {"heads": 5, "d_model": 35, "positions": "rotary"}}),
    *(("parallel.tensor", "sharded over 1, 2, 4, 8, 16, 32, 64 ranks only",
       {"model": {"activation": "swiglu"}, "parallel": {"tensor": size}})
      for size in (3, 5, 6, 7, 12, 128)),
    ("schedule.decay_shape", "belongs to kind wsd", {"schedule": {"decay_shape": "sqrt"}}),
    ("schedule.decay_shape", "with rsqrt leave it out",
     {"schedule": {"kind": "rsqrt", "decay_shape": "sqrt"}}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "expected", "tree"), INVALID)
def test_message_names_the_key_and_the_remedy(
    key: str, expected: str, tree: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    lines = [str(problem) for problem in caught.value.problems]
    about = [line for line in lines if line.startswith((f"{key}:", f"{key} ="))]
    assert about, lines
    assert any(word in line for line in about for word in expected.split("|")), lines


@pytest.mark.parametrize(("key", "expected", "tree"), INVALID)
def test_message_names_every_key_involved_once(
    key: str, expected: str, tree: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(tree)
    for problem in caught.value.problems:
        line = str(problem)
        assert "\n" not in line
        for other in (problem.key, *problem.depends_on):
            assert other in line
            assert line.count(f"{other} = ") <= 1, line


def test_values_in_the_message_are_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"schedule": {"warmup_steps": 1000, "kind": "wsd"}})
    assert [str(problem) for problem in caught.value.problems] == [
        "schedule.warmup_steps = 1000: must be less than training.steps 1000",
        "schedule.decay_steps = 0: warm-up, stable, decay needs a decay, such as 100 "
        '(with schedule.kind = "wsd", training.steps = 1000, schedule.warmup_steps = 1000)',
    ]


def test_long_lists_are_truncated_and_strings_are_not() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"modle": list(range(99)), "title": "a" * 200})
    first, second = map(str, caught.value.problems)
    assert first == f"modle = {str(list(range(99)))[:76]} ...: unknown key; did you mean model?"
    assert second.startswith(f'title = "{"a" * 200}": unknown key')


def test_at_least_sixty_configurations_are_tested() -> None:
    assert len(INVALID) >= 60


def test_defaults_are_valid() -> None:
    parse_config({})


def test_every_invalid_file_exits_with_code_2(tmp_path: Path) -> None:
    """One process loads them all with `train.py`: exit code, key in the message, no torch."""
    for number, (_, _, tree) in enumerate(INVALID):
        (tmp_path / f"{number}.json").write_text(json.dumps(tree))
    script = (
        "import runpy, sys, io, contextlib, json\n"
        "results = []\n"
        f"for number in range({len(INVALID)}):\n"
        f"    sys.argv = ['train.py', '--config', rf'{tmp_path}/{{number}}.json']\n"
        "    stderr = io.StringIO()\n"
        "    with contextlib.redirect_stderr(stderr):\n"
        "        try:\n"
        "            runpy.run_path('hg_scale/train.py', run_name='__main__')\n"
        "        except SystemExit as end:\n"
        "            results.append((end.code, stderr.getvalue()))\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(results))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for (key, _, _), (code, stderr) in zip(INVALID, results, strict=True):
        assert code == 2
        assert key in stderr and "Traceback" not in stderr


def test_all_errors_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"model": {"heads": 7, "width": 3}, "training": {"steps": 0}}))
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["parallel.zero_stage=3", "parallel.pipeline=2", "model.d_ff"])
    text = str(caught.value)
    for key in ("model.heads", "model.width", "training.steps", "parallel.zero_stage", "--set"):
        assert f"\n  {key}" in text


def test_invalid_override_causes_no_second_error(tmp_path: Path) -> None:
    """7 heads do not divide the default width, but the override sets another width."""
    path = tmp_path / "a.json"
    path.write_text('{"model": {"heads": 7}}')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ['model.d_model={"a": 1, "a": 2}'])
    assert [problem.key for problem in caught.value.problems] == ["model.d_model.a"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("extends=base.json", "extends: cannot be set with --set"),
        ("model.=3", "--set: expected key.path=value, got 'model.=3'"),
        ("model..heads=3", "--set: expected key.path=value, got 'model..heads=3'"),
        ("model.heads.first=3", "'heads' is not a section"),
        ("model.heads=" + "[" * 2000, "model.heads: objects or lists nest too deep"),
        ("model.heads=" + "[" * 64 + "]" * 64, r"model.heads\[0\]\[0\]: .* at most 64"),
        ("a" + ".a" * 64 + "=1", "a.a.a.a: objects or lists nest too deep"),
        ("model.heads=" + "1" * 4301, "model.heads: an integer of 4301 digits; at most 20"),
        ('model={"heads": 2, "heads": 4}', "model.heads: appears twice"),
        ("\udcff=1", r'--set: NUL or a lone surrogate in "\\udcff=1"'),
        ("notes=\udcff", r'--set: NUL or a lone surrogate in "notes=\\udcff"'),
        (
            "optimizer.learning_rate=None",
            "= null: expected a valid number; this key cannot",
        ),
        ("model.hierarchy=none", "= null: expected a valid string; this key cannot be null"),
        ("logging.wandb_name=7", "expected a valid string; in quotes it is a text: '\"7\"'"),
        (r'notes="\ud800"', r'notes: NUL or a lone surrogate in "\\ud800"'),
    ],
)
def test_overrides_that_cannot_be_applied(tmp_path: Path, override: str, expected: str) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"model": {"heads": 2}}')
    with pytest.raises(ConfigError, match=expected):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, None) for word in ("null", "Null", "NULL", "none", "None", "NONE", "~")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((f"{quote}None{quote}", "None") for quote in "'\""),
        *((text, text) for text in ("it's", "'", "nonesuch", "yes", "")),
        ("''", ""),
        ("1e-4", 1e-4),
        ('{"a": [null]}', {"a": [None]}),
    ],
)
def test_values_of_overrides(text: str, value: object) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_a_quoted_override_is_that_text(text: str) -> None:
    assert parse_value(json.dumps(text)) == parse_value(f"'{text}'") == text


def test_null_is_written_in_several_ways(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"logging": {"wandb_project": "p"}}')
    for text, project in (("None", None), ("~", None), ("'none'", "none"), ('"None"', "None")):
        config = load_config(path, [f"logging.wandb_project={text}"])
        assert config.logging.wandb_project == project


def test_extends_merges_files(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text('{"model": {"d_model": 64, "sequence_length": 30}}')
    (tmp_path / "over.json").write_text('{"extends": "base.json", "model": {"heads": 4}}')
    config = load_config(tmp_path / "over.json", ["model.heads=2", "notes=hello"])
    assert (config.model.d_model, config.model.heads, config.notes) == (64, 2, "hello")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "line 1"),
        ("[]", "object"),
        ('{"extends": "a.json"}', "extends itself"),
        ('{"extends": 3}', "file name"),
        ('{"model": {"heads": 2, "heads": 4}}', "model.heads: appears twice"),
        ('{"data": {"sources": [{}, {"a": 1, "a": 2}]}}', r"data.sources\[1\].a: appears twice"),
        ('{"model": {"d_model": %s}}' % ("1" * 21), "model.d_model: an integer of 21 digits"),
        (
            r'{"model": {"hierarchy": "\ud800"}}',
            r'model.hierarchy: NUL or a lone surrogate in "\\ud800"',
        ),
        (r'{"model": {"\udfff": 1}}', r'model: NUL or a lone surrogate in "\\udfff"'),
        (r'{"extends": "a\u0000"}', r'extends: NUL or a lone surrogate in "a\\u0000"'),
        ('{"extends": "b.json"}', "no such file, which .*a.json extends; did you mean .*base.json"),
        ('{"a":' * 9999 + "1" + "}" * 9999, "nest too deep"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "base.json").touch()
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


def test_loop_of_symbolic_links_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.json").symlink_to("a.json")
    (tmp_path / "b.json").write_text('{"extends": "c.json"}')
    with pytest.raises(ConfigError, match="cannot be read: .*symbolic links"):
        load_config(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="no such file, which .*b.json extends"):
        load_config(tmp_path / "b.json")


def test_long_chain_of_extended_files(tmp_path: Path) -> None:
    for number in range(1200):
        tree = {"extends": f"{number + 1}.json", "training": {"steps": number + 1}}
        (tmp_path / f"{number}.json").write_text(json.dumps(tree))
    (tmp_path / "1200.json").write_text('{"training": {"steps": 5, "seed": 3}}')
    config = load_config(tmp_path / "0.json")
    assert (config.training.steps, config.training.seed) == (1, 3)


@pytest.mark.parametrize(("world", "fits"), [(8, True), (4, True), (6, False)])
def test_world_size_must_be_a_multiple_of_model_parallelism(world: int, fits: bool) -> None:
    tree = {"parallel": {"tensor": 2, "pipeline": 2}}
    if fits:
        assert parse_config(tree, world_size=world).data_parallel(world) == world // 4
        return
    with pytest.raises(ConfigError, match=r"4 or 8 \(with parallel.pipeline = 2\)"):
        parse_config(tree, world_size=world)


def test_fitting_data_parallel_sizes_are_named() -> None:
    """As when a run resumes with another number of processes."""
    tree = {"training": {"global_batch_size": 24, "micro_batch_size": 2}}
    with pytest.raises(ConfigError, match="data-parallel sizes that fit: 1, 2, 3, 4, 6, 12"):
        parse_config(tree, world_size=5)


def test_nearest_of_many_fitting_sizes_are_named() -> None:
    tree = {"training": {"global_batch_size": 720_720, "micro_batch_size": 1}}
    with pytest.raises(
        ConfigError, match="that fit: 10, 11, 12, 13, 14, 15, 16, 18, 20, 21, 22, 24 "
    ):
        parse_config(tree, world_size=17)


def test_large_prime_batch_is_checked_quickly() -> None:
    tree = {"training": {"global_batch_size": 999_999_937}}
    with pytest.raises(ConfigError, match="data-parallel sizes that fit: 1, 999999937"):
        parse_config(tree, world_size=2)


def test_score_memory_is_not_checked_with_an_invalid_key() -> None:
    for key, value in (("dropout", 2.0), ("positions", "none"), ("upsampling", "none")):
        with pytest.raises(ConfigError) as caught:
            parse_config({"model": {"sequence_length": 30_000, key: value}})
        assert [problem.key for problem in caught.value.problems] == [f"model.{key}"]
