# SPDX-License-Identifier: Apache-2.0
"""What ``help``, an editor and ``fastpref objectives`` show of an objective: its signature in plain
types, and tables of its arguments below its docstring.

Names and defaults are those of the function and domains those of its annotations, so what is kept
here are the meanings: by name, and by objective and name where an objective has its own.
"""

import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .signature import REQUIRED, ExtraFacts, Hyperparameter, Shape, Signature, Unit

# What a formula need not define: of all families, and of groups of sampled responses.
SYMBOLS: Mapping[str, str] = {
    "x": "is the log-ratio of policy and reference",
    "s, r": "are their summed log-probabilities",
    "sbar": "is the policy's mean over tokens",
    "w, l": "mark the chosen and the rejected response",
    "n": "their numbers of tokens",
    "m": "= beta (x_w - x_l)",
    "u": "= beta x",
    "eps": "= label_smoothing",
    "S": "is the sigmoid",
    "softplus(z)": "= log(1 + exp(z))",
    "sg[]": "is a stopped gradient",
    "nll": "is the mean negative log-likelihood of a token",
    "i, j, k": "run over the responses of a list",
    "K": "is how many it has",
    "+-, -+": "have the upper sign for a desirable response",
}
SYMBOLS_OF_GROUPS: Mapping[str, str] = {
    "policy, old": "are the probabilities of a token, now and when it was sampled",
    "r": "= policy / old",
    "A": "is its advantage",
    "el, eh": "are epsilon_low and epsilon_high",
    "k3": "is the estimate of the KL to the reference",
    "mean_t, sum_t, prod_t": "run over the scored tokens of a response",
    "B, N": "are the numbers of responses and of scored tokens in the batch",
}


def _sentence(symbols: Mapping[str, str]) -> str:
    return "; ".join(f"{names} {meaning}" for names, meaning in symbols.items())


LETTERS = (
    f"{_sentence(SYMBOLS)}. Of groups of sampled responses: {_sentence(SYMBOLS_OF_GROUPS)}. What "
    "else a formula names, or names otherwise, it defines beside it, or is an argument."
)

MEANINGS: Mapping[str, str] = {
    # Log-probabilities.
    "policy_chosen_logps": "log-prob of each chosen response under the policy, summed over tokens",
    "policy_rejected_logps": "the same of each rejected response",
    "ref_chosen_logps": "log-prob of each chosen response under the reference, summed over tokens",
    "ref_rejected_logps": "the same of each rejected response",
    "policy_logps": "log-prob of each response under the policy, summed over its tokens",
    "ref_logps": "the same under the reference",
    "policy_token_logp": "log-prob of each token under the policy",
    "old_token_logp": "the same under the policy that sampled; None: the policy as it is now",
    # Extras.
    "advantages": "how much better a response, or token, is than expected",
    "chosen_kl": "KL(reference, policy) over the vocabulary, summed over the chosen's tokens",
    "rejected_kl": "the same over the rejected's tokens",
    "chosen_lengths": "number of scored tokens of each chosen response",
    "rejected_lengths": "number of scored tokens of each rejected response",
    "chosen_nll": "negative log-likelihood of the chosen for the SFT term; None: its tokens' mean",
    "chosen_q_values": "Q of the chosen step in the tree; the authors pass visit counts",
    "rejected_q_values": "Q of the rejected step",
    "chosen_win_probs": "estimated probability that the chosen beats a response of the policy",
    "rejected_win_probs": "the same of the rejected",
    "group_ids": "which prompt each response answers",
    "keep": "which pairs count; None: all",
    "kl": "shift of the value; None: the batch's mean log-ratio, at least 0",
    "labels": "whether each response is desirable",
    "lengths": "number of scored tokens of each response",
    "margin_minus": "the policy's s_w - s_l under logits a little nearer to the reference",
    "margin_plus": "the policy's s_w - s_l under logits a little further from the reference",
    "mask": "which entries are there",
    "other_chosen_logps": "log-prob of each chosen response under the other module",
    "other_rejected_logps": "log-prob of each rejected response under the other module",
    "preference_probs": "probability that the chosen is preferred",
    "prompt_embeddings": "a vector for each prompt; their cosines weigh the pairs",
    "ranks": "place of each response, 1 the best",
    "ref_entropy": "the reference's mean entropy of a token over log V",
    "ref_token_logp": "log-prob of each token under the reference, for the KL; needed if beta > 0",
    "reward_margin": "reward of the chosen less that of the rejected, by a reward model",
    "rewards": "whether each response is right",
    "running_mean": "running mean of x_w - x_l, which RunningMoments keeps",
    "running_std": "running standard deviation of the same",
    "sample_weights": "factor of each response's loss; None: 1",
    "sampler_ratio": "old policy over sampler; None: they are the same",
    "scores": "how good each response is; more is better",
    "target_probs": "target of the list's softmax; None: made of the scores",
    # Hyperparameters.
    "beta": "scale of the rewards beta x: how closely the policy is held to the reference",
    "alpha": "strength of what the objective adds",
    "beta_chosen": "beta of the chosen response",
    "beta_rejected": "beta of the rejected response; smaller slows its fall",
    "beta_min": "least beta that a batch gets",
    "c_max": "factor of the rewards of the hardest pairs; these are amplified",
    "c_min": "factor of the rewards of the easiest pairs; these are damped",
    "calibration_weight": "weight of the term that draws log-ratios to +-1 / (2 beta)",
    "delta": "running mean of the rewards; None: what the docstring says",
    "desirable_weight": "weight of the desirable responses",
    "undesirable_weight": "weight of the undesirable responses",
    "distance": "between the two margins",
    "divergence": "what holds the policy to the reference",
    "dp_group": "ranks whose batches are one; None: this process alone",
    "epsilon": "by how much the logits are moved to see which way beta should go",
    "epsilon_high": "the ratio is clipped above 1 + epsilon_high",
    "epsilon_low": "the ratio is clipped below 1 - epsilon_low",
    "eta": "scale of the reward model's margin",
    "function": "the loss as a function of the margin",
    "gamma": "target margin between the rewards",
    "importance_sampling_level": "a ratio for each token or one for the response",
    "k_negative": "power of the weight w where A < 0",
    "k_positive": "power of the weight w where A >= 0",
    "kl_estimator": "how the KL to the old policy is estimated from its tokens",
    "kl_weight": "weight of the penalty on a KL above delta",
    "label_smoothing": "share of the labels that is taken to be flipped; at 1/2 none informs",
    "lambda_negative": "decay of the weight w where A < 0",
    "lambda_positive": "decay of the weight w where A >= 0",
    "loss": "which loss the reward margin goes through",
    "max_completion_length": "longest response that the sampler may return, in tokens",
    "max_reward": "bound on the true reward; margins are clipped to twice it; None: not",
    "normalize": "whether log-ratios are a token's mean or a sum",
    "penalty": "weight of the chosen response's loss of likelihood",
    "phi": "scale of the dispersion -log(ref_entropy)",
    "role": "of the module that trains",
    "score": "of a response: its mean token's log-likelihood or likelihood ratio",
    "sft_weight": "weight of the SFT term, the negative log-likelihood of the chosen or best",
    "shift": "weight of the rejected's log-ratio; 1 is DPO",
    "slope": "how fast the factor falls as the reward margin grows",
    "target_kind": "what the list's softmax is drawn to",
    "target_tau": "temperature of the softmax of the scores",
    "tau": "temperature",
    "tau_negative": "temperature of the gate where A < 0",
    "tau_positive": "temperature of the gate where A > 0",
    "use_bias_correction_kl": "weigh the KL by the importance ratio",
    "variant": "LambdaRank, or a smooth NDCG",
    "version": "of the paper's two losses",
}

_TO_REFERENCE = "weight of the KL to the reference"
_SCALE = "scale of the rewards, mean log-probabilities"
_TARGET = "temperature of the softmax of the scores"

OWN_MEANINGS: Mapping[str, Mapping[str, str]] = {
    "adpo": {"tau": "temperature of the list's softmax, 1 / beta"},
    "alpha_dpo": {
        "running_mean": "running mean of d, which RunningMoments keeps",
        "alpha": "how much the distance from the reference adds to the target margin",
        "beta": _SCALE,
    },
    "alpha_po": {"alpha": "bend of the reward; at 0 it is SimPO", "beta": _SCALE},
    "amapo": {"beta": _SCALE},
    "apo_down": {"beta": "scale of the log-ratios inside the sigmoids"},
    "apo_zero": {"beta": "scale of the log-ratios inside the sigmoids"},
    "asft": {"beta": "weight of the likelihood terms beside SFT"},
    "bco": {"delta": "shift of the rewards; None: the batch's mean of them"},
    "bco_pair": {"delta": "running mean of the rewards; None: 0"},
    "beta_dpo": {"alpha": "how much beta follows the batch's mean gap"},
    "bnpo": {"beta": _TO_REFERENCE, "delta": "cap of the ratio in the first term; None: none"},
    "cal_dpo": {"beta": "sets the targets +-1 / (2 beta); the logistic term has none"},
    "cispo": {"beta": _TO_REFERENCE, "epsilon_high": "bound of the ratio itself"},
    "cpo": {"beta": "scale of the log-probabilities: the reference is uniform"},
    "da_dpo": {"alpha": "factor of the margin of all pairs", "reward_margin": "of the difficulty"},
    "dapo": {"beta": _TO_REFERENCE, "delta": "cap of the ratio in the first term; None: none"},
    "ddo": {
        "alpha": "weight of generated responses",
        "labels": "whether each response is real; else the reference generated it",
    },
    "disco": {
        "delta": "KL from which on the penalty counts",
        "tau": "temperature of the mean over wrong answers; None: 10, or 1 for ratios",
    },
    "discopop": {"tau": "how sharply the loss turns from logistic to exponential"},
    "dr_dpo": {"tau": "robustness: smaller discounts large losses more"},
    "dr_grpo": {"beta": _TO_REFERENCE, "delta": "cap of the ratio in the first term; None: none"},
    "exo_listwise": {"tau": _TARGET},
    "exo_pair": {
        "label_smoothing": "target probability of the rejected; at 0 the loss is infinite"
    },
    "f_dpo": {"alpha": "of the alpha-divergence: towards 0 reverse KL, towards 1 forward KL"},
    "focal_po": {"gamma": "power of S(m): how much less wrongly ranked pairs weigh; 0 is DPO"},
    "gmpo": {
        "beta": _TO_REFERENCE,
        "epsilon_high": "upper bound of a token's log-ratio",
        "epsilon_low": "minus the lower bound of a token's log-ratio",
    },
    "grpo": {"beta": _TO_REFERENCE, "delta": "cap of the ratio in the first term; None: none"},
    "gspo": {"beta": _TO_REFERENCE},
    "info_nca": {"alpha": _TARGET},
    "ipo": {"beta": "sets the target gap 1 / (2 beta)"},
    "irpo": {
        "normalize": "subtract log(K - 1), as the authors' code does",
        "ranks": "place of each segment in the response; None: as they come",
        "scores": "relevance of each segment",
    },
    "lipo": {"alpha": "sharpness of the places in approx_ndcg; unused by lambda"},
    "luspo": {"beta": _TO_REFERENCE, "delta": "cap of the ratio in the first term; None: none"},
    "madpo": {"tau": "reward margin at which the factor is 1"},
    "nca": {"alpha": _TARGET},
    "npo": {"beta": "inverse temperature; gradient ascent as it goes to 0"},
    "odpo": {"alpha": "scale of the offset log reward_margin; 0 is DPO"},
    "ofs_dpo": {"alpha": "weight of the chase between the modules"},
    "orpo": {"beta": "weight of the odds ratio's term, the paper's lambda"},
    "pro": {"tau": "divides the mean log-probabilities"},
    "r_dpo": {"alpha": "how much a token of length counts"},
    "rainbow_po": {
        "alpha": "share of the reference",
        "gamma": "home advantage, a target margin",
        "ref_entropy": "the reference's mean entropy of a token over log V; None: no dispersion",
    },
    "relative_po": {"tau": "temperature of the prompts' similarity; towards 0 it is DPO"},
    "sapo": {"beta": _TO_REFERENCE},
    "sigmoid_norm": {"beta": "scale of the log-ratios of a mean token"},
    "simnpo": {"beta": _SCALE},
    "simpo": {"beta": _SCALE},
    "slic": {"delta": "margin of the hinge"},
    "sppo": {"beta": "1 / eta of the paper; targets are (win_prob - 1/2) / beta"},
    "sppo_hard": {"beta": "1 / eta of the paper; targets are +-1 / (2 beta)"},
    "tdpo": {"alpha": "weight of the difference of the KL terms; version 1 has 1"},
    "vespo": {"beta": _TO_REFERENCE},
}

_UNITS: Mapping[Unit, str] = {"pair": "P", "unit": "B", "list": "G", "token": "B"}
_LOGPS: Mapping[Unit, str] = {"pair": "(P,)", "unit": "(B,)", "list": "(G, K)", "token": "(B, T)"}
WIDTH = 92  # with the indentation of a docstring in a terminal of 100


def meaning(objective: str, argument: str) -> str:
    """What an argument is, in a few words; nothing for one that is not known."""
    return OWN_MEANINGS.get(objective, {}).get(argument, MEANINGS.get(argument, ""))


def documented(
    function: Callable[..., Any], signature: Signature, unit: Unit, needs_reference: bool
) -> str:
    """The docstring of ``function`` with tables of its arguments below."""
    name, own = function.__name__, inspect.getdoc(function) or ""
    given = [
        (one, _LOGPS[unit], _need_of_logps(one, unit, needs_reference), meaning(name, one))
        for one in signature.logps
    ]
    extras = signature.extras.items()
    given += [(one, _shape(facts, unit), _need(facts), meaning(name, one)) for one, facts in extras]
    parts = [own, _table(("argument", "shape", "", "meaning"), given)]
    hyperparameters = signature.hyperparameters.items()
    if hyperparameters:
        rows = [(one, _default(p), _domain(p), meaning(name, one)) for one, p in hyperparameters]
        parts.append(_table(("hyperparameter", "default", "domain", "meaning"), rows))
    notes = []
    if any(facts.filled for _, facts in extras):
        notes.append("° preference_loss makes it where it is not given")
    if any(p.domain is not None and p.domain.per_unit for _, p in hyperparameters):
        word = {"pair": "pair", "list": "list"}.get(unit, "response")
        notes.append(f"* or a tensor of one value a {word}, ({_UNITS[unit]},)")
    return "\n\n".join([*parts, "\n".join(notes)]).rstrip()


def _need_of_logps(name: str, unit: Unit, needs_reference: bool) -> str:
    if name.startswith("policy"):
        return "needed"
    if unit == "token":
        return "optional"
    return "needed" if needs_reference else "not used"


def _need(facts: ExtraFacts) -> str:
    return ("needed" if facts.required else "optional") + " °" * facts.filled


def _shape(facts: ExtraFacts, unit: Unit) -> str:
    texts: Mapping[Shape, str] = {
        "logps": _LOGPS[unit],
        "unit": f"({_UNITS[unit]},)",
        "rows": f"({_UNITS[unit]}, D)",
        "number": "()",
    }
    return " or ".join(texts[shape] for shape in facts.shapes)


def _default(parameter: Hyperparameter) -> str:
    value = parameter.default
    if value is REQUIRED:
        return "needed"
    return f"{value:g}" if type(value) in (int, float) else repr(value)


def _domain(parameter: Hyperparameter) -> str:
    if parameter.choices is not None:
        return ", ".join(map(repr, parameter.choices))
    if parameter.domain is None:
        return "" if parameter.kind is None else parameter.kind.__name__
    return str(parameter.domain) + " *" * parameter.domain.per_unit


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as they must be; of the third and last as wide as there is room."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    widths[2] = max(1, min(widths[2], 24))
    room = max(24, WIDTH - sum(widths) - 2 * len(widths))
    found = []
    for line in lines:
        third, last = _wrapped(line[2], widths[2]), _wrapped(line[3], room)
        for row in range(max(len(third), len(last))):
            first = line[:2] if row == 0 else ("", "")
            cells = [*first, *("".join(part[row : row + 1]) for part in (third, last))]
            padded = (cell.ljust(width) for cell, width in zip(cells[:3], widths, strict=True))
            found.append("  ".join([*padded, cells[3]]).rstrip())
    return "\n".join(found)


def _wrapped(text: str, width: int) -> list[str]:
    # Nearly all are short, and this runs for every argument at import.
    return [text] if len(text) <= width else textwrap.wrap(text, width)


def readable_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature of ``function`` in the plain types of its annotations: a number is ``float``,
    whatever its domain, and where it may be one value a unit the table says so."""
    hints = typing.get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    parameters = [
        one.replace(annotation=_plain(hints.get(name, one.annotation)))
        for name, one in signature.parameters.items()
    ]
    returns = hints.get("return", signature.return_annotation)
    return signature.replace(parameters=parameters, return_annotation=returns)


def _plain(hint: Any) -> Any:
    if typing.get_origin(hint) is typing.Annotated:
        return _plain(hint.__origin__)
    members = typing.get_args(hint)
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    plain = [_plain(one) for one in members]
    if float in plain and Tensor in plain:
        plain.remove(Tensor)
    found = plain[0]
    for one in plain[1:]:
        found = found | one
    return found
