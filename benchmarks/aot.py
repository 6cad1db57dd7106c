"""The train step as the TPU compiler sees it, beside the figures of the best peer.

    pip install 'jaxtune[tpu]' && python benchmarks/aot.py [ROW ...] [--vmem] > table.md

No TPU is needed. Every row is one call of `python -m jaxtune.plan --json` (a minute or two of an
idle core, three to eight with the vmem flag; what was compiled before comes from plan's cache):
the whole step, parameters and Adam moments in f32, computation in bf16, FSDP over all chips but in
the row with an expert axis, packed rows. The peer is MaxText of August 2026, compiled by the same
compiler (libtpu 0.0.51, jax 0.12.0) for the same shapes and precision and read by the same rules:
counted loops (by the turns to expect, where they depend on the data), wire bytes by the ring
algorithm, time = the compiler's scheduled cycles + attention kernels at half of the peak + exposed
collectives over all links. Memory, FLOPs and bytes are exact; of the times only ratios mean much.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

from planned import ROOT, planned

WINDOWED = "--xla_jf_spmd_threshold_for_windowed_einsum_mib"
PLAIN = f"{WINDOWED}=1000000"  # no windowed einsum: the peer's best flag, and our default
VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"


class Peer(NamedTuple):
    """MaxText's figures of a chip: GiB, TFLOP, TFLOP, GB, GB, seconds of a step."""

    hbm: float
    matmul: float
    attention: float
    wire: float
    exposed: float
    step: float


class Row(NamedTuple):
    model: str  # a folder of configs/models
    topology: str
    length: int
    rows: int  # a chip
    remat: str
    peer: Peer
    vmem: bool = False  # the peer's best row of this shape has the flag
    expert: int = 1  # chips along mesh.expert, which the peer's row has not; the others along fsdp


ROWS = {
    "L8_v5e16_2048": Row("Llama-3.1-8B", "v5e-16", 2048, 4, "full",
        Peer(12.76, 452, 24.2, 55.4, 29.8, 3.694)),
    "L8_v5e256_8192": Row("Llama-3.1-8B", "v5e-256", 8192, 2, "full",
        Peer(10.69, 905, 193.5, 60.1, 33.4, 9.093)),
    "L8_v5p16_2048": Row("Llama-3.1-8B", "v5p-16", 2048, 8, "full",
        Peer(26.16, 905, 48.4, 51.9, 51.9, 3.146)),
    "L8_v5p16_2048_projections": Row("Llama-3.1-8B", "v5p-16", 2048, 8, "projections",
        Peer(64.16, 738, 48.4, 51.9, 51.9, 2.913)),
    "L8_v5p16_8192": Row("Llama-3.1-8B", "v5p-16", 8192, 2, "full",
        Peer(25.90, 905, 193.5, 51.9, 51.9, 3.827)),
    "Q06_v5e4_2048": Row("Qwen3-0.6B", "v5e-4", 2048, 4, "full",
        Peer(5.70, 35, 10.6, 9.5, 0.1, 0.564)),
    "Q06_v6e4_2048": Row("Qwen3-0.6B", "v6e-4", 2048, 4, "full",
        Peer(7.33, 35, 10.6, 3.0, 0.8, 0.225)),
    "Q30A3_v5p128_4096": Row("Qwen3-30B-A3B", "v5p-128", 4096, 4, "full",
        Peer(19.27, 151, 382.6, 239.3, 239.3, 3.594)),
    "Q30A3_v5p128_4096_expert4": Row("Qwen3-30B-A3B", "v5p-128", 4096, 4, "full",
        Peer(19.27, 151, 382.6, 239.3, 239.3, 3.594), expert=4),
    "L8_v5e16_2048_vmem": Row("Llama-3.1-8B", "v5e-16", 2048, 4, "full",
        Peer(12.76, 452, 24.2, 55.4, 29.8, 3.316), vmem=True),
    "L8_v5e16_8192_vmem": Row("Llama-3.1-8B", "v5e-16", 8192, 1, "full",
        Peer(12.75, 452, 96.8, 55.4, 29.8, 4.050), vmem=True),
    "L8_v6e16_2048_vmem": Row("Llama-3.1-8B", "v6e-16", 2048, 4, "full",
        Peer(12.81, 452, 24.2, 55.4, 55.4, 1.147), vmem=True),
    "L8_v6e16_8192_vmem": Row("Llama-3.1-8B", "v6e-16", 8192, 2, "full",
        Peer(16.80, 905, 193.5, 55.5, 55.5, 2.282), vmem=True),
}  # fmt: skip


def plan(row: Row) -> tuple[dict[str, Any], float]:
    """The object of `plan --json` and the seconds it took."""
    start = time.monotonic()
    found = planned(
        *("--topology", row.topology),
        *("--model_name_or_path", str(ROOT / "configs" / "models" / row.model)),
        *("--max_length", str(row.length), "--per_device_train_batch_size", str(row.rows)),
        *("--gradient_checkpointing", row.remat, "--mesh.expert", str(row.expert)),
        LIBTPU_INIT_ARGS=f"{PLAIN} {VMEM}" if row.vmem else PLAIN,
    )
    return found, time.monotonic() - start


def line(name: str, row: Row) -> str:
    """A line of the table: ours / the peer's."""
    found, seconds = plan(row)
    if not found["fits"]:
        return f"| {name} | does not fit: {found['hbm_bytes'] / 2**30:.2f} |"
    peer = row.peer
    pairs = [
        (found["hbm_bytes"] / 2**30, peer.hbm, 2),
        (found["matmul_flops"] / 1e12, peer.matmul, 0),
        (found["attention_flops"] / 1e12, peer.attention, 1),
        (found["collective_bytes"] / 1e9, peer.wire, 1),
        (found["collective_bytes_exposed"] / 1e9, peer.exposed, 1),
        (found["step_seconds"], peer.step, 3),
    ]
    cells = [f"{ours:,.{digits}f} / {theirs:,.{digits}f}" for ours, theirs, digits in pairs]
    least = f"{_least_wire(found) / 1e9:.1f}"
    return f"| {name} | {row.remat} | {' | '.join(cells)} | {least} | {seconds:.0f} |"


def _least_wire(found: dict[str, Any]) -> float:
    """Bytes a chip must send under FSDP with recomputation: all parameters gathered twice in bf16
    and their gradients scattered once."""
    chips = found["chips"]
    return 3 * 2 * found["trained_parameters"] * (chips - 1) / chips


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--vmem", action="store_true", help="rows with the slow flag too")
    asked = parser.parse_args()
    names = asked.rows or [name for name, row in ROWS.items() if asked.vmem or not row.vmem]
    print(
        "| row, ours / peer | remat | HBM GiB | matmul TFLOP | attention TFLOP | sent GB |"
        " of it exposed | step s, modelled | least to send GB | plan took s |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in names:
        print(line(name, ROWS[name]), flush=True)


if __name__ == "__main__":
    main()
