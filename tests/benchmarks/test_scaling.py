"""What `benchmarks.scaling` counts follows from closed forms and is what a step does; and what thousands of
ranks rely on: shards that are the whole tensor, and noise by 64-bit numbers.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import models
from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import counts
from benchmarks.scaling import host as scaling_host
from benchmarks.scaling.counts import H200, LAYOUTS, MODELS, Llama, Model, Weight
from benchmarks.step.variants import NoOptimizer
from pats_kernels import PATSAdamW
from pats_kernels.backends.tables import DeviceTables, narrowed
from pats_kernels.backends.triton import chunk_of
from pats_kernels.distributed import Statistics
from pats_kernels.hyperparameters import Hyperparameters
from pats_kernels.plan import Batch, Column, Planner
from pats_kernels.plan import Shard as Part
from pats_kernels.step import Launcher

GPUS = 4096
LARGEST = MODELS[-1]
SMALL = Model("small", Llama(64, 128, 2, 32, 96), 8)
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": models.CONFIGS["meta-llama/Llama-3.2-1B"],
    "Qwen2.5-7B": models.CONFIGS["Qwen/Qwen2.5-7B"],
    "Llama-3-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    "Llama-3.1-405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
}
LARGE = {"model_type": "llama", "vocab_size": 128256, "head_dim": 128, "num_key_value_heads": 8}
PARAMS = [1_235_814_400, 7_615_616_512, 70_553_706_496, 405_853_388_800]  # as the hub has them


@contextmanager
def alone(world_size: int, rank: int) -> Iterator[None]:
    """One rank of a process group that sends nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


# The shapes.


@pytest.mark.parametrize(
    ("model", "params"), list(zip(MODELS, PARAMS, strict=True)), ids=lambda v: str(v)[:20]
)
def test_shapes_are_those_of_transformers(model: Model, params: int) -> None:
    values = CONFIGS[model.name]
    if "model_type" not in values:
        values = {**LARGE, **values, "num_attention_heads": values["hidden_size"] // 128}
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    shapes = [weight.shape for weight in model.sizes.weights()]
    assert shapes == [tuple(param.shape) for param in built.parameters()]
    assert sum(map(math.prod, shapes)) == params


def test_deepseek_v3() -> None:
    shapes = scaling_host.deepseek_v3()
    assert (len(shapes), sum(map(math.prod, shapes))) == (45_337, 671_026_404_352)
    assert shapes.count((2048, 7168)) == 58 * 257 * 2


# Shards of thousands of ranks.


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_shards_of_rows_follow_one_another(model: Model) -> None:
    """On all of 4,096 ranks each tensor's [offset, offset + numel) are the whole, in order, with no gap."""
    for weight in set(model.sizes.weights()):
        at, end = counts.piece(weight, "fsdp", GPUS, model.shard), 0
        for rank in range(GPUS):
            found = counts.laid_out(weight, at, rank, GPUS)
            numel = math.prod(counts.sizes(found))
            assert found.shard is not None
            assert (found.shard.numel, found.shard.counts) == (math.prod(weight.shape), True)
            assert found.shard.offset == end or numel == 0, (weight, rank)
            end += numel
        assert end == math.prod(weight.shape)


@pytest.mark.parametrize("layout", ["hsdp", "fsdp x tp"])
def test_boxes_of_two_cuts_are_the_whole(layout: str) -> None:
    """The ranks' boxes are all products of intervals that follow one another, and each is there once; of
    replicas one counts."""
    for weight in set(LARGEST.sizes.weights()):
        at = counts.piece(weight, layout, GPUS, LARGEST.shard)
        copies = GPUS // LARGEST.shard if layout == "hsdp" else 1 if weight.tp is not None else counts.NODE
        boxes: dict[tuple[tuple[int, int], ...], list[bool]] = {}
        for rank in range(GPUS):
            found = counts.laid_out(weight, at, rank, GPUS)
            if math.prod(counts.sizes(found)):
                box = tuple((part.start, part.stop) for part in found.box)
                assert found.shard is not None
                strides = torch.empty(weight.shape, device="meta").stride()
                assert found.shard.offset == sum(a * s for (a, _), s in zip(box, strides, strict=True))
                boxes.setdefault(box, []).append(found.shard.counts)
        sides = [sorted(set(side)) for side in zip(*boxes, strict=True)]
        for side, size in zip(sides, weight.shape, strict=True):
            assert [start for start, _ in side] == [0, *(stop for _, stop in side[:-1])]
            assert side[-1][1] == size
        assert set(boxes) == set(product(*sides))
        counted = 1 if layout == "hsdp" else copies
        assert all((len(box), sum(box)) == (copies, counted) for box in boxes.values())


@pytest.mark.parametrize("rank", [0, 1234, 4095])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_where_torch_puts_them(layout: str, rank: int) -> None:
    with alone(GPUS, rank):
        for model in (MODELS[0], MODELS[1], LARGEST):
            for weight in set(model.sizes.weights()):
                at = counts.piece(weight, layout, GPUS, model.shard)
                if math.prod(at.mesh) < GPUS:
                    continue
                mesh = init_device_mesh("cpu", at.mesh)
                size, start = compute_local_shape_and_global_offset(
                    torch.Size(weight.shape), mesh, at.placements
                )
                found = counts.laid_out(weight, at, rank, GPUS)
                assert counts.sizes(found) == tuple(size)
                if math.prod(size):
                    assert [part.start for part in found.box] == list(start)


def test_what_is_walked_by_its_strides() -> None:
    """By hand: all columns; of 70 B's norms, 8,192 numbers, every second rank's two; no matrix's rows."""
    columns = Weight((16384, 53248), 1)
    assert counts.slow_elements(columns, "fsdp x tp", GPUS, 512) == 16384 * 53248
    assert counts.slow_elements(Weight((8192,)), "fsdp", GPUS, 64) == 4096
    assert counts.slow_elements(Weight((16384,)), "fsdp", GPUS, 512) == 0
    for weight in (Weight((128256, 16384), 0), Weight((1024, 16384), 0)):
        for layout in LAYOUTS:
            at = counts.piece(weight, layout, GPUS, 512)
            every = [counts.laid_out(weight, at, rank, GPUS) for rank in range(0, GPUS, 7)]
            assert counts.slow_elements(weight, layout, GPUS, 512) == sum(map(counts.is_slow, every)) == 0


@pytest.mark.parametrize("rank", [2048, 4095])
@pytest.mark.parametrize(
    ("shape", "beyond"),
    [
        ((128256, 16384), 2**30),  # the embedding of 405 B
        ((384, 4096, 7168), 2**32),  # a layer's experts in one tensor
        ((64, 384, 4096, 7168), 2**35),  # all layers'
    ],
)
def test_the_noise_of_the_last_elements_of_a_shard(
    backend: str, shape: tuple[int, ...], beyond: int, rank: int
) -> None:
    """Where numbers pass 32 and 34 bits the counter is the oracle's; the tensor's number is 2^32 - 1."""
    weight, count = Weight(tuple(shape)), 70
    last = math.ceil(shape[0] / math.ceil(shape[0] / GPUS)) - 1  # ranks behind it have none
    found = counts.laid_out(weight, counts.piece(weight, "fsdp", GPUS, 8), min(rank, last), GPUS)
    assert found.shard is not None
    first = found.shard.offset + math.prod(counts.sizes(found)) - count
    assert first > beyond
    assert_noise(backend, (count,), Part(first, (1,), math.prod(shape)), np.arange(first, first + count))


@pytest.mark.parametrize("first", [0, 4, 6, 2**34 - 4 * 64 - 4, 2**34 - 4 * 64, 2**34 - 8, 2**34 - 2])
@pytest.mark.parametrize("columns", [40, 512, 514])
def test_the_noise_of_a_shard_of_columns(backend: str, first: int, columns: int) -> None:
    """Blocks within a row and across rows, of whole groups and not, and where a group's low word wraps."""
    stride = 3 * 2**20
    numbers = first + stride * np.arange(3)[:, None] + np.arange(columns)
    assert_noise(backend, (3, columns), Part(first, (stride, 1), 2**40), numbers.ravel())


def assert_noise(backend: str, shape: tuple[int, ...], shard: Part, numbers: np.ndarray) -> None:
    """With no sensitivity at all the gate is open: what comes to w = 0 is the noise alone."""
    columns = [torch.zeros(shape) for _ in range(4)]
    batch = Batch(
        str,
        *([column] for column in columns),  # type: ignore[arg-type]
        sens_stats=[torch.ones(2)],
        steps=[9],
        tensor_ids=[2**32 - 1],
        hyperparameters=[Hyperparameters(noise_scale=0.5, seed=2**63 + 1)],
        shards=[shard],
        shares=[torch.zeros(2)],
    )
    Launcher().launch(batch, backend)
    h = oracle.Hyper(seed=2**63 + 1, step=9, tensor_id=2**32 - 1)
    noise = columns[0].flatten().numpy() / 0.5
    np.testing.assert_allclose(noise, oracle.normal(h, numbers), rtol=0, atol=2e-3)


# What is counted.


def test_a_row_by_hand() -> None:
    """405 B on 512 GPUs, rank 0: ceil(rows / 512) rows of every tensor."""
    row = counts.row(LARGEST, "fsdp", 512)
    layer = (2 * 32 + 2 * 2 + 2 * 104) * 16384 + 32 * 53248 + 2 * 32
    numel = 2 * 251 * 16384 + 126 * layer + 32
    assert (row["params"], row["tensors"], row["numel"]) == (405_853_388_800, 1137, numel)
    assert row["balance"] == pytest.approx(numel * 512 / 405_853_388_800)
    assert row["moved_bytes"] == {
        "ema, float32": 44 * numel,
        "ema, bfloat16": 28 * numel,
        "moments, float32": 28 * numel,
        "moments, bfloat16": 20 * numel,
    }
    assert row["adamw_moved_bytes"] == 28 * numel
    assert row["state_bytes"]["ema, float32"] == 16 * numel + 20 * 1137
    assert row["state_bytes"]["moments, bfloat16"] == 4 * numel + 20 * 1137
    assert (row["launches"], row["kernels"]) == (1, {"delayed": 2, "exact": 3})
    assert (row["messages"], row["message_bytes"], row["empty_tensors"]) == (1, 8 * 1137, 0)
    pieces = [251 * 16384, 32 * 16384, 2 * 16384, 104 * 16384, 32 * 53248]
    sizes = zip(pieces, [2, 2 * 126, 2 * 126, 2 * 126, 126], strict=True)
    assert row["chunks"] == sum(n * math.ceil(size / 4096) for size, n in sizes) + 2 * 126 + 1
    assert row["largest_sum"] == math.ceil(math.ceil(251 * 16384 / 4096) / 256)


def test_the_model_by_hand() -> None:
    row = counts.row(LARGEST, "fsdp", GPUS)
    training = 6 * 405_853_388_800 * 4096 / (0.4 * 989e12)
    step = 44 * row["numel"] / 4.8e12 + 2 * 5e-6
    assert row["training_step_s"] == pytest.approx(training)
    assert row["step_s"] == pytest.approx(step)
    assert row["share"]["ema, float32"] == pytest.approx(step / training)
    added = 16 * row["numel"] / 4.8e12 + 5e-6
    assert row["share_over_adamw"]["ema, float32"] == pytest.approx(added / training)
    assert row["message_s"] == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 9 * 5e-6) + 9096 / 10e9)
    assert counts.allreduce_s(1, 8, 8, H200) == 0
    assert counts.allreduce_s(512, 1, 0, H200) == pytest.approx(6.8e-6 + 2 * 9 * 5e-6)


def test_what_fits() -> None:
    fits = [counts.row(LARGEST, "fsdp", gpus)["fits"]["ema, float32"] for gpus in (8, 64, 512)]
    assert fits == [False, False, True]  # 24 bytes a parameter: 1,218 and 152 GB of 141


def test_the_counted_tables_are_those_of_a_launch() -> None:
    (launch,) = counts.launches(SMALL.sizes.weights(), "fsdp x tp", 16, 8, rank=3)
    launch.key = launch.key._replace(device=torch.device("cpu"))
    tables = DeviceTables(launch, chunk_of(launch.key), narrowed).current(launch)
    assert counts.table_bytes(launch) == sum(table.nbytes for table in tables)
    assert counts.chunks_of(launch) == len(tables.chunks) > 0
    assert (launch.table[:, Column.NDIM] > 0).sum() > 0


# What a step does.


def distributed_params(layout: str, gpus: int, rank: int) -> list[nn.Parameter]:
    """The small model as this rank of a process group holds it, with gradients."""
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    if layout == "fsdp x tp":
        both = init_device_mesh("cpu", (gpus // 8, 8), mesh_dim_names=("data", "model"))
        meshes = {(gpus // 8, 8): both, (gpus // 8,): both["data"]}
    params: list[nn.Parameter] = []
    for weight in SMALL.sizes.weights():
        at = counts.piece(weight, layout, gpus, SMALL.shard)
        if at.mesh not in meshes:
            meshes[at.mesh] = init_device_mesh("cpu", at.mesh)
        local = torch.ones(counts.sizes(counts.laid_out(weight, at, rank, gpus)))
        stride = torch.empty(weight.shape, device="meta").stride()
        whole = [
            DTensor.from_local(
                tensor,
                meshes[at.mesh],
                at.placements,
                run_check=False,
                shape=torch.Size(weight.shape),
                stride=stride,
            )
            for tensor in (local, local.clone())
        ]
        params.append(nn.Parameter(whole[0]))
        params[-1].grad = whole[1]
    return params


@pytest.mark.parametrize("sensitivity", ["ema", "moments"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sends_launches_and_keeps_what_is_counted(layout: str, sensitivity: Any) -> None:
    gpus, sent, launched = 16, [], []
    row = counts.row(SMALL, layout, gpus)
    with alone(gpus, 0):
        optimizer = PATSAdamW(distributed_params(layout, gpus, 0), sensitivity=sensitivity, backend="eager")
        optimizer.step()
        with patch.object(dist, "all_reduce", spying(dist.all_reduce, sent)):
            optimizer.step()
            optimizer.state_dict()
        ((plan,),) = optimizer._launcher._planner._plans.values()
        launched = plan.launches
    assert sum(tensor.nbytes for tensor in sent) == row["message_bytes"]
    assert (len(sent), len(launched)) == (row["messages"], row["launches"])
    numel = sum(int(launch.table[:, Column.NUMEL].sum()) for launch in launched)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    state += optimizer._nonfinite.values()
    held = sum(value.to_local().nbytes if isinstance(value, DTensor) else value.nbytes for value in state)
    assert (numel, held) == (row["numel"], row["state_bytes"][f"{sensitivity}, float32"])


def spying(function: Callable[..., Any], seen: list[Tensor]) -> Callable[..., Any]:
    def spy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tensor)
        return function(tensor, *args, **kwargs)

    return spy


def test_means_that_were_replaced_are_written_anew() -> None:
    """What is kept from step to step goes by the tensors: of parameters and of means."""
    with alone(16, 0):
        params = distributed_params("fsdp", 16, 0)
        optimizer = PATSAdamW(params, backend="eager")
        optimizer.step()
        optimizer.state_dict()
        old = [optimizer.state[param]["sens_stats"] for param in params]
        before = [stats.clone() for stats in old]
        for param in params:
            optimizer.state[param]["sens_stats"] = torch.zeros(2)
        optimizer.step()
        optimizer.state_dict()
    assert all(torch.equal(stats, kept) for stats, kept in zip(old, before, strict=True))
    assert all(optimizer.state[param]["sens_stats"][0] > 0 for param in params)


def test_a_message_is_of_the_tensors_that_step() -> None:
    """A parameter without a gradient, then noise off for some: other rows, and back again."""
    sizes: list[int] = []
    with alone(16, 0):
        params = distributed_params("fsdp", 16, 0)
        optimizer = PATSAdamW([{"params": params[:3]}, {"params": params[3:]}], backend="eager")
        for step in range(4):
            sent: list[Tensor] = []
            grad, params[4].grad = params[4].grad, None if step == 1 else params[4].grad
            optimizer.param_groups[0]["noise_scale"] = 0.0 if step == 2 else 1e-5
            with patch.object(dist, "all_reduce", spying(dist.all_reduce, sent)):
                optimizer.step()
            params[4].grad = grad
            sizes += [len(tensor) for tensor in sent]
    count = len(SMALL.sizes.weights())
    assert sizes == [count, count - 1, count - 3, count]


def test_meta_tensors_have_a_plan_and_others_no_memory_in_common() -> None:
    (launch,) = counts.launches([Weight((128256, 16384)), Weight((16384,))], "fsdp", GPUS, 512, rank=4095)
    assert launch.table[:, Column.NUMEL].tolist() == [0, 4]  # 32 rows a rank: the last 88 have none
    assert launch.table[:, Column.OFFSET].tolist() == [128256 * 16384, 16380]
    memory = [torch.zeros(8) for _ in range(3)]
    batch = Batch(
        str,
        [memory[0]],
        [memory[1]],
        [memory[2]],
        [memory[2][:8]],
        sens_stats=[torch.zeros(2)],
        steps=[1],
        tensor_ids=[0],
        hyperparameters=[Hyperparameters()],
    )
    with pytest.raises(ValueError, match="overlapping memory"):
        Planner().plan(batch)


# The command.


def test_the_host_is_measured_and_the_process_group_gone() -> None:
    shapes = [(4100, 8), (3, 8), (16,)]
    host = scaling_host.measure({"small": shapes}, [3, 5])
    assert not dist.is_initialized()
    (plan,) = host["planned"]
    assert (plan["tensors"], plan["params"], plan["message_bytes"]) == (3, 4100 * 8 + 24 + 16, 24)
    assert plan["step_s"] == plan["gather_s"] + plan["layout_s"] + plan["plan_s"] + plan["upload_s"] > 0
    assert [row["tensors"] for row in host["stepped"]] == [3] * 4 + [5] * 4
    for row in host["stepped"]:
        times = [value for key, value in row.items() if key.endswith("_us")]
        assert len(times) == 6
        assert all(isinstance(time, float) and 0 < time < math.inf for time in times)


def test_sharded_steps_leave_nothing_behind() -> None:
    """Neither a tensor nor one more of the objects that describe how tensors are split."""
    with alone(scaling_host.WORLD, scaling_host.RANK):
        mesh = init_device_mesh("cpu", (scaling_host.WORLD,))
        params = [nn.Parameter(scaling_host.sharded((8192, 4), mesh, "cpu")) for _ in range(3)]
        optimizers = [PATSAdamW(params, seed=1), scaling_host._attached(NoOptimizer([*params]))]
        counts: list[int] = []
        for number in range(60):
            for param in params:
                param.grad = scaling_host.sharded((8192, 4), mesh, "cpu")
            for optimizer in optimizers:
                optimizer.step()
            if number in (20, 59):
                gc.collect()
                kinds = map(type, gc.get_objects())  # without the objects: these would live on
                counts.append(sum(issubclass(kind, (DTensorSpec, Tensor)) for kind in kinds))
        assert counts[1] <= counts[0]


def test_a_gradient_that_comes_to_be_split_otherwise_is_laid_out_anew() -> None:
    """What describes the split is looked at where it is another object, of as many elements or not."""
    with alone(1, 0):
        mesh = init_device_mesh("cpu", (1,))
        values = torch.arange(8.0).view(4, 2)
        whole, rows, columns = (
            DTensor.from_local(values.clone(), mesh, [p]) for p in (Replicate(), Shard(0), Shard(1))
        )
        param = nn.Parameter(DTensor.from_local(torch.ones(4, 2), mesh, [Shard(0)]))
        batch = Batch(str, [param], [rows], [None], [None], [torch.zeros(2)], kept=1)
        statistics = Statistics()
        for grad in (rows, rows, columns, rows, whole, columns):
            (found,) = statistics.localized(replace(batch, grads=[grad])).grads
            assert torch.equal(found, values)
            assert type(found) is Tensor
        with pytest.raises(ValueError, match="the parameter is a DTensor, its gradient a plain tensor"):
            statistics.localized(replace(batch, grads=[values]))
        (found,) = statistics.localized(replace(batch, grads=[rows])).grads
        assert torch.equal(found, values)


def test_a_planned_rank_is_the_one_it_says() -> None:
    with alone(scaling_host.WORLD, scaling_host.RANK):
        mesh = init_device_mesh("cpu", (scaling_host.WORLD,))
        param = scaling_host.sharded((8192, 4), mesh, "meta")
        assert isinstance(param.placements[0], Shard)
        assert tuple(param.to_local().shape) == (2, 4)
        batch = Batch(str, [param], [param], [None], [None], [torch.zeros(2)])
        (shard,) = Statistics().localized(batch).shards
        assert shard == Part(2 * scaling_host.RANK * 4, (4, 1), 8192 * 4)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = (MODELS[0]._replace(name="one", sizes=Llama(2048, 8192, 1, 512, 128256, tied=True)),)
    paths = {"json": tmp_path / "out.json", "plot": tmp_path / "out.png"}
    names: AbstractContextManager[Any] = patch.multiple(counts, MODELS=few, GPUS=(8, 16))
    with names, patch.object(scaling, "MODELS", few), patch.object(scaling, "GPUS", (8, 16)):
        code = scaling.main(["--no-host", *(part for k, v in paths.items() for part in (f"--{k}", str(v)))])
    screen = capsys.readouterr().out
    assert code == 0
    result = json.loads(paths["json"].read_text())
    assert [(row["layout"], row["gpus"]) for row in result["rows"]] == [
        ("fsdp", 8),
        ("fsdp", 16),
        ("hsdp", 16),
        ("fsdp x tp", 8),
        ("fsdp x tp", 16),
    ]
    assert result["assumptions"] == H200
    assert "MODEL, not measured" in screen
    assert f"{100 * result['rows'][0]['share']['ema, float32']:.3f}%" in screen
    assert paths["plot"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
