"""Run tasks of the lm-evaluation-harness (lm-eval) on a trained model."""

from __future__ import annotations

import argparse
import json

from hg_scale.arguments import add_model_options, local_path
from hg_scale.commands.user_errors import refuse_unwritable, report_out_of_memory
from hg_scale.errors import UserError

HELP = "run tasks of lm-eval on a run, a checkpoint or an export"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_model_options(parser)
    add("--tasks", required=True, metavar="NAMES", help="lm-eval task names, comma-separated")
    add("--include-path", type=local_path, metavar="DIR", help="folder with your own task files")
    add("--fewshot", type=int, metavar="N", help="examples before each question")
    add("--limit", type=int, metavar="N", help="the first N questions of each task only")
    add("--batch", type=int, default=8, metavar="N",
        help="windows per batch (default: 8); texts are generated one at a time")  # fmt: skip
    add("--data", metavar="SHARDS", help="prepared corpus, for its tokenizer (default: the run's)")
    add("--json", type=local_path, metavar="FILE", help="also write the results to this file")


@report_out_of_memory()
def run(options: argparse.Namespace) -> int:
    names = _parse_tasks(options)
    try:
        import lm_eval
    except ImportError:
        raise UserError("lm-eval is not installed: pip install 'hg-scale[harness]'") from None
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from hg_scale.evaluation.harness import HarnessModel
    from hg_scale.evaluation.loaded_model import load

    manager = TaskManager(include_path=options.include_path and str(options.include_path))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f"--tasks: lm-eval has no {', '.join(unknown)}; see `lm_eval ls tasks`")
    model = HarnessModel(load(options.model, options.data, options.precision), options.batch)
    try:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            num_fewshot=options.fewshot,
            limit=options.limit,
        )
    except OSError as error:  # also raised by the libraries that download data
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"--tasks: the data of {', '.join(names)} cannot be loaded ({why}); without a network "
            "it has to be downloaded beforehand"
        ) from None
    if options.json:
        text = json.dumps(results["results"], indent=2, default=str)
        options.json.write_text(text + "\n")
    print(make_table(results))
    return 0


def _parse_tasks(options: argparse.Namespace) -> list[str]:
    """Return the task names. Raises UserError for options that are invalid or not writable."""
    names = [name for name in map(str.strip, options.tasks.split(",")) if name]
    if not names:
        raise UserError("--tasks: expected comma-separated names; see `lm_eval ls tasks`")
    for key, least in (("batch", 1), ("limit", 1), ("fewshot", 0)):
        value = getattr(options, key)
        if value is not None and value < least:
            raise UserError(f"--{key}: expected {least} or more, got {value}")
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"--include-path: {options.include_path} is not a folder")
    if options.json:
        refuse_unwritable(options.json)
    return names
