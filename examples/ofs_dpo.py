# SPDX-License-Identifier: Apache-2.0
"""OFS-DPO on two tasks, one after the other, and how much of the first is forgotten with and
without COFS:

    python examples/ofs_dpo.py

Qi et al. 2024, arXiv:2406.05534. A fast and a slow LoRA adapter train on a stream of pairs, each
chasing the other (objective ``ofs_dpo``), and exchange roles when the slow one does better. Without
COFS they go on from the first task to the second; with it each task has adapters of its own, and
the policy is their linear combination, whose weights are those of the lowest loss on a few
remembered pairs of both tasks. The paper's choice of these weights was not confirmed at the source.
"""

import itertools
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref import objectives
from fastpref.reference import AdapterPair, adapter_tensors, combine_adapters, update_

VOCABULARY, PROMPT, RESPONSE = 40, 3, 6
STEPS, BATCH, REMEMBERED, BETA, ALPHA = 30, 16, 32, 0.1, 0.1


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(fastpref.fuse_lm_head(LlamaForCausalLM(config)), lora, "fast")
    model.add_adapter("slow", lora)
    return model


def make_pairs(task: int, count: int) -> Tensor:
    """(2 count, T), chosen rows first. Of the first task even tokens are preferred to odd ones; of
    the second high ones to low ones, and most of these high ones are odd: whoever learns it alone
    learns the contrary of the first beside it."""
    half = VOCABULARY // 2
    prompts = torch.randint(VOCABULARY, (count, PROMPT)).repeat(2, 1)
    if task == 0:
        responses = torch.randint(half, (2 * count, RESPONSE)) * 2
        responses[count:] += 1
    else:
        odd = torch.rand(2 * count, RESPONSE) < 0.75
        odd[count:] = ~odd[count:]
        responses = torch.randint(half // 2, (2 * count, RESPONSE)) * 2 + odd.long()
        responses[:count] += half
    return torch.cat([prompts, responses], 1)


def logps(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) of chosen and of rejected responses."""
    labels = rows.clone()
    labels[:, :PROMPT] = -100
    scores = model(input_ids=rows, labels=labels, fused_lm_head=True).log_probs
    chosen, rejected = scores.sum(1).chunk(2)
    return chosen, rejected


@torch.no_grad()
def reference_logps(model: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    with model.disable_adapter():
        return logps(model, rows)


def train(pair: AdapterPair, task: int) -> int:
    """One task's stream; how often the roles were exchanged."""
    optimizer = torch.optim.Adam(pair.parameter_groups(fast_lr=1e-2, slow_lr=3e-3))
    switches = 0
    for step in range(1, STEPS + 1):
        rows = make_pairs(task, BATCH)
        fixed = reference_logps(pair.model, rows)
        with pair.active("fast"):
            fast = logps(pair.model, rows)
        with pair.active("slow"):
            slow = logps(pair.model, rows)
        losses = {}
        for role, own, other in (("fast", fast, slow), ("slow", slow, fast)):
            losses[role] = objectives.ofs_dpo(
                *own,
                *fixed,
                other_chosen_logps=other[0].detach(),
                other_rejected_logps=other[1].detach(),
                beta=BETA,
                alpha=ALPHA,
                role=role,
            ).losses.mean()
        optimizer.zero_grad()
        (losses["fast"] + losses["slow"]).backward()
        optimizer.step()
        pair.record(*(objectives.dpo(*one, *fixed, beta=BETA).losses for one in (fast, slow)))
        if step % 10 == 0:
            switches += pair.switch(optimizer)
    return switches


@torch.no_grad()
def measure(model: Any, adapter: str, rows: Tensor) -> tuple[float, float]:
    """Share of pairs that the policy prefers rightly against the reference, and DPO's loss."""
    model.set_adapter(adapter, inference_mode=True)
    output = objectives.dpo(*logps(model, rows), *reference_logps(model, rows), beta=BETA)
    right = (output.chosen_rewards > output.rejected_rewards).float().mean()
    return float(right), float(output.losses.mean())


def keep(pair: AdapterPair, name: str) -> None:
    """The fast adapter as it is, under a name of its own."""
    model = pair.model
    model.add_adapter(name, model.peft_config[pair.fast])
    update_(adapter_tensors(model, name), pair.parameters("fast"), decay=0.0)


def main() -> None:
    torch.manual_seed(0)
    model = make_model()
    pair = AdapterPair(model, fast="fast", slow="slow")
    start = [one.detach().clone() for one in adapter_tensors(model, "fast")]
    held_out = [make_pairs(task, 200) for task in (0, 1)]
    memory = [make_pairs(task, REMEMBERED) for task in (0, 1)]

    switches = train(pair, 0)
    keep(pair, "task 0")
    first, _ = measure(model, "task 0", held_out[0])
    switches += train(pair, 1)
    plain = [measure(model, pair.fast, rows)[0] for rows in held_out]

    for role in ("fast", "slow"):  # adapters of its own
        update_(pair.parameters(role), start, decay=0.0)
    train(pair, 1)
    keep(pair, "task 1")
    tried = []
    for weights in itertools.product((0.4, 0.7, 1.0), repeat=2):
        name = f"both {len(tried)}"
        combine_adapters(model, ["task 0", "task 1"], weights, name)
        tried.append((sum(measure(model, name, rows)[1] for rows in memory), name))
    _, best = min(tried)
    both = [measure(model, best, rows)[0] for rows in held_out]
    print(f"after task 0   right {first:.3f} of task 0")
    print(
        f"without COFS   right {plain[0]:.3f} of task 0, {plain[1]:.3f} of task 1, "
        f"{switches} exchanges of roles"
    )
    print(f"with COFS      right {both[0]:.3f} of task 0, {both[1]:.3f} of task 1")
    print(f"forgetting     without {first - plain[0]:.3f}   with {first - both[0]:.3f}")


if __name__ == "__main__":
    main()
