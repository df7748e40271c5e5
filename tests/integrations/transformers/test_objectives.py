# SPDX-License-Identifier: Apache-2.0
"""Every objective of the catalogue runs, from columns to the loss, as it does where it is called by
hand; or is refused with the reason."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

pytest.importorskip("transformers", reason="transformers is not installed")

from fastpref import objectives
from fastpref.integrations.causal_lm.output import FusedCausalLMOutput
from fastpref.integrations.transformers import PreferenceCollator, loss_func
from tests.integrations.transformers.trainings import PAD, make_rows

SETTINGS = {"dpo_shift": {"shift": 0.5}, "dr_grpo": {"max_completion_length": 8}}
WHOLE = [
    name
    for name in objectives.names()
    if objectives.get(name, **SETTINGS.get(name, {})).unit != "token"
]
REFUSED = {"tdpo", "epsilon_dpo"}
COUNT = 4


def extra_columns(objective):
    """What it needs beside tokens, references, labels and scores, in (0, 1)."""
    needed = [
        (name, facts)
        for name, facts in objective.extras.items()
        if facts.required and "lengths" not in name and name not in ("labels", "scores")
    ]
    return {
        name: 0.1 + 0.8 * torch.rand((COUNT, 5) if facts.shapes == ("rows",) else COUNT)
        for name, facts in needed
        if facts.shapes != ("number",)
    }


def by_hand(objective, rows, log_probs, columns):
    """The mean loss, of arguments that are made here."""
    scored = (log_probs != 0).sum(1)
    sums, extras = log_probs.sum(1), dict(columns)
    if objective.unit == "pair":
        policy, lengths = sums.view(2, -1), scored.view(2, -1)
        reference = [
            torch.tensor([row[f"ref_{one}_logps"] for row in rows])
            for one in ("chosen", "rejected")
        ]
        made = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
        made["chosen_nll"] = -policy[0] / lengths[0]
    elif objective.unit == "unit":
        policy, reference = [sums], [torch.tensor([row["ref_logps"] for row in rows])]
        made = {"lengths": scored, "labels": torch.tensor([row["label"] for row in rows])}
    else:
        sizes = [len(row["completions_ids"]) for row in rows]

        def lists(values):
            return pad_sequence(list(values), batch_first=True)

        policy = [lists(sums.split(sizes))]
        reference = [lists(torch.tensor(row["ref_logps"]) for row in rows)]
        made = {"scores": lists(torch.tensor(row["scores"]) for row in rows)}
        made |= {"mask": lists(torch.ones(n, dtype=torch.bool) for n in sizes)}
        made |= {"lengths": lists(scored.split(sizes))}
    zero = torch.zeros(())
    made |= {"delta": zero, "running_mean": zero, "running_std": zero}
    extras |= {name: value for name, value in made.items() if name in objective.extras}
    return objective(*policy, *(reference if objective.needs_reference else []), **extras).losses


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in REFUSED])
def test_as_called_by_hand(name):
    loss = loss_func(name, **SETTINGS.get(name, {}))
    objective = loss.objective
    columns = extra_columns(objective)
    rows = make_rows(objective.unit, COUNT)
    for i, row in enumerate(rows):
        row.update({column: values[i].tolist() for column, values in columns.items()})
        if objective.unit == "list":
            row["scores"] = [one / 100 for one in row["scores"]]
    batch = PreferenceCollator(objective, pad_token_id=PAD)(rows)
    scored = batch["fused_labels"][:, 1:] != -100
    log_probs = torch.where(scored, -4.0 - torch.rand(scored.shape), 0)
    expected = by_hand(objective, rows, log_probs, columns).mean()
    found = loss(FusedCausalLMOutput(log_probs=log_probs), batch["labels"])
    torch.testing.assert_close(found, expected)
    assert found != 0


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name):
    with pytest.raises(ValueError, match="whole distributions"):
        loss_func(name)
