"""GGUF files of models and adapters, for llama.cpp and Ollama."""

from .architectures import ARCHITECTURES as ARCHITECTURES
from .architectures import differences as differences
from .encodings import ENCODINGS as ENCODINGS
from .encodings import GGUFType as GGUFType
from .k_quants import K_QUANTS as K_QUANTS
from .k_quants import requantise as requantise
from .k_quants import require_llama_quantize as require_llama_quantize
from .lora import write_gguf_lora as write_gguf_lora
from .model import write_gguf as write_gguf
from .ollama import matching_format as matching_format
from .ollama import modelfile as modelfile
from .tokenizer import read_tokenizer as read_tokenizer
from .tokenizer import stop_texts as stop_texts
