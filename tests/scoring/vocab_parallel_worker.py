# SPDX-License-Identifier: Apache-2.0
"""One rank of the vocabulary-parallel tests: scores every case with its shard, saves the results.

Usage: python vocab_parallel_worker.py RANK WORLD_SIZE DIRECTORY
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from fastpref import ScoringOptions, linear_logprob
from tests.scoring.cases import make_case, upstream_of
from tests.scoring.test_vocab_parallel import CASES, TIMEOUT, ShardedCase, bounds


def shard(tensor: torch.Tensor, start: int, stop: int, padding: int) -> torch.Tensor:
    """Rows [start, stop), then rows of NaN that take no part."""
    rows = tensor[start:stop].detach()
    return torch.cat([rows, rows.new_full((padding, *rows.shape[1:]), torch.nan)])


def score(spec: ShardedCase, rank: int, world: int, group: dist.ProcessGroup) -> dict:
    case = make_case(**spec.arguments, dtype=spec.dtype)
    start, stop = bounds(spec, world)[rank]
    leaves = {
        "hidden": torch.where(case.scored[:, None], case.hidden, torch.nan),
        "weight": shard(case.weight, start, stop, spec.padding),
    }
    if case.bias is not None:
        leaves["bias"] = shard(case.bias, start, stop, spec.padding)
    leaves = {
        name: leaf.clone().requires_grad_(name in spec.needs) for name, leaf in leaves.items()
    }
    scores = linear_logprob(
        **leaves,
        target=case.target,
        outputs=spec.outputs,
        tp_group=group,
        vocab_range=(start, stop) if spec.padding else None,
        options=ScoringOptions(**spec.options),
        **case.map,
    )
    results = {name: getattr(scores, name).detach() for name in spec.outputs}
    if spec.differentiated:
        upstream = upstream_of(case, spec.differentiated)
        tensors = [getattr(scores, name) for name in spec.differentiated]
        torch.autograd.backward(
            tensors, [g.to(t.dtype) for g, t in zip(upstream.values(), tensors, strict=True)]
        )
        results |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return results


def main() -> None:
    rank, world, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), world)
    timeout = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    results = {}
    for name, spec in CASES.items():
        # A group of its own: a case that fails on one rank must not disturb the next.
        group = dist.new_group(timeout=timeout)
        try:
            results[name] = score(spec, rank, world, group)
        except Exception as error:
            results[name] = repr(error)
        # At once: a collective of unequal shapes may end the process.
        torch.save(results, directory / f"rank{rank}.pt")


if __name__ == "__main__":
    main()
