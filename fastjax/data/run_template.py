"""The chat template of a run: found when it is needed, left with the tokenizer."""

from typing import TYPE_CHECKING

from fastjax.data.builtin_templates import BUILTIN_TEMPLATES
from fastjax.data.chat_template import (
    ChatTemplate,
    fitting_templates,
    get_chat_template,
    template_source,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunTemplate:
    """Makes the template once.

    Args:
      tokenizer: Is given the template, so that it is saved with it.
      path: Jinja file, tokenizer folder or built-in name; None takes the tokenizer's.
      may_choose: A built-in template is taken where there is none.

    Attributes:
      notes: What a user should know of the choice.

    Raises:
      ModelError: There is nothing at `path`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        path: str | None,
        *,
        may_choose: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None
        self.notes: list[str] = []
        if path is None and not tokenizer.chat_template and may_choose:
            path = fitting_templates(tokenizer)[0]
            self.notes.append(
                f"the tokenizer has no chat template: using {path!r} "
                "(--chat_template_path chooses)"
            )
        self._path = path
        if path in BUILTIN_TEMPLATES:
            # At once: it may change the end token, which plain texts end with too.
            get_chat_template(tokenizer, path)
        elif path is not None:
            # At once too: rows without messages never ask for it.
            template_source(path)

    def __call__(self) -> ChatTemplate:
        """Returns the template, checked.

        Raises:
          DataError: There is none.
          ModelError: It cannot be used.
        """
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, path=self._path)
            if self._path is not None:
                self._tokenizer.chat_template = self._template.source
        return self._template

    @property
    def is_used(self) -> bool:
        """Whether the template was asked for."""
        return self._template is not None

    @property
    def text(self) -> str:
        """The template as it will be, without a check; empty where there is none."""
        if self._path is not None:
            return template_source(self._path)
        return str(self._tokenizer.chat_template or "")
