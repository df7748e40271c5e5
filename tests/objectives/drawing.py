# SPDX-License-Identifier: Apache-2.0
"""Inputs of any objective of the catalogue, drawn from its own signature."""

import torch
from hypothesis import strategies as st

from fastpref.objectives.signature import LOGPS, POLICY_LOGPS

SHAPES = {"pair": (4,), "unit": (4,), "list": (3, 4), "token": (4, 5)}
WIDTH = 3  # of embeddings


def draw_tensor(draw, shape, elements, dtype=torch.float32):
    count = int(torch.tensor(shape).prod()) if shape else 1
    values = draw(st.lists(elements, min_size=count, max_size=count))
    return torch.tensor(values, dtype=dtype).reshape(shape)


def draw_number(draw, domain):
    low, high = max(domain.low, -20.0), min(domain.high, 20.0)
    values = st.floats(low, high).filter(domain.contains)
    return draw(values.filter(lambda value: value == 0 or abs(value) > 1e-3))


def draw_hyperparameter(draw, name, fact):
    if fact.kind is not None:
        return None
    if fact.optional and draw(st.booleans()):
        return None
    if fact.choices is not None:
        return draw(st.sampled_from(fact.choices))
    return draw_number(draw, fact.domain)


def draw_hyperparameters(draw, declared):
    values = {
        key: draw_hyperparameter(draw, key, fact)
        for key, fact in declared.signature.hyperparameters.items()
    }
    if declared.name == "f_dpo" and (values["divergence"] == "alpha") != (
        values["alpha"] is not None
    ):
        values |= {"alpha": 0.4 if values["divergence"] == "alpha" else None}
    return values


def draw_logps(draw, declared, dtype=torch.float32):
    """One tensor for each that the objective takes."""
    count = LOGPS[declared.unit] if declared.needs_reference else POLICY_LOGPS[declared.unit]
    if declared.unit == "token":
        count = draw(st.integers(1, 2))
    elements = st.floats(-1e4, 0, width=32)
    return [draw_tensor(draw, SHAPES[declared.unit], elements, dtype) for _ in range(count)]


def _values(name, facts, shape):
    if facts.domain is not None:
        domain = facts.domain
        low, high = max(domain.low, -20.0), min(domain.high, 20.0)
        return st.floats(low, high, width=32).filter(
            lambda value: domain.contains(value) and (value == 0 or abs(value) > 1e-3)
        )
    if name in ("mask", "labels", "keep"):
        return st.booleans()
    if name.endswith("lengths"):
        return st.integers(0, 4000)
    if name == "group_ids":
        return st.integers(-2, 2)
    if name.endswith(("nll", "kl")):
        return st.floats(0, 1e4, width=32)
    if name.endswith("logps") or name == "ref_token_logp":
        return st.floats(-1e4, 0, width=32)
    if name == "running_std":
        return st.just(0.0) | st.floats(2**-10, 20, width=32)
    if name in ("target_probs", "sample_weights"):
        return st.floats(0, 20, width=32)
    return st.floats(-20, 20, width=32)


def draw_extra(draw, declared, name, facts):
    shape = SHAPES[declared.unit]
    if name == "ranks":
        order = st.permutations(range(1, shape[1] + 1))
        return torch.tensor([draw(order) for _ in range(shape[0])])
    kind = draw(st.sampled_from(facts.shapes))
    sizes = {"logps": shape, "unit": shape[:1], "rows": (shape[0], WIDTH), "number": ()}
    elements = _values(name, facts, shape)
    dtype = torch.float32
    if name in ("mask", "labels", "keep"):
        dtype = torch.bool
    elif name == "group_ids" or name.endswith("lengths"):
        dtype = torch.int64
    if name == "rewards":
        elements = st.sampled_from([0.0, 1.0])
    return draw_tensor(draw, sizes[kind], elements, dtype)


def draw_extras(draw, objective):
    """All required ones, some of the others, and one of alternatives."""
    extras = {}
    for name, facts in objective.extras.items():
        if facts.required or draw(st.booleans()):
            extras[name] = draw_extra(draw, objective, name, facts)
    alternatives = [
        name for name in ("scores", "ranks", "target_probs") if name in objective.extras
    ]
    optional = [name for name in alternatives if not objective.extras[name].required]
    if len(optional) > 1:
        chosen = draw(st.sampled_from(optional))
        for name in optional:
            extras.pop(name, None)
        extras[chosen] = draw_extra(draw, objective, chosen, objective.extras[chosen])
    return _completed(draw, objective, extras)


def _completed(draw, objective, extras):
    """What an optional extra is needed for under these hyperparameters."""
    values = objective.hyperparameters
    needed = []
    if values.get("normalize") == "mean":
        needed += ["chosen_lengths", "rejected_lengths"]
    if "chosen_nll" in objective.extras and values.get("sft_weight", 1.0) != 0:
        needed.append(
            "chosen_nll" if "chosen_lengths" not in objective.extras else "chosen_lengths"
        )
    if objective.unit == "token" and values.get("beta", 0) != 0:
        needed.append("ref_token_logp")
    for name in needed:
        if name in objective.extras and name not in extras:
            extras[name] = draw_extra(draw, objective, name, objective.extras[name])
    return extras


@st.composite
def configured(draw, declared):
    """An objective with drawn hyperparameters, and extras for it."""
    objective = declared.replace(**draw_hyperparameters(draw, declared))
    return objective, draw_extras(draw, objective)
