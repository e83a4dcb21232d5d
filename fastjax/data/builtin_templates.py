"""Chat templates for tokenizers that have none, with assistant turns marked.

They render in the environment of Hugging Face tokenizers, where the newline after a
block tag is dropped: newlines that count stand before a tag or in an expression.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BuiltinTemplate:
    """A chat template and what a tokenizer needs for it.

    Attributes:
      source: Jinja.
      control_tokens: Must be single tokens of the vocabulary.
      end_of_turn: Token that ends an assistant turn; None takes the tokenizer's EOS.
    """

    source: str
    control_tokens: tuple[str, ...] = ()
    end_of_turn: str | None = None


# What a template would leave out it refuses.
_REFUSE_TOOLS = """\
{% if message['tool_calls'] or message['role'] == 'tool' %}
{{ raise_exception('this chat template has no tool calls') }}{% endif %}
"""
_REFUSE_LATE_SYSTEM = """\
{% if message['role'] == 'system' and not loop.first %}
{{ raise_exception('this chat template takes a system message first only') }}{% endif %}
"""

_LLAMA_3 = (
    """\
{{ bos_token }}{% for message in messages %}
"""
    + _REFUSE_TOOLS
    + """\
<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}
{% else %}
{{ message['content'] | trim }}<|eot_id|>{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"""
)

# Of Llama 3.1 to 3.3: a system turn that always tells the dates.
_LLAMA_3_1 = (
    """\
{% set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' \
else '' %}
{% set date = date_string if date_string is defined else '26 Jul 2024' %}
{{ bos_token }}<|start_header_id|>system<|end_header_id|>{{ '\\n\\n' -}}
{{ 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date + '\\n\\n' -}}
{{ system | trim }}<|eot_id|>
{%- for message in messages %}
"""
    + _REFUSE_TOOLS
    + _REFUSE_LATE_SYSTEM
    + """\
{% if message['role'] == 'assistant' %}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}
{%- generation %}{{ message['content'] | trim }}<|eot_id|>{% endgeneration %}
{% elif message['role'] != 'system' %}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' -}}
{{ message['content'] | trim }}<|eot_id|>{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"""
)

_CHATML = (
    """\
{% for message in messages %}
"""
    + _REFUSE_TOOLS
    + """\
<|im_start|>{{ message['role'] }}{{ '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}
{% else %}
{{ message['content'] }}<|im_end|>{% endif %}
{{ '\\n' }}{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant{{ '\\n' }}{% endif %}"""
)

_QWEN_2_5 = (
    """\
{% if not messages or messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful \
assistant.<|im_end|>\\n' }}{% endif %}
"""
    + _CHATML
)

_MISTRAL = (
    """\
{{ bos_token }}{% for message in messages %}
"""
    + _REFUSE_TOOLS
    + _REFUSE_LATE_SYSTEM
    + """\
{% if message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
{% elif message['role'] == 'user' %}
{% set before = messages[loop.index0 - 1] if loop.index0 > 0 else message %}
{% set system = before['content'] + '\\n\\n' if before['role'] == 'system' else '' %}
{{ '[INST] ' + system + message['content'] + ' [/INST]' }}{% endif %}
{% endfor %}"""
)

_ALPACA = (
    """\
{% set preamble = 'Below are some instructions that describe some tasks. Write \
responses that appropriately complete each request.' %}
{% if messages and messages[0]['role'] == 'system' %}
{% set preamble = messages[0]['content'] %}{% endif %}
{{ bos_token if bos_token else '' }}{{ preamble + '\\n\\n' }}
{%- for message in messages %}
"""
    + _REFUSE_TOOLS
    + _REFUSE_LATE_SYSTEM
    + """\
{% if message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'assistant' %}
{{ '### Response:\\n' }}
{%- generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{{ '\\n\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""
)

BUILTIN_TEMPLATES = {
    "llama-3": BuiltinTemplate(
        source=_LLAMA_3,
        control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "llama-3.1": BuiltinTemplate(
        source=_LLAMA_3_1,
        control_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        end_of_turn="<|eot_id|>",
    ),
    "chatml": BuiltinTemplate(
        source=_CHATML,
        control_tokens=("<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
    ),
    "qwen-2.5": BuiltinTemplate(
        source=_QWEN_2_5,
        control_tokens=("<|im_start|>", "<|im_end|>"),
        end_of_turn="<|im_end|>",
    ),
    "mistral": BuiltinTemplate(source=_MISTRAL),
    "alpaca": BuiltinTemplate(source=_ALPACA),
}
