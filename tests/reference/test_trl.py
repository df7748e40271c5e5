# SPDX-License-Identifier: Apache-2.0
"""A moving reference in TRL's DPOTrainer, and under FSDP2 in checkpoints of shards."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastpref.reference import ReferenceCallback, adapter_tensors
from fastpref.reference.moving import MovingReference
from tests.examples.loading import load
from tests.reference.models import lora

pytestmark = pytest.mark.heavy


def make_trainer(folder, **options):
    """Of three steps."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    example = load("dpo_lora_trl")
    torch.manual_seed(0)
    tokenizer = example.make_tokenizer()
    rows = [{"prompt": "Say a:", "chosen": " a", "rejected": " no!"}] * 6
    from datasets import Dataset

    return trl.DPOTrainer(
        model=example.make_model(tokenizer),
        ref_model=example.make_model(tokenizer),
        args=trl.DPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=2,
            num_train_epochs=1,
            learning_rate=0.01,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def test_in_dpo_trainer(tmp_path):
    from tests.reference.trainings import Weights

    trainer = make_trainer(tmp_path)
    weights = Weights()
    reference = trainer.ref_model
    want = {name: one.detach().clone() for name, one in reference.named_parameters()}
    trainer.add_callback(ReferenceCallback(reference, decay=0.6, every=2))
    trainer.add_callback(weights)
    trainer.train()
    moved = 0
    for name, one in reference.named_parameters():
        after = 0.6 * want[name] + 0.4 * weights.steps[2][name]
        torch.testing.assert_close(one.detach(), after)
        moved += not torch.equal(one.detach(), want[name])
    assert moved > 5 and len(weights.steps) == 4


def test_log_probabilities_taken_beforehand(tmp_path):
    trainer = make_trainer(tmp_path, precompute_ref_log_probs=True)
    trainer.add_callback(ReferenceCallback(nn.Linear(2, 2), every=1))
    with pytest.raises(ValueError, match="precompute_ref_log_probs must be False"):
        trainer.train()


def stored_on_rank(rank, folder):
    """Whole weights of the reference as saved, spoiled and loaded again."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    models = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)) for _ in range(2)]
    reference, policy = (fully_shard(model, mesh=mesh) for model in models)
    moving = MovingReference(reference, 0.5, 1)
    moving.after_step(policy, 1)
    moving.save(Path(folder), policy, writes=rank == 0)
    before = [one.full_tensor().tolist() for one in reference.parameters()]
    with torch.no_grad():
        for one in reference.parameters():
            one.fill_(7.0)
    moving.load(Path(folder), policy)
    return before, [one.full_tensor().tolist() for one in reference.parameters()]


def adapter_on_rank(rank, folder):
    """A sharded policy whose reference is one of its adapters: by the formula, and loaded again."""
    mesh = init_device_mesh("cpu", (2,))
    policy = lora(adapters=("default", "reference"))
    start = [
        [one.detach().clone() for one in adapter_tensors(policy, name)]
        for name in ("reference", "default")
    ]
    fully_shard(policy, mesh=mesh)
    with torch.no_grad():
        policy(input_ids=torch.tensor([[1, 2, 3]]))
    moving = MovingReference("reference", 0.75, 1)
    moving.after_step(policy, 1)
    moving.save(Path(folder), policy, writes=rank == 0)
    moved = [one.full_tensor() for one in adapter_tensors(policy, "reference")]
    with torch.no_grad():
        for one in adapter_tensors(policy, "reference"):
            one.fill_(7.0)
        policy(input_ids=torch.tensor([[1, 2, 3]]))
    moving.load(Path(folder), policy)
    again = [one.full_tensor() for one in adapter_tensors(policy, "reference")]
    for mine, theirs, one, other in zip(*start, moved, again, strict=True):
        torch.testing.assert_close(one, 0.75 * mine + 0.25 * theirs)
        assert torch.equal(one, other)
    return len(moved)


def test_an_adapter_in_shards(two_ranks, tmp_path):
    assert two_ranks(adapter_on_rank, str(tmp_path)) == [4, 4]


def test_shards_in_a_checkpoint(two_ranks):
    with tempfile.TemporaryDirectory() as folder:
        for before, after in two_ranks(stored_on_rank, folder):
            assert after == before
        assert len(list(Path(folder).glob("*.distcp"))) == 2
