"""Standardized requests, against the projection computed by hand."""

import pytest
import tiny
import torch

from transformers_lmeye import LMEyeProcessor
from transformers_lmeye.data import BadSample
from transformers_lmeye.training import ConversationCollator, collect_requests, standardize_requests


@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
def test_projection_of_standardized_requests(build, interaction):
    ipn = build("llama", interaction).ipn
    requests = 5 + torch.randn(
        200, ipn.request_projection[0].normalized_shape[0] if interaction != "clip_text" else 48
    )
    linear = ipn.request_projection if interaction == "clip_text" else ipn.request_projection[1]
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    seen = requests
    if interaction == "cross_attention":
        seen = (requests - requests.mean(1, keepdim=True)) / (
            requests.var(1, unbiased=False, keepdim=True) + 1e-5
        ).sqrt()
    expected = (seen - seen.mean(0)) / seen.std(0) @ weight.T + bias

    standardize_requests(ipn, requests)

    torch.testing.assert_close(ipn.request_projection(requests), expected, atol=1e-4, rtol=1e-4)


def test_refuses_what_cannot_be_standardized(build):
    with pytest.raises(ValueError, match="at least two prompts"):
        standardize_requests(build("llama", "clip_text").ipn, torch.randn(1, 48))
    with pytest.raises(ValueError, match="no requests"):
        standardize_requests(build("llama", "none").ipn, torch.randn(9, 48))


@pytest.mark.parametrize("cached", [False, True])
def test_requests_of_the_first_samples(build, folders, cached):
    """Of any iterable, in its order, each as it is asked alone; what is bad or has no picture asks none."""
    model = build("llama", "clip_text")
    processor = LMEyeProcessor.from_vision_language_pretrained(
        str(folders.vision()), str(folders.language("llama")), num_dynamic_tokens=model.config.num_dynamic_tokens
    )
    questions = ["what?", "who is the man?", "why?"]
    expected, samples = [], [BadSample("x", "missing", "gone")]
    for seed, question in enumerate(questions):
        pixels = processor.image_processor(tiny.picture(seed), return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixels)
        inputs = processor(image_features=features, text=question, return_tensors="pt")
        expected.append(model.perceive(**inputs).requests)
        image = features if cached else tiny.picture(seed)
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "cat"}]}
        samples.append({"id": question, "messages": [{"role": "user", "content": content}, answer]})
    words = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, answer]
    samples.insert(2, {"id": "words", "messages": words})
    collator = ConversationCollator(processor)
    got = collect_requests(model, collator, iter(samples), num_samples=4, batch_size=3)
    torch.testing.assert_close(got, torch.cat(expected[:2]), atol=1e-5, rtol=1e-5)
    assert len(collect_requests(model, collator, samples[:1], num_samples=4)) == 0
