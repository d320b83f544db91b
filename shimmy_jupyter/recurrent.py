"""The memory of sequences that does not grow with them: the states of recurrent layers."""

from __future__ import annotations

from collections.abc import Callable


def state_bytes(number: Callable[[str], int]) -> int:
    """Of each sequence of a model, 0 where it has no recurrent layer. `number` gives what its header has under
    a key of its architecture, 0 for nothing. An upper bound: as if all layers had a state.

    As `n_embd_r` and `n_embd_s` in llama.cpp's `llama-hparams.cpp`, in F32.
    """
    width, convolved = number("embedding_length"), max(0, number("ssm.conv_kernel") - 1)
    if head := number("wkv.head_size"):
        each = width * ((number("token_shift_count") or 2) + head)
    elif cached := number("shortconv.l_cache"):
        each = width * (cached - 1)
    elif head := number("kda.head_dim"):
        each = number("attention.head_count") * head * (3 * convolved + head)
    else:
        inner, state = number("ssm.inner_size"), number("ssm.state_size")
        each = convolved * (inner + 2 * number("ssm.group_count") * state) + inner * state
    return max(0, 4 * number("block_count") * each)
