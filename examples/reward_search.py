# SPDX-License-Identifier: Apache-2.0
"""Search with the reward that a DPO policy holds: beams of transformers' ``generate`` ranked by it:

    python examples/reward_search.py

"From r to Q*", Rafailov et al. 2024, arXiv:2404.12358: the credits beta (log policy - log
reference) of a policy's tokens sum to its implicit reward, and so do those of any part of a
response. Here beams are drawn by likelihood and ranked by that sum, complete ones at the end; the
paper's own search is a beam search by the policy's likelihood, with which this is compared.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastpref
from fastpref import objectives
from fastpref.reference import frozen_copy
from fastpref.sequences import token_credit

VOCABULARY, PROMPT, RESPONSE, BEAMS, BETA = 24, 3, 6, 12, 0.1


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,  # every response has the same length
        pad_token_id=0,
        initializer_range=0.1,
    )
    return fastpref.fuse_lm_head(LlamaForCausalLM(config))


def token_logps(model: Any, rows: Tensor) -> Tensor:
    """(B, T - 1), 0 at the prompt's tokens."""
    labels = rows.clone()
    labels[:, :PROMPT] = -100
    logps: Tensor = model(input_ids=rows, labels=labels, fused_lm_head=True).log_probs
    return logps


@torch.no_grad()
def rewards(policy: Any, reference: Any, rows: Tensor) -> Tensor:
    """(B,): the credits of whole or partial responses, summed."""
    return token_credit(token_logps(policy, rows), token_logps(reference, rows), beta=BETA).sum(1)


@torch.no_grad()
def search(policy: Any, reference: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each prompt the likeliest beam, and the one of the largest reward."""
    rows = policy.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=RESPONSE,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
    ).view(len(prompts), BEAMS, -1)
    best = rewards(policy, reference, rows.flatten(0, 1)).view(-1, BEAMS).argmax(1)
    return rows[:, 0], rows[torch.arange(len(rows)), best]


def true_reward(rows: Tensor) -> Tensor:
    """What pairs were made by: how many tokens of a response are larger than the one before."""
    return (rows[:, PROMPT:] > rows[:, PROMPT - 1 : -1]).sum(1).float()


def train(policy: Any, reference: Any, steps: int) -> None:
    """DPO on pairs of random responses."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        prompts = torch.randint(1, VOCABULARY, (24, PROMPT)).repeat(2, 1)
        rows = torch.cat([prompts, torch.randint(1, VOCABULARY, (48, RESPONSE))], 1)
        left, right = rows.chunk(2)
        swap = (true_reward(right) > true_reward(left))[:, None]
        rows = torch.cat([torch.where(swap, right, left), torch.where(swap, left, right)])
        with torch.no_grad():
            fixed = token_logps(reference, rows).sum(1).chunk(2)
        losses = objectives.dpo(
            *token_logps(policy, rows).sum(1).chunk(2), *fixed, beta=BETA
        ).losses
        apart = true_reward(rows[:24]) > true_reward(rows[24:])
        optimizer.zero_grad()
        losses[apart].mean().backward()
        optimizer.step()


def pretrain(model: Any, steps: int) -> None:
    """It has habits of its own, which likelihood follows and the reward does not: tokens repeat."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.randint(1, VOCABULARY, (64, PROMPT + RESPONSE))
        for place in range(1, rows.shape[1]):
            again = torch.rand(64) < 0.5
            rows[again, place] = rows[again, place - 1]
        loss = -token_logps(model, rows).sum(1).mean() / RESPONSE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    policy = make_model()
    pretrain(policy, 40)
    reference = frozen_copy(policy)
    train(policy, reference, 40)
    policy.eval()
    prompts = torch.randint(1, VOCABULARY, (48, PROMPT))
    likeliest, best = search(policy, reference, prompts)
    found = [float(true_reward(rows).mean()) for rows in (likeliest, best)]
    print(f"likeliest beam    true reward {found[0]:.3f}")
    print(f"ranked by reward  true reward {found[1]:.3f}")


if __name__ == "__main__":
    main()
