"""Instruction tuning of open language models with JAX.

The floor plan; imports only go down, siblings never import each other (`tests/test_floors.py`):

    floor 5  doors    train  preview  plan  convert  evaluate  chat  report     `jaxtune <door>`
    floor 4  talk  serving              a conversation in the terminal | over HTTP
             inference  answering       a model opened | and asked
             capacity                   how long a text it has room for
             samples                    a model asked while it is trained
             assemble  planning         a program made | what it costs
             loop  incident             steps and what is between | a step that went wrong
             rundir  beginning          where a run lies | and the step that it goes on from
             agreement                  whether all hosts are about to run the same
             evaluating                 a model measured, by group
             reporting  weights         a run, read and drawn | a model as a config wants it
    floor 3  learn    hf                the step and its state | the outside world's checkpoints
    floor 2  model                      the only room with `nn.Module`
    floor 1  data  ops  draw            numpy only | jnp only | numbers -> pictures
             mesh  collectives          who holds which slice | what devices do together
             hosts  watch               processes of a run | who is lost, who lags
             scoring  judge             what answers are worth | another model, asked which
    floor 0  config  command  spec  tree    a config read | argv and exits | what a model is | names
             knobs  aliases  methods        what can be set | elsewhere called | and follows from it
             untrusted  hub  stores     strangers' files, read with limits | models by their id |
             kept  lock                 objects at gs:// and s3:// URLs | what of them stays here
                                        one run at a time in a folder
             files  rows  memory        whole or not there | metrics.jsonl | of a device, used up

Importing this package imports nothing heavy.
"""

__version__ = "0.1.0"
