"""Where a layer's masked weight comes from, if the layer does not make it by itself.

`group` masks many layers in one launch, `deferral` keeps what an optimizer's step has made, `reuse`
keeps a masked weight for several forwards.
"""
