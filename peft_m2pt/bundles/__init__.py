"""
Bundles: a base model and an adapter in one folder, for programs that take a model name.

Built on the tuner and `saving`. Imported by tools and by the package itself.
"""
