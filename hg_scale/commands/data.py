"""`hg-scale data`: inspect prepared data."""

from __future__ import annotations

import argparse

HELP = "inspect prepared data: its contents, whether its shards are intact, samples of it"


def add_options(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    inspect = verbs.add_parser("inspect", help="print splits, tokenizer and source")
    verify = verbs.add_parser("verify", help="check every shard against the index")
    sample = verbs.add_parser("sample", help="print decoded samples")
    for verb, run_verb in ((inspect, _inspect), (verify, _verify), (sample, _sample)):
        verb.add_argument("shards", metavar="SHARDS", help="folder or URL with index.json")
        verb.set_defaults(run_data_verb=run_verb)
    add = sample.add_argument
    add("--split", default="train", help="train, validation or test (default: train)")
    add("--windows", type=int, default=3, metavar="N", help="number of samples (default: 3)")
    add("--length", type=int, metavar="N", help="tokens of each (default: 512, or an image)")
    add("--seed", type=int, default=0, help="of the positions (default: 0)")


def run(options: argparse.Namespace) -> int:
    return options.run_data_verb(options)


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from hg_scale.data.index import read_index
    from hg_scale.data.inspection import tokenizer_line

    index = read_index(options.shards)
    console = Console(highlight=False)
    size = sum(shard.file_bytes for split in index.splits.values() for shard in split.shards)
    facts = {
        "made by": index.tool_version,
        "tokenizer": tokenizer_line(index),
        "size": f"{size:,} bytes, members of up to {index.chunk_tokens:,} tokens",
    }
    if index.document_tokens:
        facts["documents"] = f"{index.document_tokens:,} tokens each"
    facts |= {f"source: {key}": str(value) for key, value in index.source.items()}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for key, value in facts.items():
        grid.add_row(key, value)
    table = Table()
    table.add_column("split")
    for name in ("shards", "tokens", "bytes of text", "bytes per token", "documents"):
        table.add_column(name, justify="right")
    for name, split in index.splits.items():
        table.add_row(
            name, f"{len(split.shards):,}", f"{split.tokens:,}", f"{split.text_bytes:,}",
            f"{split.text_bytes / split.tokens:.3f}" if split.tokens else "-",
            "-" if split.documents is None else f"{split.documents:,}",
        )  # fmt: skip
    console.print(options.shards, style="bold", markup=False)
    console.print(grid)
    console.print(table)
    return 0


def _verify(options: argparse.Namespace) -> int:
    import sys

    from hg_scale.data.index import read_index
    from hg_scale.data.inspection import shard_problems
    from hg_scale.data.progress import ProgressBar

    index = read_index(options.shards)
    tokenizer = index.open_tokenizer()
    shards = [shard for split in index.splits.values() for shard in split.shards]
    problems = 0
    with ProgressBar(sys.stderr) as progress:
        progress.begin("reading shards", sum(shard.file_bytes for shard in shards))
        for shard in shards:
            for problem in shard_problems(index, shard, tokenizer):
                problems += 1
                print(f"hg-scale data verify: {problem}", file=sys.stderr)
            progress.advance(shard.file_bytes)
    if problems:
        print(f"{options.shards}: {problems} errors in {len(shards)} shards")
        return 1
    tokens = sum(split.tokens for split in index.splits.values())
    print(f"{options.shards}: all {len(shards)} shards are intact, {tokens:,} tokens")
    return 0


def _sample(options: argparse.Namespace) -> int:
    from hg_scale.data.errors import DataError
    from hg_scale.data.index import read_index
    from hg_scale.data.inspection import draw_samples

    if options.windows < 1 or (options.length is not None and options.length < 1):
        raise DataError("--windows and --length: expected integers above 0")
    if options.seed < 0:
        raise DataError("--seed: expected an integer, 0 or above")
    index = read_index(options.shards)
    for sample in draw_samples(
        index, options.split, count=options.windows, length=options.length, seed=options.seed
    ):
        print(f"--- {options.split}, from token {sample.position:,} on")
        print(sample.text)
    return 0
