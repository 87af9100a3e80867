"""Faults in data, evaluation, configuration, commands and the Slurm launchers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

ORDER = "tests/data/test_order.py"
MIXTURE = "tests/data/test_mixture.py"
SEQUENCES = "tests/data/test_sequence_schedule.py"
STREAM = "tests/data/test_stream.py"
PROTOCOL = "tests/data/test_protocol.py"
EVALUATION = "tests/data/test_evaluation.py"
SCORING = "tests/evaluation/test_scoring.py"
TASK = "tests/evaluation/test_task.py"
BROKEN = "tests/config/test_broken.py"

DATA = (
    Mutant(
        "every epoch has the same order of shards",
        "hg_scale/data/order.py",
        "self.seed, RandomUse.SHARDS, epoch)",
        "self.seed, RandomUse.SHARDS, 0)",
        ORDER,
    ),
    Mutant(
        "every epoch chunks from the same offsets",
        "hg_scale/data/order.py",
        "self.seed, RandomUse.OFFSET, epoch, int(span[0])",
        "self.seed, RandomUse.OFFSET, 0, int(span[0])",
        ORDER,
    ),
    Mutant(
        "blocks and offsets share their random numbers",
        "hg_scale/data/order.py",
        "    BLOCK = 2",
        "    BLOCK = 1",
        ORDER,
        equivalent="the keys of the two have different lengths, so their numbers stay independent",
    ),
    Mutant(
        "a block of images reads one token of the next",
        "hg_scale/data/order.py",
        "(high - low) * length + (not self.aligned)",
        "(high - low) * length + 1",
        f"{ORDER} {STREAM}",
    ),
    Mutant(
        "a block's last label is missing",
        "hg_scale/data/order.py",
        "(high - low) * length + (not self.aligned)",
        "(high - low) * length",
        f"{ORDER} {STREAM}",
    ),
    Mutant(
        "the rest of an epoch is one sequence longer",
        "hg_scale/data/order.py",
        "taken = min(count, plan.sequences - number)",
        "taken = min(count, plan.sequences - number + 1)",
        ORDER,
    ),
    Mutant(
        "streams alternate from the second round of a phase on",
        "hg_scale/data/order.py",
        "counts[active[:rest]] += 1",
        "counts[active[: rest + 1]] += 1",
        ORDER,
    ),
    Mutant(
        "shards go to streams in turn, not to the shortest",
        "hg_scale/data/order.py",
        "heapq.heappush(heap, (total + int(tokens[shard]), stream))",
        "heapq.heappush(heap, (total + 1, stream))",
        ORDER,
    ),
    Mutant(
        "a source's sequences are due at k / weight",
        "hg_scale/data/mixture.py",
        "heap = [((2 * counts[i] + 1) * (resolution // w), i, counts[i])",
        "heap = [((2 * counts[i]) * (resolution // w), i, counts[i])",
        MIXTURE,
    ),
    Mutant(
        "a source retires a sequence early",
        "hg_scale/data/mixture.py",
        "if limit is None or counts[i] < limit",
        "if limit is None or counts[i] < limit - 1",
        MIXTURE,
    ),
    Mutant(
        "a resumed source starts at its first sequence",
        "hg_scale/data/sequence_schedule.py",
        "order.locate(served + int(numbers[selected[0]]), len(selected))",
        "order.locate(int(numbers[selected[0]]), len(selected))",
        SEQUENCES,
    ),
    Mutant(
        "tokens served at earlier lengths are not counted",
        "hg_scale/data/sequence_schedule.py",
        "return earlier + sequences * self.sequence_length",
        "return sequences * self.sequence_length",
        SEQUENCES,
    ),
    Mutant(
        "the list of skipped sequences is lost when the length changes",
        "hg_scale/data/sequence_schedule.py",
        "before=before, skipped=state.skipped)",
        "before=before)",
        SEQUENCES,
    ),
    Mutant(
        "data ranks read interleaved sequences of a batch",
        "hg_scale/data/stream.py",
        "slice(data_rank * size, (data_rank + 1) * size)",
        "slice(data_rank, None, data_size)",
        STREAM,
    ),
    Mutant(
        "a sequence that ends where corrupt bytes begin is skipped",
        "hg_scale/data/stream.py",
        "if start < span.stop and stop > span.start:",
        "if start <= span.stop and stop >= span.start:",
        STREAM,
    ),
    Mutant(
        "a vocabulary of 257 fits into one byte",
        "hg_scale/data/tokenizer.py",
        "if vocab_size - 1 <= np.iinfo(name).max:",
        "if vocab_size - 2 <= np.iinfo(name).max:",
        "tests/data/test_tokenizer.py",
    ),
    Mutant(
        "the end of a document counts as a byte",
        "hg_scale/data/tokenizer.py",
        "return int(np.count_nonzero(np.asarray(tokens) < BYTES))",
        "return int(np.count_nonzero(np.asarray(tokens) <= BYTES))",
        "tests/data/test_tokenizer.py",
    ),
    Mutant(
        "a long text is cut inside a character",
        "hg_scale/data/text_cuts.py",
        "data[cut] & 0xC0 == 0x80",
        "data[cut] & 0xC0 == 0xC0",
        "tests/data/test_text_cuts.py",
    ),
    Mutant(
        "a window's labels are its inputs",
        "hg_scale/data/protocol.py",
        "labels[i, context:n] = ids[offset + context : offset + n]",
        "labels[i, context:n] = ids[offset + context - 1 : offset + n - 1]",
        PROTOCOL,
    ),
    Mutant(
        "the last, shorter window is left out",
        "hg_scale/data/protocol.py",
        "return 1 + max(0, -(-(tokens - self.length) // self.stride)) if tokens else 0",
        "return 1 + max(0, (tokens - self.length) // self.stride) if tokens else 0",
        PROTOCOL,
    ),
    Mutant(
        "the first sliding window scores its end only",
        "hg_scale/data/protocol.py",
        "context = self.length - self.stride if number else 0",
        "context = self.length - self.stride",
        PROTOCOL,
    ),
    Mutant(
        "data ranks evaluate overlapping windows",
        "hg_scale/data/evaluation.py",
        "last=min((data_rank + 1) * per_rank, sequences)",
        "last=min((data_rank + 1) * per_rank + 1, sequences)",
        EVALUATION,
        equivalent="the batches after the rank's own are never taken from the iterator",
    ),
    Mutant(
        "data ranks all evaluate the first windows",
        "hg_scale/data/evaluation.py",
        "first=min(data_rank * per_rank, sequences)",
        "first=0",
        EVALUATION,
    ),
    Mutant(
        "bits per byte divided by tokens",
        "hg_scale/evaluation/scoring.py",
        "return self.nats / log(2) / self.bytes",
        "return self.nats / log(2) / self.tokens",
        "tests/test_end_to_end.py -k tokenizer",
    ),
    Mutant(
        "the interval is that of the sum, not of the ratio",
        "hg_scale/evaluation/scoring.py",
        "residuals = nats - self.nats * size / size.sum()",
        "residuals = nats - nats.mean()",
        SCORING,
    ),
    Mutant(
        "losses added up in fp32",
        "hg_scale/evaluation/scoring.py",
        "targets).double()  # 0 where label is -1",
        "targets)  # 0 where label is -1",
        SCORING,
    ),
    Mutant(
        "N windows of a sliding protocol are N times its length",
        "hg_scale/evaluation/task.py",
        "limit = protocol.length + (task.windows - 1) * protocol.stride",
        "limit = protocol.length * task.windows",
        TASK,
    ),
    Mutant(
        "--first-token zero feeds the end-of-document id",
        "hg_scale/evaluation/task.py",
        'if task.first_token == "zero":\n        start_token = 0',
        'if task.first_token == "zero":\n        start_token = start_token or 0',
        TASK,
    ),
    Mutant(
        "total factors taken for steps",
        "hg_scale/config/hierarchy.py",
        "Shortening(factor, factor // above, blocks)",
        "Shortening(factor, factor, blocks)",
        "tests/test_presets.py tests/model/test_costs.py",
    ),
    Mutant(
        "an incomplete group is left out of the lengths",
        "hg_scale/config/hierarchy.py",
        "lambda n, k: -(-n // k), initial=length",
        "lambda n, k: n // k, initial=length",
        "tests/model/test_costs.py tests/model/test_decoding.py tests/model/test_layer_table.py",
    ),
    Mutant(
        "inner stacks counted once, not on the way down and up",
        "hg_scale/config/hierarchy.py",
        "inner = sum(2 * shortening.blocks for shortening in self.shortenings[:-1])",
        "inner = sum(shortening.blocks for shortening in self.shortenings[:-1])",
        "tests/model/test_initialization.py tests/config",
    ),
    Mutant(
        "attention+linear accepted with drawn factors",
        "hg_scale/config/resampling_kind.py",
        'return self.base == "linear"',
        'return self.base == "linear" and not self.attends',
        BROKEN,
    ),
    Mutant(
        "--top-p of hg-scale generate is ignored",
        "hg_scale/commands/generate.py",
        "Sampling(options.temperature, options.top_k, options.top_p)",
        "Sampling(options.temperature, options.top_k)",
        "tests/commands/test_generate.py",
    ),
    Mutant(
        "the interval's half width in nats",
        "hg_scale/commands/evaluate.py",
        "half_width = score.bits_per_byte * score.byte_interval\n    results:",
        "half_width = score.nats_per_token * score.byte_interval\n    results:",
        f"{TASK} {SCORING}",
    ),
    Mutant(
        "a run that gave up is requeued",
        "slurm/common.sh",
        '77) hg_finish "$run" 77',
        '77) hg_requeue "$run" 77',
        "tests/slurm/test_scripts.py",
    ),
    Mutant(
        "a killed rank is not worth a restart",
        "hg_scale/exit_codes.py",
        "return code in (REQUEUE, LOST) or (code > 128 and code != INTERRUPTED)",
        "return code in (REQUEUE, LOST) or (code > 192 and code != INTERRUPTED)",
        "tests/slurm/test_scripts.py",
    ),
)
