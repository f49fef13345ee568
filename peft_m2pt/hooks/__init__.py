"""
Hooks that are registered on a model beside its layers. Each belongs to a layer, which removes it.

Built on `layers` and below. Only `model.py` imports it, for `install_hooks`.
"""
