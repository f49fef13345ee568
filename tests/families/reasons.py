"""Why a family does without something: parts of messages of the package, and what only the documentation says."""

# Of `refused`: what the error says.
GOES_ROUND = "goes round the attention interface"
NO_ENCODER_FOUND = "No vision encoder was found"
NO_DECODER_FOUND = "No language model was found"
UNKNOWN_ARGUMENTS = "which M2PT does not know how to set for prompts"
NOT_BEHIND_NORM = "neither the layer's input nor the output of a norm"
MIXES = "mixes neighbouring tokens with a convolution"
NO_SELF_ATTENTION = "no layer with self-attention"

# Of `connector`.
POOLS = "its connector pools all features into a fixed number of tokens"
BY_SIZE = "its connector merges patches by the size of the image"
BETWEEN_BY_SIZE = "what stands between the towers merges patches by the size of the image"
QFORMER = "a Q-Former stands between the towers"
RESAMPLER = "its connector is a resampler: queries of its own read the features"
RESAMPLER_BETWEEN = "a resampler stands between the towers"
APART = "the towers do not feed each other"
CROSS_ATTENTION = "the decoder reads the encoder's output by cross-attention"
NO_LANGUAGE_MODEL = "no language model"
NO_VISUAL = "no visual prompts"
NO_TEXTUAL = "no textual prompts"

# Of `fails_in`.
NO_IMAGE_OUTPUTS = "its forward pass reads `image_outputs` of its language model, which has none"

# Of `without`: what is true of the model without M2PT, or with any adapter.
EAGER_TOKENIZER = "transformers has no sdpa for its tokenizer of images or sounds, and so for the whole model"
NO_SDPA = "transformers has no sdpa for it"
SHARED_KEYS = "keys shared between layers lose their gradients under reentrant checkpointing, with any adapter"
BY_KEYWORD = (
    "its vision layers get their input by keyword, which reentrant checkpointing does not follow, with any adapter"
)
IN_PLACE = "transformers adds to its embeddings in place, which its own checkpointing hook forbids"
FAILS = "transformers fails under checkpointing, with any adapter"
NO_CHECKPOINTING = "transformers has no checkpointing for it"
UNTUNED_CACHE = "generation with and without a cache differ in the untuned model too"
UNTUNED_PADDING = "padding changes the untuned model too"
OTHER_KEYS = "its layers read keys that are not of their input"
COUNTS_PADDING = "it counts padding on the left as positions, and the prompts stand in front of these"
SEES_AHEAD = "outside of training, its text is seen in both directions, so one pass shows tokens what comes later"
