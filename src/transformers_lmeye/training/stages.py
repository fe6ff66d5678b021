"""What both stage scripts do around their own data: load a model, train it, leave everything in `output_dir`."""

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..processing.processing_lmeye import LMEyeProcessor
from .arguments import ModelArguments
from .trainer import LMEyeTrainer


logger = logging.get_logger(__name__)


def load_model(arguments: ModelArguments, seed: int = 42) -> tuple[LMEyeForConditionalGeneration, LMEyeProcessor]:
    """The model to train and its processor: a checkpoint's, or a new IPN between two backbones.

    Args:
        arguments: which.
        seed: of a new IPN's random weights.
    """
    options = {"dtype": arguments.dtype}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    set_seed(seed)
    if arguments.model_name_or_path is not None:
        model = LMEyeForConditionalGeneration.from_pretrained(
            arguments.model_name_or_path, backbone_trust_remote_code=arguments.trust_remote_code, **options
        )
        return model, LMEyeProcessor.from_pretrained(arguments.model_name_or_path)
    backbones = (arguments.vision_model_name_or_path, arguments.language_model_name_or_path)
    options["trust_remote_code"] = arguments.trust_remote_code
    fields = arguments.config_fields()
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        *backbones, clip_text_model_name_or_path=arguments.clip_text_model_name_or_path, **fields, **options
    )
    processor = LMEyeProcessor.from_vision_language_pretrained(
        *backbones,
        num_static_tokens=model.config.num_static_tokens,
        num_dynamic_tokens=model.config.num_dynamic_tokens,
        num_request_rounds=model.config.num_request_rounds,
        keep_request_token=model.config.keep_request_token,
        interaction=model.config.interaction,
        add_bos=arguments.add_bos,
    )
    return model, processor


def train_and_save(trainer: LMEyeTrainer) -> dict[str, float]:
    """Trains, from a checkpoint where the arguments name one, and writes the result into `output_dir`.

    Beside the IPN, its configuration and the processor: `learning_curve.png` and `.json`, `trainer_state.json`,
    `train_results.json` and, with an evaluation split, `eval_results.json`.

    Returns:
        `dict`: the metrics of training and, with an evaluation split, of a last evaluation.

    Raises:
        ValueError: `--resume_from_checkpoint last` and there is no checkpoint.
    """
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint == "last":
        checkpoint = get_last_checkpoint(trainer.args.output_dir)
        if checkpoint is None:
            raise ValueError(f"There is no checkpoint in {trainer.args.output_dir} to resume from.")
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        evaluation = trainer.evaluate()
        trainer.log_metrics("eval", evaluation)
        trainer.save_metrics("eval", evaluation)
        metrics = {**metrics, **evaluation}
    return metrics


__all__ = ["load_model", "train_and_save"]
