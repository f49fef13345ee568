"""Plugins for other programs, one file each. Importing `peft_m2pt` imports none of them."""
