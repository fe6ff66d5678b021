"""Looks through a data set before it is trained on: what training would meet, and whether to train.

Give it the command line of the training script, with its name replaced:

    python -m transformers_lmeye.data.check --stage pretrain \
        --vision_model_name_or_path openai/clip-vit-large-patch14 \
        --language_model_name_or_path facebook/opt-iml-1.3b \
        --dataset_name_or_path pairs.jsonl

    python -m transformers_lmeye.data.check --stage instruct \
        --model_name_or_path outputs/opt-pretrain \
        --dataset_name_or_path llava_instruct_150k.json --image_folder coco/train2017 --num_samples all

Samples are read and encoded by the readers and collators of training. The exit status is 0 to train, 1 not to train
(too many bad samples, or none that is good), 2 where nothing could be checked: wrong usage, or no such data.

Memory does not hold pictures or texts: to find what occurs twice, 8 bytes are kept for each different sample, text,
picture and name of a picture.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from ..modeling.towers import ImageFeatures
from ..processing.processing_lmeye import LMEyeProcessor
from ..training.arguments import (
    ConversationDataArguments,
    DataArguments,
    ModelArguments,
    PairDataArguments,
    StageTrainingArguments,
    StageTwoArguments,
)
from ..training.collators import ConversationCollator, PairCollator
from ..training.stages import load_model
from .datasets import MixedStream, SampleStream
from .images import open_image
from .samples import BadSample


EXTREME_ASPECT_RATIO = 3
"""Longest over shortest side from which a tower's square crop shows less than a third of the picture."""

_NAMED = 20  # ids listed for each finding
_USAGE = "%(prog)s --stage {pretrain,instruct} --dataset_name_or_path DATA [arguments of the training script] [--help]"


@dataclass
class CheckArguments:
    stage: Literal["pretrain", "instruct"] = field(metadata={"help": "Stage the data is for."})
    processor_name_or_path: str | None = field(
        default=None, metadata={"help": "Processor to check with, in place of that of the model named."}
    )
    num_samples: str = field(
        default="1000",
        metadata={"help": 'How many samples: drawn by --seed, of a stream the first; or "all".'},
    )
    json: str | None = field(default=None, metadata={"help": "File for the report in JSON."})
    bad_samples_file: str | None = field(
        default=None, metadata={"help": "JSON lines file for every bad sample: its id, what is wrong, and why."}
    )


# --- what is seen of one sample -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureFacts:
    """A picture of a sample.

    Attributes:
        name: hash of its path; None where it has none.
        content: hash of its pixels, or of its features where these stand in for it.
        size: width and height in pixels; None where features stand in for it.
    """

    name: int | None
    content: int
    size: tuple[int, int] | None


@dataclass(frozen=True)
class SampleFacts:
    """What one sample is in training.

    Attributes:
        id: its name.
        bad: what is wrong with it; all that follows is then empty.
        text: hash of its texts.
        pictures: its pictures.
        num_requests: how often it asks the pictures.
        lengths: tokens of its rows: one, or of an encoder-decoder one for each answer.
        num_targets: tokens that are learnt.
        num_targets_cut: targets that `max_length` cuts off.
        num_targets_unknown: targets that are the tokenizer's token for what it does not know.
        input_size: height and width of the pictures the tower sees; None where they vary or there is none.
    """

    id: str
    bad: BadSample | None = None
    text: int = 0
    pictures: tuple[PictureFacts, ...] = ()
    num_requests: int = 0
    lengths: tuple[int, ...] = ()
    num_targets: int = 0
    num_targets_cut: int = 0
    num_targets_unknown: int = 0
    input_size: tuple[int, int] | None = None


class PictureNotes:
    """Opens pictures as training does, or looks up their features, and notes what it saw since `take` was called."""

    def __init__(self, features: Callable[..., ImageFeatures] | None, max_pixels: int):
        self.features = features
        self.max_pixels = max_pixels
        self._seen: list[PictureFacts] = []

    def __call__(self, value: Any, image_folder: str | Path | None = None) -> Image.Image | ImageFeatures:
        path = value.get("path") if isinstance(value, dict) else value
        name = _hash(str(path).encode()) if isinstance(path, str | Path) else None
        if self.features is not None:
            features = self.features(value, image_folder=image_folder)
            content = features.pooled.contiguous().view(torch.uint8).numpy().tobytes()
            self._seen.append(PictureFacts(name, _hash(content), None))
            return features
        image = open_image(value, image_folder, self.max_pixels)
        self._seen.append(PictureFacts(name, _hash(str(image.size).encode(), image.tobytes()), image.size))
        return image

    def take(self) -> tuple[PictureFacts, ...]:
        """What was seen; forgets it."""
        seen, self._seen = tuple(self._seen), []
        return seen


def _hash(*parts: bytes) -> int:
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        hasher.update(part)
    return int.from_bytes(hasher.digest(), "little")


def look_at(
    sample: dict[str, Any] | BadSample,
    pictures: tuple[PictureFacts, ...],
    collator: PairCollator | ConversationCollator,
) -> SampleFacts:
    """
    Encodes one sample as training does.

    Args:
        sample: as the data set gives it.
        pictures: what was seen of its pictures.
        collator: of the stage, with `skip_bad_samples`.
    """
    if isinstance(sample, BadSample):
        return SampleFacts(sample.id, bad=sample)
    batch = collator([sample])
    if "bad_samples" in batch:
        return SampleFacts(sample["id"], bad=batch["bad_samples"][0])
    processor = collator.processor
    lengths = batch["attention_mask"].sum(1).tolist()
    num_targets = int(batch["labels"].ne(-100).sum())
    cut = 0
    if collator.max_length in (*lengths, batch["labels"].shape[1]):
        whole = replace(collator, max_length=None)([sample])
        cut = int(whole["labels"].ne(-100).sum()) - num_targets
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    is_told_apart = unknown not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    per_request = processor.num_dynamic_tokens * processor.num_request_rounds
    dynamic = int(batch["input_ids"].eq(processor.dynamic_token_id).sum(1).max()) if pictures else 0
    pixels = batch.get("pixel_values")
    return SampleFacts(
        sample["id"],
        text=_hash(json.dumps(_texts(sample)).encode()),
        pictures=pictures,
        num_requests=dynamic // per_request if per_request else 0,
        lengths=tuple(lengths),
        num_targets=num_targets,
        num_targets_cut=cut,
        num_targets_unknown=int(batch["labels"].eq(unknown).sum()) if is_told_apart else 0,
        input_size=tuple(pixels.shape[-2:]) if pixels is not None and pixels.ndim == 4 else None,
    )


def _texts(sample: dict[str, Any]) -> list[Any]:
    if "caption" in sample:
        return [sample["caption"].strip()]
    return [
        (message["role"], part.get("text", "").strip())
        for message in sample["messages"]
        for part in message["content"]
    ]


class _Facts(Dataset):
    """Facts of chosen samples of a map-style data set."""

    def __init__(
        self,
        samples: Dataset,
        chosen: Sequence[int],
        notes: PictureNotes,
        collator: PairCollator | ConversationCollator,
    ):
        self.samples, self.chosen, self.notes, self.collator = samples, chosen, notes, collator

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> SampleFacts:
        sample = self.samples[self.chosen[index]]
        return look_at(sample, self.notes.take(), self.collator)


class _StreamedFacts(IterableDataset):
    """Facts of the samples of a stream."""

    def __init__(
        self,
        samples: SampleStream | MixedStream,
        notes: PictureNotes,
        collator: PairCollator | ConversationCollator,
    ):
        self.samples, self.notes, self.collator = samples, notes, collator

    def __iter__(self) -> Iterator[SampleFacts]:
        for sample in self.samples:
            yield look_at(sample, self.notes.take(), self.collator)


# --- what is seen of all --------------------------------------------------------------------------------------------


class HashSet:
    """64-bit hashes, 8 bytes each but for the newest.

    Args:
        num_newest: how many are held at most as Python's numbers, which are larger.
    """

    def __init__(self, num_newest: int = 1 << 18):
        self.num_newest = num_newest
        self._sorted = np.empty(0, dtype=np.uint64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value

    def add(self, value: int) -> bool:
        """Whether the value is new."""
        if value in self:
            return False
        self._recent.add(value)
        if len(self._recent) == self.num_newest:
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]), kind="stable")
            self._recent = set()
        return True


@dataclass
class Finding:
    """How many samples something is true of, and the ids of the first of them."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, sample_id: str) -> None:
        self.count += 1
        if len(self.ids) < _NAMED:
            self.ids.append(sample_id)


class Summary:
    """What the samples of one part of the data (to train on, to evaluate on) are together.

    Args:
        batch_size: of training, for the share of padding.
        asks: whether samples with pictures are to ask requests.
        trained: the part that is trained on, where this one is for evaluation.
    """

    def __init__(self, batch_size: int, asks: bool, trained: "Summary | None" = None):
        self.batch_size = batch_size
        self.asks = asks
        self.trained = trained
        self.read = 0
        self.bad: dict[str, Finding] = {}
        self.reasons: dict[str, str] = {}  # the first of each kind
        self.images: Counter[int] = Counter()  # images of a sample: how many samples
        self.requests: Counter[int] = Counter()
        self.lengths: Counter[int] = Counter()  # tokens of a row: how many rows
        self.targets, self.unknown_targets = 0, 0
        self.sizes: Counter[str] = Counter()
        self.sides: Counter[int] = Counter()  # shortest side in pixels: how many pictures
        self.findings = {
            name: Finding()
            for name in (
                "cut at max_length",
                "without a request",
                "same pictures and text as an earlier sample",
                "same picture as an earlier one under another name",
                "picture also among those to train on",
                "same pictures and text as one to train on",
            )
        }
        self.samples, self.texts = HashSet(), HashSet()
        self.contents, self.names = HashSet(), HashSet()

    def add(self, facts: SampleFacts) -> None:
        self.read += 1
        if facts.bad is not None:
            self.bad.setdefault(facts.bad.kind, Finding()).add(facts.id)
            self.reasons.setdefault(facts.bad.kind, facts.bad.reason)
            return
        self.images[len(facts.pictures)] += 1
        self.requests[facts.num_requests] += 1
        self.lengths.update(facts.lengths)
        self.targets += facts.num_targets
        self.unknown_targets += facts.num_targets_unknown
        found = self.findings
        if facts.num_targets_cut:
            found["cut at max_length"].add(facts.id)
        if self.asks and facts.pictures and not facts.num_requests:
            found["without a request"].add(facts.id)
        self._compare(facts)
        for picture in facts.pictures:
            self._measure(picture, facts.input_size)

    def _compare(self, facts: SampleFacts) -> None:
        found, contents = self.findings, [picture.content for picture in facts.pictures]
        sample = _hash(json.dumps([facts.text, *contents]).encode())
        if not self.samples.add(sample):
            found["same pictures and text as an earlier sample"].add(facts.id)
        self.texts.add(facts.text)
        if self.trained is not None:
            if sample in self.trained.samples:
                found["same pictures and text as one to train on"].add(facts.id)
            if any(content in self.trained.contents for content in contents):
                found["picture also among those to train on"].add(facts.id)
        another_name = False
        for picture in facts.pictures:
            is_new = self.contents.add(picture.content)
            if picture.name is not None:
                is_new_name = self.names.add(picture.content ^ picture.name)
                another_name |= is_new_name and not is_new
        if another_name:
            found["same picture as an earlier one under another name"].add(facts.id)

    def _measure(self, picture: PictureFacts, input_size: tuple[int, int] | None) -> None:
        self.sizes["pictures"] += 1
        if picture.size is None:
            return
        self.sizes["measured"] += 1
        self.sides[min(picture.size)] += 1
        if input_size is not None and min(picture.size) < min(input_size):
            self.sizes["smaller than the tower's input"] += 1
        if max(picture.size) > EXTREME_ASPECT_RATIO * min(picture.size):
            self.sizes["extreme aspect ratio"] += 1

    @property
    def num_bad(self) -> int:
        return sum(finding.count for finding in self.bad.values())

    def reasons_not_to_train(self, max_bad_fraction: float) -> list[str]:
        """Why this part should not be trained on; none where it may be."""
        if not self.read:
            return ["there is no sample"]
        if self.num_bad == self.read:
            return ["no sample is good"]
        if self.num_bad > max_bad_fraction * self.read:
            share = f"{self.num_bad} of {self.read} samples are bad ({self.num_bad / self.read:.2%})"
            return [f"{share}, more than --max_bad_fraction {max_bad_fraction:g} allows"]
        return []

    def as_dict(self) -> dict[str, Any]:
        """The whole as plain JSON. Lengths are in tokens, sides in pixels."""
        rows = self.lengths.total()
        mean = sum(length * count for length, count in self.lengths.items()) / rows if rows else 0.0
        longest = expected_longest(self.lengths, self.batch_size)
        num_images = sum(count * samples for count, samples in self.images.items())
        return {
            "samples": self.read,
            "bad": self.num_bad,
            "bad_by_kind": {
                kind: {"count": finding.count, "ids": finding.ids, "first_reason": self.reasons[kind]}
                for kind, finding in sorted(self.bad.items(), key=lambda item: -item[1].count)
            },
            "text_only": self.images[0],
            "images_per_sample": _histogram(self.images),
            "requests_per_sample": _histogram(self.requests),
            "different_texts": len(self.texts),
            "different_pictures": len(self.contents),
            "findings": {
                name: {"count": finding.count, "ids": finding.ids} for name, finding in self.findings.items()
            },
            "rows": rows,
            "length": {
                "min": quantile(self.lengths, 0.0),
                "median": quantile(self.lengths, 0.5),
                "95%": quantile(self.lengths, 0.95),
                "99%": quantile(self.lengths, 0.99),
                "max": quantile(self.lengths, 1.0),
                "mean": mean,
            },
            "targets_per_sample": self.targets / max(self.read - self.num_bad, 1),
            "unknown_targets": self.unknown_targets / max(self.targets, 1),
            "padding": 1 - mean / longest if longest else 0.0,
            "batch_size": self.batch_size,
            "pictures": {
                "count": num_images,
                "measured": self.sizes["measured"],
                "shortest_side_median": quantile(self.sides, 0.5),
                "smaller_than_input": self.sizes["smaller than the tower's input"],
                "extreme_aspect_ratio": self.sizes["extreme aspect ratio"],
            },
        }


def _histogram(counts: Counter[int]) -> dict[str, int]:
    return {str(value): counts[value] for value in sorted(counts) if counts[value]}


def quantile(counts: Counter[int], share: float) -> int:
    """The smallest value that at least this share of all values is not above; 0 where there are none."""
    wanted, seen = share * counts.total(), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= wanted and counts[value]:
            return value
    return 0


def expected_longest(counts: Counter[int], batch_size: int) -> float:
    """The mean of the largest of `batch_size` values drawn at random: how long the batches of random rows are."""
    total, seen, expected = counts.total(), 0, 0.0
    for value in sorted(counts):
        below, seen = seen, seen + counts[value]
        expected += value * ((seen / total) ** batch_size - (below / total) ** batch_size)
    return expected


# --- the command ----------------------------------------------------------------------------------------------------


def load_processor(arguments: ModelArguments) -> LMEyeProcessor:
    """The processor `load_model` would give, without the model's weights."""
    if arguments.model_name_or_path is not None:
        return LMEyeProcessor.from_pretrained(arguments.model_name_or_path)
    options = arguments.config_fields()
    names = (
        "interaction",
        "visual_mapping",
        "num_static_tokens",
        "num_dynamic_tokens",
        "num_request_rounds",
        "keep_request_token",
    )
    return LMEyeProcessor.from_vision_language_pretrained(
        arguments.vision_model_name_or_path,
        arguments.language_model_name_or_path,
        add_bos=arguments.add_bos,
        trust_remote_code=arguments.trust_remote_code,
        **{name: options[name] for name in names if name in options},
    )


def choose(num_samples: int, wanted: int | None, seed: int) -> Sequence[int]:
    """Which of a map-style data set's samples are looked at, in order: `wanted` drawn at random, or all."""
    everything = range(num_samples)
    if wanted is None or wanted >= num_samples:
        return everything
    return sorted(Random(seed).sample(everything, wanted))


def facts_of(
    samples: Dataset,
    notes: PictureNotes,
    collator: PairCollator | ConversationCollator,
    wanted: int | None,
    seed: int,
    num_workers: int = 0,
) -> tuple[Iterable[SampleFacts], int | None, int | None]:
    """
    What training would meet, sample by sample.

    Args:
        samples: as `DataArguments.train_dataset` gives them, bad samples in their places; a stream is read once.
        notes: what opens their pictures.
        collator: of the stage.
        wanted: how many; None for all.
        seed: of the choice.
        num_workers: processes that read.

    Returns:
        the facts, how many there will be, and how many samples the data set has; of a stream nobody knows (None).
    """
    options = {"batch_size": 16, "collate_fn": list, "num_workers": num_workers}
    if isinstance(samples, SampleStream | MixedStream):
        stream = samples.data if isinstance(samples, MixedStream) else samples
        stream.num_passes, stream.shuffle_buffer = 1, 0
        loader, expected, in_all = DataLoader(_StreamedFacts(samples, notes, collator), **options), wanted, None
    else:
        in_all = len(samples)
        chosen = choose(in_all, wanted, seed)
        expected = len(chosen)
        loader = DataLoader(_Facts(samples, chosen, notes, collator), **options)
    return islice((facts for batch in loader for facts in batch), wanted), expected, in_all


def table(name: str, part: dict[str, Any]) -> str:
    """One part of the report for people."""
    samples, good = part["samples"], part["samples"] - part["bad"]
    in_all = "" if part["in_all"] is None else f" of {part['in_all']:,}"
    lines = [f"== {name}: {samples:,}{in_all} samples looked at", "", _line("good", good, samples)]
    for kind, finding in part["bad_by_kind"].items():
        lines += [_line(f"bad: {kind}", finding["count"], samples), f"    {_ids(finding)}: {finding['first_reason']}"]
    lines += [_line("without a picture", part["text_only"], good)]
    for what in ("images", "requests"):
        shares = ", ".join(f"{number}: {count:,}" for number, count in part[f"{what}_per_sample"].items())
        lines.append(f"  {f'{what} of a sample':<52} {shares or '-'}")
    for finding_name, finding in part["findings"].items():
        if finding["count"]:
            lines += [_line(finding_name, finding["count"], good), f"    {_ids(finding)}"]
    if not good:
        return "\n".join(lines)
    lines += ["", f"  different texts {part['different_texts']:,}, different pictures {part['different_pictures']:,}"]
    length, pictures = part["length"], part["pictures"]
    lines.append(
        f"  tokens of a row: min {length['min']}, median {length['median']}, 95% {length['95%']}, "
        f"99% {length['99%']}, max {length['max']}; {part['targets_per_sample']:.1f} targets a sample"
    )
    if part["unknown_targets"]:
        lines.append(f"  targets that the tokenizer does not know: {part['unknown_targets']:.1%}")
    lines.append(f"  padding of random batches of {part['batch_size']}: {part['padding']:.1%}")
    if pictures["measured"]:
        lines.append(
            f"  pictures: {pictures['measured']:,}, shortest side {pictures['shortest_side_median']} pixels (median), "
            f"{pictures['smaller_than_input'] / pictures['measured']:.1%} smaller than the tower's input, "
            f"{pictures['extreme_aspect_ratio'] / pictures['measured']:.1%} more than {EXTREME_ASPECT_RATIO} times as "
            "long as wide"
        )
    return "\n".join(lines)


def _line(name: str, count: int, of: int) -> str:
    return f"  {name:<52} {count:>12,} {count / max(of, 1):>8.2%}"


def _ids(finding: dict[str, Any]) -> str:
    shown = ", ".join(finding["ids"][:3])
    return shown + (", .." if finding["count"] > 3 else "")


def _parse(
    arguments: Sequence[str] | None,
) -> tuple[CheckArguments, ModelArguments, DataArguments, argparse.Namespace]:
    """The training script's own arguments and those of the check. `TrainingArguments` are parsed, not made: they would
    ask for the machine that trains."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", default="pretrain")
    stage = first.parse_known_args(arguments)[0].stage
    types = [CheckArguments, ModelArguments]
    if stage == "instruct":
        types += [ConversationDataArguments, StageTrainingArguments, StageTwoArguments]
    else:
        types += [PairDataArguments, StageTrainingArguments]
    parser = HfArgumentParser(types, prog="python -m transformers_lmeye.data.check", usage=_USAGE, allow_abbrev=False)
    values = parser.parse_args(arguments)
    if values.num_samples != "all" and not (values.num_samples.isdecimal() and int(values.num_samples)):
        parser.error(f'--num_samples is a number or "all", not {values.num_samples!r}')
    made = [made_of(**{f.name: getattr(values, f.name) for f in fields(made_of)}) for made_of in types[:3]]
    return *made, values


def check(arguments: Sequence[str] | None = None) -> int:
    """
    Checks data as the command line says, and prints what it found.

    Args:
        arguments: of the command line; by default the process's own.

    Returns:
        `int`: 0 to train, 1 not to train, 2 where nothing could be checked.
    """
    args, model_args, data_args, values = _parse(arguments)
    wanted = None if args.num_samples == "all" else int(args.num_samples)
    try:
        model, features = None, None
        if data_args.feature_cache is not None:
            model, processor = load_model(model_args, values.seed)
            features = data_args.open_features(model, processor, "pretrain" if args.stage == "pretrain" else None)
        else:
            processor = None if args.processor_name_or_path else load_processor(model_args)
        if args.processor_name_or_path is not None:
            processor = LMEyeProcessor.from_pretrained(args.processor_name_or_path)
        notes = PictureNotes(features, data_args.max_pixels)
        parts = {"train": data_args.train_dataset(values.seed, notes)}
        evaluation = data_args.eval_dataset(notes)
        if evaluation is not None:
            named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
            parts |= {f"eval {name}".strip(): samples for name, samples in named.items()}
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        print(f"Nothing could be checked: {error}", file=sys.stderr)
        return 2
    collator_type = PairCollator if args.stage == "pretrain" else ConversationCollator
    collator = collator_type(processor, data_args.max_length, skip_bad_samples=True)
    asks = args.stage == "instruct" and processor.num_dynamic_tokens > 0

    report: dict[str, Any] = {"stage": args.stage, "parts": {}, "reasons": []}
    trained: Summary | None = None
    with ExitStack() as stack:
        bad_file = (
            stack.enter_context(open(args.bad_samples_file, "w", encoding="utf-8")) if args.bad_samples_file else None
        )
        for name, samples in parts.items():
            summary = Summary(values.per_device_train_batch_size, asks, trained)
            trained = trained or summary
            found, expected, in_all = facts_of(
                samples, notes, collator, wanted, values.seed, values.dataloader_num_workers
            )
            for facts in tqdm(found, name, expected, unit=" samples", disable=None):
                summary.add(facts)
                if facts.bad is not None and bad_file is not None:
                    bad_file.write(json.dumps({"part": name, **facts.bad.as_dict()}) + "\n")
            report["parts"][name] = {"in_all": in_all, **summary.as_dict()}
            reasons = summary.reasons_not_to_train(values.max_bad_fraction)
            report["reasons"] += [f"{name}: {reason}" for reason in reasons]
            print(table(name, report["parts"][name]), end="\n\n")
    report["verdict"] = "do not train" if report["reasons"] else "train"
    print(f"Verdict: {'; '.join([report['verdict'], *report['reasons']])}.")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if report["reasons"] else 0


if __name__ == "__main__":
    sys.exit(check())
