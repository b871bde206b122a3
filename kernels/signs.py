"""Device functions that keep which numbers of a matrix are positive, a bit each.

A word of 16 bits stands for 16 of 64 neighbouring columns, four words for all of them: word q holds the columns
8 j + 2 q + e, j < 8, e < 2. These are what one thread has of a row of a product on Hopper's tensor cores, so that
neither packing nor unpacking moves anything between threads.
"""
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def bit_places():
    """Places of the 16 bits of a word, for columns as (64s, 8, 4, 2)."""
    j = tl.arange(0, 8)[None, None, :, None, None]
    e = tl.arange(0, 2)[None, None, None, None, :]
    return 2 * j + e


@triton.jit
def pack_signs(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which numbers of x (ROWS, COLUMNS) are positive, as words (ROWS, COLUMNS / 16) int16; whole 64s of columns."""
    bits = tl.reshape((x > 0).to(tl.int32), (ROWS, COLUMNS // 64, 8, 4, 2)) << bit_places()
    return tl.reshape(tl.sum(tl.sum(bits, axis=4), axis=2), (ROWS, COLUMNS // 16)).to(tl.int16)


@triton.jit
def unpack_signs(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The (ROWS, COLUMNS) bool that `pack_signs` made words of."""
    words = tl.reshape(words.to(tl.int32), (ROWS, COLUMNS // 64, 1, 4, 1))
    return tl.reshape((words >> bit_places()) & 1, (ROWS, COLUMNS)) != 0


@triton.jit
def sign_words(first, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr):
    """Places of a tile's words in rows of WORDS, and which of them there are."""
    word = column // 16 + tl.arange(0, COLUMNS // 16)
    return first.to(tl.int64) * WORDS + tl.arange(0, ROWS)[:, None] * WORDS + word[None, :], (word < WORDS)[None, :]
