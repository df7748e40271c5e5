# SPDX-License-Identifier: Apache-2.0
"""GRPO in a loop of your own: sample, reward, compare within groups, update twice:

    python examples/grpo.py

In TRL nothing of this is needed: ``fastpref.integrations.trl.patch()`` serves its GRPOTrainer. Here
the reward is the share of even tokens in a response. For a model of your own, put
``from_pretrained`` for ``from_config``, and your reward for ``reward_of``.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from fastpref import PreferenceOutput, linear_logprob, preference_loss
from fastpref.objectives import group_advantages

VOCABULARY, PROMPT, RESPONSE, PROMPTS, GROUP = 60, 4, 10, 4, 8
UPDATES = 2  # of the policy, from each batch of responses


def make_model() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,  # every response has the same length
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def reward_of(responses: Tensor) -> Tensor:
    """(B,) of (B, RESPONSE)."""
    return (responses % 2 == 0).float().mean(-1)


def hidden_and_target(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of the positions that predict a token, the prompt's not scored."""
    target = ids[:, 1:].clone()
    target[:, : PROMPT - 1] = -100
    return model.model(ids, use_cache=False).last_hidden_state[:, :-1], target


def grpo_loss(model: Any, ids: Tensor, advantages: Tensor, old: Tensor) -> PreferenceOutput:
    """``old`` (B, T - 1): log-probabilities under the policy that sampled ``ids``."""
    hidden, target = hidden_and_target(model, ids)
    extras = {"advantages": advantages, "old_token_logp": old}
    return preference_loss(hidden, model.lm_head.weight, target, "grpo", extras=extras)


def main() -> None:
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(10):
        prompts = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT))
        groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
        with torch.no_grad():
            ids = model.generate(
                prompts[groups],
                attention_mask=torch.ones(len(groups), PROMPT, dtype=torch.int64),
                max_new_tokens=RESPONSE,
                do_sample=True,
            )
            hidden, target = hidden_and_target(model, ids)
            old = linear_logprob(hidden, model.lm_head.weight, target).logp
        rewards = reward_of(ids[:, PROMPT:])
        advantages = group_advantages(rewards, groups)
        for _ in range(UPDATES):
            output = grpo_loss(model, ids, advantages, old)
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        if step % 3 == 0:
            print(f"step {step:2}   reward {rewards.mean().item():.3f}")


if __name__ == "__main__":
    main()
