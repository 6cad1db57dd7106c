"""The processes of a run: how they find each other, which one writes, what they agree on.

One process is the usual case and starts without a wait: a cluster is looked for only where the
environment describes one. Knows no model and no data. Host 0 writes files and messages; all of them
compute.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import ConfigError, HostsConfig

_TEXT = 1024  # bytes of a text that hosts exchange
_RECEIVE_SECONDS = 60  # between two looks
_JOIN_SECONDS = 300  # machines of a pod do not boot at the same moment


LATE = (
    "the other processes of the run did not join within five minutes, or the first of them ended "
    "meanwhile. Start the same command on all hosts."
)


def start(hosts: HostsConfig, before: Callable[[], None] = lambda: None) -> None:
    """Join the other processes of the run, if there are several, after a call of `before`.

    Call it before JAX looks for devices; a second call does nothing. Raises `ConfigError`
    when the others cannot be found; JAX may abort() instead, for which `LATE` is the reason.
    """
    settings = _settings(hosts)
    if not settings and not detected():
        return
    import jax

    if jax.distributed.is_initialized():
        return
    # The devices of a CPU have no network of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    before()
    try:
        jax.distributed.initialize(
            **settings,
            heartbeat_timeout_seconds=hosts.heartbeat_timeout_seconds,
            initialization_timeout=_JOIN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        where = settings.get("coordinator_address", "the cluster that the environment describes")
        raise ConfigError(
            f"hosts: process {settings.get('process_id', '?')} of "
            f"{settings.get('num_processes', '?')} "
            f"could not join {where}: {str(error).splitlines()[0]} Every process gets the same "
            "hosts.coordinator_address (HOST:PORT of process 0) and hosts.num_processes, and its "
            "own hosts.process_id from 0; all start within five minutes.",
            passes=isinstance(error, RuntimeError),
        ) from None


def _settings(hosts: HostsConfig) -> dict[str, Any]:
    """Read what flags or JAX's variables set. Raises `ConfigError` for a part of it."""
    environment: Mapping[str, str] = os.environ
    address = hosts.coordinator_address or environment.get("JAX_COORDINATOR_ADDRESS")
    count, own = hosts.num_processes, hosts.process_id
    if count is None and "JAX_NUM_PROCESSES" in environment:
        count = int(environment["JAX_NUM_PROCESSES"])
    if own is None and "JAX_PROCESS_ID" in environment:
        own = int(environment["JAX_PROCESS_ID"])
    fields = {"coordinator_address": address, "num_processes": count, "process_id": own}
    known = {name: value for name, value in fields.items() if value is not None}
    if not known or (count == 1 and own in (None, 0)):
        return {}
    if len(known) < len(fields) and not detected():
        missing = ", ".join(f"hosts.{name}" for name in fields if name not in known)
        raise ConfigError(f"hosts: {missing} is not set, and no cluster is here to say it.")
    if count is not None and own is not None and not 0 <= own < count:
        raise ConfigError(f"hosts.process_id: {own} of {count}; expected 0 to {count - 1}.")
    return known


def detected(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> bool:
    """Test if JAX will find a cluster of several processes here, without the network.

    SLURM and Open MPI say how many they are, SLURM where srun has started them: an allocation alone
    has one process, whatever it may hold. A TPU machine is asked only where it has TPUs that
    are used: `jax.distributed` takes the rest from the machine's metadata, or from what GKE sets.
    """
    environment = os.environ if environment is None else environment
    by_srun = "SLURM_STEP_NODELIST" in environment
    counts = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if by_srun else ()
    for name in (*counts, "OMPI_COMM_WORLD_SIZE"):
        if name in environment:
            return int(environment[name]) > 1
    if environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return True
    workers = environment.get("TPU_WORKER_HOSTNAMES") or environment.get("TPU_PROCESS_ADDRESSES")
    if workers is not None:
        return "," in workers
    platforms = environment.get("JAX_PLATFORMS", "tpu").split(",")
    has_tpus = any(any(devices.glob(name)) for name in ("accel[0-9]*", "vfio/[0-9]*"))
    return "tpu" in platforms and has_tpus and _is_google(devices)


def _is_google(devices: Path) -> bool:
    """Test if this is a TPU VM, and no other machine with devices under /dev/vfio."""
    try:
        import libtpu  # noqa: F401
    except ImportError:
        return False
    product = devices.parent / "sys" / "class" / "dmi" / "id" / "product_name"
    try:
        return "Google" in product.read_text(encoding="utf-8")
    except OSError:
        return False


# -- what they know of each other ----------------------------------------------------------------


def _joined() -> Any | None:
    """Return JAX's state of the cluster, None for a process that is alone; finds no devices."""
    if "jax" not in sys.modules:
        return None
    # Not public, and the only way to the key-value store; Orbax takes it from here too.
    from jax._src import distributed

    state = distributed.global_state
    return state if state.client is not None and (state.num_processes or 1) > 1 else None


def index() -> int:
    state = _joined()
    return 0 if state is None else int(state.process_id)


def count() -> int:
    state = _joined()
    return 1 if state is None else int(state.num_processes)


def store() -> Any | None:
    """Return the key-value store on host 0 that all hosts reach, None for a process alone."""
    state = _joined()
    return None if state is None else state.client


def is_first() -> bool:
    return index() == 0


def gather_texts(text: str) -> list[str]:
    """Gather each host's text, by host; all must call. Long texts are cut."""
    if count() == 1:
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    own = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(own, np.uint8))
    texts = (row.tobytes().rstrip(b"\0") for row in np.asarray(rows).reshape(count(), _TEXT))
    return [text.decode(errors="replace") for text in texts]


def publish(name: str, text: str = "") -> None:
    """Publish `text` to the others under a `name` that this host uses once.

    Any thread may call: no device takes part.
    """
    if (shared := store()) is not None:
        shared.key_value_set(_key(name, index()), text)


def receive(name: str, host: int) -> str:
    """Wait for what `host` publishes under `name`, as long as that host lives.

    One that ends with an error ends this one too, by `heartbeat`.
    """
    shared = store()
    assert shared is not None, "alone"
    while True:
        try:
            milliseconds = 1000 * _RECEIVE_SECONDS
            return str(shared.blocking_key_value_get(_key(name, host), milliseconds))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _key(name: str, host: int) -> str:
    return f"jaxtune/said/{name}/{host}"


def wait(name: str) -> None:
    """Wait until all hosts are here."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def on_first(act: Callable[[], None], name: str) -> None:
    """Call `act()` on host 0, while the others wait."""
    if is_first():
        act()
    wait(name)


def check_shared(folder: Path) -> None:
    """Raise `ConfigError` on every host unless all of them see what host 0 writes in `folder`."""
    if count() == 1:
        return
    path = folder / ".seen-by-all-hosts"
    secret = gather_texts(secrets.token_hex(8))[0]
    on_first(lambda: _write(path, secret), "shared folder")
    try:
        seen = path.read_text(encoding="utf-8") == secret
    except OSError:
        seen = False
    blind = [str(host) for host, text in enumerate(gather_texts("" if seen else "blind")) if text]
    on_first(lambda: path.unlink(missing_ok=True), "shared folder seen")
    if blind:
        raise ConfigError(
            f"output_dir {folder}: host {', '.join(blind)} of {count()} does not see what host 0 "
            "writes there. All hosts write their part of a checkpoint: choose a folder on storage "
            "that they share."
        )


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
