# SPDX-License-Identifier: Apache-2.0
"""A policy beside its reference on pairs: all diagnostics, as a folder with report.json, pictures
and index.html. This module needs transformers; pictures need matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..sequences import token_credit
from .information import did_entropy, log_margin_order
from .layers import SpinalTrace, spinal
from .lengths import length_bias
from .likelihood import Likelihoods, displacement
from .pages import credit_spans, page, table
from .pictures import draw_credit, draw_layers, draw_lengths, draw_likelihoods
from .responses import IGNORE, Responses, base_model, fused, score_responses
from .similarity import ches

HOST: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
Say = Callable[[str, int, int], None]  # what is done, of how many


class NotFinite(ValueError):
    """A model gives log-probabilities that are infinite or no numbers."""


class Pair(NamedTuple):
    """Token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True)
class Settings:
    beta: float = 0.1
    batch_size: int = 8  # responses at a time
    maps: int = 3  # pairs whose credit is drawn
    layers: int = 16  # responses that the layers are compared on
    samples: int = 0  # of the policy for each prompt, for the entropy and as unseen responses
    prompts: int = 8  # that are sampled from
    new_tokens: int = 64


class _Row(NamedTuple):
    """One response."""

    prompt: list[int]
    response: list[int]


class _Scored(NamedTuple):
    """Of rows under one model."""

    sums: Tensor  # (R,)
    tokens: list[Tensor]  # of each response, its tokens' log-probabilities
    similarity: Tensor | None  # (P,) of pairs


def diagnose(
    policy: nn.Module,
    reference: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    folder: Path,
    settings: Settings,
    say: Say,
) -> dict[str, Any]:
    """Writes the folder, and returns what report.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_Row(one.prompt, one.chosen) for one in pairs]
    rows += [_Row(one.prompt, one.rejected) for one in pairs]
    scored = {}
    for name, model in (("reference", reference), ("policy", policy)):
        scored[name] = _score(model, rows, tokenizer, settings, f"pairs under the {name}", say)
    samples = _samples(policy, reference, tokenizer, pairs, settings, say)
    traces = {}
    for name, model in (("reference", reference), ("policy", policy)):
        say(f"layers of the {name}", 0, 1)
        few = rows[: settings.layers]
        traces[name] = spinal(base_model(model), _batch(few, tokenizer))
        say(f"layers of the {name}", 1, 1)
    say("pictures and page", 0, 1)
    found = _numbers(pairs, scored, samples, traces, settings)
    _write(found, pairs, scored, traces, tokenizer, folder, settings)
    say("pictures and page", 1, 1)
    return found


def _batches(count: int, size: int) -> Iterator[slice]:
    return (slice(at, min(count, at + size)) for at in range(0, count, size))


def _batch(rows: Sequence[_Row], tokenizer: Any) -> dict[str, Tensor]:
    longest = max(len(row.prompt) + len(row.response) for row in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id, **HOST)
    attended, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for at, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[at, :end] = torch.tensor(prompt + response, **HOST)
        attended[at, :end] = 1
        # Nothing predicts the first token of a row.
        first = max(1, len(prompt))
        labels[at, first:end] = ids[at, first:end]
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def _score(
    model: nn.Module, rows: Sequence[_Row], tokenizer: Any, settings: Settings, what: str, say: Say
) -> _Scored:
    """Of chosen responses and then rejected ones, a batch of pairs at a time."""
    pairs, size = len(rows) // 2, max(1, settings.batch_size // 2)
    sums, tokens, similar = torch.zeros(len(rows), dtype=torch.float64, device="cpu"), {}, []
    with fused(model) as own:
        for at in _batches(pairs, size):
            say(what, at.start, pairs)
            order = [*range(at.start, at.stop), *range(pairs + at.start, pairs + at.stop)]
            batch = _batch([rows[one] for one in order], tokenizer)
            found = score_responses(own, batch, hidden=True)
            wrong = (~found.sums.isfinite()).nonzero()
            if len(wrong):
                pair = order[int(wrong[0])] % pairs
                raise NotFinite(
                    f"{what}: log-probabilities must be finite, got {float(found.sums[wrong[0]])} "
                    f"of pair {pair + 1}"
                )
            sums[order] = found.sums.cpu()
            for index, one in zip(order, _by_row(found), strict=True):
                tokens[index] = one
            if found.hidden is not None:
                states, masks = found.hidden.chunk(2), found.mask.chunk(2)
                similar.append(ches(states[0], states[1], masks[0], masks[1]).double().cpu())
    say(what, pairs, pairs)
    return _Scored(sums, [tokens[one] for one in range(len(rows))], torch.cat(similar))


def _by_row(found: Responses) -> list[Tensor]:
    return [logps[own].double().cpu() for logps, own in zip(found.logps, found.mask, strict=True)]


class _Samples(NamedTuple):
    policy: Tensor  # (G, K)
    reference: Tensor


@torch.no_grad()
def _samples(
    policy: Any,
    reference: nn.Module,
    tokenizer: Any,
    pairs: Sequence[Pair],
    settings: Settings,
    say: Say,
) -> _Samples | None:
    if not settings.samples:
        return None
    rows: list[_Row] = []
    prompts = [one.prompt for one in pairs[: settings.prompts]]
    device = next(policy.parameters()).device
    policy.eval()
    for at, prompt in enumerate(prompts):
        say("samples of the policy", at, len(prompts))
        ids = torch.tensor([prompt], dtype=torch.int64, device=device)
        written = policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            num_return_sequences=settings.samples,
            max_new_tokens=settings.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        for one in written[:, len(prompt) :].tolist():
            end = one.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in one else None
            rows.append(_Row(prompt, one[:end]))
    say("samples of the policy", len(prompts), len(prompts))
    sums = []
    for name, model in (("policy", policy), ("reference", reference)):
        parts = []
        with fused(model) as own:
            for own_rows in _batches(len(rows), settings.batch_size):
                say(f"samples under the {name}", own_rows.start, len(rows))
                parts.append(score_responses(own, _batch(rows[own_rows], tokenizer)).sums.cpu())
        say(f"samples under the {name}", len(rows), len(rows))
        sums.append(torch.cat(parts).view(len(prompts), settings.samples))
    return _Samples(*sums)


def _numbers(
    pairs: Sequence[Pair],
    scored: dict[str, _Scored],
    samples: _Samples | None,
    traces: dict[str, SpinalTrace],
    settings: Settings,
) -> dict[str, Any]:
    policy, reference = scored["policy"].sums, scored["reference"].sums
    ratios = policy - reference
    margins = settings.beta * (ratios[: len(pairs)] - ratios[len(pairs) :])
    both = [Likelihoods(*one.chunk(2)) for one in (reference, policy)]
    entropy = None
    if samples is not None:
        unseen = samples.reference.flatten(), samples.policy.flatten()
        both = [one._replace(unseen=own) for one, own in zip(both, unseen, strict=True)]
        entropy = did_entropy(samples.policy, samples.reference)
    lengths = [
        torch.tensor([len(one[at]) for one in pairs], dtype=torch.float64, device="cpu")
        for at in (1, 2)
    ]
    before, after = (one.chosen - one.rejected for one in both)
    similar = scored["reference"].similarity
    return {
        "pairs": len(pairs),
        "settings": asdict(settings),
        "margin": float(margins.mean()),
        "accuracy": float((margins > 0).double().mean()),
        "displacement": asdict(displacement(*both)),
        "log_margin_order": _number(log_margin_order(before, after)),
        "length_bias": {n: _number(v) for n, v in asdict(length_bias(margins, *lengths)).items()},
        "ches": None if similar is None else similar.tolist(),
        "did": None
        if entropy is None
        else {
            "entropy": entropy.entropy.tolist(),
            "effective_samples": entropy.effective_samples.tolist(),
        },
        "spinal": {
            name: {
                "contraction": [_number(one) for one in trace.contraction],
                "transport": trace.transport,
                "tokens": trace.tokens,
            }
            for name, trace in traces.items()
        },
        "log_ratios": {"chosen": ratios[: len(pairs)].tolist(),
                       "rejected": ratios[len(pairs) :].tolist()},
        "margins": margins.tolist(),
        "lengths": {"chosen": lengths[0].tolist(), "rejected": lengths[1].tolist()},
    }  # fmt: skip


def _number(value: float | Tensor) -> float | None:
    """JSON has no NaN."""
    found = float(value)
    return found if found == found else None


def _write(
    found: dict[str, Any],
    pairs: Sequence[Pair],
    scored: dict[str, _Scored],
    traces: dict[str, SpinalTrace],
    tokenizer: Any,
    folder: Path,
    settings: Settings,
) -> None:
    text = json.dumps(found, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    draw_layers(traces, folder / "layers.png")
    draw_likelihoods(found["log_ratios"], folder / "log-ratios.png")
    lengths = found["lengths"]
    more = [a - b for a, b in zip(lengths["chosen"], lengths["rejected"], strict=True)]
    slope = found["length_bias"]["slope"]
    draw_lengths(more, found["margins"], float("nan") if slope is None else slope,
                 folder / "lengths.png")  # fmt: skip
    parts = [table(_rows(found)), _picture("log-ratios"), _picture("lengths"), _picture("layers")]
    for at in range(min(settings.maps, len(pairs))):
        parts.append(f"<h2>Pair {at + 1}</h2><p>{escape(tokenizer.decode(pairs[at].prompt))}</p>")
        for kind, place in (("chosen", at), ("rejected", len(pairs) + at)):
            ids = getattr(pairs[at], kind)
            own, other = (scored[name].tokens[place] for name in ("policy", "reference"))
            # Of a row without a prompt the first token is not scored.
            texts = [tokenizer.decode([one]) for one in ids[len(ids) - len(own) :]]
            credit = token_credit(own, other, beta=settings.beta).tolist()
            name = f"credit-{at + 1}-{kind}.png"
            draw_credit(texts, credit, folder / name, f"pair {at + 1}, {kind}")
            parts.append(f"<h3>{kind}, reward {sum(credit):+.4g}</h3>{credit_spans(texts, credit)}")
    note = (
        f"{len(pairs)} pairs, beta {settings.beta:g}. Blue tokens are likelier under the policy "
        "than under the reference, red ones less likely; numbers are in report.json."
    )
    html = page("A policy beside its reference", [f'<p class="note">{note}</p>', *parts])
    (folder / "index.html").write_text(html, encoding="utf-8")


def _picture(name: str) -> str:
    return f'<p><img src="{name}.png" alt="{name}"></p>'


def _rows(found: dict[str, Any]) -> list[tuple[str, object, str]]:
    moved, bias, did = found["displacement"], found["length_bias"], found["did"]
    mean = None if did is None else sum(did["entropy"]) / len(did["entropy"])
    least = None if did is None else min(did["effective_samples"])
    similar = found["ches"]
    return [
        ("margin", found["margin"], "mean reward of chosen minus rejected responses"),
        ("accuracy", found["accuracy"], "share of pairs with a positive margin"),
        ("chosen drop", moved["chosen_drop"], "nats by which chosen responses became less likely"),
        ("rejected drop", moved["rejected_drop"], "and rejected ones"),
        ("chosen fell", moved["chosen_fell"], "share of pairs: likelihood displacement"),
        ("both fell", moved["both_fell"], "share of pairs"),
        ("dispersion", moved["dispersion"], "nats by which samples of the policy became likelier"),
        ("log-margin order", found["log_margin_order"], "rank correlation of log margins"),
        ("length correlation", bias["correlation"], "of margins with how much longer chosen is"),
        ("length slope", bias["slope"], "margin a token"),
        ("accuracy, chosen longer", bias["accuracy_longer"], "of those pairs"),
        ("accuracy, chosen shorter", bias["accuracy_shorter"], "of those"),
        ("CHES", None if similar is None else sum(similar) / len(similar),
         "mean under the reference; the larger, the likelier is displacement"),
        ("DID entropy", mean, "mean of the prompts sampled from, nats"),
        ("effective samples", least, "the fewest of a prompt; near 1 the entropy means nothing"),
    ]  # fmt: skip
