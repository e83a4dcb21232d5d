"""Cross-entropy of the output layer, without the whole logits."""

from .adapter import HeadAdapter as HeadAdapter
from .api import linear_cross_entropy as linear_cross_entropy
from .api import token_log_probs as token_log_probs
from .options import CHUNK_TOKENS as CHUNK_TOKENS
