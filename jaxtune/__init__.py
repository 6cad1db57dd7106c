"""Instruction tuning of open language models with JAX.

The floor plan; imports only go down, siblings never import each other (`tests/test_floors.py`):

    floor 5  doors    train  preview  plan  convert  evaluate  chat  report     `jaxtune <door>`
    floor 4  inference  samples         a model asked | and while it is trained
             assemble  planning         a program made | what it costs
             loop  incident             steps and what is between | a step that went wrong
             reporting  weights         a run, read and drawn | a model as a config wants it
    floor 3  learn    hf                the step and its state | the outside world's checkpoints
    floor 2  model                      the only room with `nn.Module`
    floor 1  data  ops  draw            numpy only | jnp only | numbers -> pictures
             mesh  collectives          who holds which slice | what devices do together
             hosts  watch               processes of a run | who is lost, who lags
    floor 0  config  command  spec  tree    knobs | argv and exit codes | what a model is | names
             untrusted  hub  stores     strangers' files, read with limits | models by their id |
                                        objects at gs:// and s3:// URLs

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
