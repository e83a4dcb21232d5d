"""The Modelfile that makes a GGUF file a model of Ollama.

Format: github.com/ollama/ollama, docs/modelfile. Its templates are Go's, so a Jinja
template cannot be copied: a known one is chosen that renders a probe alike.
"""

import dataclasses
from collections.abc import Callable, Sequence

from fastjax.data.examples import Conversation, Message

Render = Callable[[Conversation], str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """Text around the turns of a chat; `{}` stands for what is said.

    Attributes:
      system: A system turn; empty when the system's text stands in the user's turn.
      user: A user's turn.
      reply: The assistant's turn; what stands before `{}` asks for an answer.
    """

    system: str = ""
    user: str
    reply: str

    def rendered(self, *said: str) -> str:
        """Returns the text of turns that end with the user's and ask for an answer."""
        turns = [
            (self.reply if place % 2 else self.user).replace("{}", text)
            for place, text in enumerate(said)
        ]
        return "".join(turns) + self.reply.partition("{}")[0]

    def go_template(self) -> str:
        """Returns the same as a template of Ollama."""
        user = self.user.replace("{}", "{{ .Prompt }}")
        if self.system:
            system = self.system.replace("{}", "{{ .System }}")
            system = f"{{{{ if .System }}}}{system}{{{{ end }}}}"
        else:
            system = ""
            inner = "{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"
            user = self.user.replace("{}", inner)
        reply = self.reply.replace("{}", "{{ .Response }}")
        return f"{system}{{{{ if .Prompt }}}}{user}{{{{ end }}}}{reply}"


_HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n{{}}<|eot_id|>"
_IM = "<|im_start|>{role}\n{{}}<|im_end|>\n"
_GEMMA = "<start_of_turn>{role}\n{{}}<end_of_turn>\n"
_PHI = "<|{role}|>\n{{}}<|end|>\n"
CHAT_FORMATS = {
    "llama-3": ChatFormat(
        system=_HEADER.format(role="system"),
        user=_HEADER.format(role="user"),
        reply=_HEADER.format(role="assistant"),
    ),
    "chatml": ChatFormat(
        system=_IM.format(role="system"),
        user=_IM.format(role="user"),
        reply=_IM.format(role="assistant"),
    ),
    "gemma": ChatFormat(
        user=_GEMMA.format(role="user"), reply=_GEMMA.format(role="model")
    ),
    "phi-3": ChatFormat(
        system=_PHI.format(role="system"),
        user=_PHI.format(role="user"),
        reply=_PHI.format(role="assistant"),
    ),
    "mistral": ChatFormat(user="[INST] {} [/INST]", reply=" {}</s>"),
    "mistral-v3": ChatFormat(user="[INST] {}[/INST]", reply=" {}</s>"),
    "mistral-v7": ChatFormat(
        system="[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]",
        user="[INST]{}[/INST]",
        reply="{}</s>",
    ),
}
_SAID = ("What is two and two?", "Four.", "And three?")


def matching_format(render: Render) -> str | None:
    """Returns the name of the format that a chat template writes, if it is known.

    Args:
      render: Renders a conversation and asks for an answer.
    """
    roles = ("user", "assistant", "user")
    messages = tuple(
        Message({"role": role, "content": text})
        for role, text in zip(roles, _SAID, strict=True)
    )
    text = render(Conversation(messages=messages)).rstrip()
    for name, known in CHAT_FORMATS.items():
        if text.endswith(known.rendered(*_SAID).rstrip()):
            return name
    return None


def modelfile(
    base: str, *, format_name: str | None, stops: Sequence[str], adapter: str = ""
) -> str:
    """Returns the text of a Modelfile.

    Args:
      base: GGUF file beside it, or the name of a model of Ollama.
      format_name: Key of `CHAT_FORMATS`; None leaves the template to Ollama.
      stops: Texts that end an answer.
      adapter: GGUF file of an adapter on `base`.
    """
    lines = [f"FROM {base}"]
    lines += [f"ADAPTER {adapter}"] if adapter else []
    if format_name is not None:
        lines.append(f'TEMPLATE """{CHAT_FORMATS[format_name].go_template()}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    return "\n".join(lines) + "\n"
