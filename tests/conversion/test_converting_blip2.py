"""Released checkpoints of version 0.1, over BLIP-2 with a FlanT5, answer as the authors' formulas do."""

import authors
import pytest
import tiny
import torch

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.conversion import convert


QUESTION = "what is the man doing"
PICTURE = tiny.picture(3)
ANSWER = [0, 7, 12, 30, 4]


def prompt(k: int) -> str:
    """The released prompt, written out."""
    images = " ".join(["<img>"] * tiny.NUM_QUERIES)
    return f"Human: {images}\n{QUESTION}\n <img-q> {' '.join(['<img-d>'] * k)}\nAssistant:"


@pytest.fixture(scope="module")
def blip2(tmp_path_factory):
    return tiny.save_blip2(tmp_path_factory.mktemp("blip2"))


@pytest.fixture
def clip(folders):
    return folders.vision()


def load(folder):
    return LMEyeForConditionalGeneration.from_pretrained(folder), LMEyeProcessor.from_pretrained(folder)


@pytest.mark.parametrize("k", [5, 3])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_formula(blip2, clip, tmp_path, prefix, whole, k):
    net = authors.v0_1_tensors(blip2, k)
    file = authors.write(tmp_path / "net.pth", net, prefix)
    model, processor = load(convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip, whole=whole))
    inputs = processor(images=PICTURE, text=QUESTION, return_tensors="pt")
    released = authors.ReleasedV01(blip2, clip, net)
    model.double()
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=torch.tensor([ANSWER])).logits[0]
    torch.testing.assert_close(logits, released.logits(prompt(k), PICTURE, ANSWER), atol=1e-5, rtol=0)
    other = released.logits(prompt(k), tiny.picture(4), ANSWER)
    assert (logits - other).abs().max() > 1e-2
    for strategy in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 6, "min_new_tokens": 6, **strategy}
        assert model.generate(**inputs, **options)[0].tolist() == released.generate(prompt(k), PICTURE, **options)
    assert model.config.fine_grained_dropout == 0.0 and model.config.num_request_vectors == k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_queries_are_the_backbones(blip2, clip, tmp_path, dtype):
    """In whatever dtype they were written."""
    net = {name: value.to(dtype) for name, value in authors.v0_1_tensors(blip2).items()}
    convert(authors.write(tmp_path / "net.pth", net), tmp_path / "out", blip2, clip_text_model_name_or_path=clip)


def test_other_queries_need_a_whole_checkpoint(blip2, clip, tmp_path):
    net = authors.v0_1_tensors(blip2)
    net["query_tokens"] = net["query_tokens"].flip(-1)  # a shift would be lost in the Q-Former's first norm
    file = authors.write(tmp_path / "net.pth", net)
    with pytest.raises(ValueError, match=r"query_tokens of .*largest difference \d\.\d+\).*--whole"):
        convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
    folder = convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip, whole=True)
    model, processor = load(folder)
    inputs = processor(images=PICTURE, text=QUESTION, return_tensors="pt")
    model.double()
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=torch.tensor([ANSWER])).logits[0]
    assert torch.equal(model.qformer.query_tokens, net["query_tokens"])
    expected = authors.ReleasedV01(blip2, clip, net).logits(prompt(5), PICTURE, ANSWER)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="save it whole"):  # the network alone would lose them
        model.save_pretrained(tmp_path / "network", save_backbones=False)


def test_every_problem_is_named_at_once(blip2, clip, tmp_path):
    net = authors.v0_1_tensors(blip2)
    del net["language_projection.bias"], net["instruction_embedding_imgq"]
    net["query_tokens"] = torch.zeros(1, 8, 20)
    net["instruction_linear.weight"] = torch.zeros(40, 52)
    net["instruction_extra"] = torch.zeros(3)
    file = authors.write(tmp_path / "net.pth", net)
    with pytest.raises(ValueError) as error:
        convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: instruction_embedding_imgq, expected [1, 52]",
        "missing: language_projection.bias, expected [52]",
        "left over: instruction_extra, found [3]",
        "wrong shape: instruction_linear.weight, expected [40, 20], found [40, 52]",
        "wrong shape: query_tokens, expected [1, 7, 20], found [1, 8, 20]",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]


def test_each_missing_tensor_stops_it(blip2, clip, tmp_path):
    tensors = authors.v0_1_tensors(blip2)
    for name in tensors:
        rest = {other: value for other, value in tensors.items() if other != name}
        file = authors.write(tmp_path / "net.pth", rest)
        with pytest.raises(ValueError, match=f"missing: {name}, expected"):
            convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip)


def test_arguments_that_do_not_go_together(blip2, clip, folders, tmp_path):
    file = authors.write(tmp_path / "net.pth", authors.v0_1_tensors(blip2))
    with pytest.raises(ValueError, match="takes its language model from the BLIP-2"):
        convert(file, tmp_path / "out", blip2, folders.language("llama"), clip)
    with pytest.raises(ValueError, match="--clip-text"):
        convert(file, tmp_path / "out", blip2)
    with pytest.raises(ValueError, match="needs a Q-Former"):
        convert(file, tmp_path / "out", clip, clip_text_model_name_or_path=clip)
    causal = tiny.save_blip2(tmp_path / "blip2-opt", "opt")
    with pytest.raises(ValueError, match=r"was trained on an encoder-decoder, and .*blip2-opt holds none"):
        convert(file, tmp_path / "out", causal, clip_text_model_name_or_path=clip)
    second = authors.write(tmp_path / "2.pth", authors.stage2_tensors())
    with pytest.raises(ValueError, match="was trained on a causal language model"):
        convert(second, tmp_path / "out", clip, blip2)
    first = authors.write(tmp_path / "1.pth", authors.stage1_tensors())
    with pytest.raises(ValueError, match="goes with a stage-2 file"):
        convert(file, tmp_path / "out", blip2, clip_text_model_name_or_path=clip, stage1=first)
