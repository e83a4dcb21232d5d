"""Training: one compiled step, the loop around it, checkpoints and exact resume."""

from fastjax.train.compiled import CompiledSteps as CompiledSteps
from fastjax.train.compiled import StepMemory as StepMemory
from fastjax.train.evaluate import evaluate as evaluate
from fastjax.train.evaluate import make_eval_step as make_eval_step
from fastjax.train.job import Job as Job
from fastjax.train.loop import run as run
from fastjax.train.optimizer import make_optimizer as make_optimizer
from fastjax.train.result import TrainResult as TrainResult
from fastjax.train.state import init_state as init_state
from fastjax.train.step import make_train_step as make_train_step
