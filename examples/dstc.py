# SPDX-License-Identifier: Apache-2.0
"""DSTC: a model learns from programs and tests that it wrote itself, wrong ones among them:

    python examples/dstc.py

Liu et al. 2024, arXiv:2411.13611. A prompt names an arithmetic function; a response is a program
(an operation and its operand) and a test (an argument and the value expected). Programs of a tiny
model are right about half of the time, and so are its tests. Every program is executed on every
test, ``minimax_pairs`` picks what to prefer and what to reject, and DPO trains on program and test
together. No true answer is looked at but to measure: before and after, and how many of the chosen
and rejected programs are right, beside those that pass or fail a single test of the model's.

No two programs agree on any argument here. Where some do, such as all products at 0, the most
widely passed test is one that tells nothing apart, and round after round the model learns to write
it: tests that easy have to be kept out of the selection.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpref import preference_loss
from fastpref.curriculum import minimax_pairs
from fastpref.reference import frozen_copy

FUNCTIONS, ARGUMENTS, LARGEST = 8, range(4, 9), 50
SAMPLES, ROUNDS, STEPS, BETA = 20, 3, 8, 0.5
# Tokens: functions, two operations, numbers.
PLUS, TIMES, NUMBERS = FUNCTIONS, FUNCTIONS + 1, FUNCTIONS + 2
VOCABULARY = NUMBERS + LARGEST


class Model(nn.Module):
    """Any model that gives hidden states will do."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.body = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.embeddings(ids))[0]
        return hidden

    @torch.no_grad()
    def sample(self, functions: Tensor) -> Tensor:
        """(B,) -> (B, 5): function, operation, operand, argument, value."""
        ids = functions[:, None]
        for _ in range(4):
            chances = self.head(self(ids)[:, -1]).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1)], 1)
        return ids


def true_programs(functions: Tensor) -> Tensor:
    """(B, 2): operation and operand, which is 3 to 6: products of it are larger than sums."""
    return torch.stack([PLUS + functions % 2, NUMBERS + 3 + functions // 2], 1)


def run(programs: Tensor, arguments: Tensor) -> Tensor:
    """What a program (..., 2) makes of an argument, both as tokens; -1 for what is no program."""
    operation, operand = programs.unbind(-1)
    a, x = operand - NUMBERS, arguments - NUMBERS
    value = torch.where(operation == PLUS, x + a, x * a)
    valid = ((operation == PLUS) | (operation == TIMES)) & (a >= 0) & (x >= 0)
    return torch.where(valid & (value < LARGEST), NUMBERS + value, -1)


def write(count: int, right: float) -> Tensor:
    """Responses of which this share of programs is right, and of tests."""
    functions = torch.randint(FUNCTIONS, (count,))
    program = true_programs(functions)
    other = true_programs(torch.randint(FUNCTIONS, (count,)))
    argument = NUMBERS + torch.randint(ARGUMENTS.start, ARGUMENTS.stop, (count,))
    value = run(program, argument)
    wrong = NUMBERS + torch.randint(LARGEST, (count,))
    program = torch.where(torch.rand(count, 1) < right, program, other)
    value = torch.where(torch.rand(count) < right, value, wrong)
    return torch.cat([functions[:, None], program, argument[:, None], value[:, None]], 1)


def pretrain(model: Model) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(180):
        ids = write(96, right=0.45)
        logits = model.head(model(ids)[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def are_right(ids: Tensor) -> Tensor:
    return (ids[:, 1:3] == true_programs(ids[:, 0])).all(1)


@torch.no_grad()
def pass_at_1(policy: Model) -> float:
    """The probability of the right program, mean over the functions."""
    functions = torch.arange(FUNCTIONS)
    rows = torch.cat([functions[:, None], true_programs(functions)], 1)
    logps = policy.head(policy(rows)[:, :-1]).log_softmax(-1)
    return float(logps.gather(-1, rows[:, 1:, None]).sum((1, 2)).exp().mean())


def execute(programs: Tensor, tests: Tensor) -> Tensor:
    """(functions, programs, tests): which program passes which test."""
    made = run(programs[:, :, None, 1:3], tests[:, None, :, 3])
    return (made == tests[:, None, :, 4]) & (made >= 0)


def select(policy: Model) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chosen and rejected responses (P, 5), program and test joined; and for comparison those that
    pass the first test, and those that fail it."""
    functions = torch.arange(FUNCTIONS).repeat(16)
    prompts = functions.repeat_interleave(SAMPLES)
    programs, tests = (policy.sample(prompts).view(-1, SAMPLES, 5) for _ in range(2))
    passes = execute(programs, tests)
    found = minimax_pairs(passes)
    lists = torch.arange(len(functions))
    there = found.best_row >= 0
    sides = []
    for row, col in ((found.best_row, found.best_col), (found.worst_row, found.worst_col)):
        program, test = programs[lists, row], tests[lists, col]
        sides.append(torch.cat([program[:, :3], test[:, 3:]], 1)[there])
    return sides[0], sides[1], programs[passes[:, :, 0]], programs[~passes[:, :, 0]]


def train(policy: Model, chosen: Tensor, rejected: Tensor) -> None:
    reference, rows = frozen_copy(policy), torch.cat([chosen, rejected])
    with torch.no_grad():
        ref_hidden = reference(rows)[:, :-1]
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(STEPS):
        output = preference_loss(
            policy(rows)[:, :-1],
            policy.head.weight,
            rows[:, 1:],
            "dpo",
            ref_hidden=ref_hidden,
            ref_weight=reference.head.weight,
            beta=BETA,
        )
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    policy = Model()
    pretrain(policy)
    print(f"before    pass@1 {pass_at_1(policy):.3f}")
    for number in range(1, ROUNDS + 1):
        found = select(policy)
        shares = [float(are_right(ids).float().mean()) for ids in found]
        train(policy, *found[:2])
        print(
            f"round {number}   pass@1 {pass_at_1(policy):.3f}   right: chosen {shares[0]:.3f}"
            f"   rejected {shares[1]:.3f}   passing one test {shares[2]:.3f}"
            f"   failing it {shares[3]:.3f}"
        )


if __name__ == "__main__":
    main()
