"""Standardized requests, against the projection computed by hand."""

import pytest
import torch

from transformers_lmeye.training import standardize_requests


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
