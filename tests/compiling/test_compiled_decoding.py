"""Steps that are compiled between steps that are not, with prompts in front of the tokens in a cache."""

import torch
from helpers.decoding import assert_equal, batch, config_of, feed, filled
from helpers.text_models import make, on_cache, outputs
from transformers import DynamicCache


@torch.no_grad()
def test_compiled_on_top_of_eager_tokens():
    """A compiled step finds views in the cache, adds the rows that it keeps, and is not compiled for each token."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, ids = make(), batch()
    step = torch.compile(model, backend=backend)

    def run(call):
        cache = DynamicCache(config=config_of(model))
        parts = [feed(model, cache, ids, 0, 6, 7, 8, 9)]
        for start in range(9, 13):
            parts.append(outputs(call, input_ids=ids[:, start : start + 1], **on_cache(model, cache)))
            if start == 11:
                num_graphs = len(graphs)
        assert len(graphs) == num_graphs
        return torch.cat(parts, dim=1)

    assert_equal(run(step), run(model))
    torch._dynamo.reset()


@torch.no_grad()
def test_attention_that_is_compiled_in_between():
    """Inside of a graph, a cache joins tokens alone."""
    model, ids = make(), batch()
    expected = feed(model, filled(model, ids), ids, 9, 10, 11)
    cache = filled(model, ids)
    for attention in [layer.self_attn for layer in model.get_base_model().model.layers]:
        attention.forward = torch.compile(attention.forward, backend="eager")
    actual = feed(model, cache, ids, 9, 10, 11)
    assert cache.get_seq_length() == 11
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
