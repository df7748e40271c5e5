# SPDX-License-Identifier: Apache-2.0
"""A moving reference in transformers' Trainer under accelerate's FSDP2, on two processes: the
formula, shards in every checkpoint, and a resumed training that is the same to the bit."""

import contextlib

import pytest
import torch
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers", reason="transformers is not installed")

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model

from fastpref import unfuse_lm_head
from fastpref.reference import ReferenceCallback, frozen_copy
from tests.integrations.transformers.trainings import make_model
from tests.ranks import started_by_torchrun
from tests.reference.trainings import Live, Weights, make_trainer

DECAY, EVERY, SAVED, STEPS = 0.7, 3, 4, 12  # the last save is between two updates


class Sharded(Live):
    """accelerate shards on accelerators alone: gloo's processes are called some."""

    def create_accelerator_and_postprocess(self):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()


class Whole(Weights):
    def keep(self, model):
        self.steps.append(whole(model))


def whole(model):
    return {name: one.full_tensor().detach().clone() for name, one in model.named_parameters()}


def train(folder, resume=None, **arguments):
    reference, policy = (unfuse_lm_head(make_model(seed)) for seed in (1, 0))
    reference, weights = frozen_copy(reference), Whole()
    trainer = make_trainer(
        folder,
        trainer=Sharded,
        model=policy,
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        fsdp=True,
        fsdp_config={
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        },
        **arguments,
    )
    reference = fsdp2_prepare_model(trainer.accelerator, reference)
    start = whole(reference)
    callback = ReferenceCallback(reference, decay=DECAY, every=EVERY)
    for one in (callback, weights):
        trainer.add_callback(one)
    trainer.reference = lambda policy: contextlib.nullcontext(reference)
    trainer.train(resume_from_checkpoint=resume)
    assert all(isinstance(one, DTensor) for one in trainer.model.parameters())
    return start, weights.steps, whole(reference)


def on_rank(rank, folder):
    """Of the unbroken training and of the resumed one."""
    found = []
    for name, resume in (("a", None), ("b", f"{folder}/a/checkpoint-{SAVED}")):
        with started_by_torchrun(rank, 2):
            found.append(train(f"{folder}/{name}", resume, save_strategy="steps", save_steps=SAVED))
    return found


@pytest.mark.slow
def test_resumed_to_the_bit(two_ranks, tmp_path):
    for (start, steps, reference), (_, later, again) in two_ranks(on_rank, str(tmp_path)):
        assert len(steps) == STEPS + 1 and len(later) == STEPS - SAVED + 1
        for name, one in reference.items():
            want = start[name].double()
            for step in range(EVERY, STEPS + 1, EVERY):
                want = DECAY * want + (1 - DECAY) * steps[step][name].double()
            torch.testing.assert_close(one.double(), want, rtol=1e-5, atol=1e-7)
            assert torch.equal(one, again[name])
            assert torch.equal(steps[-1][name], later[-1][name])
            assert not torch.equal(steps[-1][name], steps[SAVED][name])
    kept = tmp_path / "a" / f"checkpoint-{SAVED}" / "reference"
    assert len(list(kept.glob("*.distcp"))) == 2 and (kept / "run.json").is_file()
