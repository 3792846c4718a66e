"""Mistral's chat formats as Jinja templates. Knows nothing about token ids or files.

Mistral publishes the formats as code (`mistral-common`) that encodes each part separately. Here the
control tokens between the parts have the same effect. v1 has no control tokens except `<s>` and
`</s>`: its markers are text. The templates do not support tools.
"""

_ROLES = """
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{%- set system = messages | selectattr('role', 'equalto', 'system')
                          | map(attribute='content') | select | join('\\n\\n') -%}
"""

_CHECK = """
{%- if turn.content is not string -%}
  {{- raise_exception('This chat format takes messages whose content is text.') -}}
{%- elif turn.role not in ['system', 'user', 'assistant'] -%}
  {{- raise_exception('This chat format knows system, user and assistant messages; got ' + turn.role + '.') -}}
{%- elif turn.role == 'assistant' and not turn.content -%}
  {{- raise_exception('An assistant message of this chat format cannot be empty.') -}}
{%- endif -%}
"""  # noqa: E501  (one message, one line)

_V1 = (
    _ROLES
    + """
{{- bos_token -}}
{%- for turn in turns -%}"""
    + _CHECK
    + """
  {%- if turn.role == 'user' -%}
    {%- if loop.first and system -%}
      {{- '[INST] ' + system + '\\n\\n' + turn.content + ' [/INST]' -}}
    {%- else -%}
      {{- '[INST] ' + turn.content + ' [/INST]' -}}
    {%- endif -%}
  {%- else -%}
    {{- ' ' + turn.content + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
)

# The system prompt comes before the last user message.
_V3 = (
    _ROLES
    + """
{%- set users = turns | selectattr('role', 'equalto', 'user') | list -%}
{%- set seen = namespace(users=0) -%}
{{- bos_token -}}
{%- for turn in turns -%}"""
    + _CHECK
    + """
  {%- if turn.role == 'user' -%}
    {%- set seen.users = seen.users + 1 -%}
    {{- '[INST]' -}}
    {%- if system and seen.users == users | length -%}{{- system + '\\n\\n' -}}{%- endif -%}
    {{- turn.content + '[/INST]' -}}
  {%- else -%}
    {{- turn.content.rstrip(' ') + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
)

_V7 = (
    """
{{- bos_token -}}
{%- for turn in messages -%}"""
    + _CHECK
    + """
  {%- if turn.role == 'system' -%}
    {{- '[SYSTEM_PROMPT]' + turn.content + '[/SYSTEM_PROMPT]' -}}
  {%- elif turn.role == 'user' -%}
    {{- '[INST]' + turn.content + '[/INST]' -}}
  {%- else -%}
    {{- turn.content.rstrip(' ') + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
)

# By tokenizer version. v2 and v3, and v7 to v13, differ only in how they write tools.
CHAT_TEMPLATES = {"v1": _V1, "v2": _V3, "v3": _V3, "v7": _V7, "v11": _V7, "v13": _V7}
