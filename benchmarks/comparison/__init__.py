"""
What is learned on a model with pretrained towers: M2PT beside other methods, under one budget.

A run is one method at one learning rate from one seed. It writes one file of JSON, and is not done again where that
file is. See `benchmarks/README.md`.
"""
