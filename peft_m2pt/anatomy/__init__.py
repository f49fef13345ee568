"""
Reads a model, and changes nothing: where its parts are, and what their code does.

Imports the ground floor, `config` and `upstream`; everything above imports it.
"""
