# SPDX-License-Identifier: Apache-2.0
"""Fast and slow adapters, and combinations of adapters, in shards of FSDP2 on two processes: to
the bit as in one process without shards."""

import copy
import json

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("peft", reason="peft is not installed")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fastpref import objectives
from fastpref.reference import AdapterPair, adapter_tensors, combine_adapters
from tests.reference.models import lora
from tests.reference.trainings import logps, make_rows

EVERY, SAVED, STEPS = 2, 3, 6  # saved between two decisions
ROWS = torch.stack([row["pair"] for row in make_rows()])  # (12, 2, T)
# One adapter's weights in the root module, which FSDP2 leaves gathered after a forward.
TARGETS = ["q_proj", "down_proj", "embed_tokens"]


def make_model(shards, seed=0, **how):
    model = lora(seed, ("fast", "slow"), target_modules=TARGETS)
    if shards:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh, **how)
        fully_shard(model, mesh=mesh, **how)
    return model


def whole(parameters):
    return [
        (one.full_tensor() if isinstance(one, DTensor) else one).detach().clone()
        for one in parameters
    ]


class Training:
    """OFS-DPO against the model without adapters, of these parts of two."""

    def __init__(self, parts, shards, seed=0):
        self.parts, self.group = parts, dist.group.WORLD if shards else None
        self.pair = AdapterPair(make_model(shards, seed))
        with torch.no_grad():
            self.pair.model(input_ids=ROWS[0])
        # They exchange roles at the first decision.
        groups = self.pair.parameter_groups(fast_lr=0.01, slow_lr=0.05)
        self.optimizer, self.switched = torch.optim.Adam(groups), []

    def train(self, steps):
        for step in steps:
            for part in self.parts:
                self.backward(ROWS[2 * step + part], 1 / len(self.parts))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if step % EVERY == EVERY - 1:
                self.switched.append(self.pair.switch(self.optimizer, dp_group=self.group))

    def backward(self, rows, share):
        model, found, losses = self.pair.model, {}, []
        with torch.no_grad(), model.disable_adapter():
            fixed = logps(model, rows).chunk(2)
        for role in ("fast", "slow"):
            with self.pair.active(role):
                found[role] = logps(model, rows).chunk(2)
        for role, other in (("fast", "slow"), ("slow", "fast")):
            chosen, rejected = (one.detach() for one in found[other])
            output = objectives.ofs_dpo(
                *found[role],
                *fixed,
                other_chosen_logps=chosen,
                other_rejected_logps=rejected,
                role=role,
            )
            losses.append(output.losses.mean())
            assert all(one.requires_grad for one in self.pair.parameters(role))
        (share * sum(losses)).backward()
        self.pair.record(*(objectives.dpo(*found[one], *fixed).losses for one in found))

    def saved(self):
        model, optimizer = self.pair.model.state_dict(), self.optimizer.state_dict()
        return copy.deepcopy((model, optimizer)), json.dumps(self.pair.state_dict())

    def load(self, tensors, pair):
        self.pair.model.load_state_dict(tensors[0])
        self.optimizer.load_state_dict(tensors[1])
        self.pair.load_state_dict(json.loads(pair))

    def weights(self):
        return [whole(adapter_tensors(self.pair.model, name)) for name in ("fast", "slow")]


def same(first, second):
    return all(
        torch.equal(one, other)
        for mine, theirs in zip(first, second, strict=True)
        for one, other in zip(mine, theirs, strict=True)
    )


def train_on_rank(rank):
    """The decisions, and the pair's state as saved."""
    alone, sharded = Training((0, 1), False), Training((rank,), True)
    start = alone.weights()
    assert same(sharded.weights(), start)
    alone.train(range(STEPS))
    sharded.train(range(SAVED))
    kept = sharded.saved()
    sharded.train(range(SAVED, STEPS))
    resumed = Training((rank,), True, seed=7)
    resumed.load(*kept)
    assert resumed.saved()[1] == kept[1]
    resumed.train(range(SAVED, STEPS))
    for one in (sharded, resumed):
        assert all(isinstance(each, DTensor) for each in one.pair.parameters("fast"))
        assert one.pair.fast == alone.pair.fast
        assert same(one.weights(), alone.weights())
    assert not any(same([one], [other]) for one, other in zip(start, alone.weights(), strict=True))
    assert sharded.switched == alone.switched
    return alone.switched, json.loads(kept[1])


@pytest.mark.heavy
def test_a_pair(two_ranks):
    """Decisions, weights, and a resumed training."""
    for switched, kept in two_ranks(train_on_rank):
        assert switched == [True, False, False]
        assert kept["fast"] == "slow" and kept["losses"] is not None


def combine_on_rank(rank):
    """In shards of which a forward has left some gathered, once in half precision."""
    ids, names = ROWS[0, :1], ("fast", "slow")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    alone, sharded = make_model(False), make_model(True)
    rounded = make_model(True, mp_policy=half)
    logits = []
    for model in (alone, sharded, rounded):
        before = [list(map(id, adapter_tensors(model, name))) for name in names]
        with torch.no_grad():
            model(input_ids=ids)
        combine_adapters(model, names, [0.5, -1.5], "both")
        assert [list(map(id, adapter_tensors(model, name))) for name in names] == before
        assert same(
            *([whole(adapter_tensors(one, name)) for name in names] for one in (model, alone))
        )
        combined = adapter_tensors(model, "both")
        assert same([combined], [adapter_tensors(alone, "both")])
        assert not any(one.requires_grad for one in combined)
        model.set_adapter("both", inference_mode=True)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    sharded.set_adapter("both")
    with pytest.raises(ValueError, match=r"'both' must not be trained.* before fully_shard"):
        sharded(input_ids=ids).logits.sum().backward()
    alone.set_adapter("both")
    alone(input_ids=ids).logits.sum().backward()
    assert torch.equal(logits[1], logits[0])
    torch.testing.assert_close(logits[2].float(), logits[0], rtol=0.05, atol=0.1)
    return len(combined)


@pytest.mark.heavy
def test_a_combination(two_ranks):
    assert two_ranks(combine_on_rank) == [6, 6]
