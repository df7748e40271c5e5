# SPDX-License-Identifier: Apache-2.0
"""What a loss returns: six fields, and beside them which rows are chosen, however a framework
builds it again."""

import copy
import pickle

import pytest
import torch
from torch.distributed.utils import _apply_to_tensors
from torch.utils import _pytree

from fastpref.units import PreferenceOutput
from fastpref.units.layouts import Halves, Indexed, Interleaved, Lists, Units
from fastpref.units.output import output_of

PAIRS = torch.tensor([[3, 0], [1, 2], [3, 2]])
LAYOUTS = {  # chosen and rejected rows of four
    "halves": (Halves(), [0, 1], [2, 3]),
    "interleaved": (Interleaved(), [0, 2], [1, 3]),
    "index": (Indexed(PAIRS, 4), [3, 1, 3], [0, 2, 2]),
}


def output(arrangement, dtype=torch.float64) -> PreferenceOutput:
    generator = torch.Generator().manual_seed(2)
    return output_of(
        arrangement,
        torch.tensor(0.5, dtype=dtype),
        torch.rand(2, generator=generator, dtype=dtype),
        torch.rand(4, generator=generator, dtype=dtype),
        -torch.rand(4, generator=generator, dtype=dtype),
        None,
        {"rewards/chosen": torch.tensor(1.0, dtype=dtype)},
    )


def test_six_fields() -> None:
    given = output(Interleaved())
    assert isinstance(given, PreferenceOutput) and isinstance(given, tuple) and len(given) == 6
    assert given._fields == ("loss", "losses", "rewards", "logps", "ref_logps", "metrics")
    for got, name in zip(given, given._fields, strict=True):
        assert got is getattr(given, name) is given[given._fields.index(name)]
    assert PreferenceOutput(*given)[:] == given[:]


def by_accelerate(one):
    operations = pytest.importorskip("accelerate.utils.operations")
    return operations.recursively_apply(lambda tensor: tensor + 0, one)


def to_a_device(one):
    return pytest.importorskip("accelerate.utils.operations").send_to_device(one, "cpu")


REBUILDING = {
    "replaced": lambda one: one._replace(loss=2 * one.loss),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "pickled": lambda one: pickle.loads(pickle.dumps(one)),
    "class and fields": lambda one: type(one)(*one),
    "fields by name": lambda one: type(one)(**one._asdict()),
    "made": lambda one: type(one)._make(list(one)),
    "pytree": lambda one: _pytree.tree_map(lambda leaf: leaf, one),
    "FSDP": lambda one: _apply_to_tensors(lambda tensor: tensor + 0, one),
    "Accelerate": by_accelerate,
    "Accelerate's move": to_a_device,
}


def assert_sides(found, given, layout) -> None:
    _, chosen, rejected = LAYOUTS[layout]
    assert isinstance(found, PreferenceOutput) and len(found) == 6
    assert torch.equal(found.chosen_logps, given.logps[chosen])
    assert torch.equal(found.rejected_logps, given.logps[rejected])
    assert torch.equal(found.chosen_rewards, given.rewards[chosen])
    assert torch.equal(found.rejected_rewards, given.rewards[rejected])


@pytest.mark.parametrize("way", REBUILDING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_stays(layout, way) -> None:
    given = output(LAYOUTS[layout][0])
    once = REBUILDING[way](given)
    assert_sides(once, given, layout)
    for again in REBUILDING.values():
        assert_sides(again(once), given, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_precision_of_accelerate(layout) -> None:
    operations = pytest.importorskip("accelerate.utils.operations")
    given = output(LAYOUTS[layout][0], torch.bfloat16)
    forward = operations.convert_outputs_to_fp32(lambda: given)
    found = forward()
    assert found.loss.dtype == found.metrics["rewards/chosen"].dtype == torch.float32
    assert torch.equal(found.chosen_logps, given.chosen_logps.float())
    nested = operations.convert_to_fp32({"outputs": [given]})["outputs"][0]
    assert torch.equal(nested.rejected_rewards, given.rejected_rewards.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_device(layout) -> None:
    given = output(LAYOUTS[layout][0])
    moved = _pytree.tree_map(lambda leaf: None if leaf is None else leaf.to("meta"), given)
    assert moved.chosen_logps.is_meta and moved.chosen_logps.shape == given.chosen_logps.shape


@pytest.fixture
def alone(tmp_path):
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_through_ddp(layout, alone) -> None:
    """Which takes the output apart for the tensors with a gradient, and makes a new one."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self) -> PreferenceOutput:
            given = output(LAYOUTS[layout][0])
            return given._replace(loss=given.loss * self.scale, logps=given.logps * self.scale)

    model = torch.nn.parallel.DistributedDataParallel(Model(), static_graph=True)
    found = model()
    assert_sides(found, output(LAYOUTS[layout][0]), layout)
    found.loss.backward()
    assert model.module.scale.grad == 0.5


def gathered(outputs):
    """As torch.nn.parallel.gather and Accelerate put the outputs of several devices together."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([torch.atleast_1d(one) for one in outputs])
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: gathered([one[name] for one in outputs]) for name in first}
    return type(first)(*map(gathered, zip(*outputs, strict=True)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gathered_outputs(layout) -> None:
    """Rows of several devices follow each other: no halves any more, nor the pairs of one."""
    given = output(LAYOUTS[layout][0])
    both = gathered([given, given])
    assert both.logps.shape == (8,)
    if layout == "interleaved":
        assert torch.equal(both.chosen_logps, given.chosen_logps.repeat(2))
    else:
        with pytest.raises(AttributeError, match=r"gathered from several .* layout='interleaved'"):
            _ = both.chosen_logps


def test_one_class_a_layout() -> None:
    """So that trees of two steps have one structure."""
    for arrangement, other in ((Halves(), Interleaved()), (Units(), Halves())):
        own = type(output(arrangement))
        assert own is type(output(arrangement)) and own is not type(output(other))


def test_what_has_no_sides_says_so() -> None:
    for rebuilt in (PreferenceOutput(*output(Halves())), output(None)._replace(loss=1)):
        with pytest.raises(AttributeError, match="made of six fields and knows no layout"):
            _ = rebuilt.chosen_logps
    for arrangement in (Units(), Lists(2)):
        with pytest.raises(AttributeError, match="of a pairwise objective"):
            _ = output(arrangement).rejected_rewards
