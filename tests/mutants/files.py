"""Faults in checkpoints, conversions and the writing of files."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

FRAGMENTS = "tests/checkpoint/test_fragments.py"
RETENTION = "tests/checkpoint/test_retention.py"
SAVE = "tests/checkpoint/test_save.py"
LOAD = "tests/checkpoint/test_load.py"
RESUME = "tests/checkpoint/test_resume.py"
ATOMIC = "tests/test_atomic_write.py"
CONVERT = "tests/convert/test_convert.py"
EXPORT = "tests/convert/test_export.py"

FILES = (
    Mutant(
        "a slice starts at its index, not index times width",
        "hg_scale/checkpoint/fragments.py",
        "first = piece.index * width",
        "first = piece.index",
        FRAGMENTS,
    ),
    Mutant(
        "a fragment's rows are as wide as the unsharded parameter's",
        "hg_scale/checkpoint/fragments.py",
        "width = prod(piece.shape[dim:]) // piece.count",
        "width = prod(piece.shape[dim:])",
        FRAGMENTS,
    ),
    Mutant(
        "elements that two ranks wrote are no problem",
        "hg_scale/checkpoint/fragments.py",
        "if ends != starts:",
        "if any(a < b for a, b in zip(ends, starts, strict=True)):",
        FRAGMENTS,
    ),
    Mutant(
        "every rank writes the share of the first",
        "hg_scale/checkpoint/rank_file.py",
        "begin, end = total * index // count, total * (index + 1) // count",
        "begin, end = 0, total // count",
        "tests/checkpoint/test_rank_file.py",
    ),
    Mutant(
        "the copy in host memory is a view",
        "hg_scale/checkpoint/rank_file.py",
        "return Staged(staged.fragments, staged.lengths, [self._buffer])",
        "return staged",
        "tests/checkpoint/test_rank_file.py",
    ),
    Mutant(
        "a rank's file is not synced before the manifest names it",
        "hg_scale/checkpoint/rank_file.py",
        "os.fsync(file.fileno())",
        "file.fileno()",
        SAVE,
    ),
    Mutant(
        "Adam's second moment restored from the first",
        "hg_scale/checkpoint/local_state.py",
        "tensor.copy_(read(kind, fragment))",
        'tensor.copy_(read("exp_avg", fragment))',
        RESUME,
    ),
    Mutant(
        "Adam's step count restarts with a resume",
        "hg_scale/checkpoint/local_state.py",
        'state["step"].fill_(step)',
        'state["step"].fill_(0)',
        RESUME,
    ),
    Mutant(
        "masters are rounded weights after a resume",
        "hg_scale/checkpoint/local_state.py",
        'master = read("fp32", fragment) if full is None else full[begin:end]',
        "master = parameter.view(-1)[begin:end].float() if full is not None else "
        'read("fp32", fragment)',
        RESUME,
    ),
    Mutant(
        "one checkpoint fewer is kept",
        "hg_scale/checkpoint/retention.py",
        "if step < newest[0] and",
        "if step <= newest[0] and",
        RETENTION,
    ),
    Mutant(
        "keep_every keeps everything else",
        "hg_scale/checkpoint/retention.py",
        "not (policy.every and step % policy.every == 0)",
        "not (policy.every and step % policy.every != 0)",
        RETENTION,
    ),
    Mutant(
        "corrupt checkpoints count among those kept",
        "hg_scale/checkpoint/retention.py",
        "newest = sorted(complete)[-policy.last :]",
        "newest = sorted({*complete, *corrupt})[-policy.last :]",
        RETENTION,
    ),
    Mutant(
        "a corrupt newest checkpoint ends the search",
        "hg_scale/checkpoint/find.py",
        "sorted(checkpoints.items(), reverse=True)",
        "sorted(checkpoints.items(), reverse=True)[:1]",
        f"{LOAD} {RESUME} tests/training/test_resume.py",
    ),
    Mutant(
        "the oldest complete checkpoint is resumed",
        "hg_scale/checkpoint/find.py",
        "sorted(checkpoints.items(), reverse=True)",
        "sorted(checkpoints.items())",
        "tests/training/test_resume.py",
    ),
    Mutant(
        "ranks verify overlapping shares and leave files out",
        "hg_scale/checkpoint/find.py",
        'manifest["files"][index::count]',
        'manifest["files"][index : index + count]',
        f"{LOAD} tests/training/test_resume.py",
    ),
    Mutant(
        "the folder is not synced after its renaming",
        "hg_scale/checkpoint/save.py",
        "sync_path(final.parent)",
        "sync_path(final)",
        SAVE,
    ),
    Mutant(
        "parameters that no rank wrote go unnoticed",
        "hg_scale/checkpoint/save.py",
        "missing = sorted(set(names) - {fragment.slice.name for fragment in fragments})",
        "missing = sorted({fragment.slice.name for fragment in fragments} - set(names))",
        SAVE,
    ),
    Mutant(
        "adjacent ranges merged to the later one's end",
        "hg_scale/checkpoint/load.py",
        "result[-1] = result[-1][0], max(end, result[-1][1])",
        "result[-1] = result[-1][0], end",
        LOAD,
    ),
    Mutant(
        "a file is renamed before its contents are synced",
        "hg_scale/atomic_write.py",
        "    os.fsync(partial.fileno())\n    partial.close()\n    os.replace(partial.name, path)\n",
        "    os.replace(partial.name, path)\n    os.fsync(partial.fileno())\n    partial.close()\n",
        ATOMIC,
    ),
    Mutant(
        "the renaming of a file is not synced",
        "hg_scale/atomic_write.py",
        "sync_path(path.parent)",
        "sync_path(path)",
        ATOMIC,
    ),
    Mutant(
        "a failed write leaves its partial file",
        "hg_scale/atomic_write.py",
        "    finally:\n        partial.unlink(missing_ok=True)",
        "    finally:\n        path.with_suffix(PARTIAL).unlink(missing_ok=True)",
        ATOMIC,
    ),
    Mutant(
        "the mean of checkpoints loses its last bits in fp32",
        "hg_scale/convert/average.py",
        "total = torch.zeros(stop - start, dtype=torch.float64)",
        "total = torch.zeros(stop - start, dtype=torch.float32)",
        CONVERT,
    ),
    Mutant(
        "the mean of checkpoints divides by two",
        "hg_scale/convert/average.py",
        "return (total / len(self._sources)).float()",
        "return (total / 2).float()",
        CONVERT,
    ),
    Mutant(
        "a difference of NaN counts as none",
        "hg_scale/convert/compare.py",
        "largest = chunk if not chunk <= largest else largest",
        "largest = max(largest, chunk)",
        CONVERT,
    ),
    Mutant(
        "an export of several files has one name too many in each",
        "hg_scale/convert/export.py",
        "if group and total + size > limit:",
        "if group and total > limit:",
        EXPORT,
    ),
    Mutant(
        "an import resumes at the step of its source",
        "hg_scale/convert/to_checkpoint.py",
        "step = source.step if resumable else 0",
        "step = source.step",
        "tests/convert/test_import.py",
    ),
    Mutant(
        "padding that a source lacks repeats its first rows",
        "hg_scale/convert/source.py",
        "result = torch.zeros(stop - start)",
        "result = torch.ones(stop - start)",
        "tests/convert/test_import.py tests/convert/test_universal.py",
    ),
    Mutant(
        "DeepSpeed's files name the sharded dimension of columns for rows",
        "hg_scale/convert/universal.py",
        "mark_shard(cast(nn.Parameter, layer.weight), TensorShard(1))",
        "mark_shard(cast(nn.Parameter, layer.weight), TensorShard(0))",
        "tests/convert/test_universal.py",
    ),
)
