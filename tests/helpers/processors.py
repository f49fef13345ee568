"""A processor for the tiny LLaVA of `models`."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from helpers.models import IMAGE_TOKEN, VOCAB_SIZE


COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (40, 60, 220)}
WORDS = ["USER:", "ASSISTANT:", *COLOURS, "which", "colour", "is", "it", "say", "not", "the", "word", "what"]

# The conversation format of LLaVA 1.5, with what TRL asks for to find the answers.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() }}:{{ ' ' }}
{%- if message['role'] == 'assistant' -%}{%- generation -%}
{%- for part in message['content'] -%}{{ part['text'] }}{%- endfor -%}{{ ' ' + eos_token }}
{%- endgeneration -%}
{%- else -%}
{%- for part in message['content'] -%}
{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{{ 'ASSISTANT: ' if add_generation_prompt }}"""


def make_processor(chat_template=CHAT_TEMPLATE):
    """Every word is a token."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    vocabulary |= {word: 4 + i for i, word in enumerate(WORDS)}
    vocabulary |= {f"<{i}>": i for i in range(4 + len(WORDS), VOCAB_SIZE) if i != IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return LlavaProcessor(
        # The PIL backend needs no torchvision.
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **special
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
