"""Division of the loss into chunks of tokens and blocks of the vocabulary: numbers alone.

`ops/cross_entropy.py` follows the plan; the planner reads its memory and work from it.
"""

from typing import Literal, NamedTuple

LossType = Literal["nll", "dft"]

SMALL_LOGITS = 2**23  # elements, of all tokens: below this one block of all is the fastest
BLOCK_LOGITS = 2**26  # elements of one block of the vocabulary, of all tokens: 256 MiB
WHOLE_KERNEL = 5 * 2**26  # elements of a kernel that may be whole: with its gradient 1.9 GiB
WHOLE_LOGITS = 2**28  # elements of a chunk with all of the vocabulary: 1 GiB
SHORTEST_CHUNK = 2048  # tokens: shorter ones leave a matrix unit waiting for sums in memory
NARROW, NARROW_CHUNK = 1024, 1024  # below that width a step is short and the memory a CPU's
MOST_CHUNKS = 16
LANES = 128  # blocks are whole tiles of a matrix unit


class LossPlan(NamedTuple):
    """A division of one call, static. `block` is entries of each of the vocabulary's shards."""

    chunk: int  # tokens
    chunks: int
    block: int
    blocks: int
    z_loss: float
    whole_kernel: bool  # one block of all, whose gradients are made with its logits
    loss_type: LossType = "nll"


def plan_loss(
    tokens: int,
    width: int,
    vocab: int,
    *,
    shards: int = 1,
    z_loss: float = 0.0,
    block: int | None = None,
    compact: bool = True,
) -> LossPlan:
    """Divide the loss of so many tokens; arguments as `linear_cross_entropy` has them."""
    size = vocab // shards
    small = tokens * vocab <= SMALL_LOGITS
    whole_kernel = block is None and not z_loss and size * width <= WHOLE_KERNEL
    # Tokens that stay in place are one chunk.
    whole_kernel = whole_kernel and (compact or tokens * size <= WHOLE_LOGITS)
    if whole_kernel:
        part = size
    elif block is None:
        part = _even_block(size, 1 if small else -(-tokens * vocab // BLOCK_LOGITS))
    else:
        part = min(size, -(-block // shards))
    shortest = NARROW_CHUNK if width < NARROW else SHORTEST_CHUNK
    chunks = max(1, min(MOST_CHUNKS, tokens // shortest)) if compact and not small else 1
    chunk = -(-tokens // chunks)
    if whole_kernel and chunk * size > WHOLE_LOGITS:
        chunk = max(LANES, WHOLE_LOGITS // size // LANES * LANES)
    return LossPlan(chunk, -(-tokens // chunk), part, -(-size // part), z_loss, whole_kernel)


def _even_block(size: int, least: int) -> int:
    """Width of `least` blocks or up to twice as many: whole tiles, with the least overlap."""
    if least == 1:
        return size

    def width(blocks: int) -> int:
        return min(size, -(-size // (blocks * LANES)) * LANES)

    def overlap(blocks: int) -> int:
        return width(blocks) * -(-size // width(blocks)) - size

    return width(min(range(least, 2 * least), key=overlap))
