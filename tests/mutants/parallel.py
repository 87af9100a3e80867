"""Faults in tensor and pipeline parallelism, and in the mesh."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LAYOUTS = "tests/training/test_layouts.py"
MESH = "tests/parallel/test_mesh.py"
BOUNDARIES = "tests/parallel/test_boundaries.py"
LAUNCH = "tests/parallel/test_launch.py"

PARALLEL = (
    Mutant(
        "open skips packed innermost first",
        "hg_scale/parallel/pipeline.py",
        "for t in (state.x, *state.skips)], 1)",
        "for t in (state.x, *reversed(state.skips))], 1)",
        BOUNDARIES,
    ),
    Mutant(
        "boundary shapes list the skips innermost first",
        "hg_scale/model/plan.py",
        "for j in (level, *range(level))]",
        "for j in (level, *reversed(range(level)))]",
        BOUNDARIES,
    ),
    Mutant(
        "micro-batches of a stage count from their own start",
        "hg_scale/parallel/pipeline.py",
        "self.context.first_sample + self._micro_batch * self.micro_batch_size",
        "self.context.first_sample + self._micro_batch",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and paper-2-1-2-1'",
    ),
    Mutant(
        "a cut's cost counts one of its two boundaries",
        "hg_scale/parallel/pipeline_cut.py",
        "crossing = 2 * (traffic[a] + (traffic[b] if b < layers else 0))",
        "crossing = 2 * traffic[a]",
        "tests/parallel/test_pipeline_cut.py",
    ),
    Mutant(
        "a stage runs ahead of its neighbour's transfer",
        "hg_scale/parallel/pipeline_schedule.py",
        "end = max(clock[stage], clock[other]) + transfer[action.stage]",
        "end = clock[stage] + transfer[action.stage]",
        "tests/parallel/test_pipeline_schedule.py",
    ),
    Mutant(
        "the bubble leaves out transfers",
        "hg_scale/parallel/pipeline_cut.py",
        "return simulate_step(forward, backward, transfer, micro_batches).bubble",
        "return simulate_step(forward, backward, [0] * len(transfer), micro_batches).bubble",
        "tests/parallel/test_pipeline_cut.py",
    ),
    Mutant(
        "data ranks counted before tensor ranks",
        "hg_scale/parallel/mesh.py",
        "return self.rank // self.tensor % self.data",
        "return self.rank % self.data",
        MESH,
    ),
    Mutant(
        "model groups hold data ranks",
        "hg_scale/parallel/mesh.py",
        '"pipeline": "p", "model": "tp"}',
        '"pipeline": "p", "model": "td"}',
        MESH,
    ),
    Mutant(
        "a replicated input's gradient is not summed over tensor ranks",
        "hg_scale/parallel/megatron.py",
        "x = copy_to_tensor_model_parallel_region(x)",
        "x = x.contiguous()",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and by_level-2-2-1-1'",
    ),
    Mutant(
        "every tensor rank has the mask of the first",
        "hg_scale/parallel/megatron.py",
        "return Dropout(rate, split_dim, self.rank, self.size)",
        "return Dropout(rate, split_dim, 0, self.size)",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and paper-2-2-1-1'",
    ),
    Mutant(
        "the padded vocabulary is masked on the wrong tensor rank",
        "hg_scale/parallel/megatron.py",
        "return self.rank * (vocab // self.size)",
        "return (self.size - 1 - self.rank) * (vocab // self.size)",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and by_level-2-2-1-1'",
    ),
    Mutant(
        "a copy of the shared biases counts in the norm on every stage",
        "hg_scale/parallel/deepspeed_adapter.py",
        "mark_stage_copy(parameter, self.stage_id > 0)",
        "mark_stage_copy(parameter, False)",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and paper-2-1-2-1'",
    ),
    Mutant(
        "shared biases summed over data ranks, not over stages",
        "hg_scale/parallel/deepspeed_adapter.py",
        "(parameter, self._grid.get_pipe_parallel_group())",
        "(parameter, self._grid.get_data_parallel_group())",
        f"{LAYOUTS} -k 'test_same_curve_with_dropout and paper-2-1-2-1'",
    ),
    Mutant(
        "an interactive shell's special step counts as a task",
        "hg_scale/parallel/launch.py",
        "_FIRST_SPECIAL_STEP = 0xFFFFFFF0",
        "_FIRST_SPECIAL_STEP = 0xFFFFFFFB",
        LAUNCH,
    ),
    Mutant(
        "a rank equal to the world size is accepted",
        "hg_scale/parallel/launch.py",
        "if found >= size:",
        "if found > size:",
        LAUNCH,
    ),
    Mutant(
        "8(x2),4 tasks per node are 8, 4",
        "hg_scale/parallel/launch.py",
        "counts += [int(count)] * int(times or 1)",
        "counts += [int(count)]",
        LAUNCH,
    ),
)
