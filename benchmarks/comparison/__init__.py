"""
What methods learn and forget on vision-language models: M2PT beside others, under one budget.

A run is one method at one learning rate from one seed. It writes one file of JSON, and is not done again where that
file is. See `benchmarks/README.md` and `PLAN.md`.
"""
