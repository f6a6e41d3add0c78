"""Chat templates by name, for `--chat-template NAME`: the layouts of known model families, with generation tags.

Each writes what the family's own template writes for system, user and assistant turns, and marks the assistant's part by
`{% generation %}`, so that the loss mask needs no guessing. None of them writes tool calls: a model that calls tools
brings its own template.
"""

from pathlib import Path

from ..rows import check_regular_file

# Qwen 2's layout, without its default system prompt. Needs <|im_start|> and <|im_end|> in the tokenizer.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

# For a base whose tokenizer has no special token but EOS: words mark the roles, EOS ends the assistant's turn.
PLAIN = """\
{%- for message in messages %}
{{- message['role'] | capitalize + ':' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- ' ' + message['content'] + eos_token }}
{%- endgeneration %}
{%- else %}
{{- ' ' + message['content'] }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'Assistant:' }}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Qwen 3 without tools. Thoughts stand in reasoning_content or in the content before </think>; only those after the last
# user turn are written, as in Qwen's own. enable_thinking=false closes an empty thought in the generation prompt.
QWEN3 = """\
{%- set ns = namespace(last_query=-1) %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{% set ns.last_query = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- set thought = '' %}
{%- if message.reasoning_content is string %}
{%- set thought = message.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- generation %}
{%- if loop.index0 > ns.last_query and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}
{{- content }}
{%- endif %}
{{- '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

# Mistral 7B Instruct: user and assistant in turn; a system prompt stands before the first user's words.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set ns.system = messages[0]['content'] + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' }}
{%- set ns.system = '' %}
{%- elif message['role'] == 'assistant' %}
{%- generation %}
{{- ' ' + message['content'] | trim + eos_token }}
{%- endgeneration %}
{%- else %}
{{- raise_exception('this layout knows one system turn at the start, user and assistant, not ' + message['role']) }}
{%- endif %}
{%- endfor %}"""

# Gemma 2 and 3, text only: the assistant is called model; a system prompt stands before the first user's words.
GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages and messages[0]['role'] == 'system' %}
{%- set ns.system = messages[0]['content'] | trim + '\\n\\n' %}
{%- set turns = messages[1:] %}
{%- else %}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message['role'] == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}
{{- message['content'] | trim + '<end_of_turn>' }}
{%- endgeneration %}
{%- else %}
{{- '<start_of_turn>' + message['role'] + '\\n' + ns.system + message['content'] | trim + '<end_of_turn>' }}
{%- set ns.system = '' %}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}"""

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "gemma": GEMMA, "plain": PLAIN,
}  # fmt: skip


def template_source(name: str) -> str:
    """The source of a named template, or of a file that holds one. Raises ValueError or OSError."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(
            f"chat template {name!r} is no file and none of the known names; choose {', '.join(TEMPLATES)}, or give a file"
        )
    check_regular_file(path)
    if path.stat().st_size > 4_000_000:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a chat template has at most 4,000,000")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte offset {error.start}); a chat template is a text file") from None
