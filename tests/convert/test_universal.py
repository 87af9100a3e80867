"""DeepSpeed's formats in both directions, tested with DeepSpeed itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hg_scale.checkpoint.errors import CheckpointError
from hg_scale.checkpoint.fragments import KINDS
from hg_scale.checkpoint.load import CheckpointReader
from hg_scale.config.load import parse_config
from hg_scale.config.read import merge
from hg_scale.convert.deepspeed_files import ConsolidatedSource, UniversalSource
from hg_scale.convert.open import open_checkpoint, open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.convert.universal import tensor_parallel_dims, to_deepspeed
from hg_scale.data.progress import ProgressBar
from tests.convert.test_export import assert_bit_equal, full_tensors
from tests.convert.trained import AFTER, LAYOUTS, RATE, STEPS, TrainedCheckpoint, engine_of, train
from tests.convert.verified import verify
from tests.training.models import BY_LEVEL, PAPER, layout, random_batch
from tests.world import Worlds

Get = Callable[[str], TrainedCheckpoint]


@pytest.fixture(scope="module")
def universal(trained: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("universal") / kind
            to_deepspeed(open_checkpoint(trained(kind).path), made[kind], report=ProgressBar())
        return made[kind]

    return get


@pytest.mark.parametrize("kind", LAYOUTS)
def test_round_trip_is_bit_equal(
    trained: Get, universal: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """Weights, moments, counters and data position are equal."""
    to_checkpoint(open_source(universal(kind)), tmp_path / "back", report=ProgressBar())
    verify(tmp_path / "back")
    first, second = CheckpointReader(trained(kind).path), CheckpointReader(tmp_path / "back")
    for key in ("step", "optimizer_step", "progress"):
        assert first.manifest[key] == second.manifest[key]
    assert first.manifest["config"]["model"] == second.manifest["config"]["model"]
    for name in first.shapes:
        for part in KINDS:
            a, b = first.full_tensor(name, part), second.full_tensor(name, part)
            assert torch.equal(a, b), (name, part)


def megatron_dims(trees: list[dict[str, Any]]) -> list[dict[str, int | None]]:
    from hg_scale.model.hourglass import Hourglass
    from hg_scale.model.sharding import shard_of
    from hg_scale.parallel.mesh import make_mesh

    found = []
    for tree in trees:
        config = parse_config(tree, world_size=2)
        _, parts = make_mesh(config.parallel)
        named = Hourglass(config.model, parts, seed=None).named_parameters()
        found.append({name: shard_of(p).dim for name, p in named})
    return found


def test_sharded_dimensions_are_those_of_megatron(worlds: Worlds) -> None:
    trees = [layout(PAPER, 2), layout(PAPER, 2, pooling="attention+linear", upsampling="linear"),
             layout(BY_LEVEL, 2)]  # fmt: skip
    for tree, expected in zip(trees, worlds.run(2, megatron_dims, trees)[0], strict=True):
        assert tensor_parallel_dims(parse_config(tree).model) == expected


def plain_deepspeed(tree: dict[str, Any], universal: Path, stage: int, bf16: bool) -> list[float]:
    """Load with DeepSpeed's own interface around the plain model, and continue training."""
    import deepspeed

    from hg_scale.model.hourglass import Hourglass

    config = parse_config(tree)
    model, size = Hourglass(config.model, seed=None), dist.get_world_size()
    batch_size = config.training.global_batch_size
    settings = {
        "train_micro_batch_size_per_gpu": batch_size // size,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": config.optimizer.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "checkpoint": {"load_universal": True},
    }
    beta1, beta2 = config.optimizer.betas
    decays = [p for n, p in model.named_parameters() if n.endswith("weight") and p.dim() == 2]
    chosen = {id(p) for p in decays}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizer = torch.optim.Adam(
        [{"params": decays}, {"params": others}],
        lr=RATE, betas=(beta1, beta2), eps=config.optimizer.eps,
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.load_checkpoint(str(universal))
    assert engine.global_steps == STEPS
    if stage == 3:
        # DeepSpeed gives all parameter groups one step counter, which each of them increments.
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()
    losses = []
    for step in range(STEPS + 1, STEPS + 1 + AFTER):
        batch = random_batch(config, step).chunk(size)[dist.get_rank()]
        loss = engine(batch[:, :-1], batch[:, 1:])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / size)
    return losses


@pytest.mark.parametrize(
    ("world", "stage", "bf16"), [(1, 1, False), (2, 1, True), (2, 2, False), (2, 3, False)]
)
def test_plain_deepspeed_resumes(
    worlds: Worlds, trained: Get, universal: Callable[[str], Path], world: int, stage: int,
    bf16: bool,
) -> None:  # fmt: skip
    """From TP2 x PP2 to data-parallel layouts, with the losses of the uninterrupted run."""
    source = trained("tp2pp2")
    losses = worlds.run(world, plain_deepspeed, source.tree, universal("tp2pp2"), stage, bf16)[0]
    assert losses == pytest.approx(source.losses, rel=1e-2 if bf16 else 1e-4)


def train_own_engine(tree: dict[str, Any], universal: Path) -> list[float]:
    """Load with DeepSpeed into hg_scale's engine, in the layout of `tree`, and train."""
    engine, config = engine_of(tree)
    engine.deepspeed.load_checkpoint(str(universal))
    return train(engine, config, STEPS + 1, AFTER)


@pytest.mark.parametrize(
    ("kind", "tensor", "pipeline", "world"), [("plain", 2, 2, 4), ("zero3", 2, 1, 4)]
)
def test_deepspeed_loads_into_tensor_and_pipeline_parallel_engines(
    worlds: Worlds, trained: Get, universal: Callable[[str], Path], kind: str, tensor: int,
    pipeline: int, world: int,
) -> None:  # fmt: skip
    source = trained(kind)
    tree = layout(LAYOUTS[kind][-1], tensor, pipeline, 1)
    tree = merge(tree, {"deepspeed": {"checkpoint": {"load_universal": True}}})
    losses = worlds.run(world, train_own_engine, tree, universal(kind))[0]
    assert losses == pytest.approx(source.losses, rel=1e-4)


def deepspeed_writes(tree: dict[str, Any], folder: Path) -> None:
    """Write a native DeepSpeed checkpoint, and convert it with DeepSpeed's own tools."""
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    from hg_scale.training.state import TrainingProgress, save_state

    engine, config = engine_of(tree)
    train(engine, config, 1, STEPS)
    save_state(engine, folder / "checkpoints", TrainingProgress(STEPS, 17, 0), config)
    engine.deepspeed.save_checkpoint(str(folder / "native"), tag="tag")
    if dist.get_rank() == 0:
        arguments = argparse.Namespace(
            input_folder=str(folder / "native" / "tag"),
            output_folder=str(folder / "universal" / "tag"),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True,
            inject_missing_state=True,
        )  # fmt: skip
        ds_to_universal(arguments)
        for safe in (False, True):
            convert_zero_checkpoint_to_fp32_state_dict(
                str(folder / "native"), str(folder / f"fp32-{safe}"), max_shard_size="100KB",
                safe_serialization=safe, tag="tag",
            )  # fmt: skip
        convert_zero_checkpoint_to_fp32_state_dict(
            str(folder / "native"), str(folder / "fp32-one"), max_shard_size=None, tag="tag"
        )
    dist.barrier()


@pytest.mark.parametrize("stage", [1, 3])
def test_files_written_by_deepspeed_are_read(worlds: Worlds, tmp_path: Path, stage: int) -> None:
    """The universal folder with its moments, and consolidated fp32 weights in each format."""
    tree = layout(BY_LEVEL, 1, 1, stage)
    worlds.run(2, deepspeed_writes, tree, tmp_path)
    model = parse_config(tree).model
    checkpoint = CheckpointReader(tmp_path / "checkpoints" / f"step-{STEPS:08}")
    with pytest.raises(CheckpointError, match="its model; use from-deepspeed --config"):
        open_source(tmp_path / "universal")
    universal = open_source(tmp_path / "universal", model)
    assert isinstance(universal, UniversalSource)
    assert universal.kinds == KINDS
    assert (universal.step, universal.optimizer_step) == (STEPS, STEPS)
    for kind in KINDS:
        expected = {name: checkpoint.full_tensor(name, kind) for name in universal.shapes}
        found = {name: universal.full_tensor(name, kind) for name in universal.shapes}
        assert_bit_equal(found, expected)
    to_checkpoint(universal, tmp_path / "back", report=ProgressBar())
    assert CheckpointReader(tmp_path / "back").manifest["optimizer_step"] == STEPS
    weights = {name: checkpoint.full_tensor(name) for name in universal.shapes}
    for form in ("fp32-False", "fp32-True", "fp32-one", "fp32-one/pytorch_model.bin"):
        source = open_source(tmp_path / form, model)
        assert isinstance(source, ConsolidatedSource)
        assert_bit_equal({name: source.full_tensor(name) for name in source.shapes}, weights)


def test_missing_vocabulary_padding_becomes_zeros(trained: Get, tmp_path: Path) -> None:
    """Other tools strip the padding; no id refers to its rows, so they become zeros."""
    weights = full_tensors(trained("zero3").path)
    cut = {
        name: value[:61] if name in ("embedding.table.weight", "head.linear.weight") else value
        for name, value in weights.items()
    }
    torch.save({"module": cut}, tmp_path / "pytorch_model.bin")
    source = open_source(tmp_path, parse_config(trained("zero3").tree).model)
    for name, value in weights.items():
        rows = 61 if cut[name] is not value else len(value)
        assert torch.equal(source.full_tensor(name)[:rows], value[:rows])
        assert not source.full_tensor(name)[rows:].any()
        part = source.read(name, "fp32", 3, source.full_tensor(name).numel())
        assert torch.equal(part, source.full_tensor(name).view(-1)[3:])


def test_prefix_of_a_wrapper_is_dropped(trained: Get, tmp_path: Path) -> None:
    weights = full_tensors(trained("plain").path)
    torch.save({f"module.{k}": v for k, v in weights.items()}, tmp_path / "pytorch_model.bin")
    assert_bit_equal(
        weights,
        {n: ConsolidatedSource(tmp_path, parse_config(trained("plain").tree).model).full_tensor(n)
         for n in weights},
    )  # fmt: skip
