"""examples/benchmark.py: its statistics on hand-worked samples, its sides against each other, and its tables."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import BambaConfig, CLIPConfig, LlamaConfig, T5Config


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmark.py"


def load_script():
    spec = importlib.util.spec_from_file_location("lmeye_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


benchmark = load_script()


def tiny_arguments(folder: Path, **changes) -> "benchmark.BenchmarkArguments":
    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=120
    ).save_pretrained(folder / "language")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "projection_dim": 24}
    vision = tower | {"image_size": 28, "patch_size": 14, "projection_dim": 24}
    CLIPConfig(text_config=text, vision_config=vision, projection_dim=24).save_pretrained(folder / "vision")
    given = {"language_model": str(folder / "language"), "vision_model": str(folder / "vision")}
    return benchmark.BenchmarkArguments(**given, batch_sizes=[1, 2], answer_length=4, pairs=2, seconds=0, **changes)


@pytest.mark.parametrize(
    ("n", "low", "high"),
    [
        (5, math.nan, math.nan),  # 1 - 2/32 = 0.938
        (6, 1, 6),  # 1 - 2/64 = 0.969
        (8, 1, 8),  # 1 - 2/256 = 0.992; with the second values 1 - 2 * 9/256 = 0.930
        (9, 2, 8),  # 1 - 2 * 10/512 = 0.961
        (10, 2, 9),  # 1 - 2 * 11/1024 = 0.979
        (30, 10, 21),  # the table of the sign test
    ],
)
def test_interval_of_the_median_takes_the_order_statistics_of_the_sign_test(n, low, high):
    values = [float((7 * i) % n + 1) for i in range(n)] if n % 7 else [float(n - i) for i in range(n)]
    assert sorted(values) == list(range(1, n + 1))
    assert benchmark.median_with_interval(values) == pytest.approx(((n + 1) / 2, low, high), nan_ok=True)


def test_ratio_is_the_median_of_the_pairs_ratios_not_the_ratio_of_medians():
    comparison = benchmark.Comparison(
        "first_token", 1, "ours", "plain", [(2.0, 1.0, 2.0), (9.0, 3.0, 3.0), (4.0, 4.0, 1.0)], 1.5
    )
    assert comparison.ratio[0] == 2.0  # of 2, 3, 1; the medians would give 4/3
    assert math.isnan(comparison.ratio[2])


IN_TWO_PASSES = [  # causal, one round, the request token dropped: what `two_pass_side` writes out
    "clip_text_global",
    "clip_text_patch",
    "clip_text_qformer",
    "cross_attention_global",
    "cross_attention_patch",
    "cross_attention_qformer",
    "static_qformer",
]


@pytest.mark.parametrize("variant", [None, *IN_TWO_PASSES])
def test_two_passes_and_ours_compute_the_same(tmp_path, variant):
    arguments = tiny_arguments(tmp_path)
    torch.manual_seed(0)
    model = benchmark.build_lmeye(arguments, variant)
    sides = [benchmark.make_side(arguments, name, 2, model) for name in ("ours", "two_passes")]
    losses = [side.loss() for side in sides]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(loss, side.trained) for loss, side in zip(losses, sides, strict=True)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for how in ({"num_beams": 1}, {"num_beams": 5}):
        ours, plain = [side.generate(do_sample=False, max_new_tokens=3, **how)[:, -3:] for side in sides]
        assert torch.equal(ours, plain)


def test_every_row_and_side_comes_out_in_the_tables(tmp_path, capsys, monkeypatch):
    # the fresh process of the memory row costs an import of the libraries: here the same work in this one
    monkeypatch.setattr(benchmark, "memory_in_fresh_process", benchmark.measure_memory)
    arguments = tiny_arguments(tmp_path, json=str(tmp_path / "figures.json"))
    comparisons, memories = benchmark.main(arguments)
    tasks = {(c.row, c.batch, c.side, c.other) for c in comparisons}
    rivals = ["plain", "two_passes", "llava_256", "llava_576"]
    stepping = [rival for rival in rivals if rival != "two_passes"]  # which steps as the plain model does
    expected = {("five_beams", 1, "ours", "ours, greedy")}
    for row, batches in [
        ("first_token", (1, 2)),
        ("decode_step", (1, 2)),
        ("five_beams", (1,)),
        ("training_step", (2,)),
    ]:
        chosen = stepping if row == "decode_step" else rivals
        expected |= {(row, batch, "ours", rival) for batch in batches for rival in chosen}
        if row != "decode_step":
            expected |= {(row, batch, "two_passes", "plain") for batch in batches}
    assert tasks == expected and len(comparisons) == len(expected)
    assert all(len(c.pairs) == 2 and min(min(pair) for pair in c.pairs) > 0 for c in comparisons)
    assert len(memories) == 3 * 5 and all(m.peak > 0 for m in memories)
    printed = capsys.readouterr().out
    assert "| first_token | 2 | ours / llava_576 |" in printed and "| training_step | 2 | llava_256 |" in printed
    assert len(json.loads((tmp_path / "figures.json").read_text())["comparisons"]) == len(comparisons)


def test_decode_steps_take_turns_and_a_failure_ends_both(tmp_path):
    arguments = tiny_arguments(tmp_path)
    log = []

    def side(name: str, failing_step: int | None = None) -> "benchmark.Side":
        def generate(stopping_criteria, max_new_tokens, **_):
            for step in range(max_new_tokens):
                if step == failing_step:
                    raise RuntimeError(f"{name} failed")
                log.append(name)
                stopping_criteria[0](torch.zeros(1, step + 1), None)

        return benchmark.Side(generate, None, [])

    benchmark.pair_of_answers(arguments, side("a"), side("b"))
    assert log == ["a", "b"] * arguments.answer_length
    with pytest.raises(RuntimeError, match="b failed"):
        benchmark.pair_of_answers(arguments, side("a"), side("b", failing_step=2))


def test_unknown_row_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--rows knows first_token.*not speed"):
        tiny_arguments(tmp_path, rows=["speed"])


@pytest.fixture
def tiny_languages(monkeypatch):
    """Small language models in place of the encoder-decoder and the state-space model of the table."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
    seq2seq = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    bamba = BambaConfig(vocab_size=120, num_key_value_heads=4, attn_layer_indices=[1], **sizes, **mamba)
    monkeypatch.setitem(benchmark.LANGUAGES, "bamba", lambda _: bamba)
    monkeypatch.setitem(benchmark.LANGUAGES, "t5", lambda _: T5Config(vocab_size=120, **seq2seq))


@pytest.mark.parametrize("variant", list(benchmark.VARIANTS))
def test_plain_reads_as_many_columns_as_the_variant(tmp_path, tiny_languages, variant):
    arguments = tiny_arguments(tmp_path)
    model = benchmark.build_lmeye(arguments, variant)
    language_model, config = model.language_model, model.config
    slots = benchmark.request_slots(config)
    read: list[int] = []

    def remember(module, args, kwargs):
        given = [*args, *(kwargs.get(name) for name in ("input_ids", "inputs_embeds"))]
        read.append(next(tensor for tensor in given if tensor is not None).shape[1])

    stack = language_model.get_encoder() if config.is_encoder_decoder else language_model
    stack.register_forward_pre_hook(remember, with_kwargs=True)
    plain = benchmark.plain_side(arguments, language_model, 2, config.num_static_tokens, len(slots))
    ours = benchmark.our_side(arguments, model, 2)
    rounds = {"two_rounds": 2, "three_rounds": 3}.get(variant, 1)
    kept = variant in ("keep_request_token", "encoder_decoder")
    columns = 40 + rounds * (5 + kept)
    plain.generate(do_sample=False, max_new_tokens=1)
    assert read == [columns]
    ours.generate(do_sample=False, max_new_tokens=1)  # the first time some models are tried out
    read.clear()
    ours.generate(do_sample=False, max_new_tokens=1)
    if variant == "encoder_decoder":
        assert read == [columns, columns]
    elif variant == "state_space":  # the request behind a copy of the prefix's cache
        assert (read[0], read[-1], len(read)) == (40, 5, 3)
    else:
        assert sum(read) == columns + (0 if kept else rounds)
    read.clear()
    plain.loss()
    assert read == [columns if variant == "encoder_decoder" else columns + 4]
    assert plain.trained[0].shape == (config.num_static_tokens + rounds * (5 + kept), 32)
    trained = {id(parameter) for parameter in ours.trained}
    assert trained and trained == {id(p) for p in model.ipn.parameters() if p.requires_grad}


def test_every_variant_comes_out_in_the_table(tmp_path, tiny_languages, capsys):
    arguments = tiny_arguments(tmp_path, variants=["all"])
    comparisons, memories = benchmark.main(arguments)
    others = {"encoder_decoder": "plain_t5", "state_space": "plain_bamba"}
    expected = [
        (row, batch, variant, others.get(variant, "plain"))
        for variant in benchmark.VARIANTS
        for row, batches in (("first_token", (1, 2)), ("training_step", (2,)))
        for batch in batches
    ]
    assert [(c.row, c.batch, c.side, c.other) for c in comparisons] == expected and not memories
    assert all(len(c.pairs) == 2 and min(min(pair) for pair in c.pairs) > 0 for c in comparisons)
    printed = capsys.readouterr().out
    assert "| training_step | 2 | state_space / plain_bamba |" in printed and "bamba" in printed.splitlines()[2]


def test_variants_have_rows_of_their_own(tmp_path):
    with pytest.raises(ValueError, match=r"--variants knows clip_text_global.*not four_rounds"):
        tiny_arguments(tmp_path, variants=["four_rounds"])
    with pytest.raises(ValueError, match=r"--rows knows first_token, training_step, not decode_step"):
        tiny_arguments(tmp_path, variants=["all"], rows=["decode_step"])
