"""Hugging Face model folders: config.json, safetensors, hub."""

from .checkpoint import Checkpoint as Checkpoint
from .config import read_config as read_config
from .config import stretched_keys as stretched_keys
from .config import write_config as write_config
from .families import checkpoint_tensors as checkpoint_tensors
from .fingerprint import folder_fingerprint as folder_fingerprint
from .folder import resolve as resolve
from .load import check_tensors as check_tensors
from .load import load_weights as load_weights
from .load import stored_formats as stored_formats
from .load import stream_weights as stream_weights
from .packed_cache import files_to_load as files_to_load
from .packed_cache import load_packed_weights as load_packed_weights
from .save import COMPANION_FILES as COMPANION_FILES
from .save import WEIGHT_FILES as WEIGHT_FILES
from .save import copy_companions as copy_companions
from .save import save_model as save_model
