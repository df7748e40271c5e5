# SPDX-License-Identifier: Apache-2.0
"""Published methods by name: an objective, what a sample's squared errors weigh in its log-ratio,
and what the method makes of its data.

z = weight R[(ref - target)^2 - (model - target)^2] is the log-ratio that the objective takes, and
beta stays the objective's: a paper's beta is given as it stands there. Where a method writes
beta / 2, as Diffusion-DPO's code, the half is in the weight. R is the mean over a sample's elements
where a method's code averages (its beta is then in thousands, and 1 / D of that of a sum over D
elements), else the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .. import objectives
from ..objectives import Objective
from ..objectives.checks import closest, hint, is_number, no_tensor
from ..objectives.reading import readable
from ..units import LayoutName, PreferenceOutput
from .checks import Reduction, check_per_sample, check_predictions, one_a_unit
from .loss import preference_loss
from .methods import clipped_step_dpo, smoothed_preference_scale


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What a method makes of its data, as arguments of ``preference_loss``."""

    weight: float | Tensor = 1.0  # times that of the preset
    beta: Tensor | None = None  # times that of the objective, (P,)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    layout: LayoutName = "halves"
    group_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published method, ready to be called; made by ``preset``.

    Attributes:
        name: of ``presets()``.
        objective: with its hyperparameters, beta among them.
        weight: what multiplies the difference of a sample's squared errors, whatever the sample.
        reduction: R over a sample's elements, "mean" or "sum".
        source: paper, code, and where weight, half and reduction come from.
    """

    name: str
    objective: Objective
    weight: float
    reduction: Reduction
    source: str

    def __call__(
        self,
        model_pred: Tensor,
        ref_pred: Tensor,
        target: Tensor,
        *,
        mask: Tensor | None = None,
        weight: float | Tensor = 1.0,
        **extras: Any,
    ) -> PreferenceOutput:
        """The loss of a batch.

        Args:
            model_pred, ref_pred, target, mask: as in ``log_ratio``; pairs lie in halves, chosen
                samples first.
            weight: a number or (B,), multiplies the preset's own: a timestep's weight.
            extras: what ``source`` says that the method takes, and hyperparameters of the
                objective of one value a unit in place of those that are set.

        Returns:
            As ``preference_loss``.

        Raises:
            TypeError, ValueError: naming the argument that is wrong, or is missing.
        """
        check_predictions(model_pred=model_pred, ref_pred=ref_pred, target=target)
        check_per_sample("weight", weight, model_pred, zero=True)
        known = self.objective.signature.hyperparameters
        units = {name: extras.pop(name) for name in tuple(extras) if name in known}
        self._check_names(extras)
        read = self._read(model_pred, **extras)
        if read.beta is not None:
            units["beta"] = units.get("beta", self.objective.hyperparameters["beta"]) * read.beta
        return preference_loss(
            model_pred,
            ref_pred,
            target,
            self.objective,
            layout=read.layout,
            group_size=read.group_size,
            weight=self.weight * read.weight * weight,
            reduction=self.reduction,
            mask=mask,
            extras=read.extras,
            **units,
        )

    def _read(self, model_pred: Tensor) -> _Read:
        return _Read()

    def _check_names(self, given: Mapping[str, Any]) -> None:
        """Raise TypeError unless these are what ``_read`` takes, and all that it needs."""
        if torch.compiler.is_compiling():  # which traces no signature
            return
        takes = tuple(inspect.signature(self._read).parameters.values())[1:]
        names = [one.name for one in takes]
        said = f"{self.name} takes {', '.join(names) or 'no extras'}"
        for name in given:
            if name not in names:
                raise TypeError(f"{said}, got {name!r}{hint(name, names)}")
        for one in takes:
            if one.default is one.empty and one.name not in given:
                raise TypeError(f"{said}; {one.name} is missing")


@dataclass(frozen=True, kw_only=True)
class _Smoothed(Preset):
    """SmPO: a pair's beta by how far apart its scores are."""

    gamma: float = 10.0
    # The range of PickScore in the authors' code.
    low: float = 0.11543526500463486
    high: float = 0.28201571106910706

    def _read(  # type: ignore[override]
        self, model_pred: Tensor, chosen_scores: Tensor, rejected_scores: Tensor
    ) -> _Read:
        pairs = torch.Size([model_pred.shape[0] // 2])
        chosen_scores = one_a_unit("chosen_scores", chosen_scores, pairs, model_pred.device)
        scale = smoothed_preference_scale(
            chosen_scores, rejected_scores, low=self.low, high=self.high, gamma=self.gamma
        )
        if readable(scale) and bool((scale < 0).any()):
            first = int((scale < 0).nonzero()[0])
            raise ValueError(
                "chosen_scores must not be below rejected_scores: chosen is what scores higher; "
                f"got {float(chosen_scores[first]):g} and {float(rejected_scores[first]):g} for "
                f"pair {first}; swap its rows"
            )
        return _Read(beta=scale)


@dataclass(frozen=True, kw_only=True)
class _Labelled(Preset):
    """Single samples, desirable or not."""

    def _read(self, model_pred: Tensor, labels: Tensor) -> _Read:  # type: ignore[override]
        return _Read(extras={"labels": labels}, layout="units")


@dataclass(frozen=True, kw_only=True)
class _Edm(Preset):
    """Real samples and generated ones, in errors of EDM's denoiser."""

    def _read(  # type: ignore[override]
        self, model_pred: Tensor, labels: Tensor, sigma: float | Tensor, sigma_data: float = 0.5
    ) -> _Read:
        check_per_sample("sigma", sigma, model_pred, zero=False)
        if not is_number(sigma_data) or not sigma_data > 0:
            raise ValueError(f"sigma_data must be a positive number, got {sigma_data!r}")
        if isinstance(sigma, Tensor):
            sigma = sigma.detach().double()
        weight = 1 / sigma_data**2 + 1 / sigma**2
        return _Read(weight=weight, extras={"labels": labels}, layout="units")


@dataclass(frozen=True, kw_only=True)
class _Ranked(Preset):
    """Lists of K samples."""

    def _read(self, model_pred: Tensor, scores: Tensor) -> _Read:  # type: ignore[override]
        if not isinstance(scores, Tensor):
            raise no_tensor("scores", scores, "(G, K)")
        rows = model_pred.shape[0]
        if scores.dim() != 2 or scores.shape[1] < 2 or scores.numel() != rows:
            raise ValueError(
                f"scores must be (G, K), lists of K >= 2 that make up the {rows} rows of "
                f"model_pred, got {tuple(scores.shape)}"
            )
        return _Read(extras={"scores": scores}, layout="groups", group_size=scores.shape[1])


@dataclass(frozen=True, kw_only=True)
class _Step(Preset):
    """Called (mean, ref_mean, sample, std=...): steps of a sampler in place of predictions."""

    def _read(self, model_pred: Tensor, std: float | Tensor) -> _Read:  # type: ignore[override]
        check_per_sample("std", std, model_pred, zero=False)
        std = std.detach().double() if isinstance(std, Tensor) else float(std)
        return _Read(weight=1 / std**2)


def preset(name: str, **changes: Any) -> Preset:
    """The method called ``name``.

    Args:
        name: of ``presets()``.
        changes: hyperparameters of its objective, such as beta as the paper has it, numbers or one
            value a unit; of smpo_* ``low`` and ``high``, the scorer's range, and ``gamma``.

    Raises:
        ValueError: no such method, or a value outside its domain.
        TypeError: the method has no such hyperparameter.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be one of presets(), got {type(name).__name__}")
    if name not in _PRESETS:
        close = closest(name, _PRESETS) or presets()
        raise ValueError(
            f"no preset is called {name!r}; perhaps {', '.join(close)}? presets() lists them all"
        )
    found = _PRESETS[name]
    own = {one.name for one in fields(found)} - {one.name for one in fields(Preset)}
    ours = {key: value for key, value in changes.items() if key in own}
    others = {key: value for key, value in changes.items() if key not in own}
    return replace(found, objective=found.objective.replace(**others), **ours)


def presets() -> tuple[str, ...]:
    """The names of all methods."""
    return tuple(_PRESETS)


_DIFFUSION_DPO = """Diffusion-DPO, Wallace et al. 2023, arXiv:2311.12908.

The bound on a diffusion model's likelihood makes its log-ratio -T w(t) (||eps - model||^2 - ||eps -
ref||^2); w(t) is taken as constant and T is part of beta. The authors' code averages over elements
and has the margin -beta/2 ((m_w - m_l) - (r_w - r_l)) of the four means: weight 1/2, mean. """
_DIFFUSERS_DPO = """Diffusion-DPO as the research script of diffusers has it, after Wallace et al.
2023, arXiv:2311.12908. """
_SMPO = """SmPO-Diffusion, Lu et al. 2025, arXiv:2506.02698.

Takes chosen_scores and rejected_scores, (P,), of PickScore, chosen being what scores higher. With a
smoothed preference the margin of DPO is multiplied by (2 a - 1) gamma (smoothed_preference_scale),
inside the sigmoid; the code has -beta/2 (2 a - 1) gamma times the difference of means: weight 1/2,
mean, and a beta of each pair. The target is that of the inverted sample, (x_t - alpha x0) / sigma:
convert(x0, x_t, path=(alpha, sigma), source=DATA, target=NOISE). """
_INPO = """DDIM-InPO, Lu et al. 2025, arXiv:2503.18454.

The loss of Diffusion-DPO, weight 1/2 and mean as there, on samples inverted by the policy itself:
the target, another one for chosen and rejected, is (x_t - alpha x0) / sigma, which is convert(x0,
x_t, path=(alpha, sigma), source=DATA, target=NOISE). """
_PAPER_BETA = "Of beta the paper gives 2000 for Stable Diffusion 1.5 and 5000 for SDXL"


def _dpo(name: str, beta: float, source: str, *, weight: float = 0.5) -> Preset:
    """``softplus(-beta (z_w - z_l))``, means over elements."""
    return Preset(
        name=name,
        objective=objectives.get("dpo", beta=beta),
        weight=weight,
        reduction="mean",
        source=source,
    )


_ALL: tuple[Preset, ...] = (
    _dpo(
        "diffusion_dpo_sd15",
        2000.0,
        f"{_DIFFUSION_DPO}{_PAPER_BETA}; the launchers of its code have 5000 for both.",
    ),
    _dpo("diffusion_dpo_sdxl", 5000.0, f"{_DIFFUSION_DPO}{_PAPER_BETA}."),
    _dpo(
        "diffusers_dpo_sd15",
        2500.0,
        f"{_DIFFUSERS_DPO}The script for Stable Diffusion 1.5 leaves the half out and has beta "
        "2500: weight 1, mean. The same loss as Diffusion-DPO at beta 5000.",
        weight=1.0,
    ),
    _dpo(
        "diffusers_dpo_sdxl",
        5000.0,
        f"{_DIFFUSERS_DPO}The script for SDXL has the half and beta 5000: weight 1/2, mean.",
    ),
    *(
        _Smoothed(
            name=name,
            objective=objectives.get("dpo", beta=beta),
            weight=0.5,
            reduction="mean",
            source=f"{_SMPO}Beta is {beta:g}.",
        )
        for name, beta in (("smpo_sd15", 2000.0), ("smpo_sdxl", 5000.0))
    ),
    *(
        _dpo(name, beta, f"{_INPO}Beta is {beta:g}.")
        for name, beta in (("inpo_sd15", 2000.0), ("inpo_sdxl", 5000.0))
    ),
    _Labelled(
        name="diffusion_kto",
        objective=objectives.get("kto", beta=1000.0),
        weight=1.0,
        reduction="mean",
        source="""Diffusion-KTO, Li et al. 2024, arXiv:2404.04465.

Takes labels, (B,), true where a sample is desirable. The code's log-ratio is g = -(err - err_ref)
of means over elements, without a half: weight 1, mean. Its shift is the mean of g over the batch of
all ranks, at least 0 and without a gradient, which is ``kto``'s own (dp_group is a hyperparameter
of it); beta is 1000.""",
    ),
    _Ranked(
        name="rank_dpo",
        objective=objectives.get("rank_dpo", beta=0.1),
        weight=1.0,
        reduction="sum",
        source="""RankDPO, Karthik et al. 2024, arXiv:2410.18013, algorithm 2.

Takes scores, (G, K), shares of comparisons won in [0, 1]; rows are lists of K, one after another.
The paper's s = ||eps - model||^2 - ||eps - ref||^2 is a sum over elements and its margin -beta
(s_i - s_j), without a half: weight 1, sum. The pairs of a list are weighed by the change in
discounted gain, of the true ranking. It states no beta: 0.1 is ``rank_dpo``'s default, not
confirmed at the source.""",
    ),
    _Edm(
        name="ddo_edm",
        objective=objectives.get("ddo", beta=0.02, alpha=1.0),
        weight=1.0,
        reduction="sum",
        source="""DDO, Zheng et al. 2025, arXiv:2503.01103, for EDM.

Takes labels, (B,), false where the reference generated the sample; sigma, a number or (B,), the
noise's; sigma_data. Predictions are of the denoiser D and the target is the data. The code's
log-probability is -w(sigma) ||D - x||^2, a sum over elements, with EDM's w = (sigma^2 +
sigma_data^2) / (sigma sigma_data)^2 = 1 / sigma_data^2 + 1 / sigma^2: weight w, sum. The same sigma
and noise serve a real sample and a generated one, model and reference. The code averages over such
pairs the sum of their two losses, (1 + alpha) log 2 at first; this loss is a mean over all samples,
half of that where there are as many of each. Defaults are beta 0.02 and alpha 1; the paper searches
0.01 to 0.1 and 0.5 to 6, anew in each round.""",
    ),
    _dpo(
        "flow_dpo",
        100.0,
        """Flow-DPO, Liu et al. 2025 (VideoAlign), arXiv:2501.13918.

The margin is -beta_t/2 ((||v - model||^2 - ||v - ref||^2)_w - (...)_l) in velocities, v = eps - x0
(FLOW); the code averages over elements and has a constant beta_t of 100: weight 1/2, mean. For the
paper's other form, beta_t = beta (1 - t)^2, pass weight=(1 - t)^2.""",
    ),
    _Step(
        name="d3po",
        objective=Objective(clipped_step_dpo, unit="pair", scope="pair"),
        weight=0.5,
        reduction="mean",
        source="""D3PO, Yang et al. 2023, arXiv:2311.13231.

Called (mean, ref_mean, sample, std=...), a number or (B,): means of the model's step and of its
reference's, and what was drawn. A step's log-density is the mean over elements of -(sample -
mean)^2 / (2 std^2) and constants, which the ratio has not: weight 1 / (2 std^2), mean (the weight
1/2 here, 1 / std^2 by step). The ratio of densities is clipped to 1 +- 0.1 and beta is 0.1.""",
    ),
)
_PRESETS: Mapping[str, Preset] = {one.name: one for one in _ALL}
