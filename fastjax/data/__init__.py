"""From files to batches: sources, chat templates, tokens, packing, loader."""

from fastjax.data.builtin_templates import BUILTIN_TEMPLATES as BUILTIN_TEMPLATES
from fastjax.data.chat_template import ChatTemplate as ChatTemplate
from fastjax.data.chat_template import get_chat_template as get_chat_template
from fastjax.data.documents import Document as Document
from fastjax.data.documents import Documents as Documents
from fastjax.data.embedded import embedded_announcement as embedded_announcement
from fastjax.data.embedded import embedded_examples as embedded_examples
from fastjax.data.embedded import embedded_text as embedded_text
from fastjax.data.examples import Completion as Completion
from fastjax.data.examples import Conversation as Conversation
from fastjax.data.examples import Example as Example
from fastjax.data.examples import Text as Text
from fastjax.data.loader import Batch as Batch
from fastjax.data.loader import Loader as Loader
from fastjax.data.packing import packed_rows as packed_rows
from fastjax.data.prepare import TrainingData as TrainingData
from fastjax.data.prepare import load_data as load_data
from fastjax.data.rendering import ResponseMarkers as ResponseMarkers
from fastjax.data.report import DataReport as DataReport
from fastjax.data.selection import held_out as held_out
from fastjax.data.sources import ExampleSet as ExampleSet
from fastjax.data.sources import ReadOptions as ReadOptions
from fastjax.data.sources import Source as Source
from fastjax.data.sources import load_examples as load_examples
from fastjax.data.tiny_tokenizer import save_tiny_tokenizer as save_tiny_tokenizer
from fastjax.data.tokenization import ExampleTokenizer as ExampleTokenizer
