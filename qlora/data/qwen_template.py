"""The layout of Qwen3's conversations: ChatML with thoughts, tools, tool calls and their results.

A thought stands before the answer that it led to, as `reasoning_content` of the message or inside its content. It is
shown for answers behind the last question, and left out of earlier ones. The last answer always has the place of a
thought: an empty one if there was none, which `enable_thinking: false` puts into the prompt instead.
"""

# What the model was trained to read about its tools, to the letter.
_TOOLS = """\
{%- if tools %}
{%- set about.system = about.system + '# Tools\\n\\nYou may call one or more functions ' %}
{%- set about.system = about.system + 'to assist with the user query.' %}
{%- set about.system = about.system + '\\n\\nYou are provided with function signatures within ' %}
{%- set about.system = about.system + '<tools></tools> XML tags:\\n<tools>' %}
{%- for tool in tools %}
{%- set about.system = about.system + '\\n' + tool | tojson %}
{%- endfor %}
{%- set about.system = about.system + '\\n</tools>\\n\\nFor each function call, return a json object with ' %}
{%- set about.system = about.system + 'function name and arguments within <tool_call></tool_call> XML tags:\\n' %}
{%- set about.system = about.system + '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}' %}
{%- set about.system = about.system + '\\n</tool_call>' %}
{%- endif %}
"""

_SYSTEM = (
    """\
{%- set about = namespace(system='', asked=messages | length - 1) %}
{%- set begins = messages[0]['role'] == 'system' %}
{%- if begins %}
{%- set about.system = messages[0]['content'] + ('\\n\\n' if tools else '') %}
{%- endif %}
"""
    + _TOOLS
    + """\
{%- if begins or tools %}
{{- '<|im_start|>system\\n' + about.system + '<|im_end|>\\n' }}
{%- endif %}
"""
)

# The last question: what a user said, and not a tool in a user's place.
_QUESTION = """\
{%- for message in messages %}
{%- if message['role'] == 'user' and message['content'] is string %}
{%- set text = message['content'] %}
{%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
{%- set about.asked = loop.index0 %}
{%- endif %}
{%- endif %}
{%- endfor %}
"""

_ANSWER = """\
{%- set thought, said = '', content %}
{%- if message['reasoning_content'] is string %}
{%- set thought = message['reasoning_content'] %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set said = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > about.asked and (loop.last or thought) %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + said.lstrip('\\n') }}
{%- else %}
{{- said }}
{%- endif %}
{%- for call in message['tool_calls'] or [] %}
{%- set called = call['function'] or call %}
{%- set given = called['arguments'] %}
{{- '\\n' if said or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + called['name'] + '", "arguments": ' }}
{{- (given if given is string else given | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
"""

# Results of tools stand together in a user's place.
_RESULT = """\
{{- '<|im_start|>user' if loop.first or loop.previtem['role'] != 'tool' else '' }}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or loop.nextitem['role'] != 'tool' else '' }}
"""

QWEN_3 = (
    _SYSTEM
    + _QUESTION
    + """\
{%- for message in messages %}
{%- set content = message['content'] if message['content'] is string else '' %}
{%- if message['role'] == 'assistant' %}
"""
    + _ANSWER
    + """\
{%- elif message['role'] == 'tool' %}
"""
    + _RESULT
    + """\
{%- elif message['role'] == 'user' or not loop.first %}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking else '' }}
{%- endif %}
"""
)
