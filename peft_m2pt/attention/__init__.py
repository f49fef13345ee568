"""
What happens at the attention function of a module with prompts; `interface.py` describes the whole journey.

Imports `anatomy` and the modules below it, and knows nothing of layers, which import it.
"""
