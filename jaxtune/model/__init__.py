"""The decoder as pure functions over a tree of parameters; the only package with `nn.Module`.

linen serves inside this package, through `init` and `apply`; everybody else sees `decoder.forward`,
`decoder.init` and friends, and dicts of arrays. It never learns about text, losses or files.
"""
