"""What users call: models, adapters, training, generation and export."""

from fastjax.api.arguments import SFTConfig as SFTConfig
from fastjax.api.arguments import TrainingArguments as TrainingArguments
from fastjax.api.chat import Conversation as Conversation
from fastjax.api.combination import combine_adapters as combine_adapters
from fastjax.api.data_check import DataCheck as DataCheck
from fastjax.api.data_check import check_data as check_data
from fastjax.api.export import run_export as run_export
from fastjax.api.fast_language_model import FastLanguageModel as FastLanguageModel
from fastjax.api.fast_language_model import (
    is_bfloat16_supported as is_bfloat16_supported,
)
from fastjax.api.generation import answer as answer
from fastjax.api.generation import run_generation as run_generation
from fastjax.api.hub import push_folder as push_folder
from fastjax.api.inspection import Inspection as Inspection
from fastjax.api.inspection import inspect_folder as inspect_folder
from fastjax.api.language_model import LanguageModel as LanguageModel
from fastjax.api.loading import load_model as load_model
from fastjax.api.random_checkpoint import (
    make_random_checkpoint as make_random_checkpoint,
)
from fastjax.api.run_plan import plan_run as plan_run
from fastjax.api.sharegpt import standardize_sharegpt as standardize_sharegpt
from fastjax.api.sweep import run_sweep as run_sweep
from fastjax.api.sweep_plan import grid as grid
from fastjax.api.sweep_result import SweepResult as SweepResult
from fastjax.api.tokenizer import get_chat_template as get_chat_template
from fastjax.api.trainer import SFTTrainer as SFTTrainer
from fastjax.api.trainer import train_on_responses_only as train_on_responses_only
from fastjax.api.training import run_evaluation as run_evaluation
from fastjax.api.training import run_training as run_training
from fastjax.api.vocabulary import add_new_tokens as add_new_tokens
from fastjax.api.vocabulary import resize_token_embeddings as resize_token_embeddings
