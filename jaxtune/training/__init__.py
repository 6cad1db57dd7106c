"""The step and its state: from a batch and parameters to the next parameters.

`objectives` says what is minimised, `optim` how gradients become updates (`matrices` of which
leaves, by which rule), `schedules` how far, `partial` of what. `step` puts them into one pure
function and `program` compiles it for given devices. `checkpoint` and `metrics` are the only files
here that touch a disk. Nothing here knows text, tokenizers or file formats.
"""
