"""The Transformers `Trainer` for a model of which a small part trains."""

import json
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, has_length, seed_worker
from transformers.utils import logging

from ..modeling.lockstep import is_split
from .callbacks import LearningCurveCallback, write_learning_curve
from .checkpoints import (
    UNFINISHED_FOLDER,
    append_line,
    checkpoint_problem,
    clear_unfinished,
    flush_folder,
    keep_lines,
    last_checkpoint,
    list_files,
    publish_checkpoint,
    publish_model,
    replacing,
    rotate_checkpoints,
    write_json,
)
from .generated_samples import generate_samples
from .ipn_checkpoints import IPNCheckpointMixin
from .progress import CountingCollator, EvenDataset, Progress, Throughput, check_bad_samples, num_tokens
from .splitting import (
    check_can_be_split,
    gathered_optimizer_states,
    gathered_state_dict,
    load_optimizer_states,
    load_split_model,
    register_forward_methods,
    register_trained_parameters,
    set_up_fsdp,
)


logger = logging.get_logger(__name__)


class LMEyeTrainer(IPNCheckpointMixin, Trainer):
    """
    `Trainer` whose checkpoints hold the IPN alone and whose losses are means over target tokens.

    Call `model.freeze_for_stage` first: what it leaves trainable is what is trained. A checkpoint holds the IPN and
    the state of optimizer, schedule and random numbers, megabytes whatever the language model; it is whole only where
    the backbones have no source to be loaded from again. A PEFT adapter of the language model is saved with the IPN
    and restored with it.

    Training and evaluation loss are sums over all target tokens divided by their number, across gradient accumulation,
    batches and processes: a short answer counts as many tokens as it has, and a batch without targets counts nothing.
    The learning curve is written to `output_dir` as `learning_curve.json` and `learning_curve.png` with every
    checkpoint, evaluation and at the end; `samples_per_second` and `tokens_per_second` are logged with the loss.

    A run that is killed at any moment leaves whole checkpoints alone, and one resumed from the last of them goes on
    as if nothing had happened, on map-style data and on streams. `--resume_from_checkpoint last` finds it.

    Args:
        args: [`StageTrainingArguments`]. With plain `TrainingArguments` their fields have the defaults named there.
        train_dataset: map-style, or a [`SampleStream`], which needs `max_steps`.
        eval_dataset: map-style, or a dictionary of such by name. The metrics of the one named `""` are `eval_loss` and
            the like, those of another `eval_NAME_loss`.
        processing_class: the [`LMEyeProcessor`]; it is saved with the model, and answers are decoded with it.
        kwargs: as in `Trainer`.

    Raises:
        ValueError: a stream to train on and no `max_steps`, or one to evaluate on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(LearningCurveCallback())
        if _is_stream(self.train_dataset):
            self.add_callback(_EpochOfStream())
        self._evaluated = [0.0, 0.0]  # summed loss and number of the target tokens evaluated
        self._evaluated_samples = [0, 0]  # bad and all samples evaluated
        self._unfinished: Path | None = None  # where a checkpoint is being written
        self._random_state_of: str | None = None  # checkpoint whose random numbers follow the first batch
        self._progress = Progress()
        self._throughput = Throughput()

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.ddp_find_unused_parameters is None:
            self.args.ddp_find_unused_parameters = False  # the model's loss reaches all that train
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_fsdp(self.accelerator)

    def _prepare_for_training(self, *args, **kwargs):
        if self.is_fsdp_enabled:
            check_can_be_split(self.model)
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            register_trained_parameters(self.model)
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:
            register_forward_methods(self.model)
        return prepared

    def _validate_args(self) -> None:
        if _is_stream(self.train_dataset) and self.args.max_steps <= 0:
            raise ValueError(
                "A stream has no length, so the run's has to be given: --max_steps. One pass over N samples takes "
                "N / (per_device_train_batch_size x gradient_accumulation_steps x processes) steps."
            )
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        if any(_is_stream(dataset) for dataset in evaluated.values()):
            raise ValueError("A stream repeats for ever: evaluation data has to be map-style (streaming=False).")
        super()._validate_args()

    # --- data --------------------------------------------------------------------------------------------------

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        # Samples are made for the collator; the model's signature says nothing about their keys.
        return CountingCollator(data_collator)

    def get_train_dataloader(self) -> DataLoader:
        stream = self.train_dataset
        if not _is_stream(stream):
            return super().get_train_dataloader()
        self._assign_stream(start_batch=0)
        loader = DataLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            in_order=self.args.dataloader_in_order,
            worker_init_fn=partial(
                seed_worker, num_workers=self.args.dataloader_num_workers, rank=self.args.process_index
            ),
        )
        # One process: the stream has been told its own part, and nothing is to be split or sent around again.
        return prepare_data_loader(
            loader,
            device=self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=self.accelerator.device_placement,
            dispatch_batches=False,
            non_blocking=self.args.accelerator_config.non_blocking,
        )

    def _get_dataloader(self, dataset: Dataset, description: str, *args, **kwargs) -> DataLoader:
        # For predictions, which are gathered, accelerate's own way: it repeats samples and drops them again.
        evaluates_several = description == "Evaluation" and self.args.world_size > 1 and has_length(dataset)
        if evaluates_several and self.compute_metrics is None:
            dataset = EvenDataset(dataset, self.args.eval_batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _assign_stream(self, start_batch: int) -> None:
        self.train_dataset.assign(
            self.args.process_index, self.args.world_size, self._train_batch_size, start_batch=start_batch
        )

    def _batches_of(self) -> dict[str, int]:
        """What the batches of one process depend on, besides the data."""
        return {
            "num_processes": self.args.world_size,
            "per_device_train_batch_size": self._train_batch_size,
            "dataloader_num_workers": self.args.dataloader_num_workers,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not _has_own_lengths(dataset):
            return super()._get_train_sampler(train_dataset)
        group_size = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return _LengthGroups(_text_lengths(dataset), group_size, self._data_seed())

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if isinstance(eval_dataset, EvenDataset):
            return None  # its order keeps batches of all processes alike
        if self.args.train_sampling_strategy != "group_by_length" or not _has_own_lengths(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        group_size = self.args.eval_batch_size * self.args.world_size
        return _LengthGroups(_text_lengths(eval_dataset), group_size, self._data_seed())

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self._throughput.start()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._random_state_of is not None:  # what starting the loader drew was drawn before the checkpoint
            self._load_rng_state(self._random_state_of)
            self._random_state_of = None
        if _is_stream(self.train_dataset) and len(batches) < num_batches:
            raise ValueError(
                f"The stream ended in step {self.state.global_step + 1} of {self.state.max_steps}: let it repeat "
                "(num_passes=None), or give a smaller --max_steps."
            )
        self._count(batches)
        return batches, num_items

    def _count(self, batches: list[dict[str, Any]]) -> None:
        """Takes what is not for the model out of new batches, and adds them to what was read, in all processes."""
        found = [_pop_bad_samples(batch) for batch in batches]
        is_encoder_decoder = self.accelerator.unwrap_model(self.model).config.is_encoder_decoder
        bad = [sample for samples, _ in found for sample in samples]
        counts = torch.tensor(
            [
                sum(count for _, count in found),
                sum(num_tokens(batch, is_encoder_decoder) for batch in batches),
                len(bad),
            ]
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts.to(self.args.device), reduction="sum")
        samples, tokens, num_bad = counts.tolist()
        self._throughput.count(samples, tokens)
        self._progress.batches += len(batches)
        self._progress.samples += samples
        self._progress.tokens += tokens
        self._progress.bad_samples += num_bad
        for sample in bad:
            entry = {"id": sample.id, "kind": sample.kind, "reason": sample.reason}
            append_line(self._bad_samples_file(), {**entry, "step": self.state.global_step + 1})
            logger.warning(f"Left out sample {sample.id} ({sample.kind}): {sample.reason}")
        if num_bad:
            in_all = len(self.train_dataset) if has_length(self.train_dataset) else None
            self._check_bad_samples(self._progress.bad_samples, self._progress.samples, bad, in_all)

    def _check_bad_samples(self, num_bad: int, num_read: int, bad: list[Any], in_all: int | None) -> None:
        last = f"{bad[-1].id} ({bad[-1].kind}): {bad[-1].reason}" if bad else "read by another process"
        where = f"Those of training are listed in {self._bad_samples_file()}."
        check_bad_samples(num_bad, num_read, getattr(self.args, "max_bad_fraction", 0.01), last, where, in_all)

    def _bad_samples_file(self) -> Path:
        rank = f"-{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(self.args.output_dir) / f"bad_samples{rank}.jsonl"

    # --- loss --------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # Batches without a target have a loss of zero, not of zero divided by zero.
        count = super()._get_num_items_in_batch(batch_samples, device)
        return count.clamp(min=1) if torch.is_tensor(count) else count

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs):
        smoother, self.label_smoother = self.label_smoother, None
        try:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        finally:
            self.label_smoother = smoother
        if smoother is not None:
            # The model's own loss reaches every trained parameter, if only with a gradient of zero.
            smoothed = self._smoothed_loss(outputs, inputs["labels"], kwargs.get("num_items_in_batch"))
            loss = smoothed + 0.0 * loss
        return (loss, outputs) if return_outputs else loss

    def _smoothed_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The loss with `label_smoothing_factor`. The Trainer's own way takes the labels from the model, of which an
        encoder-decoder makes its decoder's inputs, and shifts them for none but the library's causal models."""
        shift = not self.accelerator.unwrap_model(self.model).config.is_encoder_decoder
        loss = self.label_smoother(outputs, labels, shift_labels=shift, num_items_in_batch=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluates and logs loss and speed, then a few answers (`num_generated_samples`).

        Args:
            eval_dataset: other data than the trainer's; of a dictionary each is evaluated.
            ignore_keys, metric_key_prefix: as in `Trainer.evaluate`.

        Returns:
            `dict`: the metrics. `eval_bad_samples` counts samples that were left out, if any were.

        Raises:
            ValueError: more bad samples than `max_bad_fraction` allows.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            metrics = {}
            for name, dataset in chosen.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                metrics |= self.evaluate(name if eval_dataset is None else dataset, ignore_keys, prefix)
            return metrics
        with self._throughput.pause():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            dataset = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
            self._log_generated_samples(dataset, metric_key_prefix)
        return metrics

    def _log_generated_samples(self, dataset: Dataset, metric_key_prefix: str) -> None:
        num_samples = getattr(self.args, "num_generated_samples", 4)
        if not num_samples or not has_length(dataset):
            return
        if self.processing_class is None:
            logger.warning_once("No answers are generated: without processing_class they cannot be read.")
            return
        if self.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
            logger.warning_once(
                "No answers are generated in training with ZeRO-3, which splits the model over the processes outside "
                "of its forward pass. Load a checkpoint to see answers, or give --num_generated_samples 0."
            )
            return
        # With FSDP every process holds a part of each layer, and all have to run it.
        if self.is_world_process_zero() or self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
            with self.accelerator.autocast():
                samples = list(generate_samples(model, tokenizer, self.data_collator, dataset, num_samples))
            if self.is_world_process_zero():
                self._write_generated_samples(samples, metric_key_prefix)
        self.accelerator.wait_for_everyone()

    def _write_generated_samples(self, samples: list[dict[str, str]], metric_key_prefix: str) -> None:
        step, file = self.state.global_step, Path(self.args.output_dir) / "generated_samples.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        # A step that is evaluated twice, as the last one is, has one set of answers.
        keep_lines(file, lambda entry: (entry["step"], entry["data"]) != (step, metric_key_prefix))
        for sample in samples:
            append_line(file, {"step": step, "data": metric_key_prefix, **sample})
            tqdm.write(f"{sample['prompt']}\n  reference: {sample['reference']}\n  generated: {sample['generated']}")
        text = "\n\n---\n\n".join(
            "\n\n".join(f"**{name}** {sample[name]}" for name in ("prompt", "reference", "generated"))
            for sample in samples
        )
        for callback in self.callback_handler.callbacks:
            if samples and isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_text(f"{metric_key_prefix}/generated_samples", text, step)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        bad, num_samples = _pop_bad_samples(inputs)
        for sample in bad:
            logger.warning(f"Left out sample {sample.id} of evaluation ({sample.kind}): {sample.reason}")
        self._evaluated_samples[0] += len(bad)
        self._evaluated_samples[1] += num_samples
        count = super()._get_num_items_in_batch([inputs], self.args.device)
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None:
            self._evaluated[0] += float(loss) * int(count)
            self._evaluated[1] += int(count)
        return loss, logits, labels

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        self._evaluated, self._evaluated_samples = [0.0, 0.0], [0, 0]
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        evaluated = torch.tensor([*self._evaluated, *self._evaluated_samples], device=self.args.device)
        total, count, num_bad, num_read = self.accelerator.reduce(evaluated, reduction="sum").tolist()
        if count:
            output.metrics[f"{metric_key_prefix}_loss"] = total / count
        if num_bad:
            output.metrics[f"{metric_key_prefix}_bad_samples"] = int(num_bad)
            self._check_bad_samples(int(num_bad), int(num_read), [], int(num_read))
        return output._replace(num_samples=int(num_read))

    # --- logs --------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_runtime" in logs:
            rates = {f"train_{name}": rate for name, rate in self._throughput.since_start().items()}
            totals = {"train_samples": self._progress.samples, "train_tokens": self._progress.tokens}
            logs.update({**rates, **totals, "bad_samples": self._progress.bad_samples})
        elif "loss" in logs:
            logs.update(self._throughput.since_last_log())
        super().log(logs, start_time)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        write_json(metrics, folder / f"{split}_results.json")
        if combined:
            file = folder / "all_results.json"
            earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            write_json({**earlier, **metrics}, file)

    def save_state(self) -> None:
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir) / TRAINER_STATE_NAME) as partial_file:
                self.state.save_to_json(str(partial_file))

    # --- checkpoints -------------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args, **kwargs
    ) -> TrainOutput:
        """
        Trains, from a checkpoint where one is given.

        Args:
            resume_from_checkpoint: a checkpoint's folder; or `"last"` or `True`, the newest complete one of
                `output_dir`.
            trial, args, kwargs: as in `Trainer.train`.

        Raises:
            ValueError: there is no complete checkpoint, or the one that was named is not complete, or it was written
                with `save_only_model`; see also `max_bad_fraction`.
        """
        if self.args.should_save:
            clear_unfinished(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True or resume_from_checkpoint == "last":
            resume_from_checkpoint = self._last_checkpoint()
        elif resume_from_checkpoint and Path(resume_from_checkpoint).is_dir():
            problem = checkpoint_problem(Path(resume_from_checkpoint))
            if problem is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} is no complete checkpoint: {problem}. Resume from another one "
                    "(--resume_from_checkpoint last), or start anew from its weights (--model_name_or_path)."
                )
        folder = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder is None and (earlier := last_checkpoint(self.args.output_dir)) is not None:
            logger.warning(
                f"{self.args.output_dir} holds checkpoints of an earlier run, {earlier} the last, and this one starts "
                "anew. Give another --output_dir to keep them apart, or go on with --resume_from_checkpoint last."
            )
        if (
            folder is not None
            and folder.is_dir()
            and not (self.is_deepspeed_enabled or (folder / SCHEDULER_NAME).is_file())
        ):
            raise ValueError(
                f"{folder} holds weights alone (--save_only_model), and no state of optimizer and schedule to go on "
                "from: start anew from its weights (--model_name_or_path)."
            )
        return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    def _last_checkpoint(self) -> str:
        """What the first process finds, for all of them."""
        found = [last_checkpoint(self.args.output_dir)]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        if found[0] is None:
            raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        return str(found[0])

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        epochs, num_batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._progress, self._throughput = Progress(), Throughput()
        batches_of = self._batches_of()
        if resume_from_checkpoint is not None:
            self._progress, batches_of = Progress.load(Path(resume_from_checkpoint))
        # Entries of steps that are taken again.
        keep_lines(self._bad_samples_file(), lambda entry: entry["step"] <= self.state.global_step)
        if self.is_world_process_zero():
            answers = Path(self.args.output_dir) / "generated_samples.jsonl"
            keep_lines(answers, lambda entry: entry["step"] <= self.state.global_step)
        if not _is_stream(self.train_dataset):
            own = self._batches_of()
            if _global_batch(batches_of) != _global_batch(own):
                logger.warning(
                    f"The checkpoint was trained with {batches_of}, and this run has {own}. The place in the data is "
                    "counted in optimizer steps, which are of another size now: some samples are read again, or not "
                    "in this epoch."
                )
            return epochs, num_batches
        self._random_state_of = resume_from_checkpoint
        self._progress.batches = self._num_read_batches(batches_of)  # those of other sizes, in batches of this run
        self._assign_stream(self._progress.batches)
        return epochs, 0  # the stream itself leaves out what was read

    def _num_read_batches(self, batches_of: dict[str, int]) -> int:
        """How many of this process's batches of the stream were read, by this run or those it goes on from."""
        own = self._batches_of()
        decisive = ("num_processes", "per_device_train_batch_size", "dataloader_num_workers")
        if all(batches_of[name] == own[name] for name in decisive):
            return self._progress.batches
        logger.warning(
            f"The checkpoint was trained with {batches_of}, and this run has {own}: it goes on at the same place of "
            "the stream, but some samples near it may be read again, or not in this pass."
        )
        sizes = [part["num_processes"] * part["per_device_train_batch_size"] for part in (batches_of, own)]
        return self._progress.batches * sizes[0] // sizes[1]

    def _run_epoch(self, *, epoch: int, train_dataloader: DataLoader, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step of a stream
            self.control.should_training_stop = True
            return
        # Where the Trainer and accelerate wrap batch samplers in each other, neither reaches the innermost one, nor
        # the data set.
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        for part in (getattr(sampler, "sampler", None), self.train_dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._throughput.pause():
            output_dir = Path(self._get_output_dir(trial))
            folder = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            unfinished = output_dir / UNFINISHED_FOLDER
            if self.args.should_save:
                clear_unfinished(output_dir)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._unfinished = unfinished
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._unfinished = None
            self._complete_checkpoint(unfinished / folder.name, folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _complete_checkpoint(self, staged: Path, folder: Path) -> None:
        """Gives a checkpoint that every process has written its part of its name, then deletes old ones."""
        best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            self._progress.save(staged, self._batches_of())
        self.accelerator.wait_for_everyone()
        flush_folder(staged)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            list_files(staged)
            publish_checkpoint(staged, folder)
            rotate_checkpoints(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # not before it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, state_dict=gathered_state_dict(self.model, self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # As one process writes them, so that any number of processes can go on.
        states = gathered_optimizer_states(self.optimizer)
        if self.args.should_save:
            torch.save(states, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        states = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        load_optimizer_states(self.optimizer, states)
        scheduler = torch.load(Path(checkpoint) / SCHEDULER_NAME, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self._unfinished is not None:
            self._save_files(folder, state_dict)
            return
        staged = folder / UNFINISHED_FOLDER / "model"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        card = folder / "README.md"
        if card.is_file():  # one of the user's own is kept
            shutil.copyfile(card, staged / card.name)
        self._save_files(staged, state_dict)
        flush_folder(staged)
        publish_model(staged, folder)
        shutil.rmtree(staged.parent, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_split(self.model):  # before that, there is nothing to load into
            self._check_backbones(resume_from_checkpoint)
            self._issue_warnings_after_load(load_split_model(self.model, resume_from_checkpoint))
            self._restore_adapter(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self.is_fsdp_enabled:
            super()._load_best_model()
            return
        load_split_model(self.model, self.state.best_model_checkpoint)
        self._restore_adapter(self.state.best_model_checkpoint)


class _EpochOfStream(TrainerCallback):
    """Of a stream an epoch is the whole run; the Trainer would count it from the start of every process."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        state.epoch = state.global_step / state.max_steps


class _LengthGroups(Sampler):
    """Rows of like lengths together, in an order that an epoch's number and a seed decide."""

    def __init__(self, lengths: list[int], group_size: int, seed: int):
        self.lengths, self.group_size, self.seed, self.epoch = lengths, group_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.group_size, generator=generator))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def _global_batch(batches_of: dict[str, int]) -> int:
    """Samples of an optimizer step."""
    names = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    return math.prod(batches_of[name] for name in names)


def _is_stream(dataset: Any) -> bool:
    """Whether a data set splits itself over processes and workers, as `SampleStream` does."""
    return isinstance(dataset, IterableDataset) and hasattr(dataset, "assign")


def _has_own_lengths(dataset: Any) -> bool:
    return hasattr(dataset, "texts") and has_length(dataset)


def _text_lengths(dataset: Any) -> list[int]:
    """Characters of each sample's texts: they rank samples as tokens would, and no picture is opened for them."""
    return [sum(map(len, dataset.texts(index))) for index in range(len(dataset))]


def _pop_bad_samples(batch: dict[str, Any]) -> tuple[list[Any], int]:
    """Takes the bad samples out of a batch, and the number of samples it was made of."""
    return batch.pop("bad_samples", []), batch.pop("num_samples", len(batch["input_ids"]))


__all__ = ["LMEyeTrainer", "LearningCurveCallback", "write_learning_curve"]
