"""Products in Triton: packed weights read as stored, and dense int8 matrices.

Every program owns its outputs and walks over the inputs in ascending order, so that float steps round in the order of SPEC.md
section 5 and results with int8 activations have the bits of the CPU's. That needs `enable_fp_fusion=False` at each launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dense_product", "packed_product"]


@triton.jit
def _byte(tile_pointers, position, size, mask):
    """Bytes of tiles, positions modulo the tile's size."""
    return tl.load(tile_pointers + position % size, mask=mask, other=0).to(tl.uint32)


@triton.jit
def _levels(tile_pointers, bit, mask, table, BITS: tl.constexpr, MULTIPLIER: tl.constexpr, SPLIT: tl.constexpr, OFFSET: tl.constexpr):
    """The two levels (split: fields, less their zero points unless there are offsets) of the pairs that begin at `bit`."""
    size: tl.constexpr = 16 * BITS
    bits = _byte(tile_pointers, bit // 8, size, mask) | _byte(tile_pointers, bit // 8 + 1, size, mask) << 8
    shift = (bit % 8).to(tl.uint32)
    if SPLIT:
        symbol = bits >> shift & 127
        first = (symbol & 15).to(tl.int32)
        second = (symbol >> 4).to(tl.int32)
        if not OFFSET:
            first -= 8
            second -= 4
    else:
        bits |= _byte(tile_pointers, bit // 8 + 2, size, mask) << 16
        hashed = (bits >> shift & 0xFFFF) * MULTIPLIER >> 16
        first = tl.load(table + (hashed & 127)).to(tl.int32)
        second = tl.load(table + (hashed >> 8 & 127)).to(tl.int32)
    return first, second


@triton.jit
def packed_product(
    packed, table, x, x_scale, weight_scale, weight_offset, x_sums, y,
    inputs, outputs, tiles, segment, segments, tokens, scale_stride,
    BITS: tl.constexpr, MULTIPLIER: tl.constexpr, SPLIT: tl.constexpr, OFFSET: tl.constexpr, FLOAT: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """y [tokens, outputs] of x [tokens, 4*tiles] with packed weights; a program makes OUTPUTS outputs of TOKENS tokens.

    x_scale [tokens, segments] scales segments of int8 inputs. Code split: weight_scale and weight_offset [outputs or 1, 2*segments] with
    rows `scale_stride` apart, x_sums [tokens, 2*segments] the sums of even and odd inputs of each segment.
    """
    first = tl.program_id(0) * OUTPUTS
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    output = first + tl.arange(0, OUTPUTS)
    kind = tl.float32 if FLOAT else tl.int8
    sum_kind = tl.float32 if FLOAT else tl.int32
    size: tl.constexpr = 16 * BITS
    base = packed + (first // 64).to(tl.int64) * tiles * size
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    here = token < tokens
    for s in range(segments):
        even = tl.zeros((OUTPUTS, TOKENS), sum_kind)
        odd = tl.zeros((OUTPUTS, TOKENS), sum_kind)
        begin = s * segment // 2
        end = tl.minimum((s + 1) * segment, tiles * 4) // 2
        for at in range(begin, end, PAIRS):
            pair = at + tl.arange(0, PAIRS)
            inside = pair < end
            bit = BITS * (2 * (output % 64)[:, None] + (pair % 2)[None, :])
            tile = base + (pair // 2).to(tl.int64)[None, :] * size
            mask = inside[None, :] & (output >= 0)[:, None]
            first_level, second_level = _levels(tile, bit, mask, table, BITS, MULTIPLIER, SPLIT, OFFSET)
            where = x + token.to(tl.int64)[None, :] * inputs + 2 * pair[:, None]
            x_mask = here[None, :] & inside[:, None]
            x_even = tl.load(where, mask=x_mask & (2 * pair < inputs)[:, None], other=0)
            x_odd = tl.load(where + 1, mask=x_mask & (2 * pair + 1 < inputs)[:, None], other=0)
            even = tl.dot(first_level.to(kind), x_even, even, input_precision="ieee", out_dtype=sum_kind)
            odd = tl.dot(second_level.to(kind), x_odd, odd, input_precision="ieee", out_dtype=sum_kind)
        if SPLIT:
            column = output * scale_stride + 2 * s
            valid = output < outputs
            part = tl.load(weight_scale + column, mask=valid, other=0)[:, None] * even.to(tl.float32)
            part += tl.load(weight_scale + column + 1, mask=valid, other=0)[:, None] * odd.to(tl.float32)
            if OFFSET:
                sums = x_sums + token * 2 * segments + 2 * s
                part += tl.load(weight_offset + column, mask=valid, other=0)[:, None] * tl.load(sums, mask=here, other=0)[None, :]
                part += tl.load(weight_offset + column + 1, mask=valid, other=0)[:, None] * tl.load(sums + 1, mask=here, other=0)[None, :]
        else:
            part = (even + odd).to(tl.float32)
        if not FLOAT:
            part = part * tl.load(x_scale + token * segments + s, mask=here, other=0)[None, :]
        total += part
    tl.store(y + token.to(tl.int64)[None, :] * outputs + output[:, None], total, mask=here[None, :] & (output < outputs)[:, None])


@triton.jit
def dense_product(
    weights, x, x_scale, row_scale, y, inputs, outputs, tokens, segments, x_stride, weight_stride, y_stride,
    ROW_SCALE: tl.constexpr, FLOAT: tl.constexpr, SEGMENTED: tl.constexpr,
    OUTPUTS: tl.constexpr, TOKENS: tl.constexpr, INPUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y [tokens, outputs] of x [tokens, inputs] with int8 weights [outputs, inputs]. SEGMENTED: a scale for each INPUTS inputs.

    Programs are numbered so that GROUP blocks of tokens meet the same weights while those are in the cache.
    """
    across = tl.cdiv(outputs, OUTPUTS)
    down = tl.cdiv(tokens, TOKENS)
    group = tl.program_id(0) // (GROUP * across)
    rows = tl.minimum(down - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * across)
    token = (group * GROUP + inner % rows) * TOKENS + tl.arange(0, TOKENS)
    output = inner // rows * OUTPUTS + tl.arange(0, OUTPUTS)
    here = token < tokens
    valid = output < outputs
    sum_kind = tl.float32 if FLOAT else tl.int32
    k = tl.arange(0, INPUTS)
    x_at = x + tl.where(here, token, 0).to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = weights + tl.where(valid, output, 0).to(tl.int64)[None, :] * weight_stride + k[:, None]
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    sums = tl.zeros((TOKENS, OUTPUTS), sum_kind)
    for step in range(tl.cdiv(inputs, INPUTS)):
        inside = step * INPUTS + k < inputs
        x_part = tl.load(x_at, mask=inside[None, :], other=0)
        w_part = tl.load(w_at, mask=inside[:, None], other=0)
        if FLOAT:
            w_part = w_part.to(tl.float32)
        if SEGMENTED:
            part = tl.dot(x_part, w_part, input_precision="ieee", out_dtype=sum_kind).to(tl.float32)
            total += part * tl.load(x_scale + token * segments + step, mask=here, other=0)[:, None]
        else:
            sums = tl.dot(x_part, w_part, sums, input_precision="ieee", out_dtype=sum_kind)
        x_at += INPUTS
        w_at += INPUTS
    if not SEGMENTED:
        total = sums.to(tl.float32)
        if not FLOAT:
            total = total * tl.load(x_scale + token, mask=here, other=0)[:, None]
    if ROW_SCALE:
        total = total * tl.load(row_scale + output, mask=valid, other=0)[None, :]
    tl.store(y + token.to(tl.int64)[:, None] * y_stride + output[None, :], total, mask=here[:, None] & valid[None, :])
