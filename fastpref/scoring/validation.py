# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of scoring.

Every error names the argument, what came, what was expected, and the remedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives.checks import (
    as_python,
    check_group,
    closest,
    hint,
    is_integer,
    is_number,
    no_tensor,
)
from .basis import Basis, WeightGradBasis
from .statistics import OUTPUTS
from .types import DEFAULT_OPTIONS, DTYPES, LogitMap, ScoringOptions
from .whole import check_whole

LEAST, MOST = 1e-15, 1e15


def check_model(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lora: Any,
    group: Any,
    vocab_range: Any,
    prefix: str,
) -> None:
    """``prefix`` goes before the names of tensors in messages."""
    _check_tensors(hidden, weight, target, bias, prefix)
    if lora is not None:
        _check_lora(lora, weight, prefix)
    check_group(group, "tp_group")
    if vocab_range is not None:
        check_vocab_range(vocab_range, weight.shape[0])


def _check_tensors(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, prefix: str
) -> None:
    hidden_name, weight_name, bias_name = (prefix + name for name in ("hidden", "weight", "bias"))
    for name, tensor in ((hidden_name, hidden), (weight_name, weight), (bias_name, bias)):
        if tensor is None and name == bias_name:
            continue
        if not isinstance(tensor, Tensor):
            raise no_tensor(name, tensor)
        if name != hidden_name:
            check_whole(name, tensor, matrix=name == weight_name)
        elif type(tensor).__name__ == "DTensor":
            raise ValueError(
                f"{name} must be a plain tensor, got a DTensor; pass {name}.full_tensor() where "
                f"all ranks score the same tokens, {name}.to_local() where each has its own"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got {tensor.layout}; use {name}.to_dense()")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
                f"{_remedy(tensor.dtype, name == weight_name)}"
            )
    _check_target(target, hidden)
    if not prefix:  # models that have one are given in another order
        check_order(hidden, weight, target)
    if weight.dim() != 2:
        raise ValueError(f"{weight_name} must have shape (V, H), got {tuple(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} must end in the weight's hidden size: got {hidden_name} "
            f"{tuple(hidden.shape)} and {weight_name} (V, H) = {tuple(weight.shape)}; "
            f"{_remedy_of_width(hidden, weight, hidden_name)}"
        )
    if weight.numel() == 0:
        raise ValueError(
            f"{weight_name} must have at least one row and one column, got (V, H) = "
            f"{tuple(weight.shape)}; a partitioned parameter must be gathered first"
        )
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have the shape of {hidden_name} without its last dimension: got target "
            f"{tuple(target.shape)} and {hidden_name} {tuple(hidden.shape)}; "
            "shift both (hidden[:, :-1], labels[:, 1:])"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{bias_name} must have shape ({weight.shape[0]},), one per row of {weight_name}, "
            f"got {tuple(bias.shape)}"
        )
    for name, tensor in ((weight_name, weight), ("target", target), (bias_name, bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on {hidden.device}, where {hidden_name} is; got {tensor.device}. "
                "Move it there"
            )
    if hidden.is_meta:
        raise ValueError(
            f"{hidden_name} must hold data, got a meta tensor; materialise the model first"
        )


def check_order(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Raise ValueError where hidden and weight have changed places."""
    if hidden.shape[:-1] != target.shape == weight.shape[:-1]:
        raise ValueError(
            "hidden must be (..., H) for target (...) and weight (V, H): got hidden "
            f"{tuple(hidden.shape)}, weight {tuple(weight.shape)} and target "
            f"{tuple(target.shape)}; the order is hidden, weight, target"
        )


def _remedy_of_width(hidden: Tensor, weight: Tensor, name: str) -> str:
    """For states of another width than the head's."""
    vocab, width = weight.shape
    # A head (H, V) by mistake is as wide as its states too, but no vocabulary is that small.
    if hidden.shape[-1:] == (vocab,) and vocab > width:
        return f"{name} looks like logits: pass the states before the head"
    return "pass the weight as nn.Linear stores it, (out, in)"


def _remedy(dtype: torch.dtype, is_weight: bool) -> str:
    """For a tensor in none of the dtypes of scoring."""
    quantised = dtype.itemsize == 1 if dtype.is_floating_point else is_weight
    if quantised and not dtype.is_complex and dtype != torch.bool:
        return "dequantise it first: its values mean nothing without the scales beside them"
    return "cast it first"


def _check_target(target: Tensor, hidden: Tensor) -> None:
    if not isinstance(target, Tensor):
        raise no_tensor("target", target)
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"target must be int64 (or int32) token ids, got {target.dtype}; use target.long()"
        )


def check_ids(ids: Any, hidden: Any, name: str) -> None:
    """(..., K) vocabulary ids for hidden (..., H), which is checked elsewhere."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be int64 (or int32) token ids, got {ids.dtype}; use {name}.long()"
        )
    if ids.dim() < 1 or ids.shape[-1] < 1:
        raise ValueError(
            f"{name} must be (..., K), at least one id for each hidden state, got "
            f"{tuple(ids.shape)}; for one id each use {name}[..., None]"
        )
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a torch.Tensor, got {type(hidden).__name__}")
    if ids.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must be (..., K) for hidden (..., H): got {name} {tuple(ids.shape)} and "
            f"hidden {tuple(hidden.shape)}; for one id each use {name}[..., None]"
        )
    if ids.device != hidden.device:
        raise ValueError(
            f"{name} must be on {hidden.device}, where hidden is; got {ids.device}. Move it there"
        )


def check_teacher_logps(logps: Any, ids: Tensor) -> None:
    """Of each id."""
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        got = logps.dtype if isinstance(logps, Tensor) else type(logps).__name__
        raise TypeError(f"teacher_logps must be a floating-point tensor, got {got}")
    if logps.shape != ids.shape:
        raise ValueError(
            f"teacher_logps must hold one log-probability for each of ids {tuple(ids.shape)}, got "
            f"{tuple(logps.shape)}"
        )
    if logps.device != ids.device:
        raise ValueError(
            f"teacher_logps must be on {ids.device}, where ids are; got {logps.device}. "
            "Move it there"
        )


def check_request(ignore_index: Any, options: Any) -> ScoringOptions:
    """The options, None standing for the defaults."""
    _check_ignore_index(ignore_index)
    if options is not None and not isinstance(options, ScoringOptions):
        raise TypeError(
            f"options must be a fastpref.ScoringOptions or None, got {type(options).__name__}"
        )
    return options or DEFAULT_OPTIONS


def _check_lora(lora: Any, weight: Tensor, prefix: str) -> None:
    own = f"{prefix}lora"
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        got = f"{len(lora)} values" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"{own} must be (A, B, scale), got {got}")
    a, b, scale = lora
    for name, tensor in (("A", a), ("B", b)):
        if not isinstance(tensor, Tensor):
            raise no_tensor(f"{own}'s {name}", tensor)
        check_whole(f"{own}'s {name}", tensor)
        if tensor.dtype not in DTYPES or tensor.device != weight.device:
            raise TypeError(
                f"{own}'s {name} must be floating point on {weight.device}, where {prefix}weight "
                f"is; got {tensor.dtype} on {tensor.device}"
                + ("" if tensor.dtype in DTYPES else f"; {_remedy(tensor.dtype, True)}")
            )
    if not is_number(scale):
        raise TypeError(f"{own}'s scale must be a number, got {type(scale).__name__}; use float()")
    if not abs(float(scale)) <= MOST:
        raise ValueError(f"{own}'s scale must be finite, at most {MOST}, got {scale}")
    vocab, width = weight.shape
    if (
        a.dim() != 2
        or b.dim() != 2
        or (a.shape[1], b.shape[0]) != (width, vocab)
        or (a.shape[0] != b.shape[1])
    ):
        raise ValueError(
            f"{own} must be A (r, {width}) and B ({vocab}, r) for {prefix}weight "
            f"{tuple(weight.shape)}, got {tuple(a.shape)} and {tuple(b.shape)}; PEFT's "
            "lora_A.weight and lora_B.weight are so"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{prefix}weight must be frozen beside {own}, which is what is trained; call "
            f"{prefix}weight.requires_grad_(False) or pass {prefix}weight.detach()"
        )


def check_basis(given: Any, weight: Tensor, lora: Any) -> Basis | None:
    """``weight_grad_basis``, for a weight that is checked elsewhere."""
    name = "weight_grad_basis"
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) not in (2, len(WeightGradBasis._fields)):
        got = f"{len(given)} values" if isinstance(given, (tuple, list)) else type(given).__name__
        raise TypeError(
            f"{name} must be (Q, out) or a fastpref.optim.WeightGradBasis, got {got}; make out "
            "with torch.zeros(V, r, dtype=torch.float32)"
        )
    basis = WeightGradBasis(*given)
    if lora is not None:
        raise ValueError(
            f"{name} does not go with lora, whose own gradients are low-rank already; leave one of "
            "them None"
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"weight must not need a gradient beside {name}, which takes its place; call "
            "weight.requires_grad_(False) or pass weight.detach()"
        )
    vocab = weight.shape[0]
    _check_columns(f"{name}'s Q", basis.columns, weight)
    rank = basis.columns.shape[1]
    _check_sum(f"{name}'s out", basis.out, (vocab, rank), weight)
    if (basis.transform is None) != (basis.norms is None):
        raise ValueError(
            f"{name} must have both transform and norms, or neither; got "
            f"{'norms' if basis.transform is None else 'transform'} alone"
        )
    if basis.transform is not None:
        _check_columns(f"{name}'s transform", basis.transform, weight)
        _check_sum(f"{name}'s norms", basis.norms, (basis.transform.shape[1],), weight)
    return Basis(basis)


def _check_columns(name: str, columns: Any, weight: Tensor) -> None:
    """(H, some)."""
    if not isinstance(columns, Tensor):
        raise no_tensor(name, columns)
    check_whole(name, columns)
    if columns.dtype not in DTYPES or columns.device != weight.device:
        raise TypeError(
            f"{name} must be floating point on {weight.device}, where weight is; got "
            f"{columns.dtype} on {columns.device}"
        )
    width = weight.shape[1]
    if columns.dim() != 2 or columns.shape[0] != width or not 0 < columns.shape[1] <= width:
        raise ValueError(
            f"{name} must be ({width}, r) with 0 < r <= {width} for weight {tuple(weight.shape)}, "
            f"got {tuple(columns.shape)}; columns lie one beside the other"
        )
    if columns.requires_grad:
        raise ValueError(f"{name} gets no gradient; pass {name.rsplit(' ', 1)[1]}.detach()")


def _check_sum(name: str, total: Any, shape: tuple[int, ...], weight: Tensor) -> None:
    """What backward adds to."""
    if not isinstance(total, Tensor):
        raise no_tensor(name, total)
    check_whole(name, total)
    wanted = f"torch.zeros({', '.join(map(str, shape))}, dtype=torch.float32)"
    if total.dtype != torch.float32 or total.device != weight.device:
        raise TypeError(
            f"{name} must be float32 on {weight.device}, where weight is; got {total.dtype} on "
            f"{total.device}; make it with {wanted}"
        )
    if tuple(total.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(total.shape)}; make it with {wanted}")
    if total.requires_grad:
        raise ValueError(f"{name} is added to in backward and must not need a gradient itself")
    if any(step == 0 and size > 1 for step, size in zip(total.stride(), shape, strict=True)):
        raise ValueError(
            f"{name} must have memory for each of its numbers, got an expanded tensor; use .clone()"
        )


def check_measured(basis: Basis | None) -> None:
    if basis is not None and basis.measured:
        raise ValueError(
            "weight_grad_basis with norms does not measure the gradient of mean_logits; leave "
            "mean_logits out of outputs, or pass (Q, out) alone"
        )


def check_outputs(outputs: Any) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise TypeError(
            f"outputs must be a tuple of names, got the string {outputs!r}; write "
            f"({(closest(outputs, OUTPUTS) or (outputs,))[0]!r},)"
        )
    if not isinstance(outputs, (tuple, list)):
        raise TypeError(
            f"outputs must be a tuple of names among {', '.join(OUTPUTS)}; "
            f"got {type(outputs).__name__}"
        )
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(
            f"outputs must be among {', '.join(OUTPUTS)}; got {', '.join(map(repr, unknown))}"
            f"{hint(unknown[0], OUTPUTS)}"
        )
    return tuple(outputs)


def check_two_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
) -> None:
    """What the two must have in common; each is checked by itself elsewhere."""
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise no_tensor(name, tensor)
        if name.endswith("weight"):
            check_whole(name, tensor)
        if tensor.dim() < 1 or (name.endswith("weight") and not tensor.numel()):
            wanted = "rows and columns" if name.endswith("weight") else "a last dimension"
            raise ValueError(f"{name} must have {wanted}, got shape {tuple(tensor.shape)}")
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            "teacher_hidden must hold the tokens of student_hidden, (..., H'): got "
            f"{tuple(teacher_hidden.shape)} and {tuple(student_hidden.shape)}"
        )
    if teacher_hidden.device != student_hidden.device:
        raise ValueError(
            f"teacher_hidden must be on {student_hidden.device}, where student_hidden is; got "
            f"{teacher_hidden.device}. Move it there"
        )
    check_mask(mask, student_hidden, "student_hidden")


def check_mask(mask: Any, hidden: Tensor, hidden_name: str) -> None:
    """(...) bool or None for hidden (..., H)."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, got {got}; use mask.bool()")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"mask must have the shape of {hidden_name} without its last dimension, "
            f"{tuple(hidden.shape[:-1])}, got {tuple(mask.shape)}"
        )
    if mask.device != hidden.device:
        raise ValueError(f"mask must be on {hidden.device}, got {mask.device}")


def _check_ignore_index(ignore_index: Any) -> None:
    if not is_integer(ignore_index):
        raise TypeError(
            f"ignore_index must be an int, got {type(ignore_index).__name__}; "
            "pass a value that is no token id, such as -100, where every position is scored"
        )
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit int64, as target does; got {ignore_index}")


def check_reduction_of_hidden(reduces: Any) -> None:
    if not isinstance(reduces, bool):
        raise TypeError(f"reduce_hidden_grad must be a bool, got {type(reduces).__name__}")


def check_map(temperature: float, logit_scale: float, softcap: float | None) -> LogitMap:
    for name, value in (
        ("temperature", temperature),
        ("logit_scale", logit_scale),
        ("softcap", softcap),
    ):
        if value is None and name == "softcap":
            continue
        if name == "temperature" and isinstance(value, Tensor):
            raise TypeError(
                "temperature must be a number, got Tensor; use float(temperature). One for each "
                "token is known to linear_logprob, linear_logits and preference_loss alone"
            )
        if not is_number(value):
            raise TypeError(
                f"{name} must be a number, got {type(value).__name__}; use float({name})"
            )
        # Beyond, float32 logits overflow or the map vanishes; NaN fails the comparison too.
        if value != 0 and not LEAST <= abs(as_python(value)) <= MOST:
            raise ValueError(
                f"{name} must be finite and its size between {LEAST} and {MOST}, got {value}"
            )
    if temperature <= 0:
        raise ValueError(
            f"temperature must be greater than 0, got {temperature}; logits are divided by it"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be greater than 0, got {softcap}; pass None for no cap")
    scale = float(logit_scale) / float(temperature)
    return LogitMap(scale, 0.0 if softcap is None else float(softcap) / float(temperature))


def check_vocab_range(vocab_range: Any, rows: int) -> None:
    if not isinstance(vocab_range, (tuple, list)):
        raise TypeError(
            f"vocab_range must be a pair (start, stop) or None, got {type(vocab_range).__name__}"
        )
    if len(vocab_range) != 2:
        raise ValueError(f"vocab_range must be a pair (start, stop), got {tuple(vocab_range)}")
    start, stop = vocab_range
    for bound in (start, stop):
        if not is_integer(bound):
            raise TypeError(
                f"vocab_range must hold two ints, got {type(bound).__name__}; use int()"
            )
    if not 0 <= start < stop or stop - start > rows:
        raise ValueError(
            "vocab_range must be (start, stop) with 0 <= start < stop and at most "
            f"{rows} columns, the rows of weight; got ({start}, {stop})"
        )
