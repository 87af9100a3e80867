"""Run tasks of the field's harness (lm-eval) on a trained model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hg_scale.errors import UserError

HELP = "run tasks of lm-eval on a run, a checkpoint or an export"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, metavar="RUN_OR_CHECKPOINT_OR_EXPORT",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an export")  # fmt: skip
    add("--tasks", required=True, metavar="NAMES", help="as lm-eval calls them, with commas")
    add("--include-path", metavar="DIR", help="folder of task files of your own")
    add("--fewshot", type=int, metavar="N", help="examples before each question")
    add("--limit", type=int, metavar="N", help="the first N questions of each task only")
    add("--batch", type=int, default=8, metavar="N",
        help="windows scored at once (default: 8); texts are written one at a time")  # fmt: skip
    add("--data", metavar="SHARDS", help="prepared corpus, for its tokenizer (default: the run's)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="what to compute in (default: fp32)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write all results here")


def run(options: argparse.Namespace) -> int:
    try:
        import lm_eval
    except ImportError:
        raise UserError("lm-eval is not installed: pip install 'hg-scale[harness]'") from None
    import torch
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from hg_scale.evaluation.harness import HarnessModel
    from hg_scale.evaluation.trained import load_trained

    names = [name for name in options.tasks.split(",") if name]
    manager = TaskManager(include_path=options.include_path)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f"--tasks: lm-eval knows no {', '.join(unknown)}; see `lm_eval ls tasks`")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    model = HarnessModel(load_trained(options.model, options.data, dtype), options.batch)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=names,
        task_manager=manager,
        num_fewshot=options.fewshot,
        limit=options.limit,
    )
    print(make_table(results))
    if options.json:
        text = json.dumps(results["results"], indent=2, default=str)
        options.json.write_text(text + "\n")
    return 0
