"""Two processes that see half of the devices each: load and export as one."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from children import environment
from golden.cases import tensors, write_folder
from safetensors.numpy import load_file

HOST = """
import sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtune.parallel import mesh as meshes
from jaxtune.hf import load
from jaxtune.hf.export import export_model
from jaxtune.hf.peft.merge import merged, merged_params
from jaxtune.model import decoder
from jaxtune.model.lora import Lora
from jaxtune.training.initial_weights import Adapters, first_adapters

port, process, source, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))

gathered = 0
gather = multihost_utils.process_allgather
def told(values, **options):
    global gathered
    gathered += sum(x.nbytes for x in jax.tree.leaves(values) if isinstance(x, np.ndarray))
    return gather(values, **options)
multihost_utils.process_allgather = told

read = 0
fetch = load.fetch
def counted(tensor, index):
    global read
    values = fetch(tensor, index)
    read += values.nbytes
    return values
load.fetch = counted

model = load.open_model(source)
mesh = meshes.make_mesh({"data": 1, "fsdp": 4, "tensor": 2, "context": 1})
abstract = decoder.abstract(model.spec, np.float32)
shardings = meshes.shardings(decoder.axes(model.spec), abstract, mesh)
params = load.load_params(model, shardings, np.float32)
export_model(Path(out), model=model, params=params, tokenizer=None, template=None, card="")
print("read", read)

lora, draw = Lora(r=2, alpha=4.0), np.random.default_rng(0)
made = decoder.abstract_adapters(model.spec, lora)
start = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), made)
where = meshes.shardings(decoder.adapter_axes(model.spec, lora), made, mesh)
adapters = first_adapters(model.spec, Adapters(lora, start), params, where, seed=0)
before, read = read, 0
params = merged_params(model, lora, adapters, shardings, np.float32)
assert read == before, (read, before)
assert gathered == 0, gathered
for folder, tree in (("merged", params), ("expected", merged(model, lora, start))):
    place = Path(out).with_name(folder)
    export_model(place, model=model, params=tree, tokenizer=None, template=None, card="")
"""


def test_each_host_reads_its_share_and_the_first_writes(tmp_path):
    """Adapters merged on the way too; nobody sends a whole array to the others."""
    source, out = write_folder("llama", tmp_path / "source"), tmp_path / "out"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, process, source, out],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(devices=1),
            cwd=Path(__file__).resolve().parents[2],
        )
        for process in ("0", "1")
    ]
    try:
        said = [host.communicate(timeout=120)[0] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], said
    assert {k: v.tobytes() for k, v in load_file(out / "model.safetensors").items()} == {
        k: v.tobytes() for k, v in tensors("llama").items()
    }
    # Half of what is sharded over the hosts, all of the few replicated norms.
    total = sum(values.nbytes for values in tensors("llama").values())
    norms = sum(values.nbytes for key, values in tensors("llama").items() if "norm" in key)
    shares = [int(text.split("read ")[-1].split()[0]) for text in said]
    assert max(shares) <= (total - norms) // 2 + norms
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for name, values in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
