"""The feature cache: what is stored, found, refused, and that training from it is training from pictures."""

import hashlib
import json
import pickle
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor

from transformers_lmeye import ImageFeatures, LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.data import ConversationReader, PairReader, SampleDataset, UnreadableImage, open_image
from transformers_lmeye.data import feature_extraction as extraction
from transformers_lmeye.data import features as caching
from transformers_lmeye.data.feature_extraction import (
    PictureSource,
    VisionEncoder,
    extract_features,
    load_vision_encoder,
)
from transformers_lmeye.data.features import FeatureCache, FeatureCacheWriter, picture_key
from transformers_lmeye.processing.open_clip_image_processing import open_clip_image_processor
from transformers_lmeye.training import ConversationCollator, PairCollator


SIZES = [(32, 32), (60, 32), (32, 60), (40, 90), (33, 35), (90, 40), (64, 64)]


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A folder of seven pictures of several proportions, `images/0.png` to `images/6.png`."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number, size in enumerate(SIZES):
        tiny.picture(number, size).save(folder / "images" / f"{number}.png")
    return folder


def names(count: int = len(SIZES)) -> list[str]:
    return [f"images/{number}.png" for number in range(count)]


def rows_of(images: list[Any], **columns: list[Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": images, **columns})


@pytest.fixture
def make(folders, tmp_path) -> Callable[..., tuple[LMEyeForConditionalGeneration, LMEyeProcessor]]:
    """`make(vision, **config)` -> a model around the vision model in that folder, and its processor."""

    def build(vision: Path, interaction: str = "clip_text", **config: Any):
        options = {**tiny.SMALL_STACK, **config} if interaction == "cross_attention" else config
        if interaction == "clip_text" and vision != folders.vision() and not str(vision).startswith("open_clip"):
            options["clip_text_model_name_or_path"] = str(folders.vision())
        model = LMEyeForConditionalGeneration.from_vision_language_pretrained(
            str(vision), str(folders.language("llama")), interaction=interaction, num_dynamic_tokens=2, **options
        )
        tiny.randomise_ipn(model)
        processor = LMEyeProcessor.from_vision_language_pretrained(
            str(vision),
            str(folders.language("llama")),
            interaction=interaction,
            num_static_tokens=model.config.num_static_tokens,
            num_dynamic_tokens=2,
        )
        return model, processor

    return build


def encoder_of(model: LMEyeForConditionalGeneration, processor: LMEyeProcessor, **changes: Any) -> VisionEncoder:
    config = model.config
    needed = caching.features_read(config)
    values = {
        "tower": model.vision_tower,
        "qformer": model.qformer,
        "image_processor": processor.image_processor,
        "fingerprint": config.backbones["vision"]["fingerprint"]["sampled"],
        "vision_feature_layer": config.vision_feature_layer,
        "patches": "patches" in needed,
    }
    return VisionEncoder(**{**values, **changes})


@pytest.fixture
def cached(pictures, tmp_path) -> Callable[..., Path]:
    """`cached(model, processor, ...)` -> the folder of a cache of the seven pictures."""

    def build(
        model: LMEyeForConditionalGeneration,
        processor: LMEyeProcessor,
        name: str = "cache",
        dtype: str = "float32",
        order: Sequence[int] = range(len(SIZES)),
        batch_size: int = 3,
        **changes: Any,
    ) -> Path:
        source = PictureSource(rows_of([names()[number] for number in order]), image_folder=pictures)
        encoder = encoder_of(model, processor, **changes)
        extract_features(encoder, [source], tmp_path / name, dtype=dtype, batch_size=batch_size, shard_size=5)
        return tmp_path / name

    return build


VARIANTS = {
    "clip, global": ("clip", {}),
    "clip, patches": ("clip", {"interaction": "cross_attention"}),
    "clip, every patch": ("clip", {"interaction": "none", "visual_mapping": "patch"}),
    "clip, resampled": ("clip", {"interaction": "none", "visual_mapping": "resampler", **tiny.SMALL_STACK}),
    "siglip2, patches": ("siglip2", {"interaction": "cross_attention"}),
    "blip2, queries": ("blip2", {"visual_mapping": "qformer", "fine_grained_source": "qformer"}),
    "open_clip, patches": ("open_clip", {"interaction": "cross_attention"}),
}


@pytest.fixture(params=VARIANTS)
def variant(request, make, folders, tmp_path):
    vision, config = VARIANTS[request.param]
    if vision == "open_clip":
        folder = save_clip_of_open_clip(tmp_path / "open_clip")
    else:
        folder = {"clip": folders.vision, "blip2": lambda: folders.blip2("opt")}.get(
            vision, lambda: folders.tower(vision)
        )()
    return make(folder, **config)


def save_clip_of_open_clip(folder: Path) -> Path:
    """A tiny CLIP in open_clip's own format."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is an extra")
    vision = {"image_size": tiny.IMAGE_SIZE, "layers": 3, "width": 32, "head_width": 8, "patch_size": tiny.PATCH_SIZE}
    text = {"context_length": 24, "vocab_size": 60, "width": 40, "heads": 4, "layers": 2}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng():
        model = open_clip.CLIP(**config).eval()
    tiny.randomise(model, 5, gain=1.0)
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_path_is_known_relative_to_the_image_folder(tmp_path):
    expected = hashlib.sha256(b"path:images/1.png").digest()[:16]
    for value in (
        "images/1.png",
        "./images//1.png",
        "images/../images/1.png",
        {"bytes": None, "path": "images/1.png"},
    ):
        assert picture_key(value) == picture_key(value, tmp_path) == expected
    assert picture_key(str(tmp_path / "images" / "1.png"), tmp_path) == expected
    assert picture_key(tmp_path / "images" / "1.png", root=tmp_path) == expected
    # Two files of one name in two folders are two pictures.
    other = picture_key("images/1.png", tmp_path / "val", root=tmp_path / "train")
    assert other == hashlib.sha256(b"path:../val/images/1.png").digest()[:16]


def test_a_file_in_the_row_is_known_by_its_bytes():
    for value in (b"some", {"bytes": b"some", "path": "a.png"}):
        assert picture_key(value, "folder", "root") == hashlib.sha256(b"some").digest()[:16]
    for value in (None, "", {"bytes": None, "path": None}, 3):
        with pytest.raises(UnreadableImage, match="by path or by the bytes"):
            picture_key(value)


def test_preprocessing_survives_saving_and_differs_with_every_option(folders, tmp_path):
    processors = [
        AutoImageProcessor.from_pretrained(folders.vision()),
        AutoImageProcessor.from_pretrained(folders.tower("siglip2")),
        AutoImageProcessor.from_pretrained(folders.blip2("opt")),
        AutoImageProcessor.from_pretrained(folders.tower("dinov2")),
        open_clip_image_processor(str(save_clip_of_open_clip(tmp_path / "open_clip"))),
    ]
    described = [caching.preprocessing_of(processor) for processor in processors]
    for number, (processor, description) in enumerate(zip(processors, described, strict=True)):
        assert json.loads(json.dumps(description)) == description
        processor.save_pretrained(tmp_path / str(number))
        reloaded = AutoImageProcessor.from_pretrained(tmp_path / str(number))
        assert caching.preprocessing_of(reloaded) == description
        reloaded.image_mean = [0.1, 0.2, 0.3]
        assert caching.preprocessing_of(reloaded) != description
    assert all(one != other for i, one in enumerate(described) for other in described[:i])


# --- what is stored --------------------------------------------------------------------------------------------------


def _fields(features: ImageFeatures) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in vars(features).items() if tensor is not None}


def test_features_are_those_of_the_models_own_tower(variant, cached, pictures):
    model, processor = variant
    cache = FeatureCache.open(cached(model, processor), model, processor)
    assert len(cache) == len(SIZES)
    for name in names():
        image = open_image(name, pictures)
        inputs = processor(images=image, text="what?", return_tensors="pt")
        inputs.pop("input_ids"), inputs.pop("attention_mask")
        expected = _fields(model.get_image_features(**inputs))
        found = _fields(cache(name, pictures))
        assert found.keys() == expected.keys()
        for field, tensor in found.items():
            assert tensor.dtype == expected[field].dtype and tensor.shape == expected[field].shape
            # The picture was in a batch of three: equal but for the rounding of sums.
            torch.testing.assert_close(tensor, expected[field], rtol=1e-5, atol=1e-5)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # not the whole shard


def test_a_picture_of_many_rows_is_stored_once(make, folders, pictures, tmp_path):
    model, processor = make(folders.vision())
    five = rows_of([name for name in names(4) for _ in range(5)])
    lists = rows_of([[names()[4], names()[0]], [], names()[4:6]])
    extract_features(
        encoder_of(model, processor),
        [PictureSource(five, image_folder=pictures), PictureSource(lists, image_folder=pictures)],
        tmp_path / "cache",
        shard_size=4,
    )
    shards = [load_file(file) for file in sorted((tmp_path / "cache").glob("*.safetensors"))]
    assert [len(shard["pooled"]) for shard in shards] == [4, 2]
    assert len(FeatureCache(tmp_path / "cache")) == 6


def test_pictures_of_conversations_whatever_their_form(make, folders, pictures, tmp_path):
    content = [{"type": "image", "image": "images/0.png"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    rows = [
        {"image": "images/1.png", "messages": [{"role": "user", "content": content}, answer]},
        {"image": "images/2.png", "conversations": turns},
        {"image": "images/3.png", "question": "what?", "answer": "a cat"},
        {"question": "how many?", "answer": "no"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "what?"}]}, answer]},
    ]
    model, processor = make(folders.vision())
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    source = PictureSource(stream, image_folder=pictures)
    extract_features(encoder_of(model, processor), [source], tmp_path / "cache")
    cache = FeatureCache.open(tmp_path / "cache", model, processor)
    assert len(cache) == 4
    reader = ConversationReader(open_image=lambda value: cache(value, pictures))
    for row in rows:
        sample = reader.read(row, 0, "a row")
        found = [part["image"] for message in sample["messages"] for part in message["content"] if "image" in part]
        assert all(isinstance(image, ImageFeatures) for image in found)


def test_files_inside_rows(make, folders, pictures, tmp_path):
    model, processor = make(folders.vision())
    files = [(pictures / name).read_bytes() for name in names()]
    rows = rows_of([{"bytes": file, "path": f"{number}.png"} for number, file in enumerate(files)])
    rows = rows.cast_column("image", datasets.Image(decode=False))
    extract_features(encoder_of(model, processor), [PictureSource(rows)], tmp_path / "by_bytes")
    by_bytes = FeatureCache.open(tmp_path / "by_bytes", model, processor)
    extract_features(
        encoder_of(model, processor), [PictureSource(rows_of(names()), image_folder=pictures)], tmp_path / "by_path"
    )
    by_path = FeatureCache.open(tmp_path / "by_path", model, processor)
    for row, name in zip(rows, names(), strict=True):
        assert torch.equal(by_bytes(row["image"]).pooled, by_path(name).pooled)
    with pytest.raises(UnreadableImage, match=r"A picture of 5 bytes is not in the feature cache"):
        by_bytes(b"other")


def test_half_precision_on_disk(make, folders, cached, pictures):
    model, processor = make(folders.vision(), "cross_attention")
    full = FeatureCache.open(cached(model, processor), model, processor)
    for dtype in ("bfloat16", "float16"):
        half = FeatureCache.open(cached(model, processor, dtype, dtype), model, processor)
        for name in names():
            for field, tensor in _fields(half(name)).items():
                assert torch.equal(tensor, getattr(full(name), field).to(getattr(torch, dtype)))


def test_features_that_a_dtype_cannot_hold_are_refused(make, folders, cached):
    model, processor = make(folders.vision())
    with torch.no_grad():
        model.vision_tower.visual_projection.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"pooled features are not finite in torch.float16.*--storage_dtype"):
        cached(model, processor, dtype="float16")


def test_pictures_of_several_sizes_are_refused(make, folders, cached):
    model, processor = make(folders.vision())
    processor.image_processor.do_center_crop = False
    with pytest.raises(ValueError, match="brings all pictures to one size"):
        cached(model, processor)


# --- training from it ------------------------------------------------------------------------------------------------


def _loss_and_gradients(model, batch: dict[str, Any], stage: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradients of all trained parameters as one vector."""
    num_trained = model.freeze_for_stage(stage)
    model.zero_grad()
    model.eval()  # without dropout, which would draw anew
    loss = model(**batch).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert len(gradients) == num_trained
    return loss.detach(), gradients


def test_loss_and_gradients_are_those_of_the_pictures(variant, cached, pictures):
    model, processor = variant
    order = (4, 0, 2, 1)
    alike = cached(model, processor, "alike", order=order, batch_size=4)  # as in the training batch
    otherwise = cached(model, processor, "otherwise")
    half = cached(model, processor, "half", dtype="bfloat16")
    for stage in ("pretrain", "instruct") if model.config.interaction != "none" else ("pretrain",):
        if stage == "pretrain":
            words = ("cat", "dog", "man", "house", "green", "red", "blue")
            rows = rows_of(names(), caption=[f"a {word} in a house" for word in words])
            reader, collator = PairReader, PairCollator(processor)
        else:
            rows = rows_of(names(), question=["what is it?"] * 7, answer=["a cat", "the dog", "no"] + ["a man"] * 4)
            reader, collator = ConversationReader, ConversationCollator(processor)

        def batch(read: Any, rows=rows, collator=collator) -> dict[str, Any]:
            data = SampleDataset(rows, read)
            return collator([data[index] for index in order])

        expected_batch = batch(reader(image_folder=pictures))
        assert "pixel_values" in expected_batch and "image_features" not in expected_batch
        expected = _loss_and_gradients(model, expected_batch, stage)
        for folder, tolerance in ((alike, 0), (otherwise, 1e-5), (half, 0.05)):
            cache = FeatureCache.open(folder, model, processor, pictures, stage)
            cached_batch = batch(reader(open_image=partial(cache, image_folder=pictures)))
            assert "pixel_values" not in cached_batch
            loss, gradients = _loss_and_gradients(model, cached_batch, stage)
            assert abs(loss - expected[0]) <= tolerance * expected[0]
            assert (gradients - expected[1]).norm() <= tolerance * expected[1].norm()


def test_data_loaders_workers_read_the_cache(make, folders, cached, pictures):
    model, processor = make(folders.vision(), "cross_attention")
    cache = FeatureCache.open(cached(model, processor), model, processor, pictures)
    expected = cache(names()[3], pictures)
    assert len(pickle.dumps(cache)) < 4000  # what it has mapped stays behind
    reader = PairReader(open_image=pickle.loads(pickle.dumps(cache)))
    data = SampleDataset(rows_of([str(pictures / name) for name in names()], caption=["a cat"] * 7), reader)
    batches = list(DataLoader(data, batch_size=7, num_workers=2, collate_fn=PairCollator(processor)))
    assert torch.equal(batches[0]["image_features"][3:4].patches, expected.patches)


def _anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_what_is_read(tmp_path):
    description = {"dtype": "float32", "format": caching.FORMAT}
    caching.start_cache(tmp_path, description)
    writer = FeatureCacheWriter(tmp_path, description, shard_size=50)
    patches = torch.ones(50, 64, 256)  # 64 KB a picture, 32 MB in all
    for shard in range(10):
        keys = [picture_key(f"{shard}-{row}.png") for row in range(50)]
        writer.add(keys, ImageFeatures(torch.ones(50, 4), patches))
    del writer
    caching.finish_cache(tmp_path, description)
    cache = FeatureCache(tmp_path)
    cache("0-0.png")
    before = _anonymous_memory()
    total = sum(float(cache(f"{shard}-{row}.png").patches.sum()) for shard in range(10) for row in range(50))
    assert total == 500 * 64 * 256
    assert _anonymous_memory() - before < 4e6


def test_stage_one_does_not_need_the_patches_of_stage_two(make, folders, cached, pictures):
    model, processor = make(folders.vision(), "cross_attention")
    pooled = cached(model, processor, patches=False)
    cache = FeatureCache.open(pooled, model, processor, stage="pretrain")
    assert _fields(cache(names()[0])).keys() == {"pooled"}
    with pytest.raises(ValueError, match=r"holds pooled, and the model also reads patches: .* --patches"):
        FeatureCache.open(pooled, model, processor)
    # And of a cache that has them only what is needed is read.
    everything = FeatureCache.open(cached(model, processor, "all"), model, processor, stage="pretrain")
    assert _fields(everything(names()[0])).keys() == {"pooled"}
    for mapping in ("patch", "resampler"):
        static, static_processor = make(
            folders.vision(), "none", visual_mapping=mapping, **(tiny.SMALL_STACK if mapping == "resampler" else {})
        )
        with pytest.raises(ValueError, match="also reads patches"):
            FeatureCache.open(pooled, static, static_processor, stage="pretrain")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_cache_of_another_tower_preprocessing_or_layer_is_refused(make, folders, cached):
    model, processor = make(folders.vision(), "cross_attention")
    folder = cached(model, processor)
    other, other_processor = make(folders.vision(seed=101), "cross_attention")
    with pytest.raises(ValueError, match=r"not this model's: it was made by another vision tower, with fingerprint"):
        FeatureCache.open(folder, other, other_processor)
    processor.image_processor.image_std = [0.5, 0.5, 0.5]
    with pytest.raises(
        ValueError, match=r"preprocessed in another way \(image_std .*the model's is \[0.5, 0.5, 0.5\]"
    ):
        FeatureCache.open(folder, model, processor)
    _, processor = make(folders.vision(), "cross_attention")
    model.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match=r"patch tokens are of layer -2, and the model reads those of layer -1"):
        FeatureCache.open(folder, model, processor)
    FeatureCache.open(folder, model, processor, stage="pretrain")  # the pooled output is of no layer
    model.config.backbones = None
    with pytest.raises(ValueError, match="does not record where its vision tower came from"):
        FeatureCache.open(folder, model, processor)


def test_a_cache_without_the_queries_is_refused(make, folders, cached):
    model, processor = make(folders.blip2("opt"), visual_mapping="qformer")
    folder = cached(model, processor, qformer=None)
    for stage in ("pretrain", "instruct"):
        with pytest.raises(ValueError, match=r"also reads queries: .* --queries"):
            FeatureCache.open(folder, model, processor, stage=stage)


def test_a_cache_that_is_missing_unfinished_or_of_another_format_is_refused(make, folders, cached, tmp_path):
    model, processor = make(folders.vision())
    with pytest.raises(ValueError, match=r"There is no feature cache in .*none .*extract_features.py"):
        FeatureCache.open(tmp_path / "none", model, processor)
    folder = cached(model, processor)
    description = json.loads((folder / "feature_cache.json").read_text())
    for change, message in (({"complete": False}, "not finished: run .* again"), ({"format": 0}, "has format 0")):
        (folder / "feature_cache.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match=message):
            FeatureCache.open(folder, model, processor)


def test_a_picture_that_is_not_cached_is_a_bad_sample(make, folders, cached, pictures):
    model, processor = make(folders.vision())
    cache = FeatureCache.open(cached(model, processor), model, processor)
    rows = rows_of(["images/0.png", "images/9.png"], caption=["a cat", "a dog"])
    data = SampleDataset(rows, PairReader(open_image=cache), skip_bad_samples=True)
    bad = data[1]
    assert (bad.id, bad.kind) == ("row 1", "not cached")
    assert "images/9.png is not in the feature cache" in bad.reason
    assert isinstance(data[0]["image"], ImageFeatures)
    batch = PairCollator(processor, skip_bad_samples=True)([data[0], bad])
    assert len(batch["image_features"]) == 1 and batch["bad_samples"] == [bad]


# --- going on, and bad pictures --------------------------------------------------------------------------------------


class Counting(VisionEncoder):
    """A vision encoder that counts pictures, and is stopped before one too many."""

    shown, most = 0, 1000

    def __call__(self, pixel_values: torch.Tensor, **inputs: torch.Tensor) -> ImageFeatures:
        if self.shown == self.most:
            raise KeyboardInterrupt
        self.shown += len(pixel_values)
        return super().__call__(pixel_values, **inputs)


def test_a_run_that_broke_off_goes_on_at_its_shard(make, folders, pictures, tmp_path):
    model, processor = make(folders.vision())
    encoder = encoder_of(model, processor)
    source = PictureSource(rows_of(names()), image_folder=pictures)
    options = {"batch_size": 1, "shard_size": 2}
    assert extract_features(encoder, [source], tmp_path / "whole", **options)["num_added"] == 7
    folder = tmp_path / "cut"
    counting = Counting(**vars(encoder))
    counting.most = 5
    with pytest.raises(KeyboardInterrupt):
        extract_features(counting, [source], folder, **options)
    with pytest.raises(ValueError, match=r"not finished: run .* again"):
        FeatureCache(folder)
    shards = sorted(folder.glob("*.safetensors"))
    before = [shard.read_bytes() for shard in shards]
    assert len(before) == 2
    (folder / "features-000002.safetensors.partial").write_bytes(b"half a shard")
    counting = Counting(**vars(encoder))
    assert extract_features(counting, [source], folder, **options)["num_added"] == 3
    assert counting.shown == 3
    assert [shard.read_bytes() for shard in shards] == before
    assert not list(folder.glob("*.partial"))
    cut, whole = FeatureCache(folder), FeatureCache(tmp_path / "whole")
    assert len(cut) == len(whole) == 7
    assert all(torch.equal(cut(name).pooled, whole(name).pooled) for name in names())
    # Rows that came later are added; nothing is computed twice.
    tiny.picture(7).save(pictures / "images" / "7.png")
    more = PictureSource(rows_of(names(8)), image_folder=pictures)
    assert extract_features(encoder, [more], folder, **options)["num_added"] == 1
    assert torch.equal(FeatureCache(folder)(names()[6]).pooled, whole(names()[6]).pooled)


def test_a_folder_with_another_cache_is_left_alone(make, folders, cached, pictures):
    model, processor = make(folders.vision())
    folder = cached(model, processor)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for changes, message in (({"dtype": "bfloat16"}, "other dtype"), ({"patches": True}, "other features")):
        with pytest.raises(ValueError, match=f"holds a feature cache with {message}.*--output_dir"):
            cached(model, processor, **changes)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_bad_pictures_are_named_and_counted(make, folders, pictures, tmp_path, caplog):
    model, processor = make(folders.vision())
    (pictures / "images" / "1.png").write_bytes((pictures / "images" / "1.png").read_bytes()[:500])
    images = ["images/0.png", "images/1.png", "images/none.png", "images/1.png"]
    rows = datasets.Dataset.from_dict({"image": images, "id": ["a", "b", "c", "d"]})
    sources = [PictureSource(rows, image_folder=pictures)]
    turns = [{"from": "gpt", "value": "<image>"}, {"from": "user", "value": "what?"}]
    broken = datasets.Dataset.from_list([{"image": "images/2.png", "conversations": turns}])
    sources.append(PictureSource(broken, image_folder=pictures, name="evaluation"))
    folder = tmp_path / "cache"
    encoder = encoder_of(model, processor)
    cache = extract_features(encoder, sources, folder, max_bad_fraction=0.6)
    assert cache["num_pictures"] == 1 and cache["num_bad_pictures"] == 3
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted((entry["id"], entry["kind"]) for entry in bad) == [
        ("evaluation row 0", "bad messages"),
        ("row 1 (id b)", "truncated"),
        ("row 2 (id c)", "missing"),
    ]
    # Again, one of them mended.
    tiny.picture(1).save(pictures / "images" / "1.png")
    cache = extract_features(encoder, sources, folder, max_bad_fraction=0.4)
    assert cache["num_pictures"] == 2 and cache["num_added"] == 1 and cache["num_bad_pictures"] == 2
    assert torch.isfinite(FeatureCache(folder)("images/1.png").pooled).all()
    with pytest.raises(
        ValueError, match=r"2 of 4 pictures could not be read, and max_bad_fraction=0.3 allows 1\. The last: "
    ):
        extract_features(encoder, sources, tmp_path / "strict", max_bad_fraction=0.3)
    missing = rows_of([f"{number}.png" for number in range(30)])
    for rows in (missing, missing.to_iterable_dataset()):  # a stream does not say how many there are
        with pytest.raises(ValueError, match=r"(1|11) of \d+ pictures .* allows (0|10)") as refused:
            source = PictureSource(rows, image_folder=pictures)
            extract_features(encoder, [source], tmp_path / "many", batch_size=1)
        assert str(refused.value).startswith("1 of" if rows is missing else "11 of")
    nothing = PictureSource(rows_of(["none.png"]), image_folder=pictures)
    with pytest.raises(ValueError, match="Not one picture could be read"):
        extract_features(encoder, [nothing], tmp_path / "nothing", max_bad_fraction=1)
    unnamed = PictureSource(rows_of(names()).rename_column("image", "photo"), image_folder=pictures)
    with pytest.raises(ValueError, match=r"no column 'image'; it has photo.*--image_column"):
        extract_features(encoder, [unnamed], tmp_path / "unnamed")


# --- which vision model ----------------------------------------------------------------------------------------------


def test_the_encoder_of_a_checkpoint_is_its_own(make, folders, pictures, tmp_path):
    model, processor = make(folders.vision(), "cross_attention", vision_feature_layer=-1)
    for whole in (False, True):
        folder = tmp_path / f"whole-{whole}"
        model.save_pretrained(folder, save_backbones=whole)
        processor.save_pretrained(folder)
        encoder = load_vision_encoder(model_name_or_path=str(folder))
        assert (encoder.patches, encoder.vision_feature_layer, encoder.qformer) == (True, -1, None)
        source = PictureSource(rows_of(names()), image_folder=pictures)
        extract_features(encoder, [source], folder / "cache", batch_size=1)
        cache = FeatureCache.open(folder / "cache", model, processor)
        inputs = processor(images=open_image(names()[2], pictures), text="what?", return_tensors="pt")
        expected = model.get_image_features(inputs["pixel_values"])
        assert torch.equal(cache(names()[2]).patches, expected.patches)
    # Elsewhere than it was, and another one there.
    (tmp_path / "moved").symlink_to(folders.vision())
    ipn = str(tmp_path / "whole-False")
    load_vision_encoder(str(tmp_path / "moved"), ipn)
    with pytest.raises(ValueError, match="is not the one this IPN was trained on"):
        load_vision_encoder(str(folders.vision(seed=101)), ipn)


def test_the_encoder_of_a_vision_model_fits_a_model_made_of_it_later(make, folders, pictures, tmp_path):
    for vision, config in (
        (folders.vision(), {"interaction": "cross_attention"}),
        (folders.blip2("opt"), {"visual_mapping": "qformer", "fine_grained_source": "qformer"}),
        (save_clip_of_open_clip(tmp_path / "open_clip"), {"interaction": "cross_attention"}),
    ):
        model, processor = make(vision, **config)
        needed = caching.features_read(model.config)
        encoder = load_vision_encoder(str(vision), patches="patches" in needed, queries="queries" in needed)
        assert set(encoder.features) == needed
        source = PictureSource(rows_of(names()), image_folder=pictures)
        extract_features(encoder, [source], tmp_path / f"cache-{vision.name}")
        FeatureCache.open(tmp_path / f"cache-{vision.name}", model, processor)
    assert load_vision_encoder(str(folders.vision())).features == ["pooled"]
    with pytest.raises(ValueError, match="has no Q-Former"):
        load_vision_encoder(str(folders.vision()), queries=True)
    with pytest.raises(ValueError, match="Name a vision model"):
        load_vision_encoder()


# --- the index -------------------------------------------------------------------------------------------------------


def test_the_index_finds_every_picture_of_every_shard(tmp_path):
    generator = random.Random(0)
    keys = [generator.randbytes(16) for _ in range(5000)]
    keys += [keys[0][:8] + generator.randbytes(8) for _ in range(3)]  # first halves alike
    keys += [bytes(16), b"\xff" * 16, b"\x7f" + b"\xff" * 15, b"\x80" + bytes(15)]
    description = {"dtype": "float32", "format": caching.FORMAT}
    caching.start_cache(tmp_path, description)
    writers = [FeatureCacheWriter(tmp_path, description, 700, rank, 2) for rank in range(2)]
    values = torch.arange(len(keys), dtype=torch.float32)[:, None]
    half = len(keys) // 2
    for writer, part in zip(writers, (slice(0, half), slice(half - 10, None)), strict=True):  # ten are in both
        for start in range(0, len(keys[part]), 100):
            some = slice(start, start + 100)
            writer.add(keys[part][some], ImageFeatures(values[part][some]))
        writer.flush()
    description = caching.finish_cache(tmp_path, description)
    assert description["num_pictures"] == len(set(keys)) == len(keys)
    index = caching.open_index(tmp_path)
    assert index.shape == (3, len(keys)) and isinstance(index.base, np.memmap)
    for number, key in enumerate(keys):
        shard, row = divmod(int(index[2, caching.find_key(index, key)]), 1 << 32)
        assert load_file(caching.shard_path(tmp_path, shard))["pooled"][row] == number if number % 250 == 0 else True
        assert shard % 2 == (number >= half - 10)  # what both have is found in the first shard
    for _ in range(100):
        assert caching.find_key(index, generator.randbytes(16)) is None
    assert caching.find_key(index, keys[0][:8] + bytes(8)) is None


def test_keys_met_are_known_whatever_their_number(monkeypatch):
    monkeypatch.setattr(extraction, "_LONGEST_SET", 16)
    generator = random.Random(0)
    keys = [generator.randbytes(16) for _ in range(1000)]
    met = extraction._KeySet()
    for key in keys:
        assert key not in met
        met.add(key)
        assert key in met
    assert all(key in met for key in keys) and generator.randbytes(16) not in met
    lengths = [run.shape[1] for run in met._runs]
    assert all(one >= 2 * other for one, other in pairwise(lengths))


@pytest.mark.parametrize("in_rows", [False, True])
def test_processes_share_the_pictures_out(pictures, tmp_path, in_rows):
    """Paths: each picture is the task of one process, however its rows lie. Files: each row is that of one process."""
    caching.start_cache(tmp_path / "cache", {"format": caching.FORMAT})
    paths = [f"images/{number % 40}.png" for number in range(200)]
    images = [path.encode() if in_rows else path for path in paths]
    for rows in (rows_of(images), rows_of(images).to_iterable_dataset(num_shards=4)):
        source = PictureSource(rows, image_folder=pictures)
        shares = [
            [task.value for task in extraction._Tasks([source], None, tmp_path / "cache", rank, 3)]
            for rank in range(3)
        ]
        assert all(len(share) == len(set(share)) for share in shares)
        assert set().union(*shares) == set(images)
        if not in_rows:
            assert sum(map(len, shares)) == 40
            assert min(map(len, shares)) > 5


def test_the_writer_makes_room_for_a_shard_and_no_more(tmp_path):
    description = {"dtype": "float32", "format": caching.FORMAT}
    caching.start_cache(tmp_path, description)
    writer = FeatureCacheWriter(tmp_path, description, shard_size=4)
    keys = [bytes([number]) * 16 for number in range(11)]
    for some in (slice(0, 3), slice(3, 11)):
        writer.add(keys[some], ImageFeatures(torch.arange(11.0)[some, None]))
    writer.flush()
    shards = [load_file(caching.shard_path(tmp_path, number)) for number in range(3)]
    assert [shard["pooled"].flatten().tolist() for shard in shards] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert all(shard["picture_keys"].shape == (len(shard["pooled"]), 2) for shard in shards)
    mode = (tmp_path / "feature_cache.json").stat().st_mode
    assert all(caching.shard_path(tmp_path, number).stat().st_mode == mode for number in range(3))
    caching.shard_path(tmp_path, 1).write_bytes(b"no shard")
    with pytest.raises(ValueError, match=r"features-000001.safetensors is no shard .*delete it and run again"):
        caching.build_index(tmp_path)
