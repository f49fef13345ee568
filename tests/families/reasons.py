"""Why a family lacks something: parts of error messages, and reasons that only the documentation gives."""

# Of `refused`: what the error says.
BYPASSES = "bypasses the attention interface"
NO_ENCODER_FOUND = "No vision encoder was found"
NO_DECODER_FOUND = "No language model was found"
UNKNOWN_ARGUMENTS = "which M2PT does not know how to set for prompts"
NOT_BEHIND_NORM = "neither the layer's input nor the output of a norm"
MIXES = "mixes neighbouring tokens with a convolution"
NO_SELF_ATTENTION = "no layer with self-attention"

# Of `connector`.
POOLS = "its connector pools all features into a fixed number of tokens"
BY_SIZE = "its connector merges patches by image size"
BETWEEN_BY_SIZE = "the layers between the towers merge patches by image size"
QFORMER = "there is a Q-Former between the towers"
RESAMPLER = "its connector is a resampler, whose own queries read the features"
RESAMPLER_BETWEEN = "there is a resampler between the towers"
APART = "the towers do not feed each other"
CROSS_ATTENTION = "the decoder reads the encoder's output by cross-attention"
NO_LANGUAGE_MODEL = "no language model"
NO_VISUAL = "no visual prompts"
NO_TEXTUAL = "no textual prompts"

# Of `fails_in`.
NO_IMAGE_OUTPUTS = "its forward pass reads `image_outputs` of its language model, which has none"

# Of `without`: true of the model without M2PT, or with any adapter.
EAGER_TOKENIZER = "transformers has no sdpa for its image or audio tokenizer, and so not for the model"
NO_SDPA = "transformers has no sdpa for it"
SHARED_KEYS = "keys shared between layers lose their gradients under reentrant checkpointing, with any adapter"
BY_KEYWORD = (
    "its vision layers take their input by keyword, which reentrant checkpointing cannot track, with any adapter"
)
IN_PLACE = "transformers changes its embeddings in place, which its own checkpointing hook forbids"
FAILS = "transformers fails under checkpointing, with any adapter"
NO_CHECKPOINTING = "transformers has no checkpointing for it"
UNTUNED_CACHE = "generation with and without a cache differ in the untuned model too"
UNTUNED_PADDING = "padding changes the untuned model too"
OTHER_KEYS = "its layers read keys from elsewhere than their input"
COUNTS_PADDING = "it counts left padding as positions, and prompts precede these"
SEES_AHEAD = "outside training, its text attention is bidirectional, so tokens see later ones"
