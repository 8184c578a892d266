"""Kernels of our own for GPUs, in Triton: integer convolutions without im2col, and linear layers of 4-bit weights.

Both multiply 8-bit codes of activations and keep sums in 32 bits, so that they give the same integers everywhere; in
Triton's interpreter (``TRITON_INTERPRET=1``) also on a CPU. Scales, zero points and bias are applied before anything is
written.
"""

from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of a tile


@triton.jit
def _finish(out, total, zero, sums, scale, bias, x_scale, m, n, m_in, n_in, O, FLOATS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Take the zero point out of a tile's sums, and write them as integers, or scaled and with the bias."""
    inside = m_in[:, None] & n_in[None, :]
    at = out + m[:, None].to(tl.int64) * O + n[None, :]
    total -= zero * tl.load(sums + n, mask=n_in, other=0)[None, :]
    if FLOATS:
        y = total.to(tl.float32) * x_scale * tl.load(scale + n, mask=n_in, other=0.0)[None, :]
        y += tl.load(bias + n, mask=n_in, other=0.0)[None, :]
        tl.store(at, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(at, total, mask=inside)


@triton.jit
def _conv2d(  # type: ignore[no-untyped-def]
    x, w, sums, scale, bias, out, x_scale, zero,
    M, H, W, C, OH, OW, O,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    FLOATS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the output (M = N OH OW places, O) of codes (N, H, W, C) and weights (O, KH, KW, C)."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    m_in, n_in = m < M, n < O
    image, row, column = m // (OH * OW), m // OW % OH, m % OW
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for kh in tl.static_range(KH):
        for kw in tl.static_range(KW):
            i, j = row * SH - PH + kh * DH, column * SW - PW + kw * DW
            there = m_in & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            place = ((image * H + i) * W + j).to(tl.int64) * C
            for start in range(0, C, BK):
                c = start + tl.arange(0, BK)
                c_in = c < C
                known = there[:, None] & c_in[None, :]
                a = tl.load(x + place[:, None] + c[None, :], mask=known, other=0)
                a = tl.where(known, a, zero).to(tl.int8)  # beside the image: 0, which is the zero point
                at = ((n[None, :] * KH + kh) * KW + kw) * C + c[:, None]
                b = tl.load(w + at, mask=n_in[None, :] & c_in[:, None], other=0)
                total = tl.dot(a, b, total, out_dtype=tl.int32)
    _finish(out, total, zero, sums, scale, bias, x_scale, m, n, m_in, n_in, O, FLOATS)


@triton.jit
def _linear4(  # type: ignore[no-untyped-def]
    x, w, sums, scale, bias, out, x_scale, zero, M, O, K,
    FLOATS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of the output (M, O) of codes (M, K) and weights (O, K / 2): the even column's code in the low bits."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    m_in, n_in = m < M, n < O
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for start in range(0, K // 2, BK):
        k = start + tl.arange(0, BK)
        k_in = k < K // 2
        known = m_in[:, None] & k_in[None, :]
        at = x + m[:, None].to(tl.int64) * K + 2 * k[None, :]
        both = tl.load(w + n[None, :].to(tl.int64) * (K // 2) + k[:, None], mask=n_in[None, :] & k_in[:, None], other=0)
        low, high = (both << 4).to(tl.int8) >> 4, both >> 4
        total = tl.dot(tl.load(at, mask=known, other=0), low, total, out_dtype=tl.int32)
        total = tl.dot(tl.load(at + 1, mask=known, other=0), high, total, out_dtype=tl.int32)
    _finish(out, total, zero, sums, scale, bias, x_scale, m, n, m_in, n_in, O, FLOATS)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    zero: int,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    floats: tuple[float, torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A convolution of codes.

    Args:
        x: codes (N, H, W, C), int8, contiguous.
        weight: codes (O, KH, KW, C), int8, contiguous.
        sums: of each output's weights (O,), int32.
        zero: the code that stands for 0.
        geometry: stride, padding and dilation, of rows and columns each.
        floats: the scale of ``x``, those of the weights (O,) and the bias (O,), float32; without them integers come.
        dtype: of the output, where there are scales.

    Returns:
        (N, OH, OW, O): sums of products, of codes less their zero point, in int32; or scaled, with the bias.
    """
    (n, h, w, c), (o, kh, kw, _) = x.shape, weight.shape
    (sh, sw), (ph, pw), (dh, dw) = geometry
    oh, ow = (h + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (w + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    out = torch.empty(n, oh, ow, o, device=x.device, dtype=torch.int32 if floats is None else dtype)
    places = n * oh * ow
    x_scale, scale, bias = (1.0, sums, sums) if floats is None else floats
    grid = (triton.cdiv(places, ROWS), triton.cdiv(o, COLUMNS))
    launch: Any = _conv2d[grid]
    launch(
        x, weight, sums, scale, bias, out, x_scale, zero, places, h, w, c, oh, ow, o,
        KH=kh, KW=kw, SH=sh, SW=sw, PH=ph, PW=pw, DH=dh, DW=dw,
        FLOATS=floats is not None, BM=ROWS, BN=COLUMNS, BK=DEPTH,
    )  # fmt: skip
    return out


def linear4(
    x: torch.Tensor,
    packed: torch.Tensor,
    sums: torch.Tensor,
    zero: int,
    floats: tuple[float, torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A linear map of codes by 4-bit weights.

    Args:
        x: codes (M, K), int8, contiguous; K is even.
        packed: codes (O, K / 2), int8, two in each: the even column's in the low bits.
        sums: of each output's weights (O,), int32.
        zero: the code that stands for 0.
        floats: see :func:`conv2d`.
        dtype: of the output, where there are scales.

    Returns:
        (M, O), as of :func:`conv2d`.
    """
    (m, k), o = x.shape, len(packed)
    out = torch.empty(m, o, device=x.device, dtype=torch.int32 if floats is None else dtype)
    x_scale, scale, bias = (1.0, sums, sums) if floats is None else floats
    launch: Any = _linear4[triton.cdiv(m, ROWS), triton.cdiv(o, COLUMNS)]
    launch(
        x, packed, sums, scale, bias, out, x_scale, zero, m, o, k,
        FLOATS=floats is not None, BM=ROWS, BN=COLUMNS, BK=DEPTH,
    )  # fmt: skip
    return out
