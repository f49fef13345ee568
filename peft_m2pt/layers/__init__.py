"""
The layers that are put into a model, with the weights of adapters, and the initialization of prompts.

Built on `anatomy` and `attention`. Everything above may import it: hooks, saving, plan, model.
"""
