# SPDX-License-Identifier: Apache-2.0
"""SimPO in a bare accelerate loop, on rows without padding, with gradients accumulated right:

    python examples/packed_simpo_accelerate.py        # or: accelerate launch ...

All responses of a batch lie behind each other in one row; ``position_ids`` that start again at 0
keep them apart in the model, ``cu_seqlens`` in the sums. The loss runs through the model's own
forward, which is what DDP and FSDP are wrapped around. Batches hold different numbers of pairs, so
each counts by its pairs: a mean of the batches' means would not be the mean over pairs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, LlamaConfig

from fastpref import fuse_lm_head, sequence_logp
from fastpref.objectives import simpo

VOCABULARY, PROMPT, IGNORE = 200, 4, -100
STEPS = 3  # batches to an update
Pair = tuple[Tensor, Tensor]  # ids of the chosen and the rejected row, (T,) each


def pack(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """One row (1, N) of all chosen rows, then all rejected ones; their boundaries (2 P + 1,)."""
    rows = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    targets = [pad(row[PROMPT:], (PROMPT - 1, 1), value=IGNORE) for row in rows]  # shifted by one
    return {
        "input_ids": torch.cat(rows)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "target": torch.cat(targets)[None],
        "cu_seqlens": pad(torch.tensor([len(row) for row in rows]).cumsum(0), (1, 0)),
    }


def pair_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(P,)."""
    boundaries = batch["cu_seqlens"]
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        shift_labels=batch["target"],
        fused_lm_head=True,
    )
    chosen, rejected = sequence_logp(output.log_probs, cu_seqlens=boundaries).chunk(2)
    lengths = sequence_logp(output.label_mask.float(), cu_seqlens=boundaries)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    return simpo(
        chosen,
        rejected,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta=2.0,
        gamma=1.0,
    ).losses


def update(
    accelerator: Accelerator, model: Any, optimizer: Any, window: Sequence[dict[str, Tensor]]
) -> Tensor:
    """One step of the optimizer from ``window``, ``STEPS`` batches; the mean loss of its pairs."""
    here = sum(batch["cu_seqlens"].numel() // 2 for batch in window)
    pairs = accelerator.reduce(torch.tensor(here, device=accelerator.device), "sum")
    # accelerate divides by the number of batches, DDP and FSDP by that of processes.
    share = STEPS * accelerator.num_processes / pairs
    total = torch.zeros((), device=accelerator.device)
    for batch in window:
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        with accelerator.accumulate(model):
            losses = pair_losses(model, batch)
            accelerator.backward(losses.sum() * share)
            optimizer.step()  # accelerate lets the last of the window through
            optimizer.zero_grad()
        total += losses.detach().sum()
    return accelerator.reduce(total, "sum") / pairs


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return fuse_lm_head(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def make_pairs(count: int) -> Iterator[Pair]:
    """Even tokens are preferred to odd ones; responses of 3 to 12 tokens."""
    for _ in range(count):
        prompt = torch.randint(VOCABULARY, (PROMPT,))
        lengths = torch.randint(3, 13, (2,)).tolist()
        responses = [torch.randint(VOCABULARY // 2, (length,)) * 2 for length in lengths]
        yield torch.cat([prompt, responses[0]]), torch.cat([prompt, responses[1] + 1])


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=STEPS)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    window = [pack(list(make_pairs(count))) for count in (2, 5, 3)]
    for step in range(12):
        loss = update(accelerator, model, optimizer, window)
        if step % 3 == 0 or step == 11:
            accelerator.print(f"step {step:2}   loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
