"""Released checkpoints, converted, answer as the authors' formulas do."""

import json

import authors
import pytest
import tiny
import torch

from transformers_lmeye import LMEyeForConditionalGeneration, LMEyeProcessor
from transformers_lmeye.conversion import convert


QUESTION = "what is the man doing"
PICTURE = tiny.picture(3)
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def prompt(k: int) -> str:
    """The released prompt, written out."""
    return f"Image as evidence: <img>\n Question: {QUESTION} {' '.join(['<img-d>'] * k)}\nAnswer:"


def load(folder):
    return LMEyeForConditionalGeneration.from_pretrained(folder), LMEyeProcessor.from_pretrained(folder)


def logits_of(folder, num_words, text=QUESTION):
    """Logits of a converted folder, from a picture and a question alone, in float64."""
    model, processor = load(folder)
    model.double()
    inputs = processor(images=PICTURE, text=text, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, :, :num_words]


def paths(folders, family, **language):
    return folders.vision(), folders.language(family, **language)


# A table longer than the tokenizer (its rows lie under the slots), one that ends with it, one that ends between them.
TABLES = {"longer": 99, "equal": 90, "one longer": 91}


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "mpt"])
def test_stage2_is_the_released_formula(folders, tmp_path, family, rows, k):
    vision, language = paths(folders, family, vocab_size=rows)
    net = authors.stage2_tensors(k)
    file = authors.write(tmp_path / "net.pth", net)
    folder = convert(file, tmp_path / "out", vision, language)
    released = authors.ReleasedV1(vision, language, net)
    expected = released.stage2(prompt(k), PICTURE)
    torch.testing.assert_close(logits_of(folder, released.num_words), expected, **TOLERANCE)
    # What the picture brings matters, or the comparison would prove nothing.
    other = released.stage2(prompt(k), tiny.picture(4))
    assert (expected - other)[-1].abs().max() > 1e-2


@pytest.mark.parametrize("rows", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_stage1_is_the_released_formula(folders, tmp_path, family, rows):
    vision, language = paths(folders, family, vocab_size=rows)
    net = authors.stage1_tensors()
    folder = convert(authors.write(tmp_path / "net.pth", net), tmp_path / "out", vision, language)
    released = authors.ReleasedV1(vision, language, net, num_slots=1)
    expected = released.stage1("a cat and a dog", PICTURE)
    torch.testing.assert_close(logits_of(folder, released.num_words, "<img>a cat and a dog"), expected, **TOLERANCE)
    assert load(folder)[0].config.interaction == "none"


def test_rows_under_the_slots_count(folders, tmp_path):
    """With the same file, a table with rows of its own under the slots gives other slot vectors than one without."""
    net = authors.stage2_tensors()
    file = authors.write(tmp_path / "net.pth", net)
    vision, language = paths(folders, "opt", vocab_size=99)
    model, _ = load(convert(file, tmp_path / "opt", vision, language))
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(model.ipn.image_token[0], net["embedding_img"][0] + table[90])
    torch.testing.assert_close(model.ipn.request_token, net["embedding_imgd"][0] + table[91])
    model, _ = load(convert(file, tmp_path / "llama", *paths(folders, "llama", vocab_size=90)))
    assert torch.equal(model.ipn.image_token, net["embedding_img"])
    assert torch.equal(model.ipn.request_token, net["embedding_imgd"][0])


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("vector", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ways_a_file_was_written(folders, tmp_path, prefix, vector, dtype):
    vision, language = paths(folders, "opt")
    net = {name: value.to(dtype) for name, value in authors.stage2_tensors(vector=vector).items()}
    folder = convert(authors.write(tmp_path / "net.pth", net, prefix), tmp_path / "out", vision, language)
    released = authors.ReleasedV1(vision, language, net)
    torch.testing.assert_close(logits_of(folder, released.num_words), released.stage2(prompt(5), PICTURE), **TOLERANCE)
    assert load(folder)[0].ipn.image_token.dtype == torch.float32


@pytest.mark.parametrize("prefix", ["", "module."])
def test_stage2_file_without_the_static_mapping(folders, tmp_path, prefix):
    vision, language = paths(folders, "bloom")
    net, first = authors.stage2_tensors(), authors.stage1_tensors()
    rest = {name: value for name, value in net.items() if not name.startswith(("imgLinear", "embedding_img"))}
    rest["embedding_imgd"] = net["embedding_imgd"]
    file = authors.write(tmp_path / "net.pth", rest)
    with pytest.raises(ValueError, match=r"missing: imgLinear\.weight, expected \[48, 24\](?s:.*)--stage1"):
        convert(file, tmp_path / "out", vision, language)
    stage1 = authors.write(tmp_path / "stage1.pth", first, prefix)
    folder = convert(file, tmp_path / "out", vision, language, stage1=stage1)
    whole = rest | {
        "imgLinear.weight": first["imageLinear.weight"],
        "imgLinear.bias": first["imageLinear.bias"],
        "embedding_img": first["new_embedding"],
    }
    released = authors.ReleasedV1(vision, language, whole)
    torch.testing.assert_close(logits_of(folder, released.num_words), released.stage2(prompt(5), PICTURE), **TOLERANCE)


def test_what_is_written(folders, tmp_path):
    vision, language = paths(folders, "llama", vocab_size=90)
    file = authors.write(tmp_path / "net.pth", authors.stage2_tensors())
    network = convert(file, tmp_path / "network", vision, language)
    whole = convert(file, tmp_path / "whole", vision, language, whole=True, add_bos=True)
    for folder in (network, whole):
        names = {path.name for path in folder.iterdir()}
        assert {"config.json", "model.safetensors", "README.md", "generation_config.json"} <= names
        assert {"processor_config.json", "tokenizer.json", "modeling_lmeye.py", "processing_lmeye.py"} <= names
        assert not [name for name in names if name.startswith(".")]
        assert ".partial" not in "".join(path.read_text() for path in folder.glob("*.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.pth", "network", "whole"]
    assert json.loads((network / "config.json").read_text())["includes_backbones"] is False
    assert (network / "model.safetensors").stat().st_size < 0.2 * (whole / "model.safetensors").stat().st_size
    torch.testing.assert_close(logits_of(network, 90), logits_of_without_bos(whole, 90), **TOLERANCE)
    assert load(whole)[1].add_bos and not load(network)[1].add_bos
    # The language model's own settings come along.
    model, _ = load(network)
    assert model.generation_config.eos_token_id == model.language_model.generation_config.eos_token_id == 2


def logits_of_without_bos(folder, num_words):
    model, processor = load(folder)
    model.double()
    processor.add_bos = False
    with torch.no_grad():
        return model(**processor(images=PICTURE, text=QUESTION, return_tensors="pt")).logits[0, :, :num_words]


def test_backbones_that_are_not_read(folders, tmp_path, monkeypatch):
    """No weight of the frozen parts is read for the network alone, where no row of the table lies under the slots."""
    devices = []
    load_backbones = LMEyeForConditionalGeneration.from_vision_language_pretrained.__func__

    def spy(cls, *args, **kwargs):
        model = load_backbones(cls, *args, **kwargs)
        devices.append(model.language_model.device.type)
        return model

    monkeypatch.setattr(LMEyeForConditionalGeneration, "from_vision_language_pretrained", classmethod(spy))
    file = authors.write(tmp_path / "net.pth", authors.stage2_tensors())
    convert(file, tmp_path / "llama", *paths(folders, "llama", vocab_size=90))
    assert devices == ["meta", "meta"]
    convert(file, tmp_path / "opt", *paths(folders, "opt", vocab_size=99))
    assert devices[2:] == ["meta", "cpu"]


def nothing_left(tmp_path, *files):
    return sorted(path.name for path in tmp_path.iterdir()) == sorted(files)


def test_every_problem_is_named_at_once(folders, tmp_path):
    vision, language = paths(folders, "opt")
    net = authors.stage2_tensors()
    del net["llm2clip.bias"], net["embedding_imgd"]
    net["imgLinear.weight"] = torch.zeros(48, 25)
    net["promptMlp.weight"] = torch.zeros(201, 24)
    net["extraLinear.weight"] = torch.zeros(2, 3)
    file = authors.write(tmp_path / "net.pth", net)
    with pytest.raises(ValueError) as error:
        convert(file, tmp_path / "out", vision, language)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing: embedding_imgd, expected [1, 48]",
        "missing: llm2clip.bias, expected [40]",
        "left over: extraLinear.weight, found [2, 3]",
        "wrong shape: imgLinear.weight, expected [48, 24], found [48, 25]",
        "wrong shape: promptMlp.weight, expected [200, 24], found [201, 24]",
    ]
    assert nothing_left(tmp_path, "net.pth")


@pytest.mark.parametrize("name", authors.stage2_tensors())
def test_each_missing_tensor_stops_it(folders, tmp_path, name):
    net = authors.stage2_tensors()
    del net[name]
    file = authors.write(tmp_path / "net.pth", net)
    with pytest.raises(ValueError, match=f"missing: {name}, expected"):
        convert(file, tmp_path / "out", *paths(folders, "llama"))
    assert nothing_left(tmp_path, "net.pth")


@pytest.mark.parametrize("name", ["embedding_img", "embedding_imgd"])
@pytest.mark.parametrize("shape", [(2, 48), (1, 1, 1, 48), (47,), (48, 1)])
def test_a_vector_of_another_shape(folders, tmp_path, name, shape):
    net = authors.stage2_tensors()
    net[name] = torch.zeros(shape)
    file = authors.write(tmp_path / "net.pth", net)
    with pytest.raises(ValueError, match=rf"wrong shape: {name}, expected \[1, 48\], found"):
        convert(file, tmp_path / "out", *paths(folders, "llama"))


def test_another_language_model_than_trained_on(folders, tmp_path):
    """The widths of a file for one language model do not fit another."""
    file = authors.write(tmp_path / "net.pth", authors.stage2_tensors(d_l=44, d_h=44))
    with pytest.raises(ValueError, match=r"wrong shape: imgLinear.bias, expected \[48\], found \[44\]"):
        convert(file, tmp_path / "out", *paths(folders, "llama"))


def test_failing_while_writing_leaves_nothing(folders, tmp_path, monkeypatch):
    file = authors.write(tmp_path / "net.pth", authors.stage2_tensors())

    def fail(self, folder, **kwargs):
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(LMEyeProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(file, tmp_path / "out", *paths(folders, "llama"))
    assert nothing_left(tmp_path, "net.pth")


def test_what_is_there_is_not_overwritten(folders, tmp_path):
    file = authors.write(tmp_path / "net.pth", authors.stage2_tensors())
    (tmp_path / "out").mkdir()
    assert convert(file, tmp_path / "out", *paths(folders, "llama")) == tmp_path / "out"
    with pytest.raises(FileExistsError, match="choose another output"):
        convert(file, tmp_path / "out", *paths(folders, "llama"))


def test_arguments_that_do_not_go_together(folders, tmp_path):
    vision, language = paths(folders, "llama")
    second = authors.write(tmp_path / "2.pth", authors.stage2_tensors())
    first = authors.write(tmp_path / "1.pth", authors.stage1_tensors())
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--language"):
        convert(second, out, vision)
    with pytest.raises(ValueError, match="leave --clip-text out"):
        convert(second, out, vision, language, vision)
    with pytest.raises(ValueError, match="holds the static mapping itself"):
        convert(second, out, vision, language, stage1=first)
    with pytest.raises(ValueError, match="goes with a stage-2 file"):
        convert(first, out, vision, language, stage1=first)
    rest = {name: value for name, value in authors.stage2_tensors().items() if name.startswith("llm2clip")}
    with pytest.raises(ValueError, match="is no stage-1 file"):
        convert(authors.write(tmp_path / "rest.pth", rest), out, vision, language, stage1=second)
    assert nothing_left(tmp_path, "1.pth", "2.pth", "rest.pth")
