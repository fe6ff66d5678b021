"""Promise 7: LMEye among Transformers' own tools."""

import copy

import pytest
import tiny
import torch
from reference import Reference

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor


def inputs_of(model, layouts, padding="left"):
    rows = [tiny.row(model.config, layout, index) for index, layout in enumerate(layouts)]
    pictures = tiny.pixels(sum(layout.split().count("img") for layout in layouts))
    return {**tiny.batch(rows, padding), "pixel_values": pictures}


def prompt_of(model, layout):
    inputs = inputs_of(model, [layout])
    del inputs["labels"]
    return inputs


TURNS = "img 3 req 1 =3 2 req 1 =3 1 img 2 req 1 =2"


def close(got, expected):
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=1e-5 * scale, rtol=0)


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, 14], ids=lambda n: f"last_{n}")
def test_logits_to_keep(build, keep, padding):
    model = build("llama", "cross_attention")
    inputs = inputs_of(model, [TURNS, "2 img 3 req 2 =3", "4 =2"], padding)
    del inputs["labels"]
    with torch.no_grad():
        every = model(**inputs).logits
        kept = model(**inputs, logits_to_keep=keep).logits
    assert kept.shape[1] == keep
    close(kept, every[:, -keep:])


def test_logits_to_keep_by_column(build):
    model = build()
    inputs = inputs_of(model, [TURNS])
    del inputs["labels"]
    columns = torch.tensor([0, 4, 20])
    with torch.no_grad():
        close(model(**inputs, logits_to_keep=columns).logits, model(**inputs).logits[:, columns])


@pytest.mark.parametrize("padding", ["left", "right", "ragged"])
@pytest.mark.parametrize("family", ["llama", "opt_projected", "bloom"])
def test_hidden_states_of_the_final_sequence(build, reference, family, padding):
    """What the language model holds when it reads the finished sequence, slots filled, at every layer."""
    model = build(family, "cross_attention")
    layouts = [TURNS, "2 img 3 req 2 =3"]
    inputs = inputs_of(model, layouts, padding)
    plain = reference(model, family)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        first = 0
        for index, layout in enumerate(layouts):
            count = layout.split().count("img")
            ids, _ = tiny.row(model.config, layout, index)
            embeds = plain.finish(ids, inputs["pixel_values"][first : first + count]).embeds
            expected = plain.language_model(inputs_embeds=embeds[None], output_hidden_states=True).hidden_states
            assert len(states) == len(expected)
            for ours, theirs in zip(states, expected, strict=True):
                close(ours[index][inputs["attention_mask"][index].bool()], theirs[0])
            first += count


def test_static_information_is_returned(build, reference):
    model = build("llama", "none", num_static_tokens=2)
    inputs = inputs_of(model, ["img 2", "1 img 1 img 2"])
    plain = reference(model)
    with torch.no_grad():
        expected = torch.stack([plain.static(*plain.clip.image(picture)) for picture in inputs["pixel_values"]])
        close(model(**inputs).image_hidden_states, expected)


def test_attentions(build):
    """The plain model's without images; with images there is none to give, and it says so."""
    model = build("llama", "cross_attention", attn_implementation="eager")
    text = inputs_of(model, ["6", "5"])
    del text["pixel_values"]
    attentions = model(**text, output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"output_attentions .*perceive"):
        model(**inputs_of(model, [TURNS]), output_attentions=True)


def test_generated_hidden_states(build, reference):
    model = build("llama", "cross_attention")
    prompt = prompt_of(model, "2 img 4 req 2")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True}
    out = model.generate(**prompt, **options)
    plain = reference(model)
    with torch.no_grad():
        embeds = plain.finish(prompt["input_ids"][0].tolist(), prompt["pixel_values"]).embeds
        theirs = plain.language_model.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds), dtype=torch.long), **options
        )
    assert out.sequences[0].tolist() == prompt["input_ids"][0].tolist() + theirs.sequences[0].tolist()
    assert len(out.hidden_states) == 4
    for ours, expected in zip(out.hidden_states, theirs.hidden_states, strict=True):
        for layer, expected_layer in zip(ours, expected, strict=True):
            close(layer, expected_layer)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_scores_of_each_step(build, reference, options):
    model = build("gemma2", "cross_attention")
    prompt = prompt_of(model, "2 img 4 req 2")
    options = dict(options, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True)
    out = model.generate(**prompt, **options)
    plain = reference(model, "gemma2")
    with torch.no_grad():
        embeds = plain.finish(prompt["input_ids"][0].tolist(), prompt["pixel_values"]).embeds
        theirs = plain.language_model.generate(
            inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds), dtype=torch.long), **options
        )
    assert type(out) is type(theirs)
    for name in ("scores", "logits"):
        for ours, expected in zip(out[name], theirs[name], strict=True):
            close(ours, expected)
    if "num_beams" in options:
        close(out.sequences_scores, theirs.sequences_scores)


# --- chats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new_turn", ["3", "2 req 1", "1 img 2 req 1"], ids=["words", "request", "image"])
@pytest.mark.parametrize("family", ["llama", "mpt", "gemma2", "gpt2"])
def test_a_chat_continues_from_its_cache(build, reference, family, new_turn):
    """The second turn, generated from the first one's cache, is what the whole conversation read anew gives."""
    model = build(family, "cross_attention")
    first = prompt_of(model, "2 img 4 req 2")
    out = model.generate(**first, max_new_tokens=5, return_dict_in_generate=True)
    turn, _ = tiny.row(model.config, new_turn, seed=9)
    ids = out.sequences[0].tolist() + turn
    second = tiny.pixels(1, seed=8) if "img" in new_turn else None
    pictures = first["pixel_values"] if second is None else torch.cat([first["pixel_values"], second])
    expected = reference(model, family).generate(ids, pictures, max_new_tokens=5)
    full = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    anew = model.generate(**full, pixel_values=pictures, max_new_tokens=5)
    assert anew[0].tolist() == ids + expected
    seen = []
    layers = next(m for m in model.language_model.modules() if isinstance(m, torch.nn.ModuleList))
    layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    continued = model.generate(**full, pixel_values=pictures, past_key_values=out.past_key_values, max_new_tokens=5)
    assert continued[0].tolist() == ids + expected
    assert sum(seen) <= len(turn) + 1 + 1 + 5, "the cache was not used"


@pytest.mark.parametrize("family", ["llama", "mpt", "gemma2"])
def test_a_batch_of_chats_continues_from_its_cache(build, reference, family):
    """Rows of unlike lengths, padded on the left, some without an image."""
    model = build(family, "cross_attention")
    layouts = ["2 img 4 req 2", "6", "img 3 req 1 3 2 req 1"]
    first = inputs_of(model, layouts)
    del first["labels"]
    out = model.generate(**first, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    pictures = iter(first["pixel_values"].split([1, 1]))
    images = [next(pictures) if "img" in layout else None for layout in layouts]
    turns = ["2 req 1", "8", "2 req 1"]  # of one length, so that no padding stands inside a row
    rows = []
    for index, (layout, turn) in enumerate(zip(layouts, turns, strict=True)):
        prompt, _ = tiny.row(model.config, layout, index)
        rows.append(prompt + out.sequences[index, -4:].tolist() + tiny.row(model.config, turn, index + 10)[0])
    inputs = tiny.batch([(row, row) for row in rows], "left")
    expected = reference(model, family).generate_batch(
        list(zip(rows, images, strict=True)), max_new_tokens=4, min_new_tokens=4
    )
    got = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=first["pixel_values"],
        past_key_values=out.past_key_values,
        max_new_tokens=4,
        min_new_tokens=4,
    )
    assert got[:, -4:].tolist() == expected


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_forward_continues_from_a_cache(build, reference, family):
    """Logits of new columns behind returned past_key_values, given alone or with the whole sequence."""
    model = build(family)
    layout, head = "2 img 3 req 2 3 img 2 req 2", "2 img 3 req 2 "
    ids, _ = tiny.row(model.config, layout, 1)
    cut = len(tiny.row(model.config, head, 1)[0])
    pictures = tiny.pixels(2)
    with torch.no_grad():
        plain = reference(model, family)
        expected = plain.logits(plain.finish(ids, pictures).embeds)[cut:]
        for alone in (True, False):
            first = model(input_ids=torch.tensor([ids[:cut]]), pixel_values=pictures[:1], use_cache=True)
            assert first.past_key_values.get_seq_length() == cut
            second = model(
                input_ids=torch.tensor([ids[cut:] if alone else ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pictures[1:] if alone else pictures,
                past_key_values=first.past_key_values,
            )
            # the second request sees the second picture alone where the first was not given again
            if not alone:
                close(second.logits[0, -len(expected) :], expected)
            assert second.past_key_values.get_seq_length() == len(ids)


# --- streamers, pipeline -------------------------------------------------------------------------------------------


def test_text_streamer(build, folders):
    from threading import Thread

    from transformers import TextIteratorStreamer

    model = build()
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language()))
    inputs = processor(images=tiny.picture(), text="what is the man doing?", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 8, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == processor.batch_decode(expected, skip_special_tokens=True)[0] and text


@pytest.mark.parametrize("chat_template", [None, tiny.CHAT_TEMPLATE], ids=["released", "chat"])
def test_pipeline(build, folders, chat_template):
    from transformers import pipeline

    language = folders.language("llama", chat_template=chat_template)
    model = build()
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(language))
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": tiny.picture(1)},
                {"type": "text", "text": "what is the man doing?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.post_process_image_text_to_text(new)[0]
    (said,) = answer(text=messages, max_new_tokens=6, return_full_text=False)
    assert said["generated_text"].strip() == expected.strip() and expected.strip()


def test_pipeline_with_a_bare_question(build, folders):
    """An image and a text, no chat: slots are placed for the user."""
    from transformers import pipeline

    model = build()
    processor = LMEyeProcessor.from_vision_language_pretrained(str(folders.vision()), str(folders.language()))
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    inputs = processor(images=tiny.picture(1), text="what is it?", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    (said,) = answer(images=tiny.picture(1), text="what is it?", max_new_tokens=6)
    assert said["generated_text"].endswith(processor.post_process_image_text_to_text(new)[0])


# --- adapters, precision, memory -----------------------------------------------------------------------------------


# PEFT asks Transformers by a name that is on its way out.
ignore_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@ignore_peft
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_lora_on_the_language_model(build, folders, family):
    """An adapter inside the language model acts in every pass, and trains along."""
    peft = pytest.importorskip("peft")
    model = build(family, "cross_attention")
    plain = Reference(folders.vision(), folders.language(family), model)
    untouched = copy.deepcopy(plain.language_model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    model.language_model = peft.get_peft_model(model.language_model, config)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    plain.language_model = copy.deepcopy(model.language_model).merge_and_unload()
    inputs = inputs_of(model, [TURNS, "2 img 3 req 2 =3", "4 =2"], "right")
    layouts, rows, first = [TURNS, "2 img 3 req 2 =3", "4 =2"], [], 0
    for index, layout in enumerate(layouts):
        count = layout.split().count("img")
        pictures = inputs["pixel_values"][first : first + count] if count else None
        rows.append((*tiny.row(model.config, layout, index), pictures))
        first += count
    loss = model(**inputs).loss
    close(loss.detach(), plain.loss(rows).detach())
    adapted = plain.language_model
    plain.language_model = untouched
    assert abs(float(plain.loss(rows).detach()) - float(loss.detach())) > 1e-2, "the adapter has to matter here"
    plain.language_model = adapted
    loss.backward()
    gradients = [p.grad for name, p in model.language_model.named_parameters() if "lora_" in name]
    assert gradients and all(g is not None and float(g.abs().max()) > 0 for g in gradients)
    prompt = prompt_of(model, "2 img 4 req 2")
    got = model.generate(**prompt, max_new_tokens=6)
    ids = prompt["input_ids"][0].tolist()
    assert got[0].tolist() == ids + plain.generate(ids, prompt["pixel_values"], max_new_tokens=6)


@ignore_peft
def test_lora_around_the_whole(build):
    """PEFT wrapped around LMEye itself, the IPN saved beside the adapter."""
    peft = pytest.importorskip("peft")
    model = build("llama", "cross_attention")
    inputs = inputs_of(model, [TURNS])
    with torch.no_grad():
        before = model(**inputs).loss
    config = peft.LoraConfig(r=2, target_modules=r"language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    loss = wrapped(**inputs).loss
    close(loss.detach(), before)  # LoRA starts at zero
    loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name and "language_model" in name for name in trained)


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention"])
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2"])
def test_gradient_checkpointing(build, family, interaction, stage):
    """Equal gradients from fewer saved bytes."""
    model = build(family, interaction, fine_grained_dropout=0.0).train()
    model.freeze_for_stage(stage)
    inputs = inputs_of(model, [TURNS + " =30", "2 img 3 req 2 =30"], "right")

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def measure():
        model.zero_grad()
        seen: dict[int, int] = {}  # bytes of each storage kept for the backward pass, weights aside

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**inputs).loss
        kept = sum(seen.values())
        loss.backward()
        return kept, loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_bytes, plain_loss, plain_gradients = measure()
    model.activation_checkpointing_enable()
    saved_bytes, loss, gradients = measure()
    assert saved_bytes < 0.6 * plain_bytes, f"{saved_bytes} of {plain_bytes} bytes"
    close(loss, plain_loss)
    assert gradients.keys() == plain_gradients.keys() and gradients
    for name, gradient in gradients.items():
        close(gradient, plain_gradients[name])
    model.activation_checkpointing_disable()
    assert measure()[0] == plain_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interaction", ["clip_text", "cross_attention", "none"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom", "opt"])
def test_half_precision(build, family, interaction, dtype):
    """Backbones in half precision give about the float32 loss, gradients in the IPN's float32, and answers."""
    layouts = ["2 img 3 2 =4", "3 =4"] if interaction == "none" else ["2 img 3 req 2 =4", "3 =4"]
    exact = build(family, interaction)
    expected = float(exact(**inputs_of(exact, layouts)).loss.detach())
    model = build(family, interaction, dtype=dtype)
    model.freeze_for_stage("pretrain")
    inputs = inputs_of(model, layouts)
    loss = model(**inputs).loss
    assert float(loss.detach()) == pytest.approx(expected, rel=0.05)
    loss.backward()
    assert model.ipn.image_token.grad.dtype == torch.float32 and torch.isfinite(model.ipn.image_token.grad).all()
    del inputs["labels"]
    out = model.generate(**inputs, max_new_tokens=4, num_beams=2)
    assert out.shape[1] > inputs["input_ids"].shape[1]


def test_whole_model_in_half_precision(build):
    """`model.to(dtype)` takes the IPN along, and it still runs."""
    model = build("llama", "cross_attention").to(torch.bfloat16)
    inputs = inputs_of(model, [TURNS])
    assert torch.isfinite(model(**inputs).loss)


def test_autocast(build):
    model = build("llama", "cross_attention")
    inputs = inputs_of(model, [TURNS])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert float(loss.detach()) == pytest.approx(float(model(**inputs).loss.detach()), rel=0.05)


def test_names_others_look_for(build):
    """What trainers and libraries ask of any image-text model."""
    model = build()
    assert model.config.get_text_config().vocab_size == tiny.TABLE_ROWS
    assert model.get_output_embeddings() is model.language_model.get_output_embeddings()
    assert model.get_input_embeddings() is model.language_model.get_input_embeddings()
    assert model.can_generate()
    assert set(model.input_modalities) == {"image", "text"}


@pytest.mark.slow
def test_compiled_decode_step(build, reference):
    """A static cache and a compiled forward: the same ids, and the decode steps share one graph."""
    model = build("llama", "cross_attention")
    prompt = prompt_of(model, "2 img 4 req 2")
    ids = prompt["input_ids"][0].tolist()
    expected = reference(model).generate(ids, prompt["pixel_values"], max_new_tokens=12, min_new_tokens=12)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=False)
    got = model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, cache_implementation="static")
    assert got[0].tolist() == ids + expected
    first = len(graphs)
    assert first > 0
    model.generate(**prompt, max_new_tokens=12, min_new_tokens=12, cache_implementation="static")
    assert len(graphs) == first, "decode steps compile again"
    torch._dynamo.reset()


def test_model_from_configuration_alone(build):
    """A configuration builds a working model with random weights, as every Transformers model does."""
    config = build("llama", "cross_attention").config
    model = LMEyeForConditionalGeneration(copy.deepcopy(config)).eval()
    assert torch.isfinite(model(**inputs_of(model, [TURNS])).loss)
