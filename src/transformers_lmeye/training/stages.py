"""What both stage scripts do around their own data: load a model, train it, leave everything in `output_dir`."""

from pathlib import Path

from transformers import set_seed
from transformers.utils import PROCESSOR_NAME, logging

from ..modeling.configuration_lmeye import LMEyeConfig
from ..modeling.modeling_lmeye import LMEyeForConditionalGeneration
from ..processing.processing_lmeye import LMEyeProcessor
from .arguments import ModelArguments
from .trainer import LMEyeTrainer


logger = logging.get_logger(__name__)


def load_model(arguments: ModelArguments, seed: int = 42) -> tuple[LMEyeForConditionalGeneration, LMEyeProcessor]:
    """The model to train and its processor: a checkpoint's, or a new IPN between two backbones.

    A checkpoint's folder without a processor gets that of its backbones.

    Args:
        arguments: which.
        seed: of a new IPN's random weights.

    Raises:
        ValueError: a checkpoint of unknown backbones has no processor.
    """
    options = arguments.loading_options()
    set_seed(seed)
    if arguments.model_name_or_path is not None:
        model = LMEyeForConditionalGeneration.from_pretrained(
            arguments.model_name_or_path, backbone_trust_remote_code=arguments.trust_remote_code, **options
        )
        folder = Path(arguments.model_name_or_path)
        if not folder.is_dir() or (folder / PROCESSOR_NAME).is_file():
            return model, LMEyeProcessor.from_pretrained(arguments.model_name_or_path)
        sources = model.config.backbones
        if sources is None:
            raise ValueError(f"{folder} holds no processor: save it there with processor.save_pretrained.")
        backbones = tuple(sources[role]["name_or_path"] for role in ("vision", "language"))
        return model, _processor_for(model.config, backbones, arguments)
    backbones = (arguments.vision_model_name_or_path, arguments.language_model_name_or_path)
    options["trust_remote_code"] = arguments.trust_remote_code
    fields = arguments.config_fields()
    model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
        *backbones, clip_text_model_name_or_path=arguments.clip_text_model_name_or_path, **fields, **options
    )
    return model, _processor_for(model.config, backbones, arguments)


def _processor_for(config: LMEyeConfig, backbones: tuple[str, str], arguments: ModelArguments) -> LMEyeProcessor:
    """The processor that places as many slots as a model of `config` has tokens."""
    return LMEyeProcessor.from_vision_language_pretrained(
        *backbones,
        num_static_tokens=config.num_static_tokens,
        num_dynamic_tokens=config.num_dynamic_tokens,
        num_request_rounds=config.num_request_rounds,
        keep_request_token=config.keep_request_token,
        interaction=config.interaction,
        add_bos=arguments.add_bos,
        trust_remote_code=arguments.trust_remote_code,
    )


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
    metrics = trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint).metrics
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
