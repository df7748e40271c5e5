# SPDX-License-Identifier: Apache-2.0
"""Fast and slow adapters, their exchange of roles, and combinations of adapters."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed")

from transformers import TrainerCallback

from fastpref import objectives
from fastpref.reference import (
    AdapterPair,
    AdapterPairCallback,
    adapter_tensors,
    combine_adapters,
)
from tests.reference.models import Small, lora, values
from tests.reference.trainings import Live, logps, make_trainer

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def make_pair():
    return AdapterPair(lora(adapters=("fast", "slow")))


def output(model):
    return model(input_ids=IDS).logits.detach()


@pytest.mark.heavy
def test_roles_and_learning_rates():
    pair = make_pair()
    optimizer = torch.optim.Adam(pair.parameter_groups(fast_lr=0.1, slow_lr=0.01))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    groups = optimizer.param_groups
    fast, slow = pair.parameters("fast"), pair.parameters("slow")
    assert [one.data_ptr() for one in groups[0]["params"]] == [one.data_ptr() for one in fast]
    pair.swap(optimizer, scheduler)
    assert (pair.fast, pair.slow) == ("slow", "fast")
    assert [group["lr"] for group in groups] == [0.01, 0.1]
    assert all(one is other for one, other in zip(pair.parameters("fast"), slow, strict=True))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in groups] == [0.005, 0.05]
    # A scheduler that is made anew goes on from these.
    assert [group["initial_lr"] for group in groups] == [0.01, 0.1]
    with pytest.raises(ValueError, match=r"optimizer must have one group an adapter.*got 0"):
        pair.swap(torch.optim.SGD(fast, lr=0.1))
    assert pair.fast == "slow"


@pytest.mark.heavy
def test_one_is_active_and_both_train():
    pair = make_pair()
    pair.model.set_adapter("slow")
    alone = output(pair.model)
    pair.model.set_adapter("fast")
    with pair.active("slow"):
        assert torch.equal(output(pair.model), alone)
        slow = pair.model(input_ids=IDS).logits.sum()
    assert pair.model.active_adapter == "fast"
    slow.backward()
    assert all(one.grad is not None and one.requires_grad for one in pair.parameters("slow"))
    assert all(one.grad is None and one.requires_grad for one in pair.parameters("fast"))
    with pytest.raises(ValueError, match="role must be 'fast' or 'slow', got 'quick'"):
        pair.parameters("quick")


@pytest.mark.heavy
def test_the_lower_loss_becomes_the_fast_one():
    pair = make_pair()
    assert pair.switch() is False
    pair.record(torch.tensor([1.0, 3.0]), torch.tensor(1.5))  # 2 and 1.5
    pair.record(torch.tensor(1.0), torch.tensor(1.4))
    stored = json.loads(json.dumps(pair.state_dict()))
    assert pair.switch() is True and pair.fast == "slow"  # 3 against 2.9
    pair.record(torch.tensor(1.0), torch.tensor(1.0))
    assert pair.switch() is False and pair.fast == "slow"
    pair.load_state_dict(stored)
    assert pair.fast == "fast" and pair.switch() is True
    pair.record(torch.tensor(2.1), torch.tensor([1.0, 3.0]))  # means, however many
    assert pair.switch() is True and pair.fast == "fast"
    with pytest.raises(ValueError, match="must be of the adapters"):
        pair.load_state_dict({"fast": "a", "slow": "b", "losses": None})


def decided_on_rank(rank):
    """Each rank alone would decide otherwise: 1 against 2 and 5 against 3."""
    pair = make_pair()
    pair.record(*(torch.tensor(one) for one in ((1.0, 2.0), (5.0, 3.0))[rank]))
    state = SimpleNamespace(global_step=4)
    AdapterPairCallback(pair, every=4).on_step_end(
        None, state, None, optimizer=None, lr_scheduler=None
    )
    return pair.fast


@pytest.mark.heavy
def test_ranks_decide_by_the_sum_of_their_losses(two_ranks):
    assert two_ranks(decided_on_rank) == ["slow", "slow"]


class Chasing(Live):
    """OFS-DPO against the model without adapters."""

    pair: AdapterPair

    def compute_loss(self, model, inputs, *_, **__):
        rows = inputs["pair"].transpose(0, 1).flatten(0, 1)
        with torch.no_grad(), model.disable_adapter():
            fixed = logps(model, rows).chunk(2)
        found = {}
        for role in ("fast", "slow"):
            with self.pair.active(role):
                found[role] = logps(model, rows).chunk(2)
        losses = {}
        for role, other in (("fast", "slow"), ("slow", "fast")):
            chosen, rejected = (one.detach() for one in found[other])
            losses[role] = objectives.ofs_dpo(
                *found[role],
                *fixed,
                other_chosen_logps=chosen,
                other_rejected_logps=rejected,
                role=role,
            ).losses.mean()
        self.pair.record(*(objectives.dpo(*found[one], *fixed).losses for one in found))
        return losses["fast"] + losses["slow"]


@pytest.mark.heavy
def test_resumed_to_the_bit(tmp_path):
    """Roles, learning rates and losses recorded between two decisions."""

    class Seen(TrainerCallback):
        """Roles and losses, as a training begins and as it saves."""

        def __init__(self, pair):
            self.pair = pair

        def on_train_begin(self, *_, **__):
            self.began = self.pair.state_dict()

        def on_save(self, args, state, control, **_):
            if state.global_step == 8:
                self.saved = self.pair.state_dict()

    def train(folder, resume=None, **arguments):
        pair = make_pair()
        seen = Seen(pair)
        groups = pair.parameter_groups(fast_lr=0.001, slow_lr=0.05)
        optimizer = torch.optim.Adam(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        trainer = make_trainer(
            folder,
            trainer=Chasing,
            model=pair.model,
            callbacks=[AdapterPairCallback(pair, every=3), seen],
            given={"optimizers": (optimizer, scheduler)},
            **arguments,
        )
        trainer.pair, roles = pair, []
        swap = pair.swap
        pair.swap = lambda *given: (roles.append(trainer.state.global_step), swap(*given))
        trainer.train(resume_from_checkpoint=resume)
        return pair, roles, seen

    pair, roles, seen = train(tmp_path / "a", save_strategy="steps", save_steps=8)
    again, later, other = train(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-8"))
    assert seen.saved["losses"] is not None and other.began == seen.saved != seen.began
    assert later == [step for step in roles if step > 8]
    assert (again.fast, again.slow) == (pair.fast, pair.slow)
    mine, theirs = values(pair.model), values(again.model)
    assert all(torch.equal(one, theirs[name]) for name, one in mine.items())


def deltas(model, name):
    """What an adapter adds to each weight."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            down, up = module.lora_A[name].weight, module.lora_B[name].weight
            found[path] = (module.scaling[name] * up @ down).detach()
    return found


@pytest.mark.heavy
def test_a_combination_is_exact():
    model = lora(adapters=("a", "b", "c"))
    before = values(model)
    active = model.active_adapter
    combine_adapters(model, ["a", "b", "c"], [0.5, -1.5, 2.0], "all")
    parts = [deltas(model, name) for name in ("a", "b", "c")]
    got = deltas(model, "all")
    assert len(got) == 2
    for path, one in got.items():
        want = 0.5 * parts[0][path] - 1.5 * parts[1][path] + 2.0 * parts[2][path]
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-5)
    assert model.active_adapter == active
    assert not any(one.requires_grad for one in adapter_tensors(model, "all"))
    after = values(model)
    assert all(torch.equal(after[name], one) for name, one in before.items())


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("names", "weights", "new", "message"),
    [
        (["a"], [1.0], "n", "names must be at least two adapters"),
        (["a", "a"], [1.0, 1.0], "n", "each once"),
        (["a", "z"], [1.0, 1.0], "n", "names must be one of the model's adapters, a, b, got 'z'"),
        (["a", "b"], [1.0], "n", "weights must be one for each of 2 names, got 1"),
        (["a", "b"], [1.0, float("inf")], "n", "weights must be finite"),
        (["a", "b"], [1.0, 1.0], "n.1", "new_name must have no '.'"),
        (["a", "b"], [1.0, 1.0], "a", "new_name must be of no adapter yet, got 'a'"),
    ],
)
def test_bad_combinations(names, weights, new, message):
    model = lora(adapters=("a", "b"))
    with pytest.raises(ValueError, match=message):
        combine_adapters(model, names, weights, new)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.heavy
def test_what_is_no_plain_lora():
    model = lora(adapters=("a", "b"), use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA, got 'a' with use_dora=True"):
        combine_adapters(model, ["a", "b"], [1.0, 1.0], "n")


@pytest.mark.heavy
def test_no_pair():
    model = lora(adapters=("fast", "slow"))
    with pytest.raises(TypeError, match=r"model must be a peft\.PeftModel, got Small"):
        AdapterPair(Small(1))
    with pytest.raises(ValueError, match="slow must be one of the model's adapters"):
        AdapterPair(model, slow="other")
    with pytest.raises(ValueError, match="two adapters, got 'fast' for both"):
        AdapterPair(model, slow="fast")
    with pytest.raises(TypeError, match="pair must be an AdapterPair"):
        AdapterPairCallback(model, every=2)
    with pytest.raises(ValueError, match="every must be at least 1 step"):
        AdapterPairCallback(AdapterPair(model), every=0)
