# SPDX-License-Identifier: Apache-2.0
"""All kernels, in all the ways that calls launch them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import (
    column_sums,
    cosine_rows,
    divergence_rows,
    exp_rows,
    join_shares,
    linear_exp,
    linear_grad,
    logit_grad_rows,
    probabilities,
    reanchor,
    row_scores,
    row_sums,
    scale_rows,
    squared_errors,
    target_logits,
    tiles,
)

ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
_ON_OFF = (False, True)


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched."""

    kernel: Any
    name: str
    constants: dict[str, Any]  # None: the argument is not given
    descriptors: dict[str, tuple[int, int]]  # blocks of the arguments that are descriptors
    element: str
    warps: int = 4
    stages: int = 3
    # Of the arguments by whose alignment the kernel is compiled anew, those that are no multiples
    # of 16: numbers, or addresses in bytes.
    unaligned: tuple[str, ...] = ()
    registers: int | None = None  # of a thread at most; None: as the compiler likes


def variants(capability: int, element: str) -> Iterator[Variant]:
    """All kernels, in all the ways they are launched on that chip for inputs of that element type;
    those of whole tiles also with ``flatten``, which a process may turn on."""
    chip = tiles.CHIPS[capability]
    yield from products(chip, element)
    if tiles.flattenable(chip, ELEMENTS[element]):
        yield from products(tiles.flattened(chip), element)
    yield from _flagged(chip, element)
    yield from _sums(statistics=False, capped=False)
    for capped in _ON_OFF:
        yield from _sums(statistics=True, capped=capped)
    if element == "fp16":
        yield probabilities_variant()
    yield from _glue(element)
    yield from _columns(element)
    yield from rows_in_place(element)
    yield from _divergences(element)
    yield from _errors(element)


def products(chip: tiles.Chip, element: str) -> Iterator[Variant]:
    """linear_exp and linear_grad in the chip's ordinary tiles."""
    for capped, bias, ragged, precision in _ways(element):
        given = {"bias": bias, "ragged": ragged, "capped": capped}
        for statistics, store in itertools.product(_ON_OFF, _ON_OFF):
            shape = _tiles(chip, element, statistics or capped, precision).ordinary
            yield Variant(
                linear_exp.linear_exp_kernel,
                _label("linear_exp", store=store, statistics=statistics, **given)
                + _suffix(precision, shape),
                _whole_tiles(chip, shape, capped, ragged, precision)
                | {"EXACT": element == "fp32"}
                | _absent(exps=store, best_index=statistics, bias=bias),
                _described(chip, shape, "exps" if store else None),
                element,
                shape.warps,
                shape.stages,
                registers=shape.registers,
            )
        shape = _tiles(chip, element, True, precision).ordinary
        for entropy, lse in itertools.product(_ON_OFF, _ON_OFF):
            yield Variant(
                linear_grad.linear_grad_kernel,
                _label("linear_grad", entropy=entropy, lse=lse, **given)
                + _suffix(precision, shape),
                _whole_tiles(chip, shape, capped, ragged, precision)
                | {"EXACT": element == "fp32"}
                | _absent(grad_entropy=entropy, entropy=entropy, grad_lse=lse, bias=bias),
                _described(chip, shape, "grads"),
                element,
                shape.warps,
                shape.stages,
                registers=shape.registers,
            )


def _flagged(chip: tiles.Chip, element: str) -> Iterator[Variant]:
    """Of rows that are projected again, gathered through pointers."""
    for capped, bias, ragged, precision in _ways(element):
        given = {"bias": bias, "ragged": ragged, "capped": capped}
        for statistics, store in itertools.product(_ON_OFF, _ON_OFF):
            shape = _tiles(chip, element, statistics or capped, precision).flagged
            yield Variant(
                reanchor.reanchor_kernel,
                _label("reanchor", store=store, statistics=statistics, **given)
                + _suffix(precision, shape),
                _blocks(shape, capped, precision)
                | {"SLICES": shape.slices, "RAGGED": ragged, "ALIGNED": True}
                | {"EXACT": element == "fp32"}
                | _absent(exps=store, best_index=statistics, bias=bias),
                {},
                element,
                shape.warps,
                shape.stages,
                registers=shape.registers,
            )
    for capped, bias, heavy, precision in _ways(element):  # with a cap all are heavy
        shape = _tiles(chip, element, heavy, precision).flagged
        yield Variant(
            reanchor.largest_logit_kernel,
            _label("largest_logit", heavy=heavy, bias=bias, capped=capped)
            + _suffix(precision, shape),
            _blocks(shape, capped, precision) | _absent(bias=bias),
            {},
            element,
            shape.warps,
            shape.stages,
            registers=shape.registers,
        )


def _ways(element: str) -> Iterator[tuple[bool, bool, bool, str]]:
    """Whether there is a cap, a bias, a ragged slice (under a cap, any); and the precision."""
    for precision in ("ieee", "tf32") if element == "fp32" else ("ieee",):
        for capped, bias in itertools.product(_ON_OFF, _ON_OFF):
            for ragged in (True,) if capped else _ON_OFF:
                yield capped, bias, ragged, precision


def _label(name: str, **flags: bool) -> str:
    return " ".join([name, *(flag for flag, on in flags.items() if on)])


def _suffix(precision: str, shape: tiles.TileShape) -> str:
    return " tf32" * (precision == "tf32") + " flat" * shape.flatten


def _absent(**given: bool) -> dict[str, None]:
    return {name: None for name, here in given.items() if not here}


def _tiles(chip: tiles.Chip, element: str, heavy: bool, precision: str) -> tiles.Tiles:
    pair = (chip.heavy if heavy else chip.plain)[ELEMENTS[element]]
    return tiles.in_tf32(pair) if precision == "tf32" else pair


def _blocks(shape: tiles.TileShape, capped: bool, precision: str) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": shape.rows,
        "BLOCK_COLS": shape.cols,
        "BLOCK_WIDTH": shape.width,
        "CAPPED": capped,
        "PRECISION": precision,
    }


def _whole_tiles(
    chip: tiles.Chip, shape: tiles.TileShape, capped: bool, ragged: bool, precision: str
) -> dict[str, Any]:
    return _blocks(shape, capped, precision) | {
        "GROUP_ROWS": shape.group_rows,
        "SLICES": shape.slices,
        "FLATTEN": shape.flatten,
        "DESCRIPTORS": chip.descriptors,
        "RAGGED": ragged,
        "ALIGNED": True,
    }


def _described(
    chip: tiles.Chip, shape: tiles.TileShape, out: str | None
) -> dict[str, tuple[int, int]]:
    if not chip.descriptors:
        return {}
    blocks = {"hidden": (shape.rows, shape.width), "weight": (shape.cols, shape.width)}
    return blocks if out is None else blocks | {out: (shape.rows, shape.slice_cols)}


def probabilities_variant() -> Variant:
    constants = {"BLOCK_COLS": probabilities.COLS, "ALIGNED": True}
    return Variant(probabilities.probabilities_kernel, "probabilities", constants, {}, "fp16")


def _glue(element: str) -> Iterator[Variant]:
    # Hidden states and heads of any width, at any address.
    lies: dict[str, tuple[str, ...]] = {"": ()}
    lies[" odd"] = ("width", "hidden_stride", "weight_stride")
    lies[" unaligned"] = (*lies[" odd"], "hidden", "weight")
    for (lie, unaligned), capped, bias in itertools.product(lies.items(), _ON_OFF, _ON_OFF):
        blocks = {"BLOCK_ROWS": target_logits.ROWS, "BLOCK_WIDTH": target_logits.WIDTH}
        yield Variant(
            target_logits.target_logits_kernel,
            _label("target_logits", bias=bias, capped=capped) + lie,
            blocks | {"CAPPED": capped} | _absent(bias=bias),
            {},
            element,
            unaligned=unaligned,
        )
    for statistics, store, capped in itertools.product(_ON_OFF, _ON_OFF, _ON_OFF):
        constants = {"BLOCK_ROWS": row_scores.ROWS, "CAPPED": capped}
        yield Variant(
            row_scores.row_scores_kernel,
            _label("row_scores", store=store, statistics=statistics, capped=capped),
            constants | _absent(best=statistics, exps=store),
            {},
            element,
        )
    lies = {"": (), " odd": ("width", "matrix_stride", "out_stride")}
    lies[" unaligned"] = (*lies[" odd"], "matrix", "out")
    for lie, unaligned in lies.items():
        yield Variant(
            scale_rows.scale_rows_kernel,
            "scale_rows" + lie,
            {"BLOCK_WIDTH": 1024},
            {},
            element,
            unaligned=unaligned,
        )


def _columns(element: str) -> Iterator[Variant]:
    blocks = {"BLOCK_ROWS": column_sums.ROWS, "BLOCK_COLS": column_sums.COLS}
    for weighted in _ON_OFF:
        yield Variant(
            column_sums.column_sums_kernel,
            _label("column_sums", weighted=weighted),
            blocks | _absent(weights=weighted),
            {},
            element,
            column_sums.WARPS,
            registers=column_sums.REGISTERS,
        )


def rows_in_place(element: str) -> Iterator[Variant]:
    """The passes over rows of torch's own products, which begin at multiples of 16 bytes and are
    padded to such."""
    for by_row, bias, capped, statistics in itertools.product(_ON_OFF, repeat=4):
        step: dict[str, Any] = {
            "PIECES": exp_rows.CAPPED_PIECES if capped else exp_rows.PIECES,
            "VECTOR": 16 // ELEMENTS[element],
            "WHOLE": True,
        }
        flags: dict[str, Any] = {"CAPPED": capped, "BY_ROW": by_row, "ALIGNED": True}
        absent = _absent(bias=bias)
        given = {"bias": bias, "capped": capped, "by_row": by_row}
        of_sums = flags | {"STATISTICS": statistics} | _absent(best_index=statistics)
        for write in (False,) if element == "fp16" else _ON_OFF:
            label = _label("exp_rows", write=write, statistics=statistics, **given)
            constants = step | of_sums | absent | {"WRITE": write, "EXACT": element == "fp32"}
            yield Variant(
                exp_rows.exp_rows_kernel,
                label,
                constants,
                {},
                element,
                exp_rows.WARPS,
                registers=exp_rows.BIAS_REGISTERS if bias else None,
            )
        for write in _ON_OFF:
            label = _label("join_shares", write=write, statistics=statistics, **given)
            constants = step | of_sums | absent | _absent(out_index=statistics)
            constants |= {"WRITE": write, "HALVES": write and element == "fp16"}
            constants |= {"MOST_SHARES": join_shares.MOST_SHARES}
            yield Variant(
                join_shares.join_shares_kernel, label, constants, {}, element, exp_rows.WARPS
            )
        # In the place of statistics: whether a gradient arrived at the entropy.
        for lse in _ON_OFF:
            entropy = statistics
            label = _label("logit_grad_rows", entropy=entropy, lse=lse, **given)
            constants = step | flags | absent | {"EXACT": element == "fp32"}
            constants |= _absent(grad_entropy=entropy, entropy=entropy, grad_lse=lse)
            yield Variant(
                logit_grad_rows.logit_grad_rows_kernel,
                label,
                constants,
                {},
                element,
                exp_rows.WARPS,
            )


def _sums(statistics: bool, capped: bool) -> Iterator[Variant]:
    constants: dict[str, Any] = {"BLOCK_ROWS": row_sums.ROWS, "BLOCK_TILES": row_sums.TILES}
    constants["CAPPED"] = capped
    constants |= _absent(best_index=statistics, out_index=statistics)
    for kernel, name in (
        (row_sums.row_sums_kernel, "row_sums"),
        (reanchor.sum_flagged_kernel, "sum_flagged"),
    ):
        label = _label(name, statistics=statistics, capped=capped)
        yield Variant(kernel, label, constants, {}, "fp32")
    if not statistics:
        yield Variant(reanchor.anchor_kernel, "anchor", {"BLOCK_ROWS": row_sums.ROWS}, {}, "fp32")
        yield Variant(reanchor.list_flagged_kernel, "list_flagged", {"BLOCK": 1024}, {}, "fp32")


def _divergences(element: str) -> Iterator[Variant]:
    """With the gradient and a bias: without them, it is a part of these."""
    names = ("forward_kl", "reverse_kl", "jsd", "tv", "bhattacharyya")
    for capped in _ON_OFF:
        blocks = {"BLOCK_COLS": divergence_rows.COLS, "CAPPED": capped, "WRITE": True}
        # With maps by row the first alone, which objectives take.
        kinds = [(0, True), *((kind, False) for kind in range(len(names)))]
        for kind, by_row in kinds:
            yield Variant(
                divergence_rows.divergence_rows_kernel,
                _label(names[kind], capped=capped, by_row=by_row),
                blocks | {"KIND": kind, "BY_ROW": by_row, "EXACT": element == "fp32"},
                {},
                element,
                divergence_rows.WARPS,
                registers=divergence_rows.REGISTERS,
            )
        yield Variant(
            cosine_rows.cosine_rows_kernel,
            _label("cosine", capped=capped),
            blocks,
            {},
            element,
            divergence_rows.WARPS,
            registers=divergence_rows.REGISTERS,
        )


def _errors(element: str) -> Iterator[Variant]:
    """Of predictions of one dtype: dense samples, and short pieces that share a mask's element."""
    for lie, compared, masked in itertools.product(("", " odd", " unaligned"), _ON_OFF, _ON_OFF):
        blocks: dict[str, Any] = {"BLOCK_PIECES": 1, "BLOCK_LENGTH": squared_errors.ELEMENTS}
        blocks |= {"mask_stride": 1} if masked else _absent(mask=False)
        yield Variant(
            squared_errors.squared_errors_kernel,
            _label("squared_errors", masked=masked, alone=not compared) + lie,
            blocks | _absent(reference=compared),
            {},
            element,
            squared_errors.WARPS,
            unaligned=_lying(lie, model=True, target=True, reference=compared, mask=masked),
        )
        if not compared:
            yield Variant(
                squared_errors.error_gradient_kernel,
                _label("error_gradient", masked=masked) + lie,
                blocks,
                {},
                element,
                squared_errors.WARPS,
                unaligned=_lying(lie, model=True, target=True, out=True, mask=masked),
            )
    # channels_last, and a mask that all channels share.
    short = {"BLOCK_PIECES": squared_errors.ELEMENTS // 4, "BLOCK_LENGTH": 4}
    for kernel, name, third in (
        (squared_errors.squared_errors_kernel, "squared_errors", "reference"),
        (squared_errors.error_gradient_kernel, "error_gradient", "out"),
    ):
        yield Variant(
            kernel,
            f"{name} masked short",
            short,
            {},
            element,
            squared_errors.WARPS,
            unaligned=_lying(" odd", model=True, target=True, mask=True, **{third: True}),
        )
    constants = {"BLOCK_PARTS": squared_errors.MOST_PARTS}
    yield Variant(squared_errors.join_parts_kernel, "join_parts", constants, {}, element)


def _lying(lie: str, **given: bool) -> tuple[str, ...]:
    """What is no multiple of 16 of predictions of an odd size, and of such at any address."""
    tensors = tuple(name for name, here in given.items() if here)
    strides = tuple(f"{name}_{of}" for name in tensors for of in ("sample", "piece"))
    odd = ("length", *strides) if lie else ()
    return odd + tensors if lie == " unaligned" else odd
