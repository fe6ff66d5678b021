"""What a run has read so far, how fast it reads, and which of its samples were bad."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from .checkpoints import write_json


PROGRESS_NAME = "progress.json"


class EvenDataset(Dataset):
    """A map-style data set made up to a multiple of some number with `Filler`s, which `CountingCollator` leaves out.

    Several processes then evaluate equally many batches, and no sample twice.
    """

    def __init__(self, dataset: Dataset, multiple: int):
        self.dataset, self.multiple = dataset, multiple

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index] if index < len(self.dataset) else Filler(self.dataset)


@dataclass
class Filler:
    """In place of a sample; one of `dataset` is read where a batch holds no other."""

    dataset: Dataset


@dataclass
class CountingCollator:
    """A collator whose batches say under `num_samples` how many samples they were made of, bad ones included."""

    collator: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        own = [sample for sample in samples if not isinstance(sample, Filler)]
        batch = dict(self.collator(own or [samples[0].dataset[0]]))
        if not own:
            batch["labels"] = torch.full_like(batch["labels"], -100)
            batch.pop("bad_samples", None)
        batch["num_samples"] = len(own)
        return batch


@dataclass
class Progress:
    """Totals of a run, goings-on included. `batches` are those of each process, the others those of all together.

    Tokens are the columns of `input_ids` that are not padding, slots included, and an encoder-decoder's targets.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    bad_samples: int = 0

    def save(self, checkpoint: Path, batches_of: dict[str, int]) -> None:
        """Writes the totals into a checkpoint; `batches_of` says what a process's batches were made by."""
        write_json({**asdict(self), "batches_of": batches_of}, checkpoint / PROGRESS_NAME)

    @classmethod
    def load(cls, checkpoint: Path) -> tuple["Progress", dict[str, int]]:
        """What `save` was given."""
        saved = json.loads((checkpoint / PROGRESS_NAME).read_text(encoding="utf-8"))
        batches_of = saved.pop("batches_of")
        return cls(**saved), batches_of


@dataclass
class Throughput:
    """Samples and tokens per second of training in this process's life, since the last log and since its start.

    Loading, forward, backward and update count as training; evaluating and saving do not.
    """

    samples: int = 0
    tokens: int = 0
    started: float | None = None
    paused: float = 0.0
    logged: tuple[int, int, float] = field(default=(0, 0, 0.0))  # samples, tokens and seconds at the last log

    def start(self) -> None:
        """Starts the clock, where it does not run yet."""
        if self.started is None:
            self.started = time.perf_counter()

    def count(self, samples: int, tokens: int) -> None:
        self.samples += samples
        self.tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Keeps the time of a block out."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - before

    def since_last_log(self) -> dict[str, float]:
        now = (self.samples, self.tokens, self._seconds())
        rates = self._rates(*(value - last for value, last in zip(now, self.logged, strict=True)))
        self.logged = now
        return rates

    def since_start(self) -> dict[str, float]:
        return self._rates(self.samples, self.tokens, self._seconds())

    def _seconds(self) -> float:
        return 0.0 if self.started is None else time.perf_counter() - self.started - self.paused

    @staticmethod
    def _rates(samples: int, tokens: int, seconds: float) -> dict[str, float]:
        if seconds <= 0:
            return {}
        return {
            "samples_per_second": round(samples / seconds, 3),
            "tokens_per_second": round(tokens / seconds, 3),
        }


def num_tokens(batch: dict[str, Any], is_encoder_decoder: bool) -> int:
    """Tokens of a batch that are not padding: what is read and, of an encoder-decoder, what is to be said."""
    mask = batch.get("attention_mask")
    read = batch["input_ids"].numel() if mask is None else int(mask.sum())
    return read + (int(batch["labels"].ne(-100).sum()) if is_encoder_decoder and "labels" in batch else 0)


def check_bad_samples(
    bad: int, read: int, max_fraction: float, last: str, where: str, in_all: int | None = None
) -> None:
    """
    Stops where more samples were bad than the user allows: `max_fraction` of those read, of the first 1,000 (or of
    all, where there are fewer) at least.

    Args:
        bad, read: how many samples were bad, and how many were read, bad ones included.
        max_fraction: as in [`StageTrainingArguments`]; 0 allows none.
        last: the last bad sample and what it got, for the message.
        where: what lists them all.
        in_all: how many samples the data set holds, where it is known.

    Raises:
        ValueError: there were more.
    """
    allowed = math.floor(max_fraction * max(read, 1000 if in_all is None else min(in_all, 1000)) + 1e-9)
    if bad > allowed:
        raise ValueError(
            f"{bad} of {read} samples could not be used, and max_bad_fraction={max_fraction} allows {allowed}. "
            f"The last: {last.rstrip('.')}. {where} Repair the data (python -m transformers_lmeye.data.check finds "
            "them all), or raise --max_bad_fraction."
        )


__all__ = [
    "PROGRESS_NAME",
    "CountingCollator",
    "EvenDataset",
    "Progress",
    "Throughput",
    "check_bad_samples",
    "num_tokens",
]
