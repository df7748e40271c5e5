# SPDX-License-Identifier: Apache-2.0
"""Averages and copies of weights against the formula in float64, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from fastpref.reference import adapter_tensors, frozen_copy, update_
from tests.reference.models import Small, lora, values


def test_parameters_are_averaged_and_buffers_copied():
    reference, policy = Small(1), Small(2)
    before, theirs = values(reference), values(policy)
    update_(reference, policy, decay=0.75)
    after = values(reference)
    assert reference.second.weight is reference.first.weight
    for name, one in after.items():
        if name.startswith("norm.") and name.split(".")[1] not in ("weight", "bias"):
            assert torch.equal(one, theirs[name]), name
        else:
            want = 0.75 * before[name].double() + 0.25 * theirs[name].double()
            torch.testing.assert_close(one.double(), want, rtol=1e-6, atol=1e-7)
            assert not torch.equal(one, before[name]) or torch.equal(before[name], theirs[name])
    assert all(torch.equal(one, theirs[name]) for name, one in values(policy).items())


def test_a_copy_is_one_to_the_bit():
    """Whatever lay there before."""
    reference, policy = Small(1), Small(2)
    with torch.no_grad():
        reference.first.weight.fill_(float("nan"))
    update_(reference, policy, decay=0.0)
    theirs = values(policy)
    assert all(torch.equal(one, theirs[name]) for name, one in values(reference).items())


def test_equal_weights_stay_as_they_are():
    reference = frozen_copy(policy := Small(1))
    for decay in (0.1, 0.5, 0.999):
        update_(reference, policy, decay=decay)
    theirs = values(policy)
    assert all(torch.equal(one, theirs[name]) for name, one in values(reference).items())


def test_tensors_in_order_and_by_name():
    reference, policy = [torch.zeros(2), torch.ones(3)], [torch.ones(2), torch.full((3,), 5.0)]
    update_(reference, iter(policy), decay=0.5)
    assert reference[0].tolist() == [0.5, 0.5] and reference[1].tolist() == [3.0, 3.0, 3.0]
    update_({"a": reference[0]}, {"a": policy[1][:2]}, decay=0.5)
    assert reference[0].tolist() == [2.75, 2.75]


def test_a_reference_of_another_dtype():
    reference, policy = [torch.ones(1)], [torch.ones(1, dtype=torch.bfloat16) * 2]
    for _ in range(3):
        update_(reference, policy, decay=0.999)
    assert reference[0].item() == pytest.approx(2 - 0.999**3, rel=1e-6)


@pytest.mark.parametrize("tied", ["policy", "reference"])
def test_weights_tied_on_one_side(tied):
    reference, policy = Small(1), Small(2)
    loose = reference if tied == "policy" else policy
    loose.second.weight = nn.Parameter(loose.second.weight.detach().clone())
    if tied == "policy":
        update_(reference, policy, decay=0.0)
        assert torch.equal(reference.second.weight, policy.first.weight)
        return
    before = values(reference)
    with pytest.raises(ValueError, match=r"only in the policy: second\.weight"):
        update_(reference, policy, decay=0.0)
    assert all(torch.equal(one, before[name]) for name, one in values(reference).items())


def test_what_stands_around_a_module_does_not_count():
    reference, policy = Small(1), Small(2)
    update_(reference, torch.compile(policy, backend="eager"), decay=0.0)
    assert torch.equal(reference.first.weight, policy.first.weight)
    update_(torch.compile(reference, backend="eager"), Small(3), decay=0.0)
    assert torch.equal(reference.first.weight, Small(3).first.weight)


def test_a_frozen_copy():
    copy = frozen_copy(policy := Small(1))
    assert not copy.training and not any(one.requires_grad for one in copy.parameters())
    assert policy.training and all(one.requires_grad for one in policy.parameters())
    assert copy.first.weight.data_ptr() != policy.first.weight.data_ptr()


@pytest.mark.heavy
def test_a_whole_model_follows_a_lora_policy():
    """As PEFT merges, and the policy keeps its weights."""
    policy, reference = lora(seed=3), lora(seed=5)
    reference = reference.merge_and_unload()
    before, theirs = values(reference), values(policy)
    update_(reference, policy, decay=0.4)
    assert all(torch.equal(one, theirs[name]) for name, one in values(policy).items())
    merged = values(policy.merge_and_unload())
    moved = 0
    for name, one in values(reference).items():
        want = 0.4 * before[name].double() + 0.6 * merged[name].double()
        torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-6)
        moved += not torch.equal(one, before[name])
    assert moved == 2


def update_of(model, adapters):
    """What LoRA adds to each weight, by its definition."""
    added = {}
    for path, module in model.named_modules():
        for name in adapters if hasattr(module, "lora_A") else ():
            down, up = (
                one[name].weight.detach().double() for one in (module.lora_A, module.lora_B)
            )
            whole = f"{path.removeprefix('base_model.model.')}.weight"
            added[whole] = added.get(whole, 0) + 3.0 * up @ down  # lora_alpha over r
    return added


@pytest.mark.heavy
@pytest.mark.parametrize("around", [lambda model: model, lambda model: torch.compile(model)])
def test_several_active_adapters(around):
    """Their sum; also where torch.compile stands around the policy."""
    from tests.integrations.transformers.trainings import make_model

    policy, reference = lora(adapters=("a", "b", "c")), lora(seed=5).merge_and_unload()
    policy.base_model.set_adapter(["a", "c"])
    start = values(make_model())
    update_(reference, around(policy), decay=0.0)
    added = update_of(policy, ("a", "c"))
    assert len(added) == 2
    for name, one in values(reference).items():
        want = start[name].double() + added.get(name, 0)
        torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.heavy
def test_adapters_that_are_merged_already():
    policy, reference = lora(), lora().merge_and_unload()
    policy.merge_adapter()
    with torch.no_grad():
        for one in reference.parameters():
            one.zero_()
    update_(reference, policy, decay=0.0)
    whole = values(lora().merge_and_unload())
    for name, one in values(reference).items():
        torch.testing.assert_close(one, whole[name])


@pytest.mark.heavy
def test_tensors_of_an_adapter_are_those_that_peft_saves():
    from peft import get_peft_model_state_dict

    model = lora(adapters=("default", "reference"))
    for name in ("default", "reference"):
        saved = get_peft_model_state_dict(model, adapter_name=name)
        found = adapter_tensors(model, name)
        assert [tuple(one.shape) for one in found] == [
            tuple(one.shape) for one in adapter_tensors(model, "default")
        ]
        assert sorted(one.data_ptr() for one in found) == sorted(
            one.data_ptr() for one in saved.values()
        )


@pytest.mark.heavy
def test_one_adapter_follows_another():
    model = lora(adapters=("default", "reference"))
    mine, theirs = (adapter_tensors(model, one) for one in ("reference", "default"))
    want = [0.9 * a.detach() + 0.1 * b.detach() for a, b in zip(mine, theirs, strict=True)]
    others = {n: v for n, v in values(model).items() if "reference" not in n}
    update_(mine, theirs, decay=0.9)
    assert len(mine) == 4
    for a, b in zip(adapter_tensors(model, "reference"), want, strict=True):
        torch.testing.assert_close(a.detach(), b)
    after = values(model)
    assert all(torch.equal(after[name], one) for name, one in others.items())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "has DoRA or another variant"),
        ({"modules_to_save": ["lm_head"]}, "trained whole"),
    ],
)
def test_what_cannot_be_merged(options, message):
    reference = lora().merge_and_unload()
    with pytest.raises(ValueError, match=message):
        update_(reference, lora(**options), decay=0.0)


def sharded(rank, decay):
    """On one of two ranks: what a sharded reference holds whole afterwards."""
    mesh = init_device_mesh("cpu", (2,))
    models = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)) for _ in range(2)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for one in model.parameters():
            nn.init.normal_(one)
    whole = [[one.detach().clone() for one in model.parameters()] for model in models]
    reference, policy = (fully_shard(model, mesh=mesh) for model in models)
    with torch.no_grad():
        reference(torch.ones(1, 4))
    assert not isinstance(reference[0].weight, DTensor)  # FSDP2 keeps what a root gathered
    with CommDebugMode() as communicated:
        update_(reference, policy, decay=decay)
    assert communicated.get_total_counts() == 0
    assert all(isinstance(one, DTensor) for one in reference.parameters())
    loose = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="must be sharded as policy"):
        update_(loose, policy, decay=decay)
    found = [one.full_tensor().tolist() for one in reference.parameters()]
    return found, [[one.tolist() for one in model] for model in whole]


@pytest.mark.heavy
@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_shards(two_ranks, decay):
    for found, (reference, policy) in two_ranks(sharded, decay):
        for got, mine, theirs in zip(found, reference, policy, strict=True):
            want = decay * torch.tensor(mine) + (1 - decay) * torch.tensor(theirs)
            torch.testing.assert_close(torch.tensor(got), want)


def sharded_lora(rank):
    """What a sharded whole reference holds after a sharded LoRA policy, and before."""
    mesh = init_device_mesh("cpu", (2,))
    policy, reference = lora(seed=3), lora(seed=5).merge_and_unload()
    whole = values(reference), values(copy.deepcopy(policy).merge_and_unload())
    fully_shard(policy, mesh=mesh)
    fully_shard(reference, mesh=mesh)
    update_(reference, policy, decay=0.4)
    found = {name: one.full_tensor().tolist() for name, one in reference.named_parameters()}
    return found, [{name: one.tolist() for name, one in each.items()} for each in whole]


@pytest.mark.heavy
def test_shards_of_a_whole_model_follow_a_lora_policy(two_ranks):
    for found, (reference, merged) in two_ranks(sharded_lora):
        assert found.keys() == reference.keys()
        for name, one in found.items():
            want = 0.4 * torch.tensor(reference[name]) + 0.6 * torch.tensor(merged[name])
            torch.testing.assert_close(torch.tensor(one), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("reference", "policy", "decay", "error", "message"),
    [
        ([torch.ones(2)], [torch.ones(2)], 1.0, ValueError, r"decay must be in \[0, 1\).*got 1.0"),
        ([torch.ones(2)], [torch.ones(2)], float("nan"), ValueError, "decay must be in"),
        ([torch.ones(2)], [torch.ones(2)], "0.5", TypeError, "decay must be a number.*got str"),
        ([torch.ones(2)], [torch.ones(3)], 0.5, ValueError, r"shape of policy\[0\], \(3,\)"),
        ([torch.ones(2)], [torch.ones(2)] * 2, 0.5, ValueError, "only in the policy: 1"),
        (torch.ones(2), [torch.ones(2)], 0.5, TypeError, "several tensors, got one Tensor"),
        ([1.0], [torch.ones(2)], 0.5, TypeError, "must be tensors, got float"),
        (Small(1), Small(1).first, 0.5, ValueError, "must hold the weights that policy holds"),
    ],
)
def test_bad_use(reference, policy, decay, error, message):
    with pytest.raises(error, match=message):
        update_(reference, policy, decay=decay)


def test_a_model_is_not_its_own_reference():
    model = Small(1)
    with pytest.raises(ValueError, match="another model than policy"):
        update_(model, model, decay=0.5)


def test_adapters_of_no_peft_model():
    with pytest.raises(TypeError, match=r"model must be a peft\.PeftModel, got Small"):
        adapter_tensors(Small(1), "default")
