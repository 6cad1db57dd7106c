"""The decoder as pure functions over a tree of parameters; the only room with `nn.Module`.

linen serves inside this room, through `init` and `apply`; everybody else sees `decoder.forward`,
`decoder.init` and friends, and dicts of arrays. This room never learns about text, losses or files.
"""
