"""The two training stages of the paper on the Transformers `Trainer`."""

from .arguments import (
    ConversationDataArguments,
    ModelArguments,
    PairDataArguments,
    StageTrainingArguments,
    StageTwoArguments,
)
from .collators import ConversationCollator, PairCollator
from .requests import collect_requests, standardize_requests
from .stages import load_model, train_and_save
from .trainer import LearningCurveCallback, LMEyeTrainer, write_learning_curve


__all__ = [
    "ConversationCollator",
    "ConversationDataArguments",
    "LMEyeTrainer",
    "LearningCurveCallback",
    "ModelArguments",
    "PairCollator",
    "PairDataArguments",
    "StageTrainingArguments",
    "StageTwoArguments",
    "collect_requests",
    "load_model",
    "standardize_requests",
    "train_and_save",
    "write_learning_curve",
]
