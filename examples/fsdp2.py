# SPDX-License-Identifier: Apache-2.0
"""DPO on several processes in plain torch, with FSDP2 or DDP around the model:

    torchrun --nproc-per-node 2 examples/fsdp2.py        # or --ddp; or python examples/fsdp2.py

The loss comes out of the model's own forward, whose hooks gather each unit's parameters and reduce
its gradients, those of the output head too, which is a unit of its own here. Processes hold
different numbers of pairs, and a step takes several batches: a sum over pairs divided by the pairs
of one process on average makes the mean of gradients over processes the one over pairs.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from fastpref import fuse_lm_head, sequence_logp
from fastpref.objectives import dpo

VOCABULARY, PROMPT, RESPONSE, PAIRS = 200, 4, 8, 10
Batch = dict[str, Tensor]


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return fuse_lm_head(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def wrap(model: Any, ddp: bool) -> Any:
    if ddp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),)
    )
    for module in (*model.model.layers, model.lm_head, model):
        fully_shard(module, mesh=mesh)
    return model


def make_batch(pairs: int = PAIRS) -> Batch:
    """Even tokens are preferred to odd ones. Chosen rows first, then rejected ones."""
    prompt = torch.randint(VOCABULARY, (pairs, PROMPT))
    even = torch.randint(VOCABULARY // 2, (2 * pairs, RESPONSE)) * 2
    even[pairs:] += 1
    ids = torch.cat([torch.cat([prompt, prompt]), even], dim=1)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def own_pairs(batch: Batch, rank: int, world: int) -> Batch:
    """Every ``world``-th pair, for some one more than for others."""
    pairs = batch["input_ids"].shape[0] // 2
    own = torch.arange(rank, pairs, world)
    rows = torch.cat([own, own + pairs])
    return {name: value[rows] for name, value in batch.items()}


def response_logps(model: Any, batch: Batch) -> Tensor:
    """(2 P,)."""
    return sequence_logp(model(**batch, fused_lm_head=True).log_probs)


def step(model: Any, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> Tensor:
    """One update from this process's ``batches`` and those of the others; the mean loss. Each has
    its ``ref_logps``."""
    device = batches[0]["input_ids"].device
    pairs = torch.tensor(sum(len(one["input_ids"]) // 2 for one in batches), device=device)
    dist.all_reduce(pairs)
    share = dist.get_world_size() / pairs
    total = torch.zeros((), device=device)
    optimizer.zero_grad()
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last  # as in no_sync()
        else:
            model.set_requires_gradient_sync(last)
        tokens = {name: batch[name] for name in ("input_ids", "labels")}
        logps = response_logps(model, tokens)
        losses = dpo(*logps.chunk(2), *batch["ref_logps"].chunk(2), beta=0.5).losses
        (losses.sum() * share).backward()
        total += losses.detach().sum()
    optimizer.step()
    dist.all_reduce(total)
    return total / pairs


def main(ddp: bool) -> None:
    if "RANK" not in os.environ:  # without torchrun
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.manual_seed(0)
    model = make_model().to("cuda" if torch.cuda.is_available() else "cpu")
    batches = [own_pairs(make_batch(), rank, world) for _ in range(2)]
    batches = [{name: value.to(model.device) for name, value in one.items()} for one in batches]
    model = wrap(model, ddp)
    with torch.no_grad():
        for batch in batches:
            batch["ref_logps"] = response_logps(model, batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for index in range(10):
        loss = step(model, optimizer, batches)
        if rank == 0 and index % 3 == 0:
            print(f"step {index}   loss {loss.item():.5f}")
    # A thread of gloo lets go of the last collective's tensors later, which the interpreter's end
    # would abort; a barrier has none.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(ddp="--ddp" in sys.argv[1:])
