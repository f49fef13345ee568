"""
The command `peft-m2pt`.

On top of everything: nothing imports it but the console script and `python -m peft_m2pt`.
"""
